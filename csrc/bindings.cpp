// Python bindings: the only file that knows Python. Tensors arrive as addresses, a stream as its handle.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "stdit/c_api.h"

namespace py = pybind11;

namespace {

using Addresses = std::vector<uintptr_t>;

void raise_if_failed(int status) {
  if (status != 0) throw std::runtime_error(stdit_last_error());
}

void ema_update(const Addresses& ema, const Addresses& params, const std::vector<int64_t>& sizes, int param_dtype,
                double decay, int device, uintptr_t stream) {
  if (params.size() != ema.size() || sizes.size() != ema.size()) {
    throw std::invalid_argument("ema_update: ema, params and sizes differ in length");
  }
  static_assert(sizeof(uintptr_t) == sizeof(void*), "an address is handed on as a pointer");
  raise_if_failed(stdit_ema_update(reinterpret_cast<float* const*>(ema.data()),
                                   reinterpret_cast<const void* const*>(params.data()), sizes.data(),
                                   static_cast<int64_t>(ema.size()), param_dtype, decay, device,
                                   reinterpret_cast<void*>(stream)));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of stdit_fast. A failed CUDA call raises RuntimeError with CUDA's own text.";
  m.attr("FLOAT32") = static_cast<int>(STDIT_FLOAT32);
  m.attr("BFLOAT16") = static_cast<int>(STDIT_BFLOAT16);
  m.attr("cuda_compiler") = stdit_cuda_compiler();
  m.attr("architectures") = stdit_architectures();
  m.def(
      "check_device", [](int device) { raise_if_failed(stdit_check_device(device)); }, py::arg("device"),
      py::call_guard<py::gil_scoped_release>(), "Raises when the library's kernels cannot run on the device.");
  m.def("ema_update", &ema_update, py::arg("ema"), py::arg("params"), py::arg("sizes"), py::arg("param_dtype"),
        py::arg("decay"), py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "ema += (1 - decay) * (param - ema) for arrays at these addresses, of these numbers of elements.");
}
