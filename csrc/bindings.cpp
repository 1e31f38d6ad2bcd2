// Python bindings: the only file that knows Python. Tensors arrive as addresses, a stream as its handle.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
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
  raise_if_failed(stdit_ema_update(
      reinterpret_cast<float* const*>(ema.data()), reinterpret_cast<const void* const*>(params.data()), sizes.data(),
      static_cast<int64_t>(ema.size()), param_dtype, decay, device, reinterpret_cast<void*>(stream)));
}

// (address, stride of a sequence, of a row, of a head), strides in elements.
using Heads = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

stdit_heads heads_of(const Heads& heads) {
  const auto& [address, sequence_stride, row_stride, head_stride] = heads;
  return {reinterpret_cast<void*>(address), sequence_stride, row_stride, head_stride};
}

// One call's tensors and sizes; see stdit_attention in c_api.h.
class Attention {
 public:
  Attention(const Heads& q, const Heads& k, const Heads& v, const Heads& o, uintptr_t lse, uintptr_t q_weight,
            uintptr_t k_weight, int weight_dtype, bool normalise_q, bool normalise_k, int64_t sequences,
            int64_t queries, int64_t keys, int heads, int head_dim, float scale, float epsilon, uintptr_t key_starts,
            int64_t packed_keys)
      : call_{heads_of(q),
              heads_of(k),
              heads_of(v),
              heads_of(o),
              reinterpret_cast<float*>(lse),
              reinterpret_cast<const void*>(q_weight),
              reinterpret_cast<const void*>(k_weight),
              weight_dtype,
              normalise_q,
              normalise_k,
              sequences,
              queries,
              keys,
              reinterpret_cast<const int*>(key_starts),
              packed_keys,
              heads,
              head_dim,
              scale,
              epsilon} {}

  void forward(int device, uintptr_t stream) const {
    raise_if_failed(stdit_attention_forward(&call_, device, reinterpret_cast<void*>(stream)));
  }
  int64_t backward_scratch(int device) const {
    int64_t bytes = 0;
    raise_if_failed(stdit_attention_backward_scratch(&call_, device, &bytes));
    return bytes;
  }
  void backward(const Heads& d_o, const Heads& d_q, const Heads& d_k, const Heads& d_v, uintptr_t d_weights,
                uintptr_t scratch, int device, uintptr_t stream) const {
    const stdit_attention_gradients gradients{heads_of(d_o),
                                              heads_of(d_q),
                                              heads_of(d_k),
                                              heads_of(d_v),
                                              reinterpret_cast<float*>(d_weights),
                                              reinterpret_cast<void*>(scratch)};
    raise_if_failed(stdit_attention_backward(&call_, &gradients, device, reinterpret_cast<void*>(stream)));
  }

 private:
  stdit_attention call_;
};

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
  py::class_<Attention>(m, "Attention", "softmax(scale * norm(q) norm(k)^T) v of one call; addresses and strides.")
      .def(py::init<const Heads&, const Heads&, const Heads&, const Heads&, uintptr_t, uintptr_t, uintptr_t, int, bool,
                    bool, int64_t, int64_t, int64_t, int, int, float, float, uintptr_t, int64_t>(),
           py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("lse"), py::arg("q_weight"),
           py::arg("k_weight"), py::arg("weight_dtype"), py::arg("normalise_q"), py::arg("normalise_k"),
           py::arg("sequences"), py::arg("queries"), py::arg("keys"), py::arg("heads"), py::arg("head_dim"),
           py::arg("scale"), py::arg("epsilon"), py::arg("key_starts") = 0, py::arg("packed_keys") = 0)
      .def("forward", &Attention::forward, py::arg("device"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>())
      .def("backward_scratch", &Attention::backward_scratch, py::arg("device"))
      .def("backward", &Attention::backward, py::kw_only(), py::arg("d_o"), py::arg("d_q"), py::arg("d_k"),
           py::arg("d_v"), py::arg("d_weights"), py::arg("scratch"), py::arg("device"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>());
}
