// The device that a scope works on.
#pragma once

#include "stdit/launch_check.h"

namespace stdit {

// Makes `device` current and, at the end of the scope, the previous one again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    STDIT_CHECK(cudaGetDevice(&previous_));
    STDIT_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace stdit
