// The library's whole interface: plain C, so that it can be compiled on one machine and bound on another.
//
// Every function returns 0, or 1 after a failure that stdit_last_error() then describes. Device memory is
// passed as pointers, a stream as the cudaStream_t it is; nothing here synchronises.
#pragma once

#include <stdint.h>

#define STDIT_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum stdit_dtype { STDIT_FLOAT32 = 0, STDIT_BFLOAT16 = 1 };

// An array [sequences, rows, heads, head_dim] of bfloat16: strides in elements, head_dim's elements are neighbours.
struct stdit_heads {
  void* data;
  int64_t sequence_stride, row_stride, head_stride;
};

// Attention: o = softmax(scale * norm(q) norm(k)^T) v for each sequence and head, with
// norm(x) = x / sqrt(mean(x^2) + epsilon) * weight over head_dim. Addresses are multiples of 16 bytes, strides of 8.
struct stdit_attention {
  struct stdit_heads q, k, v, o;
  float* lse;            // [sequences, heads, queries]: the logarithm of the sum of exponentials of each row of scores
  const void* q_weight;  // [head_dim] of weight_dtype, a stdit_dtype; null: 1
  const void* k_weight;
  int weight_dtype;
  int normalise_q, normalise_k;  // 0: the weights, if given, are all that is applied
  int64_t sequences, queries, keys;
  // Packed keys: sequence i's are rows key_starts[i] to key_starts[i + 1] - 1 of k and v, which are one sequence of
  // packed_keys rows. int32, on the device, [sequences + 1], each sequence with at least one key and at most `keys`.
  // Null: all sequences have `keys` keys of their own. Packed keys come without norms and weights.
  const int* key_starts;
  int64_t packed_keys;
  int heads, head_dim;
  float scale, epsilon;
};

// The gradients' arrays; d_o is read, the others are written, whole.
struct stdit_attention_gradients {
  struct stdit_heads d_o, d_q, d_k, d_v;
  float* d_weights;  // [2, head_dim]: of q_weight and of k_weight
  void* scratch;     // stdit_attention_backward_scratch() bytes, a multiple of 256 as address
};

// Attention over the frames at each position: RMSNorm of q and k, then rotation of neighbouring channels, or the other
// way round. qkv [batch, frames, positions, 3, heads, head_dim], bfloat16, the last three axes contiguous; strides in
// elements. d_o [batch, frames, positions, heads, head_dim] is contiguous, and so is the gradient of qkv.
struct stdit_temporal {
  const void* qkv;
  int64_t batch_stride, frame_stride, position_stride;
  const void* d_o;
  void* d_qkv;
  const void *q_weight, *k_weight;  // [head_dim], of one stdit_dtype
  int weight_dtype;
  const float* rotation;  // [frames, 2, head_dim / 2]: cosines, sines
  float* d_weights;       // [parts * heads, 2, head_dim]: to be summed over the first axis; `parts` is asked for
  float* d_sums;          // [parts, 3, heads, head_dim]: likewise, of d_qkv over all tokens; null: not asked for
  int64_t batch, positions;
  int frames, heads, head_dim;
  int rotate_first;
  float epsilon;
};

// Elements of a tensor that one block works on.
#define STDIT_ADAMW_TILE 8192

// One tensor of an optimizer: contiguous arrays of `size` elements.
struct stdit_adamw_tensor {
  float *master, *exp_avg, *exp_avg_sq;
  float* average;  // null: no average is kept
  void* working;   // bfloat16, the master's rounded copy; null: there is none
  int64_t size;
};

// All tensors of an optimizer; every address is one on the device. Calls belong on one stream.
struct stdit_adamw {
  const struct stdit_adamw_tensor* tensors;  // [count]
  const int32_t* tiles;  // [tile_count, 2]: a tensor, and its how maniest STDIT_ADAMW_TILE elements; tensors in order
  float* steps;          // [count]: updates so far
  void* scratch;         // 8 * (3 * count + tile_count + 2) bytes, a multiple of 16 as address
  int64_t count, tile_count;
};

struct stdit_adamw_settings {
  double lr, beta1, beta2, epsilon, weight_decay;
  double max_norm;       // of the gradient; infinity: no clipping
  double average_decay;  // the averages' share that stays
};

// One GEMM of a linear layer y = x W^T + bias; x [rows, in_features], W [out_features, in_features], all contiguous
// and bfloat16, at multiples of 16 bytes; features are multiples of 8.
enum stdit_linear_product {
  STDIT_LINEAR_FORWARD = 0,         // first x, second W, result y; bias: added; gelu: hidden written, y = gelu(hidden)
  STDIT_LINEAR_INPUT_GRADIENT = 1,  // first dy, second W, result dx; no bias; gelu: dx times gelu'(hidden), x being
                                    // gelu(hidden)
};
struct stdit_linear {
  int product;  // a stdit_linear_product
  int gelu;     // by its tanh approximation
  int bias;
  int64_t rows, in_features, out_features;
};
struct stdit_linear_arrays {
  const void *first, *second;
  void* result;
  void* bias;       // null without
  void* hidden;     // of y's shape (forward) or x's; null without gelu
  void* workspace;  // as many bytes as the plan needs
};

// What went wrong in this thread's last failed call; valid until its next one.
STDIT_API const char* stdit_last_error(void);

// The compiler's version and the architectures that the library holds machine code for ("13.0.88", "90a-real").
STDIT_API const char* stdit_cuda_compiler(void);
STDIT_API const char* stdit_architectures(void);

// Fails when the library's kernels cannot run on that device.
STDIT_API int stdit_check_device(int device);

// The sum of the squares of all gradients into *square_sum, on the device. `grads`, read before this returns: for each
// tensor the address of its gradient, of one stdit_dtype for all, or null, where there is none.
STDIT_API int stdit_adamw_square_sum(const struct stdit_adamw* optimizer, const void* const* grads, int grad_dtype,
                                     double* square_sum, int device, void* stream);

// AdamW's update with the gradients of the last stdit_adamw_square_sum, clipped by *square_sum, which may have become
// several processes' by now; then the averages'. Changes nothing where *square_sum or *loss, which may be null, is not
// finite. Tensors without gradient keep all but their averages.
STDIT_API int stdit_adamw_update(const struct stdit_adamw* optimizer, int grad_dtype, const double* square_sum,
                                 const double* loss, const struct stdit_adamw_settings* settings, int device,
                                 void* stream);

// The forward pass; writes o and lse. scratch: stdit_attention_forward_scratch() bytes, a multiple of 256 as address;
// null where that is none.
STDIT_API int stdit_attention_forward(const struct stdit_attention* call, void* scratch, int device, void* stream);

// Bytes of scratch memory that the forward pass needs, in *bytes.
STDIT_API int stdit_attention_forward_scratch(const struct stdit_attention* call, int64_t* bytes);

// The backward pass; reads o and lse. Repeats bit for bit.
STDIT_API int stdit_attention_backward(const struct stdit_attention* call,
                                       const struct stdit_attention_gradients* gradients, int device, void* stream);

// Bytes of scratch memory that the backward pass needs on that device, in *bytes.
STDIT_API int stdit_attention_backward_scratch(const struct stdit_attention* call, int device, int64_t* bytes);

// Temporal attention's backward pass. Repeats bit for bit.
STDIT_API int stdit_temporal_backward(const struct stdit_temporal* call, int device, void* stream);

// How many parts of d_weights and d_sums it writes on that device, in *parts.
STDIT_API int stdit_temporal_parts(const struct stdit_temporal* call, int device, int64_t* parts);

// The version of the cuBLASLt that this process has loaded, as 130200; fails where it has none.
STDIT_API int stdit_cublaslt_version(int64_t* version);

// Makes a plan of how a layer's GEMM runs on a device; `rank` picks the library's proposal, 0 its best.
STDIT_API int stdit_linear_plan(const struct stdit_linear* layer, int device, int rank, void** plan,
                                int64_t* workspace_bytes);

// Launches it on a stream of its device.
STDIT_API int stdit_linear_run(const void* plan, const struct stdit_linear_arrays* arrays, void* stream);

// Ends a plan, whose launches may still run.
STDIT_API void stdit_linear_destroy(void* plan);

#ifdef __cplusplus
}
#endif
