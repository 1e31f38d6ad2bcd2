// k of all heads as an image (row_image.h), which products read many times: normalised where kRoundsLongKeys, else as
// it came, with what its rows' scores are multiplied by.
#pragma once

#include <cstdint>

#include "attention/head_dim.h"
#include "attention/row_image.h"
#include "attention/shared.h"

namespace stdit {

constexpr int kKeyThreads = 256;

struct KeyImageArguments {
  HeadArray k;
  char* image;     // [sequences * heads] of row_length rows, with zeroes for those that are not there
  float* factors;  // [sequences * heads, row_length]: what the rows are multiplied by; null: not asked for. Of rows
                   // that came as they are: what their scores are, and zeroes for those that are not there
  int heads, keys, row_length, row_blocks;
  bool normalise;
  float epsilon;
  float score_factor;  // of scores, to units of log2, as part of the factors; not of normalised rows
};

// 16 rows a warp; neighbouring blocks have neighbouring heads. Normalised k has ones in the columns that are left.
template <int D>
__global__ void __launch_bounds__(kKeyThreads) attention_key_image_kernel(KeyImageArguments a) {
  constexpr bool kRounds = kRoundsLongKeys<D>;
  static_assert(!kRounds || Image<D>::kPads, "columns for ones");
  const int head = blockIdx.x % a.heads, rest = blockIdx.x / a.heads;
  const int row_block = rest % a.row_blocks, sequence = rest / a.row_blocks;
  const int lane = threadIdx.x % 32, first = (row_block * (kKeyThreads / 32) + threadIdx.x / 32) * 16;
  if (first >= a.row_length) return;
  const int row = first + lane / 2;
  const HalfRow<D, 64> share{lane % 2};
  const auto* from = reinterpret_cast<const uint4*>(a.k.head(sequence, head) + row * a.k.row_stride);
  uint4 pieces[share.kEach];
#pragma unroll
  for (int i = 0; i < share.kEach; ++i) {
    pieces[i] = make_uint4(0, 0, 0, 0);
    if (share.there(i) && row < a.keys) pieces[i] = __ldg(from + share.piece(i));
  }
  float factor = kRounds ? 1.0f : a.score_factor;
  if constexpr (kRounds) {
    if (a.normalise) {
      factor = row_factor<D, 64>(pieces, a.epsilon);
#pragma unroll
      for (int i = 0; i < share.kEach; ++i) {
        uint4& v = pieces[i];
        v.x = pack(low_half(v.x) * factor, high_half(v.x) * factor);
        v.y = pack(low_half(v.y) * factor, high_half(v.y) * factor);
        v.z = pack(low_half(v.z) * factor, high_half(v.z) * factor);
        v.w = pack(low_half(v.w) * factor, high_half(v.w) * factor);
      }
    }
  } else {
    if (a.normalise) factor *= row_factor<D, 64>(pieces, a.epsilon);
  }
  const int64_t first_of_all = (static_cast<int64_t>(sequence) * a.heads + head) * a.row_length + first;
  if constexpr (kRounds) {
    if (lane % 2 == 0 && a.factors != nullptr) a.factors[first_of_all + lane / 2] = factor;
  } else {
    if (lane % 2 == 0) a.factors[first_of_all + lane / 2] = row < a.keys ? factor : 0.0f;
  }
  char* image = a.image + Image<D>::bytes(first_of_all);  // whole sixteens of rows
#pragma unroll
  for (int i = 0; i < share.kEach; ++i) {
    if (share.there(i)) *reinterpret_cast<uint4*>(image + Image<D>::offset(lane / 2, share.piece(i))) = pieces[i];
  }
  if (kRounds && lane % 2 == 1) {
    *reinterpret_cast<uint4*>(image + Image<D>::offset(lane / 2, D / 8)) = ones();
  }
}

template <int D>
void make_key_image(const stdit_attention& call, char* image, float* factors, int row_length, cudaStream_t stream) {
  const NormArguments norm = norm_of(call);
  KeyImageArguments a{};
  a.k = array_of(call.k);
  a.image = image;
  a.factors = factors;
  a.heads = call.heads;
  a.keys = static_cast<int>(call.keys);
  a.row_length = row_length;
  a.row_blocks = (row_length + kKeyThreads / 2 - 1) / (kKeyThreads / 2);
  a.normalise = norm.normalise_k;
  a.epsilon = norm.epsilon;
  a.score_factor = norm.score_factor();
  const auto blocks = static_cast<unsigned>(call.sequences * call.heads * a.row_blocks);
  attention_key_image_kernel<D><<<blocks, kKeyThreads, 0, stream>>>(a);
  check_launch("attention_key_image_kernel");
}

}  // namespace stdit
