// Rows of a head as the tensor cores read them without a swizzle: 8 x 8 matrices of 128 contiguous bytes, in a row for
// every eight rows.
//
// Any eight rows more are contiguous bytes more, in global memory as in shared: one bulk copy brings a tile, of
// whatever height, where rows of D * 2 bytes lie between other heads'. And a product D wide is one instruction, where a
// tile of 64 swizzled columns and the rest takes two.
#pragma once

#include <cstdint>

#include "stdit/attention_tiles.h"

namespace stdit {

template <int D>
struct Image {
  static_assert(D % 8 == 0, "columns come in eights");
  // Products over columns take sixteens. Where that leaves eight of them, an image has those too, as an even number of
  // matrices for eight rows (see in_parts).
  static constexpr bool kPads = D / 8 % 2 != 0;
  static constexpr int kGroupBytes = (D + 15) / 16 * 256;

  static __host__ __device__ constexpr int64_t bytes(int64_t rows) {  // of whole eights
    return kPads ? rows / 8 * kGroupBytes : rows * D * 2;
  }
  static __device__ __forceinline__ int offset(int row, int eighth) {
    return row / 8 * kGroupBytes + eighth * 128 + row % 8 * 16;
  }
};

// What eight columns that are left can hold: numbers to be added to products, beside ones in the other operand. These
// times ones() are x to float32's precision.
__device__ __forceinline__ uint4 in_parts(float x) {
  const float high = __bfloat162float(__float2bfloat16_rn(x)), middle = __bfloat162float(__float2bfloat16_rn(x - high));
  return make_uint4(pack(high, middle), pack(x - high - middle, 0.0f), 0, 0);
}
__device__ __forceinline__ uint4 ones() { return make_uint4(0x3f803f80u, 0x00003f80u, 0, 0); }

// How two lanes share a row of a tile, in pieces of 16 bytes, as in scale_rows: of each 64 columns the first takes the
// left half, so that eight lanes meet no bank twice.
template <int D, int Rows>
struct HalfRow {
  using T = Tile<D, Rows>;
  static constexpr int kRestPieces = T::kRest / 8, kEach = 4 * T::kBlocks + (kRestPieces + 1) / 2;
  int half;

  __device__ __forceinline__ int piece(int i) const {
    return i < 4 * T::kBlocks ? i / 4 * 8 + 4 * half + i % 4 : 8 * T::kBlocks + 2 * (i - 4 * T::kBlocks) + half;
  }
  __device__ __forceinline__ bool there(int i) const {
    return i < 4 * T::kBlocks || kRestPieces % 2 == 0 || piece(i) < D / 8;
  }
  // A row's pieces of this lane, zeroes where none is there.
  static __device__ __forceinline__ HalfRow read(const char* tile, int row, uint4 (&pieces)[kEach]) {
    const HalfRow share{static_cast<int>(threadIdx.x % 2)};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      pieces[i] = make_uint4(0, 0, 0, 0);
      if (share.there(i)) pieces[i] = *reinterpret_cast<const uint4*>(tile + T::offset(row, share.piece(i)));
    }
    return share;
  }
};

// The reciprocal root mean square of a row, of which two neighbouring lanes have their pieces each, zeroes where none
// is there. All lanes of a warp call it.
template <int D, int Rows>
__device__ __forceinline__ float row_factor(const uint4 (&pieces)[HalfRow<D, Rows>::kEach], float epsilon) {
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < HalfRow<D, Rows>::kEach; ++i) {
    const uint32_t words[4] = {pieces[i].x, pieces[i].y, pieces[i].z, pieces[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums[j] = fmaf(low_half(words[j]), low_half(words[j]), sums[j]);
      sums[j] = fmaf(high_half(words[j]), high_half(words[j]), sums[j]);
    }
  }
  float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  sum += __shfl_xor_sync(~0u, sum, 1);
  return rsqrtf(sum * (1.0f / D) + epsilon);
}

// Scales such a row: by its reciprocal root mean square (if `normalise`) and by `weights` (if not null).
template <int D, int Rows>
__device__ __forceinline__ void scale_row(uint4 (&pieces)[HalfRow<D, Rows>::kEach], const HalfRow<D, Rows>& share,
                                          bool normalise, float epsilon, const float* weights) {
  constexpr int kEach = HalfRow<D, Rows>::kEach;
  const float factor = normalise ? row_factor<D, Rows>(pieces, epsilon) : 1.0f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (!share.there(i)) continue;
    float4 low{factor, factor, factor, factor}, high = low;
    if (weights != nullptr) {
      low = *reinterpret_cast<const float4*>(weights + 8 * share.piece(i));
      high = *reinterpret_cast<const float4*>(weights + 8 * share.piece(i) + 4);
      low = make_float4(low.x * factor, low.y * factor, low.z * factor, low.w * factor);
      high = make_float4(high.x * factor, high.y * factor, high.z * factor, high.w * factor);
    }
    uint4& v = pieces[i];
    v.x = pack(low_half(v.x) * low.x, high_half(v.x) * low.y);
    v.y = pack(low_half(v.y) * low.z, high_half(v.y) * low.w);
    v.z = pack(low_half(v.z) * high.x, high_half(v.z) * high.y);
    v.w = pack(low_half(v.w) * high.z, high_half(v.w) * high.w);
  }
}

// Operands whose columns are summed, 16 at a time: step i has columns 16 i to 16 i + 15.
template <class T>
struct TileColumns {
  Operand blocks, rest;

  __device__ __forceinline__ explicit TileColumns(const char* tile)
      : blocks(shared_address(tile), Swizzle::k128, 16, 1024),
        rest(shared_address(tile) + T::kRestAt, Swizzle::k32, 16, 256) {}
  __device__ __forceinline__ Operand step(int i) const {
    if (i < 4 * T::kBlocks) return blocks.moved(i / 4 * T::kBlockBytes + i % 4 * 32);
    return rest.moved((i - 4 * T::kBlocks) * T::kChunkBytes);
  }
};

template <int D>
struct ImageColumns {
  Operand whole;

  __device__ __forceinline__ explicit ImageColumns(const char* image)
      : whole(shared_address(image), Swizzle::kNone, 128, Image<D>::kGroupBytes) {}
  __device__ __forceinline__ Operand step(int i) const { return whole.moved(i * 256); }
};

// 16 rows of an image as fragments.
template <int D>
__device__ __forceinline__ void load_fragments(Fragments<D>& to, const char* image, int first_row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < to.kSteps; ++i) {
    const uint32_t at = shared_address(image + Image<D>::offset(first_row + lane % 16, 2 * i + lane / 16));
    load_matrices(at, to.x[4 * i], to.x[4 * i + 1], to.x[4 * i + 2], to.x[4 * i + 3]);
  }
}

// Of fragments in registers.
struct FragmentColumns {
  const uint32_t* x;

  __device__ __forceinline__ const uint32_t* step(int i) const { return x + 4 * i; }
};

// d[64, N] = A B^T over all D columns.
// Kept: d keeps its registers, though not its values.
template <int N, int D, bool Kept = false, class A, class B>
__device__ __forceinline__ void multiply_columns(float (&d)[N / 2], const A& a, const B& b) {
  using Product = Wgmma<N, kMajorK, kMajorK>;
  if constexpr (Kept) {
    Product::restart(d, a.step(0), b.step(0));
  } else {
    Product::start(d, a.step(0), b.step(0));
  }
#pragma unroll
  for (int i = 1; i < (D + 15) / 16; ++i) Product::add(d, a.step(i), b.step(i));
}

// An image as an operand whose rows are summed.
template <int D>
struct ImageRows {
  Operand whole;

  __device__ __forceinline__ explicit ImageRows(const char* image)
      : whole(shared_address(image), Swizzle::kNone, Image<D>::kGroupBytes, 128) {}
};

// d[64, D] += A B over all rows of B, A in registers, of 16 rows of B in four of them.
template <int D, int Rows>
__device__ __forceinline__ void add_rows(float (&d)[D / 2], const uint32_t (&a)[Rows / 4], const ImageRows<D>& b) {
#pragma unroll
  for (int i = 0; i < Rows / 16; ++i) {
    Wgmma<D, kMajorK, kMajorMN>::add(d, a + 4 * i, b.whole.moved(i * 2 * Image<D>::kGroupBytes));
  }
}

}  // namespace stdit
