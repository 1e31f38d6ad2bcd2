// Keeps the blocks of a launch together while they go through heads.
//
// Heads that lie beside each other share lines of memory where a head's row of a token is no multiple of a line's 128
// bytes: of 144 bytes, each by itself, 1.78 times as much would be read. They are on neighbouring blocks, which bring
// shared lines once, for as long as one of them comes before the L2 cache has dropped what the other brought: a few
// heads' time. Some multiprocessors get at memory faster than others, so that without this blocks are further apart
// than that after some twelve heads.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "stdit/attention.h"
#include "stdit/launch_check.h"

namespace stdit {

// Where it is worth it, measured on an H100: heads in all, and keys. Of fewer keys than kFewestPacedKeys a head is loaded
// while the L2 cache still has the one before. Of 193 to 256 blocks drift apart too, but the kernel has no registers left
// (Forward::kPaced); of 300 and more computing takes long enough.
constexpr int64_t kFewestPacedHeads = 10 * 132;
constexpr int64_t kFewestPacedKeys = 81, kMostPacedKeys = 192;

// Scratch memory for the count of heads.
constexpr int64_t kPaceBytes = 256;

template <int D>
bool keeps_pace(const stdit_attention& call) {
  return call.key_starts == nullptr && D * 2 % 128 != 0 && call.sequences * call.heads >= kFewestPacedHeads &&
         call.keys >= kFewestPacedKeys && call.keys <= kMostPacedKeys;
}

// Whether the current device's memory is slow enough for it. An H100 moves 3.35 TB/s; on an H200, with 4.8, blocks
// drift as well, but it can afford what is read twice.
inline bool memory_lags() {
  constexpr double kEnough = 4e12;                  // bytes a second
  static const std::vector<bool> of_devices = [] {  // once: the driver takes long to say a clock rate
    int count = 0;
    STDIT_CHECK(cudaGetDeviceCount(&count));
    std::vector<bool> lag;
    for (int device = 0; device < count; ++device) {
      int kilohertz = 0, bits = 0;  // stay 0 on a virtual GPU that does not say
      if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device) != cudaSuccess ||
          cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device) != cudaSuccess) {
        cudaGetLastError();  // is not the next launch's
      }
      lag.push_back(2e3 * kilohertz * (bits / 8.0) < kEnough);  // two transfers a cycle
    }
    return lag;
  }();
  int device = 0;
  STDIT_CHECK(cudaGetDevice(&device));
  return of_devices[device];
}

// A block's place among all. `begun`, in device memory, counts the heads that all blocks have begun, from 0 on; null:
// they go as they like.
class Pace {
 public:
  __device__ __forceinline__ explicit Pace(int* begun) : begun_(begun), waits_(begun != nullptr) {}

  // Called by one thread before a block loads its next head: waits until the blocks have on average begun as many
  // as this one before. No barrier: where that takes longer than it ever should, as with blocks that have no
  // multiprocessor yet, this one waits no more.
  __device__ __forceinline__ void next() {
    if (begun_ == nullptr) return;
    atomicAdd(begun_, 1);
    const int enough = own_++ * static_cast<int>(gridDim.x);
    for (int i = 0; waits_ && seen() < enough; ++i) {
      __nanosleep(kSleep);
      waits_ = i < kMostLooks;
    }
  }

 private:
  // ns between looks, and how many: with the looks themselves some 60 us, in which a block does a dozen heads.
  static constexpr int kSleep = 100, kMostLooks = 100;

  __device__ __forceinline__ int seen() const {
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(begun_) : "memory");
    return value;
  }

  int* begun_;
  int own_ = 0;
  bool waits_;
};

}  // namespace stdit
