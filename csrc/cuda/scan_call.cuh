// How an operator of the scan kernels is called where few instantiations are wanted.
#pragma once

#include "scan.cuh"

namespace fused_critic::cuda {

template <typename T>
constexpr DType accumulation_type() {
  return sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
}

template <typename Op>
struct ScanCall {
  typename Op::Params params;
  ScanPlan plan;
};

// Instantiations: plain access for float, which large calls have; general access for all else.
template <typename Op>
void launch_sparsely(const ScanCall<Op>& call, void* workspace, cudaStream_t stream) {
  if constexpr (sizeof(typename Op::Scalar) == sizeof(float)) {
    if (call.plan.access == Access::kPlain) {
      launch_scan<Op, Access::kPlain>(call.params, call.plan, workspace, stream);
      return;
    }
  }
  launch_scan<Op, Access::kGeneral>(call.params, call.plan, workspace, stream);
}

}  // namespace fused_critic::cuda
