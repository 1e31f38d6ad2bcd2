// The C interface: exceptions end here.
#include "stdit/c_api.h"

#include <exception>
#include <stdexcept>
#include <string>

#include "stdit/adamw.h"
#include "stdit/attention.h"
#include "stdit/device.h"
#include "stdit/device_guard.h"
#include "stdit/linear.h"
#include "stdit/temporal.h"

namespace {

thread_local std::string last_error;

template <typename Call>
int guarded(Call call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an unknown C++ exception";
  }
  return 1;
}

stdit_dtype checked_dtype(int dtype) {
  if (dtype != STDIT_FLOAT32 && dtype != STDIT_BFLOAT16) {
    throw std::invalid_argument("unknown dtype " + std::to_string(dtype));
  }
  return static_cast<stdit_dtype>(dtype);
}

}  // namespace

const char* stdit_last_error(void) { return last_error.c_str(); }
const char* stdit_cuda_compiler(void) { return STDIT_CUDA_COMPILER; }
const char* stdit_architectures(void) { return STDIT_ARCHITECTURES; }

int stdit_check_device(int device) {
  return guarded([&] { stdit::check_device(device); });
}

int stdit_adamw_square_sum(const stdit_adamw* optimizer, const void* const* grads, int grad_dtype, double* square_sum,
                           int device, void* stream) {
  return guarded([&] {
    const stdit_dtype dtype = checked_dtype(grad_dtype);
    const stdit::DeviceGuard guard(device);
    stdit::adamw_square_sum(*optimizer, grads, dtype, square_sum, static_cast<cudaStream_t>(stream));
  });
}

int stdit_adamw_update(const stdit_adamw* optimizer, int grad_dtype, const double* square_sum, const double* loss,
                       const stdit_adamw_settings* settings, int device, void* stream) {
  return guarded([&] {
    const stdit_dtype dtype = checked_dtype(grad_dtype);
    const stdit::DeviceGuard guard(device);
    stdit::adamw_update(*optimizer, dtype, square_sum, loss, *settings, static_cast<cudaStream_t>(stream));
  });
}

int stdit_attention_forward(const stdit_attention* call, void* scratch, int device, void* stream) {
  return guarded([&] {
    stdit::check_attention(*call);
    stdit::check_attention_scratch(*call, scratch);
    const stdit::DeviceGuard guard(device);
    stdit::attention_forward(*call, scratch, static_cast<cudaStream_t>(stream));
  });
}

int stdit_attention_forward_scratch(const stdit_attention* call, int64_t* bytes) {
  return guarded([&] {
    stdit::check_attention(*call);
    *bytes = stdit::attention_forward_scratch(*call);
  });
}

int stdit_attention_backward(const stdit_attention* call, const stdit_attention_gradients* gradients, int device,
                             void* stream) {
  return guarded([&] {
    stdit::check_attention(*call, *gradients);
    const stdit::DeviceGuard guard(device);
    stdit::attention_backward(*call, *gradients, static_cast<cudaStream_t>(stream));
  });
}

int stdit_temporal_backward(const stdit_temporal* call, int device, void* stream) {
  return guarded([&] {
    stdit::check_temporal(*call);
    const stdit::DeviceGuard guard(device);
    stdit::temporal_backward(*call, static_cast<cudaStream_t>(stream));
  });
}

int stdit_temporal_parts(const stdit_temporal* call, int device, int64_t* parts) {
  return guarded([&] {
    stdit::check_temporal(*call);
    const stdit::DeviceGuard guard(device);
    *parts = stdit::temporal_parts(*call);
  });
}

int stdit_attention_backward_scratch(const stdit_attention* call, int device, int64_t* bytes) {
  return guarded([&] {
    stdit::check_attention(*call);
    const stdit::DeviceGuard guard(device);
    *bytes = stdit::attention_backward_scratch(*call);
  });
}

int stdit_cublaslt_version(int64_t* version) {
  return guarded([&] { *version = stdit::cublaslt_version(); });
}

int stdit_linear_plan(const stdit_linear* layer, int device, int rank, void** plan, int64_t* workspace_bytes) {
  return guarded([&] {
    auto made = stdit::plan_linear(*layer, device, rank);
    *workspace_bytes = made->workspace_bytes();
    *plan = made.release();
  });
}

int stdit_linear_run(const void* plan, const stdit_linear_arrays* arrays, void* stream) {
  return guarded([&] {
    static_cast<const stdit::LinearPlan*>(plan)->run(*arrays, static_cast<cudaStream_t>(stream));
  });
}

void stdit_linear_destroy(void* plan) { delete static_cast<stdit::LinearPlan*>(plan); }
