// Plain parameter blocks: the only thing that crosses from the host layer (value_loss.cpp, gae.cpp) to the kernels.
// Nothing below this line of the package knows a torch type.
#pragma once

#include <cstdint>

namespace fused_critic {

// Storage types that a kernel can read. Integers and bool stand for themselves by size alone: only "is it zero" is ever asked of them.
enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16, kInt8, kInt16, kInt32, kInt64 };

// One input. Element (s, t) lies at data[s * seq_stride + t * time_stride]; packed: at data[(cu_seqlens[s] + t) * time_stride].
// Strides count elements and may be 0 (expanded) or negative. data == nullptr: the argument was not given.
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t seq_stride = 0;
  int64_t time_stride = 0;
};

// One output: addressed as Operand, allocated by the host layer, written in full (masked positions too).
struct Output {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t seq_stride = 0;
  int64_t time_stride = 0;
};

// A number that the caller gave as such (data == nullptr: value), or as a tensor on the kernel's device (read there, never by the host):
// sequence s has the element data[s * seq_stride]; 0-d: seq_stride is 0. dtype: floating, kInt32 or kInt64.
struct Number {
  double value = 0;
  const void* data = nullptr;
  DType dtype = DType::kFloat64;
  int64_t seq_stride = 0;
};

// All per-token operands of one call share one layout: num_seqs sequences of seq_len tokens ([B, T], [T, B], [T]),
// or, with cu_seqlens, num_seqs segments of seq_len tokens in all (packed [N]; segment s is [cu_seqlens[s], cu_seqlens[s + 1])).
// On CUDA the content of cu_seqlens is unchecked: kernels clamp every bound into [0, seq_len].
struct Layout {
  int64_t num_seqs = 0;
  int64_t seq_len = 0;
  const void* cu_seqlens = nullptr;
  DType cu_seqlens_dtype = DType::kInt64;  // kInt32 or kInt64
};

}  // namespace fused_critic
