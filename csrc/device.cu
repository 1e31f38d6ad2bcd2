#include "stdit/device.h"

#include "stdit/device_guard.h"
#include "stdit/launch_check.h"

namespace stdit {

__global__ void probe() {}

void check_device(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  // Loads the machine code of this device's architecture, and fails where the library has none.
  STDIT_CHECK(cudaFuncGetAttributes(&attributes, probe));
}

}  // namespace stdit
