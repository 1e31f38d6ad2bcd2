// The order of work over packed keys, where a block takes units of queries of one head after each other.
//
// Blocks beside each other work on different heads of the same queries at about the same time: a head's 144 bytes of a
// token lie in two lines of memory that its neighbours share, which would be brought again for each head otherwise.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/shared.h"

namespace stdit {

__host__ __device__ constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// How many heads blocks beside each other take: as many as leave no more than a tenth of the multiprocessors idle, or
// of those that leave the fewest.
inline int heads_at_once(int heads, int multiprocessors) {
  int best = 1;
  int64_t most = 0;
  for (int width = std::min(heads, multiprocessors); width > 0; --width) {
    const int64_t busy = multiprocessors / width * width * int64_t{heads} / ceil_div(heads, width) / width;
    if (10 * busy >= 9 * multiprocessors) return width;
    if (busy > most) {
      most = busy;
      best = width;
    }
  }
  return best;
}

// Units of a head, of which keys and values stay from `first` to `last`.
struct Unit {
  int head, sequence;
  int unit, end;  // of the sequence; the units up to `end` follow with the same keys
  bool first;     // keys and values must be brought

  __device__ __forceinline__ bool last() const { return unit + 1 == end; }
};

// A block's part of the work over packed keys: units `begin` to `stop` of all sequences' in a row, of a head, then of
// the next that it takes.
struct PackedUnits : Unit {
  int begin, stop, units, heads, heads_at_once;

  // units: of each sequence.
  __device__ __forceinline__ PackedUnits(const int (&range)[2], int units_, int heads_, int heads_at_once_)
      : begin(range[0]), stop(range[1]), units(units_), heads(heads_), heads_at_once(heads_at_once_) {
    head = begin < stop ? static_cast<int>(blockIdx.x) % heads_at_once : heads;
    go_to(begin / units, begin % units);
  }
  __device__ __forceinline__ bool valid() const { return head < heads; }
  __device__ __forceinline__ void next() {
    first = false;
    if (++unit < end) return;
    if ((sequence + 1) * units < stop) {
      go_to(sequence + 1, 0);
    } else {
      head += heads_at_once;
      go_to(begin / units, begin % units);
    }
  }

 private:
  __device__ __forceinline__ void go_to(int sequence_, int unit_) {
    sequence = sequence_;
    unit = unit_;
    end = min(units, stop - sequence * units);
    first = true;
  }
};

// Which units a block has: range[0] to range[1] of all sequences' in a row. By the block's first 64 threads. A unit
// costs what its keys' tiles cost, and as much as one for its queries.
__device__ __forceinline__ void find_range(int (&range)[2], const int* key_starts, int sequences, int units,
                                           int heads_at_once, int tile_keys) {
  const int part = blockIdx.x / heads_at_once + threadIdx.x / 32, parts = gridDim.x / heads_at_once;
  const Place place = place_of(
      part, parts, sequences, [&](int) { return units; },
      [&](int sequence) {
        return (KeyRange::packed(key_starts, sequence).count + tile_keys - 1) / tile_keys + 1;
      });
  if (threadIdx.x % 32 == 0) range[threadIdx.x / 32] = place.sequence * units + place.unit;
}

}  // namespace stdit
