// Head dimensions that the kernels are made for, and what is made for each.
//
// Each .cu file of this folder is compiled once for every head dimension that it serves, with that as STDIT_HEAD_DIM,
// and instantiates its part of what is declared here; attention.cpp picks.
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
  static constexpr bool has(int head_dim) { return ((head_dim == D) || ...); }
  // "64, 72"
  static std::string text() {
    std::string all;
    ((all += (all.empty() ? "" : ", ") + std::to_string(D)), ...);
    return all;
  }
};

// The head dimensions of each file, which CMakeLists.txt reads here: a list and its files to a line.
using ServedHeadDims = HeadDims<64, 72, 80, 96>;  // forward.cu packed_backward.cu
using ShortHeadDims = HeadDims<64, 72, 80>;       // backward.cu
using WholeHeadDims = HeadDims<72>;               // whole_backward.cu
using LongHeadDims = HeadDims<64, 80, 96>;        // long_backward.cu
using RoundedHeadDims = HeadDims<72>;             // rounded_backward.cu

// Whether one kernel finds all gradients of a head of few keys: wider heads' leave no room for that in registers.
template <int D>
constexpr bool kHasShortBackward = ShortHeadDims::has(D);

// Whether one kernel that has all of a head in shared memory is there as well.
template <int D>
constexpr bool kHasWholeBackward = WholeHeadDims::has(D);

// Which kernels serve few keys: one for all of a head's gradients, of more keys two.
constexpr int64_t kMostShortKeys = 320;
template <int D>
bool is_short(const stdit_attention& call) {
  return kHasShortBackward<D> && call.keys <= kMostShortKeys;
}

// Whether normalised keys are rounded to bfloat16 before they are multiplied. Where not, what is multiplied are the
// rows as they came, and the scores are scaled instead. Both passes must see the same scores. Few keys always are; more
// where products leave columns that more can be put into (row_image.h).
template <int D>
constexpr bool kRoundsLongKeys = D / 8 % 2 != 0;
template <int D>
bool rounds_keys(const stdit_attention& call) {
  return kRoundsLongKeys<D> || is_short<D>(call);
}

template <int D>
void forward(const stdit_attention& call, void* scratch, cudaStream_t stream);  // forward.cu
template <int D>
int64_t forward_scratch(const stdit_attention& call);

// Scratch memory's bytes, and the gradients: of few keys, if kHasShortBackward (backward.cu),
template <int D>
int64_t short_backward_scratch(const stdit_attention& call);
template <int D>
void short_backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream);
// of heads that fit on chip, if kHasWholeBackward (whole_backward.cu),
template <int D>
bool whole_backward_serves(const stdit_attention& call);
template <int D>
int64_t whole_backward_scratch(const stdit_attention& call);
template <int D>
void whole_backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream);
// of any number (rounded_backward.cu if kRoundsLongKeys, else long_backward.cu),
template <int D>
int64_t long_backward_scratch(const stdit_attention& call);
template <int D>
void long_backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream);
// and of packed keys (packed_backward.cu).
template <int D>
int64_t packed_backward_scratch(const stdit_attention& call);
template <int D>
void packed_backward(const stdit_attention& call, const stdit_attention_gradients& gradients, cudaStream_t stream);

}  // namespace stdit
