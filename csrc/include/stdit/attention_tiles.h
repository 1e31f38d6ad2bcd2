// Tiles of attention's operands in shared memory.
//
// A tile holds rows of one head, D values each: first 64 columns (128 bytes a row, the copy engine's 128-byte swizzle),
// likewise for every further 64, then what is left in chunks of 16 columns (32 bytes a row, 32-byte swizzle). For D =
// 72 that is 64 + 16, the last 8 of them zeroes. The swizzles keep eight rows of 16 bytes in different banks. A tile is
// an operand with its columns summed (Q and K in Q K^T) or its rows (V in P V) as it stands.
//
// Why not one kind of chunk: in chunks of 16 columns alone a product 72 wide is one instruction (36 cycles against 45
// for 64 and 8), but the copy engine brings 32-byte rows at 16 bytes/ns a multiprocessor, against 25 (docs/kernels.md).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "stdit/barrier.h"
#include "stdit/tensor_map.h"
#include "stdit/wgmma.h"

namespace stdit {

template <int D, int Rows>
struct Tile {
  static_assert(D % 8 == 0 && Rows % 8 == 0, "columns and rows come in eights");
  static constexpr int kBlocks = D / 64, kRest = D % 64, kChunks = (kRest + 15) / 16;
  static constexpr int kBlockBytes = Rows * 128, kChunkBytes = Rows * 32, kRestAt = kBlocks * kBlockBytes;
  static constexpr int kLoadBytes = kRestAt + kChunks * kChunkBytes;  // that the copy engine brings
  static constexpr int kBytes = (kLoadBytes + 1023) / 1024 * 1024;    // so that tiles can stand in a row

  // Where eight columns of a row are, in bytes from the tile's beginning.
  static __device__ __forceinline__ int offset(int row, int eighth) {
    if (eighth < 8 * kBlocks) return eighth / 8 * kBlockBytes + row * 128 + (((eighth ^ row) & 7) << 4);
    const int e = eighth - 8 * kBlocks;
    return kRestAt + (e >> 1) * kChunkBytes + row * 32 + (((e ^ (row >> 2)) & 1) << 4);
  }
};

// A tile as an operand whose columns are summed.
struct ColumnsOperand {
  Operand blocks, rest;

  template <class T>
  static __device__ __forceinline__ ColumnsOperand of(const char* tile) {
    const uint32_t address = shared_address(tile);
    return {Operand(address, Swizzle::k128, 16, 1024), Operand(address + T::kRestAt, Swizzle::k32, 16, 256)};
  }
};

// A tile as an operand whose rows are summed.
struct RowsOperand {
  Operand blocks, rest;

  __device__ __forceinline__ RowsOperand moved(uint32_t bytes) const {
    return {blocks.moved(bytes), rest.moved(bytes)};
  }

  template <class T>
  static __device__ __forceinline__ RowsOperand of(const char* tile) {
    const uint32_t address = shared_address(tile);
    return {Operand(address, Swizzle::k128, T::kBlockBytes, 1024),
            Operand(address + T::kRestAt, Swizzle::k32, T::kChunkBytes, 256)};
  }
};

// The first values of an array.
template <int Count, class T, int Size>
__device__ __forceinline__ T (&front(T (&values)[Size]))[Count] {
  static_assert(Count <= Size, "values that are there");
  return reinterpret_cast<T(&)[Count]>(values);
}

// D[64, N] = A B^T over all columns of two tiles, 64 rows of A and N of B.
template <int N, class A, class B>
__device__ __forceinline__ void multiply_columns(float (&d)[N / 2], const ColumnsOperand& a, const ColumnsOperand& b) {
  static_assert(A::kBlocks > 0, "narrower heads than 64 would start with the rest");
  using Product = Wgmma<N, kMajorK, kMajorK>;
  Product::start(d, a.blocks, b.blocks);
#pragma unroll
  for (int i = 1; i < 4 * A::kBlocks; ++i) {
    Product::add(d, a.blocks.moved(i / 4 * A::kBlockBytes + i % 4 * 32),
                 b.blocks.moved(i / 4 * B::kBlockBytes + i % 4 * 32));
  }
#pragma unroll
  for (int c = 0; c < A::kChunks; ++c) {
    Product::add(d, a.rest.moved(c * A::kChunkBytes), b.rest.moved(c * B::kChunkBytes));
  }
}

// The same with A in registers, 16 columns after 16: as load_fragments brings them. Kept: d keeps its registers, though
// not its values.
template <int N, class B, bool Kept = false>
__device__ __forceinline__ void multiply_columns(float (&d)[N / 2], const uint32_t* a, const ColumnsOperand& b) {
  static_assert(B::kBlocks > 0, "narrower heads than 64 would start with the rest");
  using Product = Wgmma<N, kMajorK, kMajorK>;
  if constexpr (Kept) {
    Product::restart(d, a, b.blocks);
  } else {
    Product::start(d, a, b.blocks);
  }
#pragma unroll
  for (int i = 1; i < 4 * B::kBlocks; ++i) {
    Product::add(d, a + 4 * i, b.blocks.moved(i / 4 * B::kBlockBytes + i % 4 * 32));
  }
#pragma unroll
  for (int c = 0; c < B::kChunks; ++c) Product::add(d, a + 4 * (4 * B::kBlocks + c), b.rest.moved(c * B::kChunkBytes));
}

// D[64, columns of B] += A[64, 16] B over 16 rows of a tile, from `row` on; = where it starts. A: registers or an
// operand.
template <class B, int MajorA, bool Start = false, int Count, class OperandA>
__device__ __forceinline__ void multiply_rows(float (&d)[Count], OperandA a, const RowsOperand& b, int row) {
  constexpr int kWhole = 64 * B::kBlocks;
  static_assert(Count == (kWhole + B::kRest) / 2, "half a row of B for each thread");
  const auto multiply = [&](auto product, auto& part, const Operand& of_b) {
    using Product = decltype(product);
    if constexpr (Start) {
      Product::start(part, a, of_b);
    } else {
      Product::add(part, a, of_b);
    }
  };
  if constexpr (B::kBlocks > 0) {
    multiply(Wgmma<kWhole, MajorA, kMajorMN>{}, *reinterpret_cast<float (*)[kWhole / 2]>(d), b.blocks.moved(row * 128));
  }
  if constexpr (B::kRest > 0) {
    multiply(Wgmma<B::kRest, MajorA, kMajorMN>{}, *reinterpret_cast<float (*)[B::kRest / 2]>(d + kWhole / 2),
             b.rest.moved(row * 32));
  }
}

// An array [sequences, rows, heads, D] of bfloat16, strides in elements; the D values of a head are neighbours.
struct HeadArray {
  __nv_bfloat16* data;
  int64_t sequence_stride, row_stride, head_stride;

  __device__ __forceinline__ __nv_bfloat16* head(int sequence, int head) const {
    return data + sequence * sequence_stride + head * head_stride;
  }
};

// How tiles of an array are copied: its blocks of 64 columns, and the rest.
struct TileMaps {
  CUtensorMap blocks;
  CUtensorMap rest;
};

// Maps of an array [sequences, rows, heads, D] for tiles of `box_rows` rows.
template <int D>
TileMaps make_tile_maps(const HeadArray& array, int64_t sequences, int64_t rows, int heads, int box_rows) {
  const auto dimension = [](int64_t size, int64_t stride, int box) {
    return MapDimension{static_cast<uint64_t>(size), static_cast<uint64_t>(stride) * 2, static_cast<uint32_t>(box)};
  };
  const MapDimension row = dimension(rows, array.row_stride, box_rows);
  const MapDimension head = dimension(heads, array.head_stride, 1);
  const MapDimension sequence = dimension(sequences, array.sequence_stride, 1);
  TileMaps maps{};
  if (D >= 64) {
    maps.blocks =
        make_tensor_map<4>(array.data, {dimension(D, 1, 64), row, head, sequence}, CU_TENSOR_MAP_SWIZZLE_128B);
  }
  if (D % 64 != 0) {
    maps.rest = make_tensor_map<4>(array.data, {dimension(D, 1, 16), row, head, sequence}, CU_TENSOR_MAP_SWIZZLE_32B);
  }
  return maps;
}

// Starts the copy of a tile; `barrier` must expect Tile<D, Rows>::kLoadBytes. Rows beyond the array's are zero, as are
// columns beyond D.
template <int D, int Rows>
__device__ __forceinline__ void load_tile(const TileMaps& maps, Barrier& barrier, char* to, int row, int head,
                                          int sequence) {
  using T = Tile<D, Rows>;
#pragma unroll
  for (int i = 0; i < T::kBlocks; ++i) {
    load_box(maps.blocks, barrier, to + i * T::kBlockBytes, 64 * i, row, head, sequence);
  }
#pragma unroll
  for (int i = 0; i < T::kChunks; ++i) {
    load_box(maps.rest, barrier, to + T::kRestAt + i * T::kChunkBytes, 64 * T::kBlocks + 16 * i, row, head, sequence);
  }
}

// Starts the copy of 16 rows of a tile, from `first_row` on, to global memory; rows and columns beyond the array's are
// left out. The maps' boxes have 16 rows.
template <int D, int Rows>
__device__ __forceinline__ void store_rows(const TileMaps& maps, const char* from, int first_row, int row, int head,
                                           int sequence) {
  using T = Tile<D, Rows>;
  const char* block = from + first_row * 128;
  const char* rest = from + T::kRestAt + first_row * 32;
#pragma unroll
  for (int i = 0; i < T::kBlocks; ++i) store_box(maps.blocks, block + i * T::kBlockBytes, 64 * i, row, head, sequence);
#pragma unroll
  for (int i = 0; i < T::kChunks; ++i) {
    store_box(maps.rest, rest + i * T::kChunkBytes, 64 * T::kBlocks + 16 * i, row, head, sequence);
  }
}

// The first warpgroup feeds the others: its first warp's first thread has the copy engine bring tiles, the other warps
// normalise them, 16 rows at a time, in turn.
constexpr int kNormalisers = 3;

__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ float low_half(uint32_t bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float high_half(uint32_t bits) { return __uint_as_float(bits & 0xffff0000u); }

// Four 8 x 8 matrices, one row of 16 bytes a lane: lanes 8 i to 8 i + 7 give the rows of matrix i.
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// Four 8 x 8 matrices, likewise.
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(address)
               : "memory");
}

// A warp's 16 rows of a tile as A operands of products: 16 columns, zeroes beyond D, in four registers after another.
template <int D>
struct Fragments {
  static constexpr int kSteps = (D + 15) / 16, kColumns = 16 * kSteps;
  uint32_t x[4 * kSteps];  // [step][right eight columns][eight rows below]

  template <int Rows>
  __device__ __forceinline__ void load(const char* tile, int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane % 16;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const uint32_t at = shared_address(tile + Tile<D, Rows>::offset(row, 2 * i + lane / 16));
      load_matrices(at, x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    }
  }
  // Scales rows by their reciprocal root mean square (if `normalise`) and by `weights` [kColumns].
  __device__ __forceinline__ void scale(bool normalise, float epsilon, const float* weights) {
    float factor[2] = {1.0f, 1.0f};
    if (normalise) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sums[2] = {};
#pragma unroll
        for (int i = h; i < 4 * kSteps; i += 2) {
          sums[0] = fmaf(low_half(x[i]), low_half(x[i]), sums[0]);
          sums[1] = fmaf(high_half(x[i]), high_half(x[i]), sums[1]);
        }
        float sum = sums[0] + sums[1];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        factor[h] = rsqrtf(sum * (1.0f / D) + epsilon);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {  // eight columns after eight
      const float2 w = *reinterpret_cast<const float2*>(weights + 8 * i + threadIdx.x % 4 * 2);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t& pair = x[2 * i + h];
        pair = pack(low_half(pair) * (w.x * factor[h]), high_half(pair) * (w.y * factor[h]));
      }
    }
  }
};

// The sums over columns of a * b of this thread's two rows of fragments.
template <int D>
__device__ __forceinline__ float2 row_dots(const Fragments<D>& a, const Fragments<D>& b) {
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < 4 * Fragments<D>::kSteps; ++i) {
    sums[i % 2] = fmaf(low_half(a.x[i]), low_half(b.x[i]), sums[i % 2]);
    sums[i % 2] = fmaf(high_half(a.x[i]), high_half(b.x[i]), sums[i % 2]);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sums[h] += __shfl_xor_sync(~0u, sums[h], 1);
    sums[h] += __shfl_xor_sync(~0u, sums[h], 2);
  }
  return make_float2(sums[0], sums[1]);
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Writes a warp's accumulators [16, D], each row times its factor, as bfloat16 into rows `first_row` on of a tile.
template <int D, int Rows>
__device__ __forceinline__ void store_accumulators(char* tile, int first_row, const float (&d)[D / 2], float factor0,
                                                   float factor1) {
  const int lane = threadIdx.x % 32;
  const int row = first_row + lane % 16;
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    const float* v = d + 8 * c;
    store_matrices(shared_address(tile + Tile<D, Rows>::offset(row, 2 * c + lane / 16)),
                   pack(v[0] * factor0, v[1] * factor0), pack(v[2] * factor1, v[3] * factor1),
                   pack(v[4] * factor0, v[5] * factor0), pack(v[6] * factor1, v[7] * factor1));
  }
  if constexpr (D % 16 != 0) {
    const float* v = d + 8 * (D / 16);
    store_matrices(shared_address(tile + Tile<D, Rows>::offset(row, D / 8 - 1)), pack(v[0] * factor0, v[1] * factor0),
                   pack(v[2] * factor1, v[3] * factor1));
  }
}

// The reciprocal root mean squares of 16 rows of a tile, by a warp, into factors[first_row ...]. Two lanes a row, as in
// scale_rows.
template <int D, int Rows>
__device__ __forceinline__ void row_factors(const char* tile, int first_row, float epsilon, float* factors) {
  using T = Tile<D, Rows>;
  constexpr int kRestPieces = T::kRest / 8, kEach = 4 * T::kBlocks + (kRestPieces + 1) / 2;
  const int lane = threadIdx.x % 32, half = lane % 2, row = first_row + lane / 2;
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int piece =
        i < 4 * T::kBlocks ? i / 4 * 8 + 4 * half + i % 4 : 8 * T::kBlocks + 2 * (i - 4 * T::kBlocks) + half;
    if (piece >= D / 8) continue;
    const uint4 four = *reinterpret_cast<const uint4*>(tile + T::offset(row, piece));
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums[j] = fmaf(low_half(words[j]), low_half(words[j]), sums[j]);
      sums[j] = fmaf(high_half(words[j]), high_half(words[j]), sums[j]);
    }
  }
  float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  sum += __shfl_xor_sync(~0u, sum, 1);
  if (half == 0) factors[row] = rsqrtf(sum * (1.0f / D) + epsilon);
}

// Scales 16 rows of a tile, in place, by a warp: by their reciprocal root mean square (if `normalise`) and by `weights`
// (if not null). The former are kept in factors [Rows], if not null. Two lanes a row: of each 64 columns the first takes
// the left half, so that eight lanes meet no bank twice.
template <int D, int Rows>
__device__ __forceinline__ void scale_rows(char* tile, int first_row, bool normalise, float epsilon,
                                           const float* weights, float* factors = nullptr) {
  using T = Tile<D, Rows>;
  constexpr int kRestPieces = T::kRest / 8, kEach = 4 * T::kBlocks + (kRestPieces + 1) / 2;
  const int lane = threadIdx.x % 32, half = lane % 2, row = first_row + lane / 2;
  const auto piece_of = [&](int i) {
    return i < 4 * T::kBlocks ? i / 4 * 8 + 4 * half + i % 4 : 8 * T::kBlocks + 2 * (i - 4 * T::kBlocks) + half;
  };
  const auto there = [&](int i) { return i < 4 * T::kBlocks || kRestPieces % 2 == 0 || piece_of(i) < D / 8; };
  uint4 pieces[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    pieces[i] = make_uint4(0, 0, 0, 0);
    if (there(i)) pieces[i] = *reinterpret_cast<const uint4*>(tile + T::offset(row, piece_of(i)));
  }
  float factor = 1.0f;
  if (normalise) {
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t words[4] = {pieces[i].x, pieces[i].y, pieces[i].z, pieces[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums[j] = fmaf(low_half(words[j]), low_half(words[j]), sums[j]);
        sums[j] = fmaf(high_half(words[j]), high_half(words[j]), sums[j]);
      }
    }
    float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    sum += __shfl_xor_sync(~0u, sum, 1);
    factor = rsqrtf(sum * (1.0f / D) + epsilon);
  }
  if (factors != nullptr && half == 0) factors[row] = factor;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (!there(i)) continue;
    float4 low{factor, factor, factor, factor}, high = low;
    if (weights != nullptr) {
      low = *reinterpret_cast<const float4*>(weights + 8 * piece_of(i));
      high = *reinterpret_cast<const float4*>(weights + 8 * piece_of(i) + 4);
      low = make_float4(low.x * factor, low.y * factor, low.z * factor, low.w * factor);
      high = make_float4(high.x * factor, high.y * factor, high.z * factor, high.w * factor);
    }
    uint4 v = pieces[i];
    v.x = pack(low_half(v.x) * low.x, high_half(v.x) * low.y);
    v.y = pack(low_half(v.y) * low.z, high_half(v.y) * low.w);
    v.z = pack(low_half(v.z) * high.x, high_half(v.z) * high.y);
    v.w = pack(low_half(v.w) * high.z, high_half(v.w) * high.w);
    *reinterpret_cast<uint4*>(tile + T::offset(row, piece_of(i))) = v;
  }
}

// Deals groups of 16 rows to the normalising warps, going on where the tile before ended.
struct Dealer {
  int next;                  // groups until this warp's turn
  int warps = kNormalisers;  // that share them

  // Calls scale(group) for this warp's of `count` groups.
  template <class Scale>
  __device__ __forceinline__ void deal(int count, Scale scale) {
    while (next < count) {
      scale(next);
      next += warps;
    }
    next -= count;
  }
};

}  // namespace stdit
