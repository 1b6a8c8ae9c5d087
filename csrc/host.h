// Host layer, shared by the operators: argument checks (once, for all devices), tensors to operands, kernel launch.
// A failed check names the operator, the argument, what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <optional>

#include "params.h"
#ifdef FUSED_CRITIC_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fused_critic {

using OptionalTensor = std::optional<at::Tensor>;

inline DType storage_type(const char* op, const char* name, const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble: return DType::kFloat64;
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    case at::kBool: case at::kByte: case at::kChar: return DType::kInt8;
    case at::kShort: case at::kUInt16: return DType::kInt16;
    case at::kInt: case at::kUInt32: return DType::kInt32;
    case at::kLong: case at::kUInt64: return DType::kInt64;
    default: TORCH_CHECK_TYPE(false, op, ": ", name, ": expected bool, an integer, float64, float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

inline void check_floating(const char* op, const char* name, const at::Tensor& x) {
  const auto t = x.scalar_type();
  TORCH_CHECK_TYPE(t == at::kDouble || t == at::kFloat || t == at::kBFloat16 || t == at::kHalf,
                   op, ": ", name, ": expected a floating dtype (float64, float32, bfloat16, float16), got ", t);
}

// How the tensors of one call are laid out, taken from its first per-token argument.
class Arguments {
 public:
  Arguments(const char* op, const char* name, const at::Tensor& reference, const OptionalTensor& cu_seqlens, int64_t time_dim);

  const Layout& layout() const { return layout_; }
  bool empty() const { return layout_.num_seqs == 0 || layout_.seq_len == 0; }

  // A per-token argument: the shape, the device. An absent one stays absent.
  Operand per_token(const char* name, const at::Tensor& x) const;
  Operand per_token(const char* name, const OptionalTensor& x) const { return x.has_value() && x->defined() ? per_token(name, *x) : Operand{}; }
  Operand floating(const char* name, const at::Tensor& x) const;
  Operand floating(const char* name, const OptionalTensor& x) const { return x.has_value() && x->defined() ? floating(name, *x) : Operand{}; }
  // One value per sequence: [num_seqs], or for a single [T] also 0-d.
  Operand per_sequence(const char* name, const OptionalTensor& x) const;
  Output output(const at::Tensor& x) const;
  Output per_sequence_output(const at::Tensor& x) const;
  // A 0-d tensor: read here if it lies on the CPU, by the kernel otherwise.
  Number number(const char* name, const at::Tensor& x) const;
  // That, or one number per sequence, which the kernel reads: [num_seqs] on the device of the other arguments.
  Number number_per_sequence(const char* name, const at::Tensor& x) const;

 private:
  void check_device(const char* name, const at::Tensor& x) const;
  Operand operand(const char* name, const at::Tensor& x) const;
  DType number_type(const char* name, const at::Tensor& x) const;

  const char* op_;
  const char* reference_name_;
  const at::Tensor& reference_;
  at::Tensor cu_seqlens_;  // keeps a contiguous copy alive
  Layout layout_;
  int64_t time_dim_ = 0;   // of the per-token arguments, not negative
};

inline Number number(double value) {
  Number n;
  n.value = value;
  return n;
}

// A number that the host knows, the same for all sequences.
inline bool known(const Number& n) { return n.data == nullptr; }

// For the outputs of one call, `bytes` in all, before they are allocated. glibc returns what is free at the end of its heap to the system when that is
// more than twice the largest block that it has ever unmapped (mallopt(3), M_TRIM_THRESHOLD). Outputs that a caller drops together are, and so every
// call would have all their pages faulted in anew, for several times the kernel's time. A block of their size that is allocated and freed untouched raises
// that bound. Outside of these sizes glibc would do something else.
inline void keep_pages(const at::Device& device, int64_t bytes) {
  constexpr int64_t kLeast = int64_t(128) << 10, kMost = int64_t(32) << 20;  // where its thresholds begin and end
  if (device.is_cpu() && bytes >= kLeast && bytes < kMost) at::empty({bytes}, at::TensorOptions().dtype(at::kByte));
}

#ifdef FUSED_CRITIC_WITH_CUDA
// Runs launch(workspace, stream) with `device` current, on its current stream, with scratch from the caching allocator.
template <typename Launch>
void launch_on(const at::Device& device, int64_t workspace_bytes, const Launch& launch) {
  const c10::cuda::CUDAGuard guard(device);
  at::Tensor workspace;
  if (workspace_bytes > 0) workspace = at::empty({workspace_bytes}, at::TensorOptions().dtype(at::kByte).device(device));
  launch(workspace_bytes > 0 ? workspace.mutable_data_ptr() : nullptr, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
#endif

}  // namespace fused_critic
