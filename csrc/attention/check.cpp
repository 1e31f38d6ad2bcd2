// What attention's kernels can serve.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "stdit/attention.h"

#include "attention/head_dim.h"

namespace stdit {
namespace {

void check_heads(const char* name, const stdit_heads& heads) {
  if (heads.data == nullptr) throw std::invalid_argument(std::string("attention: ") + name + " is null");
  if (reinterpret_cast<uintptr_t>(heads.data) % 16 != 0) {
    throw std::invalid_argument(std::string("attention: ") + name + " does not begin at a multiple of 16 bytes");
  }
  for (const int64_t stride : {heads.sequence_stride, heads.row_stride, heads.head_stride}) {
    if (stride % 8 != 0 || stride <= 0 || stride >= (int64_t{1} << 39)) {
      throw std::invalid_argument(std::string("attention: a stride of ") + name + " is " + std::to_string(stride) +
                                  " elements, where multiples of 8 from 8 to 2^39 can be served");
    }
  }
}

}  // namespace

void check_attention(const stdit_attention& call, const stdit_attention_gradients& gradients) {
  check_attention(call);
  check_heads("d_o", gradients.d_o);
  check_heads("d_q", gradients.d_q);
  check_heads("d_k", gradients.d_k);
  check_heads("d_v", gradients.d_v);
  if (reinterpret_cast<uintptr_t>(gradients.scratch) % 256 != 0) {
    throw std::invalid_argument("attention: the scratch memory does not begin at a multiple of 256 bytes");
  }
}

void check_attention(const stdit_attention& call) {
  check_heads("q", call.q);
  check_heads("k", call.k);
  check_heads("v", call.v);
  check_heads("o", call.o);
  if (!ServedHeadDims::visit(call.head_dim, [](auto) {})) {
    throw std::invalid_argument("attention: head dimension " + std::to_string(call.head_dim) + ", where " +
                                ServedHeadDims::text() + " can be served");
  }
  if (call.weight_dtype != STDIT_FLOAT32 && call.weight_dtype != STDIT_BFLOAT16) {
    throw std::invalid_argument("attention: unknown dtype " + std::to_string(call.weight_dtype) + " of the weights");
  }
  if (!(call.scale > 0)) {
    throw std::invalid_argument("attention: scale " + std::to_string(call.scale) + ", where positive ones are served");
  }
  if (call.key_starts != nullptr) {
    if (call.normalise_q || call.normalise_k || call.q_weight != nullptr || call.k_weight != nullptr) {
      throw std::invalid_argument("attention: packed keys with a norm or weights");
    }
    if (call.keys > kMostPackedKeys) {
      throw std::invalid_argument("attention: packed sequences of " + std::to_string(call.keys) + " keys, where " +
                                  std::to_string(kMostPackedKeys) + " can be served");
    }
    if (call.packed_keys < 1 || call.packed_keys > (int64_t{1} << 30)) {
      throw std::invalid_argument("attention: " + std::to_string(call.packed_keys) + " packed keys");
    }
  }
  constexpr int64_t kMost = int64_t{1} << 30;
  if (call.sequences < 1 || call.heads < 1 || call.queries < 1 || call.keys < 1) {
    throw std::invalid_argument("attention: an empty dimension");
  }
  const int64_t longest = call.queries > call.keys ? call.queries : call.keys;
  if (longest > kMost / 64 || call.sequences > kMost || call.sequences * call.heads > kMost / ((longest + 63) / 64)) {
    throw std::invalid_argument("attention: more than 2^30 blocks of 64 queries or keys");
  }
}

}  // namespace stdit
