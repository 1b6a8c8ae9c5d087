// Every operator's schema: the API of torch.ops.fused_critic.*. Meaning of the arguments: python/fused_critic/functional.py.
//
// Numbers come in two overloads: floats, or 0-d tensors (".tensor": read on their device, so a change neither synchronises nor recompiles).
// gamma, lam and returns_lam may also be tensors with one number per sequence.
#include <torch/library.h>

#include "cpu/kernels.h"

TORCH_LIBRARY(fused_critic, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // residuals: what backward needs besides the inputs (csrc/value_loss.h, enum Residual). Differentiable in values.
  m.def(
      "value_loss(Tensor values, Tensor? old_values, Tensor returns, Tensor? mask=None, Tensor? cu_seqlens=None, *, "
      "float clip_low=-0.2, float clip_high=0.2, bool clip=True, str criterion=\"mse\", float delta=1.0, bool clip_only=False, "
      "float? loss_clamp=None, str reduction=\"token-mean\", float? batch_num_tokens=None, float? global_batch_size=None, "
      "float dp_size=1.0, float? loss_scale_factor=None, int time_dim=-1) "
      "-> (Tensor loss, Tensor stats, Tensor residuals)",
      tags);
  // clip_low, clip_high: 0-d, or of the shape of values.
  m.def(
      "value_loss.tensor(Tensor values, Tensor? old_values, Tensor returns, Tensor? mask=None, Tensor? cu_seqlens=None, Tensor? clip_low=None, "
      "Tensor? clip_high=None, Tensor? batch_num_tokens=None, Tensor? global_batch_size=None, Tensor? loss_clamp=None, *, bool clip=True, "
      "str criterion=\"mse\", float delta=1.0, bool clip_only=False, str reduction=\"token-mean\", float dp_size=1.0, "
      "float? loss_scale_factor=None, int time_dim=-1) "
      "-> (Tensor loss, Tensor stats, Tensor residuals)",
      tags);
  // clip_low, clip_high: where they are of the shape of values. clamp: there was a loss_clamp. Both numbers are among the residuals.
  m.def(
      "value_loss_backward(Tensor grad_loss, Tensor values, Tensor? old_values, Tensor returns, Tensor? mask, Tensor? cu_seqlens, "
      "Tensor residuals, Tensor? clip_low=None, Tensor? clip_high=None, *, bool clip, str reduction, int time_dim, str criterion=\"mse\", "
      "float delta=1.0, bool clip_only=False, bool clamp=False) -> Tensor grad_values",
      tags);

  // Differentiable in rewards, values, next_values and bootstrap_values.
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor? mask=None, Tensor? terminated=None, Tensor? truncated=None, Tensor? next_values=None, "
      "Tensor? bootstrap_values=None, Tensor? cu_seqlens=None, *, float gamma, float lam, str mask_mode=\"skip\", int time_dim=-1, "
      "float? returns_lam=None) "
      "-> (Tensor advantages, Tensor returns)",
      tags);
  m.def(
      "gae.tensor(Tensor rewards, Tensor values, Tensor gamma, Tensor lam, Tensor? mask=None, Tensor? terminated=None, Tensor? truncated=None, "
      "Tensor? next_values=None, Tensor? bootstrap_values=None, Tensor? cu_seqlens=None, Tensor? returns_lam=None, *, str mask_mode=\"skip\", "
      "int time_dim=-1) "
      "-> (Tensor advantages, Tensor returns)",
      tags);
  // Gradients that nobody asked for (wanted: rewards, values, next_values, bootstrap_values) are tensors of no element.
  m.def(
      "gae_backward(Tensor? grad_advantages, Tensor? grad_returns, Tensor? mask, Tensor? terminated, Tensor? truncated, Tensor? cu_seqlens, "
      "Tensor gamma, Tensor lam, Tensor? returns_lam=None, *, bool has_next_values, bool[4] wanted, str mask_mode, int time_dim) "
      "-> (Tensor grad_rewards, Tensor grad_values, Tensor grad_next_values, Tensor grad_bootstrap_values)",
      tags);

  // y_t = x_t + decay_t y_{t+1} within each sequence, init beyond its end. decay of ".tensor": 0-d, per sequence or per position.
  // Differentiable in x, decay and init.
  m.def("reverse_scan(Tensor x, Tensor? init=None, Tensor? cu_seqlens=None, *, float decay, int time_dim=-1) -> Tensor y", tags);
  m.def("reverse_scan.tensor(Tensor x, Tensor decay, Tensor? init=None, Tensor? cu_seqlens=None, *, int time_dim=-1) -> Tensor y", tags);
  // x and init: for the gradient of decay alone. Gradients that nobody asked for (wanted: x, decay, init) are tensors of no element.
  m.def(
      "reverse_scan_backward(Tensor grad, Tensor? x, Tensor decay, Tensor? init, Tensor? cu_seqlens, *, bool[3] wanted, int time_dim) "
      "-> (Tensor grad_x, Tensor grad_decay, Tensor grad_init)",
      tags);

  // Exactly one of log_rhos and ratios. Not differentiable: the inputs are constants, as IMPALA has them.
  m.def(
      "vtrace(Tensor rewards, Tensor values, Tensor? log_rhos=None, Tensor? ratios=None, Tensor? mask=None, Tensor? terminated=None, "
      "Tensor? truncated=None, Tensor? next_values=None, Tensor? bootstrap_values=None, Tensor? cu_seqlens=None, *, float gamma, float lam=1.0, "
      "float? rho_clip=1.0, float? c_clip=1.0, float? pg_rho_clip=1.0, int time_dim=-1) "
      "-> (Tensor vs, Tensor pg_advantages, Tensor advantages)",
      tags);
  m.def(
      "vtrace.tensor(Tensor rewards, Tensor values, Tensor gamma, Tensor lam, Tensor? rho_clip, Tensor? c_clip, Tensor? pg_rho_clip, "
      "Tensor? log_rhos=None, Tensor? ratios=None, Tensor? mask=None, Tensor? terminated=None, Tensor? truncated=None, "
      "Tensor? next_values=None, Tensor? bootstrap_values=None, Tensor? cu_seqlens=None, *, int time_dim=-1) "
      "-> (Tensor vs, Tensor pg_advantages, Tensor advantages)",
      tags);

  // The instruction set that the CPU kernels use here.
  m.def("_cpu_capability() -> str", []() -> std::string { return fused_critic::cpu::kernels().name; });
}
