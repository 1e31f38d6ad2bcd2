// The part of cuBLASLt that is used here, found at run time in the copy that PyTorch has loaded.
//
// The library is neither linked nor needed to compile: what its header declares of it is declared here again, in this
// project's words, and cublaslt_values.cpp holds it against that header wherever there is one. Its interface is plain
// C, whose values have not changed since CUDA 11.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace stdit::cublaslt {

using Handle = void*;      // cublasLtHandle_t
using Operation = void*;   // cublasLtMatmulDesc_t
using Layout = void*;      // cublasLtMatrixLayout_t
using Preference = void*;  // cublasLtMatmulPreference_t

struct Algorithm {
  uint64_t data[8];
};

struct Proposal {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

constexpr int kSuccess = 0;
constexpr int kComputeFloat32 = 68;  // CUBLAS_COMPUTE_32F
constexpr int kFloat32 = 0, kBfloat16 = 14;
constexpr int32_t kAsIs = 0, kTransposed = 1;

// Attributes of an operation.
constexpr int kTransposeA = 3, kEpilogue = 7, kBiasPointer = 8, kAuxPointer = 11, kAuxStride = 12;

// Values of its epilogue.
constexpr uint32_t kPlain = 1, kBias = 4, kGeluAux = 32 | 128, kGeluAuxBias = kGeluAux | 4;
constexpr uint32_t kGeluGradient = 64 | 128;

// Attributes of a preference, and schemes of adding up what several blocks have of one tile.
constexpr int kMaxWorkspace = 1, kReductionMask = 3, kMinAlignmentA = 5, kMinAlignmentD = 8;
constexpr uint32_t kNoReduction = 0, kReductionInWorkspace = 2;

struct Functions {
  int (*create)(Handle*);
  size_t (*version)();
  const char* (*status_name)(int);
  int (*operation_create)(Operation*, int compute_type, int scale_type);
  int (*operation_destroy)(Operation);
  int (*operation_set)(Operation, int attribute, const void* value, size_t bytes);
  int (*layout_create)(Layout*, int type, uint64_t rows, uint64_t columns, int64_t stride);
  int (*layout_destroy)(Layout);
  int (*preference_create)(Preference*);
  int (*preference_set)(Preference, int attribute, const void* value, size_t bytes);
  int (*preference_destroy)(Preference);
  int (*propose)(Handle, Operation, Layout a, Layout b, Layout c, Layout d, Preference, int wanted, Proposal*,
                 int* found);
  int (*matmul)(Handle, Operation, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta,
                const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace, size_t bytes, cudaStream_t);
};

// Throws std::runtime_error where this process has no cuBLASLt.
const Functions& functions();

// Throws with the failed call and the library's name of the failure.
void check(int status, const char* call);

}  // namespace stdit::cublaslt
