// Whether a device can run this library.
#pragma once

namespace stdit {

// Throws with CUDA's reason: no driver, no such device, or no machine code for its architecture.
void check_device(int device);

}  // namespace stdit
