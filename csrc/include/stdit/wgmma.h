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

// Whether an operand in shared memory has the summed dimension (K) contiguous, or the other one.
constexpr int kMajorK = 0, kMajorMN = 1;

// start: D = A * B, which leaves nothing of D before it, so that it needs no registers until then. add: D += A * B.
// A is an operand in shared memory or in registers.
template <int N, int MajorA, int MajorB>
struct Wgmma;

#define STDIT_PICK_8(mode, d, i)                                                                            \
  mode(d[i]), mode(d[i + 1]), mode(d[i + 2]), mode(d[i + 3]), mode(d[i + 4]), mode(d[i + 5]), mode(d[i + 6]), \
      mode(d[i + 7])
#define STDIT_PICK_4(mode, d, i) mode(d[i]), mode(d[i + 1]), mode(d[i + 2]), mode(d[i + 3])

template <int MajorA, int MajorB>
struct Wgmma<8, MajorA, MajorB> {
  static __device__ __forceinline__ void start(float (&d)[4], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3"
        "}, %4, %5, p, 1, 1, %6, %7;\n}\n"
        : STDIT_PICK_4("=f", d, 0)
        : "l"(a), "l"(b), "n"(MajorA), "n"(MajorB));
  }
  static __device__ __forceinline__ void start(float (&d)[4], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3"
        "}, {%4, %5, %6, %7}, %8, p, 1, 1, %9;\n}\n"
        : STDIT_PICK_4("=f", d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MajorB));
  }
  static __device__ __forceinline__ void add(float (&d)[4], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3"
        "}, %4, %5, p, 1, 1, %6, %7;\n}\n"
        : STDIT_PICK_4("+f", d, 0)
        : "l"(a), "l"(b), "n"(MajorA), "n"(MajorB));
  }
  static __device__ __forceinline__ void add(float (&d)[4], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3"
        "}, {%4, %5, %6, %7}, %8, p, 1, 1, %9;\n}\n"
        : STDIT_PICK_4("+f", d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MajorB));
  }
};

template <int MajorA, int MajorB>
struct Wgmma<48, MajorA, MajorB> {
  static __device__ __forceinline__ void start(float (&d)[24], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23"
        "}, %24, %25, p, 1, 1, %26, %27;\n}\n"
        : STDIT_PICK_8("=f", d, 0), STDIT_PICK_8("=f", d, 8), STDIT_PICK_8("=f", d, 16)
        : "l"(a), "l"(b), "n"(MajorA), "n"(MajorB));
  }
  static __device__ __forceinline__ void start(float (&d)[24], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23"
        "}, {%24, %25, %26, %27}, %28, p, 1, 1, %29;\n}\n"
        : STDIT_PICK_8("=f", d, 0), STDIT_PICK_8("=f", d, 8), STDIT_PICK_8("=f", d, 16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MajorB));
  }
  static __device__ __forceinline__ void add(float (&d)[24], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23"
        "}, %24, %25, p, 1, 1, %26, %27;\n}\n"
        : STDIT_PICK_8("+f", d, 0), STDIT_PICK_8("+f", d, 8), STDIT_PICK_8("+f", d, 16)
        : "l"(a), "l"(b), "n"(MajorA), "n"(MajorB));
  }
  static __device__ __forceinline__ void add(float (&d)[24], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23"
        "}, {%24, %25, %26, %27}, %28, p, 1, 1, %29;\n}\n"
        : STDIT_PICK_8("+f", d, 0), STDIT_PICK_8("+f", d, 8), STDIT_PICK_8("+f", d, 16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MajorB));
  }
};

template <int MajorA, int MajorB>
struct Wgmma<64, MajorA, MajorB> {
  static __device__ __forceinline__ void start(float (&d)[32], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, p, 1, 1, %34, %35;\n}\n"
        : STDIT_PICK_8("=f", d, 0), STDIT_PICK_8("=f", d, 8), STDIT_PICK_8("=f", d, 16), STDIT_PICK_8("=f", d, 24)
        : "l"(a), "l"(b), "n"(MajorA), "n"(MajorB));
  }
  static __device__ __forceinline__ void start(float (&d)[32], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, %37;\n}\n"
        : STDIT_PICK_8("=f", d, 0), STDIT_PICK_8("=f", d, 8), STDIT_PICK_8("=f", d, 16), STDIT_PICK_8("=f", d, 24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MajorB));
  }
  static __device__ __forceinline__ void add(float (&d)[32], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, p, 1, 1, %34, %35;\n}\n"
        : STDIT_PICK_8("+f", d, 0), STDIT_PICK_8("+f", d, 8), STDIT_PICK_8("+f", d, 16), STDIT_PICK_8("+f", d, 24)
        : "l"(a), "l"(b), "n"(MajorA), "n"(MajorB));
  }
  static __device__ __forceinline__ void add(float (&d)[32], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, %37;\n}\n"
        : STDIT_PICK_8("+f", d, 0), STDIT_PICK_8("+f", d, 8), STDIT_PICK_8("+f", d, 16), STDIT_PICK_8("+f", d, 24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MajorB));
  }
};

template <int MajorA, int MajorB>
struct Wgmma<80, MajorA, MajorB> {
  static __device__ __forceinline__ void start(float (&d)[40], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39"
        "}, %40, %41, p, 1, 1, %42, %43;\n}\n"
        : STDIT_PICK_8("=f", d, 0), STDIT_PICK_8("=f", d, 8), STDIT_PICK_8("=f", d, 16), STDIT_PICK_8("=f", d, 24),
          STDIT_PICK_8("=f", d, 32)
        : "l"(a), "l"(b), "n"(MajorA), "n"(MajorB));
  }
  static __device__ __forceinline__ void start(float (&d)[40], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39"
        "}, {%40, %41, %42, %43}, %44, p, 1, 1, %45;\n}\n"
        : STDIT_PICK_8("=f", d, 0), STDIT_PICK_8("=f", d, 8), STDIT_PICK_8("=f", d, 16), STDIT_PICK_8("=f", d, 24),
          STDIT_PICK_8("=f", d, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MajorB));
  }
  static __device__ __forceinline__ void add(float (&d)[40], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39"
        "}, %40, %41, p, 1, 1, %42, %43;\n}\n"
        : STDIT_PICK_8("+f", d, 0), STDIT_PICK_8("+f", d, 8), STDIT_PICK_8("+f", d, 16), STDIT_PICK_8("+f", d, 24),
          STDIT_PICK_8("+f", d, 32)
        : "l"(a), "l"(b), "n"(MajorA), "n"(MajorB));
  }
  static __device__ __forceinline__ void add(float (&d)[40], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39"
        "}, {%40, %41, %42, %43}, %44, p, 1, 1, %45;\n}\n"
        : STDIT_PICK_8("+f", d, 0), STDIT_PICK_8("+f", d, 8), STDIT_PICK_8("+f", d, 16), STDIT_PICK_8("+f", d, 24),
          STDIT_PICK_8("+f", d, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MajorB));
  }
};

template <int MajorA, int MajorB>
struct Wgmma<96, MajorA, MajorB> {
  static __device__ __forceinline__ void start(float (&d)[48], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
        "}, %48, %49, p, 1, 1, %50, %51;\n}\n"
        : STDIT_PICK_8("=f", d, 0), STDIT_PICK_8("=f", d, 8), STDIT_PICK_8("=f", d, 16), STDIT_PICK_8("=f", d, 24),
          STDIT_PICK_8("=f", d, 32), STDIT_PICK_8("=f", d, 40)
        : "l"(a), "l"(b), "n"(MajorA), "n"(MajorB));
  }
  static __device__ __forceinline__ void start(float (&d)[48], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
        "}, {%48, %49, %50, %51}, %52, p, 1, 1, %53;\n}\n"
        : STDIT_PICK_8("=f", d, 0), STDIT_PICK_8("=f", d, 8), STDIT_PICK_8("=f", d, 16), STDIT_PICK_8("=f", d, 24),
          STDIT_PICK_8("=f", d, 32), STDIT_PICK_8("=f", d, 40)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MajorB));
  }
  static __device__ __forceinline__ void add(float (&d)[48], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
        "}, %48, %49, p, 1, 1, %50, %51;\n}\n"
        : STDIT_PICK_8("+f", d, 0), STDIT_PICK_8("+f", d, 8), STDIT_PICK_8("+f", d, 16), STDIT_PICK_8("+f", d, 24),
          STDIT_PICK_8("+f", d, 32), STDIT_PICK_8("+f", d, 40)
        : "l"(a), "l"(b), "n"(MajorA), "n"(MajorB));
  }
  static __device__ __forceinline__ void add(float (&d)[48], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
        "}, {%48, %49, %50, %51}, %52, p, 1, 1, %53;\n}\n"
        : STDIT_PICK_8("+f", d, 0), STDIT_PICK_8("+f", d, 8), STDIT_PICK_8("+f", d, 16), STDIT_PICK_8("+f", d, 24),
          STDIT_PICK_8("+f", d, 32), STDIT_PICK_8("+f", d, 40)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MajorB));
  }
};

template <int MajorA, int MajorB>
struct Wgmma<128, MajorA, MajorB> {
  static __device__ __forceinline__ void start(float (&d)[64], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, p, 1, 1, %66, %67;\n}\n"
        : STDIT_PICK_8("=f", d, 0), STDIT_PICK_8("=f", d, 8), STDIT_PICK_8("=f", d, 16), STDIT_PICK_8("=f", d, 24),
          STDIT_PICK_8("=f", d, 32), STDIT_PICK_8("=f", d, 40), STDIT_PICK_8("=f", d, 48), STDIT_PICK_8("=f", d, 56)
        : "l"(a), "l"(b), "n"(MajorA), "n"(MajorB));
  }
  static __device__ __forceinline__ void start(float (&d)[64], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, %69;\n}\n"
        : STDIT_PICK_8("=f", d, 0), STDIT_PICK_8("=f", d, 8), STDIT_PICK_8("=f", d, 16), STDIT_PICK_8("=f", d, 24),
          STDIT_PICK_8("=f", d, 32), STDIT_PICK_8("=f", d, 40), STDIT_PICK_8("=f", d, 48), STDIT_PICK_8("=f", d, 56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MajorB));
  }
  static __device__ __forceinline__ void add(float (&d)[64], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, p, 1, 1, %66, %67;\n}\n"
        : STDIT_PICK_8("+f", d, 0), STDIT_PICK_8("+f", d, 8), STDIT_PICK_8("+f", d, 16), STDIT_PICK_8("+f", d, 24),
          STDIT_PICK_8("+f", d, 32), STDIT_PICK_8("+f", d, 40), STDIT_PICK_8("+f", d, 48), STDIT_PICK_8("+f", d, 56)
        : "l"(a), "l"(b), "n"(MajorA), "n"(MajorB));
  }
  static __device__ __forceinline__ void add(float (&d)[64], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, %69;\n}\n"
        : STDIT_PICK_8("+f", d, 0), STDIT_PICK_8("+f", d, 8), STDIT_PICK_8("+f", d, 16), STDIT_PICK_8("+f", d, 24),
          STDIT_PICK_8("+f", d, 32), STDIT_PICK_8("+f", d, 40), STDIT_PICK_8("+f", d, 48), STDIT_PICK_8("+f", d, 56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MajorB));
  }
};

#undef STDIT_PICK_8
#undef STDIT_PICK_4

}  // namespace stdit
