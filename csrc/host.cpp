#include "host.h"

#include <cstdlib>
#include <cstring>

namespace fused_critic {
namespace {

int64_t integer(const at::Tensor& cpu, int64_t i) {
  return cpu.scalar_type() == at::kInt ? cpu.const_data_ptr<int32_t>()[i] : cpu.const_data_ptr<int64_t>()[i];
}

void check_cu_seqlens_values(const char* op, const at::Tensor& cu_seqlens, int64_t tokens) {
  const at::Tensor cpu = cu_seqlens.to(at::kCPU);
  const int64_t last = cpu.numel() - 1;
  TORCH_CHECK_VALUE(integer(cpu, 0) == 0, op, ": cu_seqlens: expected to start at 0, got ", integer(cpu, 0));
  for (int64_t i = 0; i < last; ++i) {
    TORCH_CHECK_VALUE(integer(cpu, i) <= integer(cpu, i + 1), op, ": cu_seqlens: expected no decrease, got ", integer(cpu, i), " then ", integer(cpu, i + 1),
                      " at index ", i);
  }
  TORCH_CHECK_VALUE(integer(cpu, last) == tokens, op, ": cu_seqlens: expected to end at the number of tokens, ", tokens, ", got ", integer(cpu, last));
}

bool validate_on_device() {
  const char* value = std::getenv("FUSED_CRITIC_CHECK");
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

}  // namespace

Arguments::Arguments(const char* op, const char* name, const at::Tensor& reference, const OptionalTensor& cu_seqlens, int64_t time_dim)
    : op_(op), reference_name_(name), reference_(reference) {
  const int64_t dims = reference.dim();
  TORCH_CHECK_VALUE(dims == 1 || dims == 2, op, ": ", name, ": expected 1 or 2 dimensions ([T], packed [N] with cu_seqlens, [B, T] or [T, B]), got shape ",
                    reference.sizes());
  TORCH_CHECK_VALUE(time_dim >= -dims && time_dim < dims, op, ": time_dim: expected a dimension of ", name, " (shape ", reference.sizes(), "), got ", time_dim);
  time_dim_ = time_dim < 0 ? time_dim + dims : time_dim;
  if (!cu_seqlens.has_value() || !cu_seqlens->defined()) {
    layout_.seq_len = reference.size(time_dim_);
    layout_.num_seqs = dims == 1 ? 1 : reference.size(1 - time_dim_);
    return;
  }
  TORCH_CHECK_VALUE(dims == 1, op, ": ", name, ": expected the packed shape [N] beside cu_seqlens, got ", reference.sizes());
  TORCH_CHECK_TYPE(cu_seqlens->scalar_type() == at::kInt || cu_seqlens->scalar_type() == at::kLong,
                   op, ": cu_seqlens: expected int32 or int64, got ", cu_seqlens->scalar_type());
  TORCH_CHECK_VALUE(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1, op, ": cu_seqlens: expected shape [number of sequences + 1], got ", cu_seqlens->sizes());
  check_device("cu_seqlens", *cu_seqlens);
  cu_seqlens_ = cu_seqlens->contiguous();
  layout_.num_seqs = cu_seqlens_.numel() - 1;
  layout_.seq_len = reference.size(0);
  layout_.cu_seqlens = cu_seqlens_.const_data_ptr();
  layout_.cu_seqlens_dtype = cu_seqlens_.scalar_type() == at::kInt ? DType::kInt32 : DType::kInt64;
  if (cu_seqlens_.is_cpu() || validate_on_device()) check_cu_seqlens_values(op, cu_seqlens_, layout_.seq_len);
}

void Arguments::check_device(const char* name, const at::Tensor& x) const {
  TORCH_CHECK_VALUE(x.device() == reference_.device(), op_, ": ", name, ": expected device ", reference_.device(), " (that of ", reference_name_, "), got ", x.device());
}

Operand Arguments::operand(const char* name, const at::Tensor& x) const {
  TORCH_CHECK_VALUE(x.sizes() == reference_.sizes(), op_, ": ", name, ": expected shape ", reference_.sizes(), " (that of ", reference_name_, "), got ", x.sizes(),
                    "; nothing is broadcast");
  check_device(name, x);
  Operand out;
  out.dtype = storage_type(op_, name, x);
  out.data = x.const_data_ptr();
  out.time_stride = x.stride(time_dim_);
  out.seq_stride = x.dim() == 2 ? x.stride(1 - time_dim_) : 0;
  return out;
}

Operand Arguments::per_token(const char* name, const at::Tensor& x) const { return operand(name, x); }

Operand Arguments::floating(const char* name, const at::Tensor& x) const {
  check_floating(op_, name, x);
  return operand(name, x);
}

Operand Arguments::per_sequence(const char* name, const OptionalTensor& x) const {
  if (!x.has_value() || !x->defined()) return {};
  check_floating(op_, name, *x);
  const bool fits = (x->dim() == 1 && x->size(0) == layout_.num_seqs) || (x->dim() == 0 && reference_.dim() == 1 && layout_.cu_seqlens == nullptr);
  TORCH_CHECK_VALUE(fits, op_, ": ", name, ": expected shape [", layout_.num_seqs, "] (one value per sequence), got ", x->sizes());
  check_device(name, *x);
  Operand out;
  out.dtype = storage_type(op_, name, *x);
  out.data = x->const_data_ptr();
  out.seq_stride = x->dim() == 1 ? x->stride(0) : 0;
  return out;
}

Output Arguments::output(const at::Tensor& x) const {
  Output out;
  out.dtype = storage_type(op_, "output", x);
  out.data = x.mutable_data_ptr();
  out.time_stride = x.stride(time_dim_);
  out.seq_stride = x.dim() == 2 ? x.stride(1 - time_dim_) : 0;
  return out;
}

Output Arguments::per_sequence_output(const at::Tensor& x) const {
  Output out;
  out.dtype = storage_type(op_, "output", x);
  out.data = x.mutable_data_ptr();
  out.seq_stride = 1;
  return out;
}

DType Arguments::number_type(const char* name, const at::Tensor& x) const {
  const auto t = x.scalar_type();
  TORCH_CHECK_TYPE(t == at::kDouble || t == at::kFloat || t == at::kBFloat16 || t == at::kHalf || t == at::kLong || t == at::kInt,
                   op_, ": ", name, ": expected a number, or a tensor of a floating dtype, int64 or int32, got ", t);
  return storage_type(op_, name, x);
}

Number Arguments::number(const char* name, const at::Tensor& x) const {
  TORCH_CHECK_VALUE(x.dim() == 0, op_, ": ", name, ": expected a number or a 0-d tensor, got shape ", x.sizes());
  Number out;
  out.dtype = number_type(name, x);
  if (x.is_cpu()) {
    out.value = x.item().toDouble();
  } else {
    check_device(name, x);
    out.data = x.const_data_ptr();
  }
  return out;
}

Number Arguments::number_per_sequence(const char* name, const at::Tensor& x) const {
  if (x.dim() == 0) return number(name, x);
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == layout_.num_seqs, op_, ": ", name, ": expected a number, a 0-d tensor or shape [", layout_.num_seqs,
                    "] (one number per sequence), got shape ", x.sizes());
  check_device(name, x);
  Number out;
  out.dtype = number_type(name, x);
  out.data = x.const_data_ptr();
  out.seq_stride = x.stride(0);
  return out;
}

}  // namespace fused_critic
