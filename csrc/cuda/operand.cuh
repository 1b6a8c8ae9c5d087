// Typed access to operands. The dtype tag is the same for every thread of a launch, so the switch is a uniform branch:
// a new storage type costs one line per switch and no instantiation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../params.h"

namespace fused_critic::cuda {

constexpr int kVec = 4;  // tokens that one thread holds side by side: 16 bytes of float

__host__ __device__ constexpr int dtype_size(DType t) {
  switch (t) {
    case DType::kFloat64: case DType::kInt64: return 8;
    case DType::kFloat32: case DType::kInt32: return 4;
    case DType::kBFloat16: case DType::kFloat16: case DType::kInt16: return 2;
    case DType::kInt8: break;
  }
  return 1;
}

// An element of a floating operand.
template <typename T>
__device__ __forceinline__ T load(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<T>(static_cast<const double*>(data)[i]);
    case DType::kFloat32: return static_cast<T>(static_cast<const float*>(data)[i]);
    case DType::kBFloat16: return static_cast<T>(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]));
    default: return static_cast<T>(__half2float(static_cast<const __half*>(data)[i]));
  }
}

// The number of a sequence; without `seq`, one that is the same for all.
__device__ __forceinline__ double load_number(const Number& n, int64_t seq = 0) {
  if (n.data == nullptr) return n.value;
  const int64_t i = seq * n.seq_stride;
  if (n.dtype == DType::kInt64) return static_cast<double>(static_cast<const int64_t*>(n.data)[i]);
  if (n.dtype == DType::kInt32) return static_cast<double>(static_cast<const int32_t*>(n.data)[i]);
  return load<double>(n.data, n.dtype, i);
}

}  // namespace fused_critic::cuda
