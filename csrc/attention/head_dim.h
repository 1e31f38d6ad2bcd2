// Head dimensions that the kernels are made for, and what is made for each.
//
// Each .cu file of this folder is compiled once for every head dimension, with that as STDIT_HEAD_DIM (CMakeLists.txt has
// the same list), and instantiates its part of what is declared here; attention.cpp picks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "stdit/attention.h"

namespace stdit {

template <int... D>
struct HeadDims {
  // Calls f(std::integral_constant<int, D>) for the D that is `head_dim`; false where there is none.
  template <class F>
  static bool visit(int head_dim, F f) {
    return ((head_dim == D && (f(std::integral_constant<int, D>{}), true)) || ...);
  }
  // "64, 72"
  static std::string text() {
    std::string all;
    ((all += (all.empty() ? "" : ", ") + std::to_string(D)), ...);
    return all;
  }
};

using ServedHeadDims = HeadDims<72>;

template <int D>
void forward(const stdit_attention& call, cudaStream_t stream);

template <int D>
void backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream);
template <int D>
int64_t backward_scratch(const stdit_attention& call);

// What backward hands on: sequences of more than a few hundred keys (long_backward.cu), and packed keys
// (packed_backward.cu).
template <int D>
void long_backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream);
template <int D>
int64_t long_backward_scratch(const stdit_attention& call);
template <int D>
void packed_backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream);
template <int D>
int64_t packed_backward_scratch(const stdit_attention& call);

}  // namespace stdit
