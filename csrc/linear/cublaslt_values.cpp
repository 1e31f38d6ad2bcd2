// Holds the declarations of cublaslt.h against cuBLASLt's own header, where the compiler finds it. No code.
#if __has_include(<cublasLt.h>)

#include <cublasLt.h>

#include <type_traits>

#include "linear/cublaslt.h"

namespace stdit::cublaslt {

static_assert(kSuccess == CUBLAS_STATUS_SUCCESS && kComputeFloat32 == CUBLAS_COMPUTE_32F);
static_assert(kFloat32 == CUDA_R_32F && kBfloat16 == CUDA_R_16BF);
static_assert(kAsIs == CUBLAS_OP_N && kTransposed == CUBLAS_OP_T);
static_assert(kTransposeA == CUBLASLT_MATMUL_DESC_TRANSA && kEpilogue == CUBLASLT_MATMUL_DESC_EPILOGUE);
static_assert(kBiasPointer == CUBLASLT_MATMUL_DESC_BIAS_POINTER);
static_assert(kAuxPointer == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER);
static_assert(kAuxStride == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD);
static_assert(kPlain == CUBLASLT_EPILOGUE_DEFAULT && kBias == CUBLASLT_EPILOGUE_BIAS);
static_assert(kGeluAux == CUBLASLT_EPILOGUE_GELU_AUX && kGeluAuxBias == CUBLASLT_EPILOGUE_GELU_AUX_BIAS);
static_assert(kGeluGradient == CUBLASLT_EPILOGUE_DGELU);
static_assert(kMaxWorkspace == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
static_assert(kReductionMask == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
static_assert(kMinAlignmentA == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
static_assert(kMinAlignmentD == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES && kMinAlignmentD == kMinAlignmentA + 3);
static_assert(kNoReduction == CUBLASLT_REDUCTION_SCHEME_NONE);
static_assert(kReductionInWorkspace == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
static_assert(sizeof(Algorithm) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(Proposal) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(Proposal, workspace) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(Proposal, status) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(offsetof(Proposal, waves) == offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));

// Functions differ from the header's in the names of their types alone: enumerations are int, handles are pointers.
template <typename T>
using Passed = std::conditional_t<std::is_enum_v<T>, int, std::conditional_t<std::is_pointer_v<T>, void*, T>>;
template <typename T>
struct Shape;
template <typename R, typename... A>
struct Shape<R (*)(A...)> {
  using type = Passed<R> (*)(Passed<A>...);
};
template <typename Ours, typename Theirs>
constexpr bool kSameCall = std::is_same_v<typename Shape<Ours>::type, typename Shape<Theirs>::type>;

static_assert(kSameCall<decltype(Functions::create), decltype(&cublasLtCreate)>);
static_assert(kSameCall<decltype(Functions::version), decltype(&cublasLtGetVersion)>);
static_assert(kSameCall<decltype(Functions::status_name), decltype(&cublasLtGetStatusName)>);
static_assert(kSameCall<decltype(Functions::operation_create), decltype(&cublasLtMatmulDescCreate)>);
static_assert(kSameCall<decltype(Functions::operation_destroy), decltype(&cublasLtMatmulDescDestroy)>);
static_assert(kSameCall<decltype(Functions::operation_set), decltype(&cublasLtMatmulDescSetAttribute)>);
static_assert(kSameCall<decltype(Functions::layout_create), decltype(&cublasLtMatrixLayoutCreate)>);
static_assert(kSameCall<decltype(Functions::layout_destroy), decltype(&cublasLtMatrixLayoutDestroy)>);
static_assert(kSameCall<decltype(Functions::preference_create), decltype(&cublasLtMatmulPreferenceCreate)>);
static_assert(kSameCall<decltype(Functions::preference_set), decltype(&cublasLtMatmulPreferenceSetAttribute)>);
static_assert(kSameCall<decltype(Functions::preference_destroy), decltype(&cublasLtMatmulPreferenceDestroy)>);
static_assert(kSameCall<decltype(Functions::propose), decltype(&cublasLtMatmulAlgoGetHeuristic)>);
static_assert(kSameCall<decltype(Functions::matmul), decltype(&cublasLtMatmul)>);

}  // namespace stdit::cublaslt

#endif
