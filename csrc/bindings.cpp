// Python bindings: the only file that knows Python. Tensors arrive as addresses, a stream as its handle.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "stdit/c_api.h"

namespace py = pybind11;

namespace {

void raise_if_failed(int status) {
  if (status != 0) throw std::runtime_error(stdit_last_error());
}

// The tensors of one optimizer; see stdit_adamw in c_api.h.
class AdamW {
 public:
  AdamW(uintptr_t tensors, uintptr_t tiles, uintptr_t steps, uintptr_t scratch, int64_t count, int64_t tile_count,
        int device)
      : optimizer_{reinterpret_cast<const stdit_adamw_tensor*>(tensors),
                   reinterpret_cast<const int32_t*>(tiles),
                   reinterpret_cast<float*>(steps),
                   reinterpret_cast<void*>(scratch),
                   count,
                   tile_count},
        device_(device) {}

  void square_sum(const std::vector<uintptr_t>& grads, int grad_dtype, uintptr_t square_sum, uintptr_t stream) const {
    if (static_cast<int64_t>(grads.size()) != optimizer_.count) {
      throw std::invalid_argument("adamw: as many gradients as tensors are needed");
    }
    static_assert(sizeof(uintptr_t) == sizeof(void*), "an address is handed on as a pointer");
    raise_if_failed(stdit_adamw_square_sum(&optimizer_, reinterpret_cast<const void* const*>(grads.data()), grad_dtype,
                                           reinterpret_cast<double*>(square_sum), device_,
                                           reinterpret_cast<void*>(stream)));
  }

  void update(int grad_dtype, uintptr_t square_sum, uintptr_t loss, double lr, double beta1, double beta2,
              double epsilon, double weight_decay, double max_norm, double average_decay, uintptr_t stream) const {
    const stdit_adamw_settings settings{lr, beta1, beta2, epsilon, weight_decay, max_norm, average_decay};
    raise_if_failed(stdit_adamw_update(&optimizer_, grad_dtype, reinterpret_cast<const double*>(square_sum),
                                       reinterpret_cast<const double*>(loss), &settings, device_,
                                       reinterpret_cast<void*>(stream)));
  }

 private:
  stdit_adamw optimizer_;
  int device_;
};

// (address, stride of a sequence, of a row, of a head), strides in elements.
using Heads = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

stdit_heads heads_of(const Heads& heads) {
  const auto& [address, sequence_stride, row_stride, head_stride] = heads;
  return {reinterpret_cast<void*>(address), sequence_stride, row_stride, head_stride};
}

// One call's tensors and sizes; see stdit_attention in c_api.h.
class Attention {
 public:
  Attention(const Heads& q, const Heads& k, const Heads& v, const Heads& o, uintptr_t lse, uintptr_t q_weight,
            uintptr_t k_weight, int weight_dtype, bool normalise_q, bool normalise_k, int64_t sequences,
            int64_t queries, int64_t keys, int heads, int head_dim, float scale, float epsilon, uintptr_t key_starts,
            int64_t packed_keys)
      : call_{heads_of(q),
              heads_of(k),
              heads_of(v),
              heads_of(o),
              reinterpret_cast<float*>(lse),
              reinterpret_cast<const void*>(q_weight),
              reinterpret_cast<const void*>(k_weight),
              weight_dtype,
              normalise_q,
              normalise_k,
              sequences,
              queries,
              keys,
              reinterpret_cast<const int*>(key_starts),
              packed_keys,
              heads,
              head_dim,
              scale,
              epsilon} {}

  int64_t forward_scratch() const {
    int64_t bytes = 0;
    raise_if_failed(stdit_attention_forward_scratch(&call_, &bytes));
    return bytes;
  }
  void forward(uintptr_t scratch, int device, uintptr_t stream) const {
    raise_if_failed(stdit_attention_forward(&call_, reinterpret_cast<void*>(scratch), device,
                                            reinterpret_cast<void*>(stream)));
  }
  int64_t backward_scratch(int device) const {
    int64_t bytes = 0;
    raise_if_failed(stdit_attention_backward_scratch(&call_, device, &bytes));
    return bytes;
  }
  void backward(const Heads& d_o, const Heads& d_q, const Heads& d_k, const Heads& d_v, uintptr_t d_weights,
                uintptr_t scratch, int device, uintptr_t stream) const {
    const stdit_attention_gradients gradients{heads_of(d_o),
                                              heads_of(d_q),
                                              heads_of(d_k),
                                              heads_of(d_v),
                                              reinterpret_cast<float*>(d_weights),
                                              reinterpret_cast<void*>(scratch)};
    raise_if_failed(stdit_attention_backward(&call_, &gradients, device, reinterpret_cast<void*>(stream)));
  }

 private:
  stdit_attention call_;
};

// One call's tensors and sizes; see stdit_temporal in c_api.h.
class Temporal {
 public:
  Temporal(uintptr_t qkv, int64_t batch_stride, int64_t frame_stride, int64_t position_stride, uintptr_t d_o,
           uintptr_t d_qkv, uintptr_t q_weight, uintptr_t k_weight, int weight_dtype, uintptr_t rotation, int64_t batch,
           int64_t positions, int frames, int heads, int head_dim, bool rotate_first, float epsilon)
      : call_{reinterpret_cast<const void*>(qkv),
              batch_stride,
              frame_stride,
              position_stride,
              reinterpret_cast<const void*>(d_o),
              reinterpret_cast<void*>(d_qkv),
              reinterpret_cast<const void*>(q_weight),
              reinterpret_cast<const void*>(k_weight),
              weight_dtype,
              reinterpret_cast<const float*>(rotation),
              nullptr,
              nullptr,
              batch,
              positions,
              frames,
              heads,
              head_dim,
              rotate_first,
              epsilon} {}

  int64_t parts(int device) const {
    int64_t parts = 0;
    raise_if_failed(stdit_temporal_parts(&call_, device, &parts));
    return parts;
  }
  void backward(uintptr_t d_weights, uintptr_t d_sums, int device, uintptr_t stream) const {
    stdit_temporal call = call_;
    call.d_weights = reinterpret_cast<float*>(d_weights);
    call.d_sums = reinterpret_cast<float*>(d_sums);
    raise_if_failed(stdit_temporal_backward(&call, device, reinterpret_cast<void*>(stream)));
  }

 private:
  stdit_temporal call_;
};

// How one GEMM of a linear layer runs on a device; see stdit_linear in c_api.h.
class Linear {
 public:
  Linear(int product, bool gelu, bool bias, int64_t rows, int64_t in_features, int64_t out_features, int device,
         int rank) {
    const stdit_linear layer{product, gelu, bias, rows, in_features, out_features};
    raise_if_failed(stdit_linear_plan(&layer, device, rank, &plan_, &workspace_bytes_));
  }
  ~Linear() { stdit_linear_destroy(plan_); }
  Linear(const Linear&) = delete;
  Linear& operator=(const Linear&) = delete;
  int64_t workspace_bytes() const { return workspace_bytes_; }
  void run(uintptr_t first, uintptr_t second, uintptr_t result, uintptr_t bias, uintptr_t hidden, uintptr_t workspace,
           uintptr_t stream) const {
    const stdit_linear_arrays arrays{reinterpret_cast<const void*>(first),  reinterpret_cast<const void*>(second),
                                     reinterpret_cast<void*>(result),       reinterpret_cast<void*>(bias),
                                     reinterpret_cast<void*>(hidden),       reinterpret_cast<void*>(workspace)};
    raise_if_failed(stdit_linear_run(plan_, &arrays, reinterpret_cast<void*>(stream)));
  }

 private:
  void* plan_ = nullptr;
  int64_t workspace_bytes_ = 0;
};

int64_t cublaslt_version() {
  int64_t version = 0;
  raise_if_failed(stdit_cublaslt_version(&version));
  return version;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of stdit_fast. A failed CUDA call raises RuntimeError with CUDA's own text.";
  m.attr("FLOAT32") = static_cast<int>(STDIT_FLOAT32);
  m.attr("BFLOAT16") = static_cast<int>(STDIT_BFLOAT16);
  m.attr("cuda_compiler") = stdit_cuda_compiler();
  m.attr("architectures") = stdit_architectures();
  m.def(
      "check_device", [](int device) { raise_if_failed(stdit_check_device(device)); }, py::arg("device"),
      py::call_guard<py::gil_scoped_release>(), "Raises when the library's kernels cannot run on the device.");
  m.attr("ADAMW_TILE") = STDIT_ADAMW_TILE;
  py::class_<AdamW>(m, "AdamW", "AdamW's step over the tensors of a table on the device; addresses.")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int>(), py::kw_only(),
           py::arg("tensors"), py::arg("tiles"), py::arg("steps"), py::arg("scratch"), py::arg("count"),
           py::arg("tile_count"), py::arg("device"))
      .def("square_sum", &AdamW::square_sum, py::kw_only(), py::arg("grads"), py::arg("grad_dtype"),
           py::arg("square_sum"), py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def("update", &AdamW::update, py::kw_only(), py::arg("grad_dtype"), py::arg("square_sum"), py::arg("loss"),
           py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("epsilon"), py::arg("weight_decay"),
           py::arg("max_norm"), py::arg("average_decay"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>());
  py::class_<Attention>(m, "Attention", "softmax(scale * norm(q) norm(k)^T) v of one call; addresses and strides.")
      .def(py::init<const Heads&, const Heads&, const Heads&, const Heads&, uintptr_t, uintptr_t, uintptr_t, int, bool,
                    bool, int64_t, int64_t, int64_t, int, int, float, float, uintptr_t, int64_t>(),
           py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("lse"), py::arg("q_weight"),
           py::arg("k_weight"), py::arg("weight_dtype"), py::arg("normalise_q"), py::arg("normalise_k"),
           py::arg("sequences"), py::arg("queries"), py::arg("keys"), py::arg("heads"), py::arg("head_dim"),
           py::arg("scale"), py::arg("epsilon"), py::arg("key_starts") = 0, py::arg("packed_keys") = 0)
      .def("forward_scratch", &Attention::forward_scratch)
      .def("forward", &Attention::forward, py::arg("scratch"), py::arg("device"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>())
      .def("backward_scratch", &Attention::backward_scratch, py::arg("device"))
      .def("backward", &Attention::backward, py::kw_only(), py::arg("d_o"), py::arg("d_q"), py::arg("d_k"),
           py::arg("d_v"), py::arg("d_weights"), py::arg("scratch"), py::arg("device"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>());
  py::class_<Temporal>(m, "Temporal", "One call of temporal attention's backward pass.")
      .def(py::init<uintptr_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int, uintptr_t,
                    int64_t, int64_t, int, int, int, bool, float>(),
           py::kw_only(), py::arg("qkv"), py::arg("batch_stride"), py::arg("frame_stride"), py::arg("position_stride"),
           py::arg("d_o"), py::arg("d_qkv"), py::arg("q_weight"), py::arg("k_weight"), py::arg("weight_dtype"),
           py::arg("rotation"), py::arg("batch"), py::arg("positions"), py::arg("frames"), py::arg("heads"),
           py::arg("head_dim"), py::arg("rotate_first"), py::arg("epsilon"))
      .def("parts", &Temporal::parts, py::arg("device"))
      .def("backward", &Temporal::backward, py::kw_only(), py::arg("d_weights"), py::arg("d_sums"), py::arg("device"),
           py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.attr("LINEAR_FORWARD") = static_cast<int>(STDIT_LINEAR_FORWARD);
  m.attr("LINEAR_INPUT_GRADIENT") = static_cast<int>(STDIT_LINEAR_INPUT_GRADIENT);
  m.def("cublaslt_version", &cublaslt_version, "Of the cuBLASLt in this process, as 130200; raises where it has none.");
  py::class_<Linear>(m, "Linear", "One GEMM of a linear layer with bias and GELU in its epilogue.")
      .def(py::init<int, bool, bool, int64_t, int64_t, int64_t, int, int>(), py::kw_only(), py::arg("product"),
           py::arg("gelu"), py::arg("bias"), py::arg("rows"), py::arg("in_features"), py::arg("out_features"),
           py::arg("device"), py::arg("rank") = 0)
      .def_property_readonly("workspace_bytes", &Linear::workspace_bytes)
      .def("run", &Linear::run, py::arg("first"), py::arg("second"), py::arg("result"), py::arg("bias"),
           py::arg("hidden"), py::arg("workspace"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
