// Matrix products of a warpgroup (wgmma): D[64, N] += A[64, 16] * B[16, N], bf16 in, fp32 accumulated.
//
// Accumulator layout (PTX ISA, wgmma, matrix D): thread `t` of the warpgroup holds, in d[4 * j + 2 * h + e], row
// 16 * (t / 32) + (t % 32) / 4 + 8 * h, column 8 * j + 2 * (t % 4) + e. An A operand in registers has the layout of
// 16 columns of it: a[h + 2 * j] holds the pair e = 0, 1.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "stdit/barrier.h"

namespace stdit {

// How rows of a tile are permuted in shared memory, as the copy engine writes and the tensor cores read it.
enum class Swizzle : uint64_t { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

// An operand in shared memory. What the two offsets (bytes) mean depends on which of the operand's dimensions is
// contiguous; attention_tiles.h has the cases in use. Made once and moved: each costs few instructions.
struct Operand {
  uint32_t low, high;

  __device__ __forceinline__ Operand(uint32_t address, Swizzle swizzle, uint32_t leading, uint32_t stride)
      : low(((address & 0x3ffff) >> 4) | leading >> 4 << 16),
        high(stride >> 4 | static_cast<uint32_t>(swizzle) << 30) {}
  // The same operand `bytes` further.
  __device__ __forceinline__ Operand moved(uint32_t bytes) const {
    Operand result = *this;
    result.low += bytes >> 4;
    return result;
  }
  __device__ __forceinline__ operator uint64_t() const {
    uint64_t bits;
    asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "r"(low), "r"(high));
    return bits;
  }
};

// Before the first product that reads registers or shared memory that this thread wrote.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `Groups` committed groups are unfinished.
template <int Groups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
}

// Keeps the compiler from moving accesses of these registers across this place.
template <int Count>
__device__ __forceinline__ void hold(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int Count>
__device__ __forceinline__ void hold(uint32_t (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Sets accumulators to zero, at this place: not while products into others are made, which would wait for each other.
template <int Count>
__device__ __forceinline__ void clear(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[i])::"memory");
}

// Whether an operand in shared memory has the summed dimension (K) contiguous, or the other one.
constexpr int kMajorK = 0, kMajorMN = 1;

// start: D = A * B, which leaves nothing of D before it, so that it needs no registers until then; restart: the same
// into registers that stay D's, so that it can be under way over a loop's end. add: D += A * B.
// A is an operand in shared memory or in registers.
template <int N, int MajorA, int MajorB>
struct Wgmma;

// The instruction's text counts its operands: the accumulators' registers first, then A, B and the constants, whose
// numbers STDIT_WGMMA takes as r0 to r5.
#define STDIT_TEXT_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define STDIT_TEXT_8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define STDIT_TEXT_16 "%16, %17, %18, %19, %20, %21, %22, %23"
#define STDIT_TEXT_24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define STDIT_TEXT_32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define STDIT_TEXT_40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define STDIT_TEXT_48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define STDIT_TEXT_56 "%56, %57, %58, %59, %60, %61, %62, %63"
#define STDIT_PICK_4(mode, i) mode(d[i]), mode(d[i + 1]), mode(d[i + 2]), mode(d[i + 3])
#define STDIT_PICK_8(mode, i) STDIT_PICK_4(mode, i), STDIT_PICK_4(mode, i + 4)
#define STDIT_PICK_16(mode, i) STDIT_PICK_8(mode, i), STDIT_PICK_8(mode, i + 8)
#define STDIT_PICK_32(mode, i) STDIT_PICK_16(mode, i), STDIT_PICK_16(mode, i + 16)

#define STDIT_WGMMA_FUNCTIONS(name, mode, predicate, N, text, pick, r0, r1, r2, r3, r4, r5)                        \
  static __device__ __forceinline__ void name(float (&d)[N / 2], uint64_t a, uint64_t b) {                         \
    asm volatile("{\n.reg .pred p;\nsetp." predicate                                                               \
                 ".b32 p, 0, 0;\n"                                                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" text "}, %" #r0 ", %" #r1            \
                 ", p, 1, 1, %" #r2 ", %" #r3 ";\n}\n"                                                             \
                 : pick(mode)                                                                                      \
                 : "l"(a), "l"(b), "n"(MajorA), "n"(MajorB));                                                      \
  }                                                                                                                \
  static __device__ __forceinline__ void name(float (&d)[N / 2], const uint32_t* a, uint64_t b) {                  \
    asm volatile("{\n.reg .pred p;\nsetp." predicate                                                               \
                 ".b32 p, 0, 0;\n"                                                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" text "}, {%" #r0 ", %" #r1 ", %" #r2 \
                 ", %" #r3 "}, %" #r4 ", p, 1, 1, %" #r5 ";\n}\n"                                                  \
                 : pick(mode)                                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MajorB));                               \
  }

#define STDIT_WGMMA(N, text, pick, ...)                                  \
  template <int MajorA, int MajorB>                                      \
  struct Wgmma<N, MajorA, MajorB> {                                      \
    STDIT_WGMMA_FUNCTIONS(start, "=f", "ne", N, text, pick, __VA_ARGS__) \
    STDIT_WGMMA_FUNCTIONS(restart, "+f", "ne", N, text, pick, __VA_ARGS__) \
    STDIT_WGMMA_FUNCTIONS(add, "+f", "eq", N, text, pick, __VA_ARGS__)   \
  };

#define STDIT_D_8(mode) STDIT_PICK_4(mode, 0)
#define STDIT_D_16(mode) STDIT_PICK_8(mode, 0)
#define STDIT_D_32(mode) STDIT_PICK_16(mode, 0)
#define STDIT_D_48(mode) STDIT_PICK_16(mode, 0), STDIT_PICK_8(mode, 16)
#define STDIT_D_64(mode) STDIT_PICK_32(mode, 0)
#define STDIT_D_72(mode) STDIT_PICK_32(mode, 0), STDIT_PICK_4(mode, 32)
#define STDIT_D_80(mode) STDIT_PICK_32(mode, 0), STDIT_PICK_8(mode, 32)
#define STDIT_D_96(mode) STDIT_PICK_32(mode, 0), STDIT_PICK_16(mode, 32)
#define STDIT_D_128(mode) STDIT_PICK_32(mode, 0), STDIT_PICK_32(mode, 32)

STDIT_WGMMA(8, "%0, %1, %2, %3", STDIT_D_8, 4, 5, 6, 7, 8, 9)
STDIT_WGMMA(16, STDIT_TEXT_0, STDIT_D_16, 8, 9, 10, 11, 12, 13)
STDIT_WGMMA(32, STDIT_TEXT_0 ", " STDIT_TEXT_8, STDIT_D_32, 16, 17, 18, 19, 20, 21)
STDIT_WGMMA(48, STDIT_TEXT_0 ", " STDIT_TEXT_8 ", " STDIT_TEXT_16, STDIT_D_48, 24, 25, 26, 27, 28, 29)
STDIT_WGMMA(64, STDIT_TEXT_0 ", " STDIT_TEXT_8 ", " STDIT_TEXT_16 ", " STDIT_TEXT_24, STDIT_D_64, 32, 33, 34, 35, 36,
            37)
STDIT_WGMMA(72, STDIT_TEXT_0 ", " STDIT_TEXT_8 ", " STDIT_TEXT_16 ", " STDIT_TEXT_24 ", %32, %33, %34, %35",
            STDIT_D_72, 36, 37, 38, 39, 40, 41)
STDIT_WGMMA(80, STDIT_TEXT_0 ", " STDIT_TEXT_8 ", " STDIT_TEXT_16 ", " STDIT_TEXT_24 ", " STDIT_TEXT_32, STDIT_D_80, 40,
            41, 42, 43, 44, 45)
STDIT_WGMMA(96,
            STDIT_TEXT_0 ", " STDIT_TEXT_8 ", " STDIT_TEXT_16 ", " STDIT_TEXT_24 ", " STDIT_TEXT_32 ", " STDIT_TEXT_40,
            STDIT_D_96, 48, 49, 50, 51, 52, 53)
STDIT_WGMMA(128,
            STDIT_TEXT_0 ", " STDIT_TEXT_8 ", " STDIT_TEXT_16 ", " STDIT_TEXT_24 ", " STDIT_TEXT_32 ", " STDIT_TEXT_40
                         ", " STDIT_TEXT_48 ", " STDIT_TEXT_56,
            STDIT_D_128, 64, 65, 66, 67, 68, 69)

#undef STDIT_TEXT_0
#undef STDIT_TEXT_8
#undef STDIT_TEXT_16
#undef STDIT_TEXT_24
#undef STDIT_TEXT_32
#undef STDIT_TEXT_40
#undef STDIT_TEXT_48
#undef STDIT_TEXT_56
#undef STDIT_PICK_4
#undef STDIT_PICK_8
#undef STDIT_PICK_16
#undef STDIT_PICK_32
#undef STDIT_WGMMA_FUNCTIONS
#undef STDIT_WGMMA
#undef STDIT_D_8
#undef STDIT_D_16
#undef STDIT_D_32
#undef STDIT_D_48
#undef STDIT_D_64
#undef STDIT_D_72
#undef STDIT_D_80
#undef STDIT_D_96
#undef STDIT_D_128

}  // namespace stdit
