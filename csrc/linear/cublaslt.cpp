#include "linear/cublaslt.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace stdit::cublaslt {

namespace {

void* loaded_library() {
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) return library;
  }
  throw std::runtime_error("cuBLASLt is not loaded in this process (a CUDA build of PyTorch 2.11 or newer loads it)");
}

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("this process's cuBLASLt has no ") + name);
}

Functions find_all() {
  void* library = loaded_library();
  Functions found{};
  find(library, "cublasLtCreate", found.create);
  find(library, "cublasLtGetVersion", found.version);
  find(library, "cublasLtGetStatusName", found.status_name);
  find(library, "cublasLtMatmulDescCreate", found.operation_create);
  find(library, "cublasLtMatmulDescDestroy", found.operation_destroy);
  find(library, "cublasLtMatmulDescSetAttribute", found.operation_set);
  find(library, "cublasLtMatrixLayoutCreate", found.layout_create);
  find(library, "cublasLtMatrixLayoutDestroy", found.layout_destroy);
  find(library, "cublasLtMatmulPreferenceCreate", found.preference_create);
  find(library, "cublasLtMatmulPreferenceSetAttribute", found.preference_set);
  find(library, "cublasLtMatmulPreferenceDestroy", found.preference_destroy);
  find(library, "cublasLtMatmulAlgoGetHeuristic", found.propose);
  find(library, "cublasLtMatmul", found.matmul);
  return found;
}

}  // namespace

const Functions& functions() {
  static const Functions found = find_all();  // a failure is tried again at the next call
  return found;
}

void check(int status, const char* call) {
  if (status == kSuccess) return;
  throw std::runtime_error(std::string(call) + ": " + functions().status_name(status));
}

}  // namespace stdit::cublaslt
