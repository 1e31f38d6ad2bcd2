// Turns at asking for products.
//
// Asking takes about as long as the products do. Warpgroups that ask while another's products run wait for those too,
// and then all have none to ask for at the same time. In turns one has products made while the others do what is
// between them.
#pragma once

#include "stdit/barrier.h"

namespace stdit {

// A consumer's place; named barrier 1 + consumer admits it. All consumers must take as many turns. Of one: no turns.
template <int Consumers>
struct Turns {
  int consumer;

  // Before the first turn, which is the first consumer's.
  __device__ __forceinline__ void begin() const {
    if (Consumers > 1 && consumer == Consumers - 1) pass();
  }
  __device__ __forceinline__ void take() const {
    if (Consumers > 1) sync_threads(1 + consumer, 256);
  }
  __device__ __forceinline__ void pass() const {
    if (Consumers > 1) arrive_threads(1 + (consumer + 1) % Consumers, 256);
  }
  // After the last: takes the turn that the last consumer passed on.
  __device__ __forceinline__ void end() const {
    if (Consumers > 1 && consumer == 0) take();
  }
};

}  // namespace stdit
