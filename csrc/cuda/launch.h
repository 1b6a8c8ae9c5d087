// The seam between the host layer and the CUDA kernels: parameters, scratch and a stream in, nothing of torch.
// A launcher only launches: it is called with the right device current, never for an empty problem, and leaves errors to the caller's
// launch check. Geometry depends on the problem alone, never on the device, so results are the same on every GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "../gae.h"
#include "../reverse_scan.h"
#include "../value_loss.h"
#include "../vtrace.h"

namespace fused_critic::cuda {

// The value of the next valid position of the sequence at every position, of masked ones too; bootstrap (or 0) where there is none.
struct NextValues {
  Layout layout;
  Operand values, mask, bootstrap;  // mask and bootstrap may be absent
  Output next;                      // in the accumulation type
};

// Bytes of uninitialised device scratch that the launch needs (0: none), 256-byte aligned, from the caching allocator.
template <typename T> int64_t value_loss_workspace(const ValueLossParams& p);
template <typename T> int64_t gae_workspace(const GaeParams& p);
template <typename T> int64_t gae_backward_workspace(const GaeBackwardParams& p);
template <typename T> int64_t reverse_scan_workspace(const ReverseScanParams& p);
template <typename T> int64_t reverse_scan_backward_workspace(const ReverseScanBackwardParams& p);
template <typename T> int64_t next_values_workspace(const NextValues& p);
template <typename T> int64_t vtrace_workspace(const VTraceParams& p);

// T: accumulation type, float or double.
template <typename T> void launch_value_loss(const ValueLossParams& p, void* workspace, cudaStream_t stream);
template <typename T> void launch_value_loss_backward(const ValueLossBackwardParams& p, cudaStream_t stream);
template <typename T> void launch_gae(const GaeParams& p, void* workspace, cudaStream_t stream);
template <typename T> void launch_gae_backward(const GaeBackwardParams& p, void* workspace, cudaStream_t stream);
template <typename T> void launch_reverse_scan(const ReverseScanParams& p, void* workspace, cudaStream_t stream);
template <typename T> void launch_reverse_scan_backward(const ReverseScanBackwardParams& p, void* workspace, cudaStream_t stream);
template <typename T> void launch_next_values(const NextValues& p, void* workspace, cudaStream_t stream);
template <typename T> void launch_vtrace(const VTraceParams& p, void* workspace, cudaStream_t stream);

}  // namespace fused_critic::cuda
