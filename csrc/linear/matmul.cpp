// One GEMM of a linear layer y = x W^T + bias, as cuBLASLt runs it.
//
// All matrices are row-major here and column-major there, which is the transpose: every product is asked for as
// result^T = second^T-or-second * first-or-first^T, so that cuBLASLt's A is our second operand and its B our first.
// Its epilogues work along the rows of its D, which are our columns: where bias and bias gradient belong.
//
// The algorithm is the library's first proposal, never one that was timed: the same on every run and inside captures
// of CUDA graphs, so that runs repeat bit for bit. For that, too, tiles that several blocks work on may be added up in
// the workspace alone, in a fixed order, and not by atomics.
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "linear/cublaslt.h"
#include "stdit/device_guard.h"
#include "stdit/linear.h"

#define STDIT_LT(call) ::stdit::cublaslt::check(lt.call, "cuBLASLt " #call)

namespace stdit {

namespace lt_values = cublaslt;

namespace {

constexpr size_t kMaxWorkspaceBytes = size_t{32} << 20;
constexpr uint32_t kAlignment = 16;  // bytes, of every array
constexpr int kMaxProposals = 16;

void check_layer(const stdit_linear& layer) {
  for (int64_t size : {layer.rows, layer.in_features, layer.out_features}) {
    if (size <= 0) throw std::invalid_argument("linear: a size of " + std::to_string(size));
  }
  if (layer.in_features % 8 || layer.out_features % 8) {
    throw std::invalid_argument("linear: features " + std::to_string(layer.in_features) + " to " +
                                std::to_string(layer.out_features) + ", where multiples of 8 are needed");
  }
}

uint32_t epilogue_of(const stdit_linear& layer) {
  using namespace lt_values;
  switch (layer.product) {
    case STDIT_LINEAR_FORWARD:
      return layer.gelu ? (layer.bias ? kGeluAuxBias : kGeluAux) : (layer.bias ? kBias : kPlain);
    case STDIT_LINEAR_INPUT_GRADIENT:
      if (!layer.bias) return layer.gelu ? kGeluGradient : kPlain;
      break;
  }
  throw std::invalid_argument("linear: product " + std::to_string(layer.product) + " with gelu " +
                              std::to_string(layer.gelu) + " and bias " + std::to_string(layer.bias));
}

cublaslt::Handle handle_of(int device) {  // the device is current
  static std::mutex mutex;
  static std::map<int, cublaslt::Handle> handles;
  const std::lock_guard lock(mutex);
  auto found = handles.find(device);
  if (found == handles.end()) {
    const auto& lt = cublaslt::functions();
    cublaslt::Handle handle = nullptr;
    STDIT_LT(create(&handle));
    found = handles.emplace(device, handle).first;
  }
  return found->second;
}

void check_address(const void* address, const char* name) {
  if (!address) throw std::invalid_argument(std::string("linear: no ") + name);
  if (reinterpret_cast<uintptr_t>(address) % kAlignment) {
    throw std::invalid_argument(std::string("linear: ") + name + " is not at a multiple of 16 bytes");
  }
}

class Matmul final : public LinearPlan {
 public:
  Matmul(const stdit_linear& layer, int device, int rank) : layer_(layer) {
    check_layer(layer);
    epilogue_ = epilogue_of(layer);
    if (rank < 0 || rank >= kMaxProposals) throw std::invalid_argument("linear: rank " + std::to_string(rank));
    const DeviceGuard guard(device);
    const auto& lt = cublaslt::functions();
    handle_ = handle_of(device);
    STDIT_LT(operation_create(&operation_, lt_values::kComputeFloat32, lt_values::kFloat32));
    try {
      describe();
      choose(rank);
    } catch (...) {
      destroy();
      throw;
    }
  }
  ~Matmul() override { destroy(); }
  Matmul(const Matmul&) = delete;
  Matmul& operator=(const Matmul&) = delete;

  int64_t workspace_bytes() const override { return static_cast<int64_t>(proposal_.workspace); }

  void run(const stdit_linear_arrays& arrays, cudaStream_t stream) const override {
    check_address(arrays.first, "first operand");
    check_address(arrays.second, "second operand");
    check_address(arrays.result, "result");
    if (layer_.bias) check_address(arrays.bias, "bias");
    if (layer_.gelu) check_address(arrays.hidden, "hidden values");
    if (proposal_.workspace) check_address(arrays.workspace, "workspace");
    const auto& lt = cublaslt::functions();
    const float one = 1, zero = 0;
    const std::lock_guard lock(mutex_);  // the operation holds this call's addresses until it is launched
    if (layer_.bias) set(lt_values::kBiasPointer, arrays.bias);
    if (layer_.gelu) set(lt_values::kAuxPointer, arrays.hidden);
    STDIT_LT(matmul(handle_, operation_, &one, arrays.second, a_, arrays.first, b_, &zero, arrays.result, d_,
                    arrays.result, d_, &proposal_.algorithm, arrays.workspace, proposal_.workspace, stream));
  }

 private:
  void destroy() {
    const auto& lt = cublaslt::functions();
    for (cublaslt::Layout layout : {a_, b_, d_}) {
      if (layout) lt.layout_destroy(layout);
    }
    if (operation_) lt.operation_destroy(operation_);
  }

  // Transposes, layouts and epilogue.
  void describe() {
    const auto& lt = cublaslt::functions();
    const auto rows = static_cast<uint64_t>(layer_.rows), in = static_cast<uint64_t>(layer_.in_features),
               out = static_cast<uint64_t>(layer_.out_features);
    const auto layout = [&](cublaslt::Layout& made, uint64_t columns, uint64_t count) {  // row-major [count, columns]
      STDIT_LT(layout_create(&made, lt_values::kBfloat16, columns, count, static_cast<int64_t>(columns)));
    };
    const bool forward = layer_.product == STDIT_LINEAR_FORWARD;
    layout(a_, in, out);                   // the weight
    layout(b_, forward ? in : out, rows);  // x, or dy
    layout(d_, forward ? out : in, rows);
    set(lt_values::kTransposeA, forward ? lt_values::kTransposed : lt_values::kAsIs);
    set(lt_values::kEpilogue, epilogue_);
    // The library looks at the addresses' alignment when it proposes an algorithm.
    const void* aligned = reinterpret_cast<const void*>(uintptr_t{kAlignment});
    if (layer_.bias) set(lt_values::kBiasPointer, aligned);
    if (layer_.gelu) {
      set(lt_values::kAuxPointer, aligned);
      set(lt_values::kAuxStride, forward ? layer_.out_features : layer_.in_features);
    }
  }

  void choose(int rank) {
    const auto& lt = cublaslt::functions();
    cublaslt::Preference preference = nullptr;
    STDIT_LT(preference_create(&preference));
    const auto prefer = [&](int attribute, auto value) {
      STDIT_LT(preference_set(preference, attribute, &value, sizeof(value)));
    };
    prefer(lt_values::kMaxWorkspace, kMaxWorkspaceBytes);
    prefer(lt_values::kReductionMask, lt_values::kReductionInWorkspace | lt_values::kNoReduction);
    for (int operand = lt_values::kMinAlignmentA; operand <= lt_values::kMinAlignmentD; ++operand) {
      prefer(operand, kAlignment);
    }
    std::vector<cublaslt::Proposal> proposals(rank + 1);
    int found = 0;
    const int status = lt.propose(handle_, operation_, a_, b_, d_, d_, preference, rank + 1, proposals.data(), &found);
    lt.preference_destroy(preference);
    cublaslt::check(status, "cuBLASLt propose");
    if (found <= rank) {
      throw std::runtime_error("cuBLASLt proposes " + std::to_string(found) + " algorithms for this layer");
    }
    proposal_ = proposals[rank];
    cublaslt::check(proposal_.status, "cuBLASLt propose");
  }

  template <typename Value>
  void set(int attribute, Value value) const {
    const auto& lt = cublaslt::functions();
    STDIT_LT(operation_set(operation_, attribute, &value, sizeof(value)));
  }

  stdit_linear layer_;
  uint32_t epilogue_ = 0;
  cublaslt::Handle handle_ = nullptr;
  cublaslt::Operation operation_ = nullptr;
  cublaslt::Layout a_ = nullptr, b_ = nullptr, d_ = nullptr;
  cublaslt::Proposal proposal_{};
  mutable std::mutex mutex_;
};

}  // namespace

std::unique_ptr<LinearPlan> plan_linear(const stdit_linear& layer, int device, int rank) {
  return std::make_unique<Matmul>(layer, device, rank);
}

int64_t cublaslt_version() { return static_cast<int64_t>(cublaslt::functions().version()); }

}  // namespace stdit
