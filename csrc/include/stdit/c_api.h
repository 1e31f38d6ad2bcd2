// The library's whole interface: plain C, so that it can be compiled on one machine and bound on another.
//
// Every function returns 0, or 1 after a failure that stdit_last_error() then describes. Device memory is
// passed as pointers, a stream as the cudaStream_t it is; nothing here synchronises.
#pragma once

#include <stdint.h>

#define STDIT_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum stdit_dtype { STDIT_FLOAT32 = 0, STDIT_BFLOAT16 = 1 };

// What went wrong in this thread's last failed call; valid until its next one.
STDIT_API const char* stdit_last_error(void);

// The compiler's version and the architectures that the library holds machine code for ("13.0.88", "90a-real").
STDIT_API const char* stdit_cuda_compiler(void);
STDIT_API const char* stdit_architectures(void);

// Fails when the library's kernels cannot run on that device.
STDIT_API int stdit_check_device(int device);

// ema[i][j] += (1 - decay) * (param[i][j] - ema[i][j]) for `count` contiguous tensors of sizes[i] elements.
// ema is float32; all params have one dtype, a stdit_dtype.
STDIT_API int stdit_ema_update(float* const* ema, const void* const* params, const int64_t* sizes, int64_t count,
                               int param_dtype, double decay, int device, void* stream);

#ifdef __cplusplus
}
#endif
