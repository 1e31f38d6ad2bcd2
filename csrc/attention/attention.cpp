// Attention's passes, each by the kernels of the call's head dimension.
#include "stdit/attention.h"

#include <cstdint>
#include <stdexcept>

#include "attention/head_dim.h"

namespace stdit {
namespace {

template <class F>
void of_head_dim(int head_dim, F f) {
  const auto checked = [&](auto d) {
    static_assert(LongHeadDims::has(d) != RoundedHeadDims::has(d) && RoundedHeadDims::has(d) == kRoundsLongKeys<d>,
                  "many keys have one backward pass, by the way in which the forward pass normalises them");
    f(d);
  };
  if (!ServedHeadDims::visit(head_dim, checked)) {
    throw std::invalid_argument("attention: a head dimension that no kernel is made for");
  }
}

}  // namespace

void attention_forward(const stdit_attention& call, void* scratch, cudaStream_t stream) {
  of_head_dim(call.head_dim, [&](auto d) { forward<d>(call, scratch, stream); });
}

int64_t attention_forward_scratch(const stdit_attention& call) {
  int64_t bytes = 0;
  of_head_dim(call.head_dim, [&](auto d) { bytes = forward_scratch<d>(call); });
  return bytes;
}

void check_attention_scratch(const stdit_attention& call, const void* scratch) {
  if (attention_forward_scratch(call) == 0) return;
  if (scratch == nullptr || reinterpret_cast<uintptr_t>(scratch) % 256 != 0) {
    throw std::invalid_argument("attention: the scratch memory does not begin at a multiple of 256 bytes");
  }
}

void attention_backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream) {
  of_head_dim(call.head_dim, [&](auto d) {
    if (call.key_starts != nullptr) return packed_backward<d>(call, gradients, stream);
    if constexpr (kHasWholeBackward<d>) {
      if (whole_backward_serves<d>(call)) return whole_backward<d>(call, gradients, stream);
    }
    if constexpr (kHasShortBackward<d>) {
      if (is_short<d>(call)) return short_backward<d>(call, gradients, stream);
    }
    long_backward<d>(call, gradients, stream);
  });
}

int64_t attention_backward_scratch(const stdit_attention& call) {
  int64_t bytes = 0;
  of_head_dim(call.head_dim, [&](auto d) {
    bytes = call.key_starts == nullptr ? long_backward_scratch<d>(call) : packed_backward_scratch<d>(call);
    if constexpr (kHasShortBackward<d>) {
      if (call.key_starts == nullptr && is_short<d>(call)) bytes = short_backward_scratch<d>(call);
    }
    if constexpr (kHasWholeBackward<d>) {
      if (whole_backward_serves<d>(call)) bytes = whole_backward_scratch<d>(call);
    }
  });
  return bytes;
}

}  // namespace stdit
