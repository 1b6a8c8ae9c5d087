// Value loss: host entry (checks, allocation, dispatch by device) and autograd.
#include "value_loss.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "autograd.h"
#include "host.h"
#ifdef FUSED_CRITIC_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace fused_critic {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kOp = "fused_critic.value_loss";
constexpr const char* kBackwardOp = "fused_critic.value_loss_backward";

Reduction parse_reduction(const char* op, c10::string_view name) {
  if (name == "token-mean") return Reduction::kTokenMean;
  if (name == "token-sum") return Reduction::kTokenSum;
  if (name == "seq-mean-token-sum") return Reduction::kSeqMeanTokenSum;
  if (name == "seq-mean-token-sum-norm") return Reduction::kSeqMeanTokenSumNorm;
  if (name == "seq-mean-token-mean") return Reduction::kSeqMeanTokenMean;
  if (name == "none") return Reduction::kNone;
  TORCH_CHECK_VALUE(false, op, ": reduction: expected one of token-mean, token-sum, seq-mean-token-sum, seq-mean-token-sum-norm, seq-mean-token-mean, none, got '",
                    name, "'");
}

// 1 / delta of a smooth_l1 so narrow that float holds no such number; its square never counts there.
constexpr double kMaxCurvature = std::numeric_limits<float>::max();

Criterion parse_criterion(const char* op, c10::string_view name, double delta) {
  Criterion c;
  if (name == "mse") return c;
  if (name == "l1") {
    c.delta = c.curvature = 0;
    return c;
  }
  const bool huber = name == "huber";
  TORCH_CHECK_VALUE(huber || name == "smooth_l1", op, ": criterion: expected one of mse, huber, smooth_l1, l1, got '", name, "'");
  TORCH_CHECK_VALUE(delta > 0 && std::isfinite(delta), op, ": delta: expected a positive, finite number for ", name, ", got ", delta);
  c.delta = delta;
  c.curvature = huber ? 1 : std::min(1 / delta, kMaxCurvature);
  c.slope = huber ? delta : 1;
  c.offset = delta / 2;
  return c;
}

bool counts_sequences(Reduction r) { return r == Reduction::kSeqMeanTokenSum || r == Reduction::kSeqMeanTokenSumNorm || r == Reduction::kSeqMeanTokenMean; }

void check_count(const char* name, const std::optional<Number>& count) {
  if (!count.has_value() || !known(*count)) return;
  TORCH_CHECK_VALUE(count->value >= 0, kOp, ": ", name, ": expected a count, at least 0, got ", count->value);
}

// Denominator and factor of the reduction (see ValueLossParams).
void set_reduction(ValueLossParams& p, const std::optional<Number>& batch_num_tokens, const std::optional<Number>& global_batch_size, double dp_size,
                   std::optional<double> loss_scale_factor) {
  check_count("batch_num_tokens", batch_num_tokens);
  check_count("global_batch_size", global_batch_size);
  TORCH_CHECK_VALUE(dp_size > 0, kOp, ": dp_size: expected a positive number, got ", dp_size);
  const bool tokens = p.reduction == Reduction::kTokenMean, seqs = counts_sequences(p.reduction);
  const std::optional<Number>& count = tokens ? batch_num_tokens : global_batch_size;
  TORCH_CHECK_VALUE(dp_size == 1 || count.has_value() || !(tokens || seqs), kOp, ": dp_size: expected ", tokens ? "batch_num_tokens" : "global_batch_size",
                    " beside dp_size > 1 for this reduction (a mean over all ranks needs the global count), got dp_size ", dp_size, " alone");
  if ((tokens || seqs) && count.has_value()) {
    p.has_count = true;
    p.count = *count;
  }
  p.factor = p.reduction == Reduction::kNone ? 1 : dp_size;
  if (p.reduction != Reduction::kSeqMeanTokenSumNorm) return;
  TORCH_CHECK_VALUE(loss_scale_factor.has_value() || p.layout.cu_seqlens == nullptr,
                    kOp, ": loss_scale_factor: expected a number for seq-mean-token-sum-norm with cu_seqlens (packed input has no padded length), got None");
  const double divisor = loss_scale_factor.value_or(double(p.layout.seq_len));
  TORCH_CHECK_VALUE(!loss_scale_factor.has_value() || divisor > 0, kOp, ": loss_scale_factor: expected a positive number, got ", divisor);
  p.factor = divisor == 0 ? 0 : p.factor / divisor;  // a padded length of 0: nothing to sum either
}

bool is_double(const at::Tensor& x) { return x.scalar_type() == at::kDouble; }
bool is_double(const OptionalTensor& x) { return x.has_value() && is_double(*x); }

// Of the per-token arguments that the loss is computed from.
template <typename... Tensors>
at::ScalarType accumulation_type(const Tensors&... x) {
  return (is_double(x) || ...) ? at::kDouble : at::kFloat;
}

template <typename T>
void run(const ValueLossParams& p, const at::Device& device) {
#ifdef FUSED_CRITIC_WITH_CUDA
  if (device.is_cuda()) {
    launch_on(device, cuda::value_loss_workspace<T>(p), [&](void* workspace, cudaStream_t stream) { cuda::launch_value_loss<T>(p, workspace, stream); });
    return;
  }
#endif
  (void)device;
  cpu::value_loss<T>(p);
}

template <typename T>
void run(const ValueLossBackwardParams& p, const at::Device& device) {
#ifdef FUSED_CRITIC_WITH_CUDA
  if (device.is_cuda()) {
    launch_on(device, 0, [&](void*, cudaStream_t stream) { cuda::launch_value_loss_backward<T>(p, stream); });
    return;
  }
#endif
  (void)device;
  cpu::value_loss_backward<T>(p);
}

// What an empty problem gives on a device whose kernels are not launched for it.
void fill_empty(const ValueLossParams& p, at::Tensor& loss, at::Tensor& stats, at::Tensor& residuals) {
  if (p.reduction != Reduction::kNone) loss.zero_();
  stats.zero_();
  stats.select(0, kValueMin).fill_(std::numeric_limits<double>::infinity());
  stats.select(0, kValueMax).fill_(-std::numeric_limits<double>::infinity());
  residuals.zero_();
}

// One end of the clip range: a number, or one for each token.
struct Bound {
  Number number;
  OptionalTensor each;
};

struct TokenArguments {
  bool clip;
  Bound low, high;
  c10::string_view criterion;
  double delta;
  bool clip_only;
  std::optional<Number> loss_clamp;
};

Outputs forward(const Arguments& args, const at::Tensor& values, const OptionalTensor& old_values, const at::Tensor& returns, const OptionalTensor& mask,
                const TokenArguments& token, c10::string_view reduction, const std::optional<Number>& batch_num_tokens, const std::optional<Number>& global_batch_size,
                double dp_size, std::optional<double> loss_scale_factor) {
  ValueLossParams p;
  p.layout = args.layout();
  p.values = args.floating("values", values);
  TORCH_CHECK_VALUE(!token.clip || old_values.has_value(), kOp, ": old_values: expected a tensor beside a clip range, got None (clip_range=None: no clipping)");
  if (token.clip) p.old_values = args.floating("old_values", old_values);
  p.returns = args.floating("returns", returns);
  p.mask = args.per_token("mask", mask);
  LossOptions& o = p.options;
  o.clip = token.clip;
  o.clip_lows = args.floating("clip_low", token.low.each);
  o.clip_highs = args.floating("clip_high", token.high.each);
  p.clip_low = token.low.number;
  p.clip_high = token.high.number;
  if (token.clip && !token.low.each.has_value() && !token.high.each.has_value() && known(p.clip_low) && known(p.clip_high)) {
    TORCH_CHECK_VALUE(p.clip_low.value <= p.clip_high.value, kOp, ": clip_range: expected a number >= 0 or a pair (low, high) with low <= high, got (", p.clip_low.value,
                      ", ", p.clip_high.value, ")");
  }
  o.criterion = parse_criterion(kOp, token.criterion, token.delta);
  o.clip_only = token.clip_only;
  o.clamp = token.loss_clamp.has_value();
  if (o.clamp) {
    p.loss_clamp = *token.loss_clamp;
    TORCH_CHECK_VALUE(!known(p.loss_clamp) || p.loss_clamp.value > 0, kOp, ": loss_clamp: expected a positive number or None, got ", p.loss_clamp.value);
  }
  p.reduction = parse_reduction(kOp, reduction);
  set_reduction(p, batch_num_tokens, global_batch_size, dp_size, loss_scale_factor);

  const at::ScalarType type = accumulation_type(values, token.clip ? old_values : std::nullopt, returns, token.low.each, token.high.each);
  const auto options = values.options().dtype(type);
  const bool none = p.reduction == Reduction::kNone;
  at::Tensor loss = none ? at::empty_like(values, options) : at::empty({}, options);
  at::Tensor stats = at::empty({kNumMoments}, options.dtype(at::kDouble));
  const int64_t factors = p.reduction == Reduction::kSeqMeanTokenMean ? p.layout.num_seqs : 0;
  at::Tensor residuals = at::empty({kSeqScale + factors + o.clamp}, options.dtype(at::kDouble));
  if (none) {
    p.tokens = args.output(loss);
  } else {
    p.loss = loss.mutable_data_ptr();
  }
  p.stats = stats.mutable_data_ptr<double>();
  p.residuals = residuals.mutable_data_ptr<double>();
  if (o.clamp) p.clamp_residual = p.residuals + kSeqScale + factors;
  if (args.empty() && !values.is_cpu()) {
    fill_empty(p, loss, stats, residuals);
  } else if (type == at::kDouble) {
    run<double>(p, values.device());
  } else {
    run<float>(p, values.device());
  }
  return {std::move(loss), std::move(stats), std::move(residuals)};
}

std::optional<Number> optional_number(std::optional<double> x) { return x.has_value() ? std::optional<Number>(number(*x)) : std::nullopt; }

Outputs value_loss(const at::Tensor& values, const OptionalTensor& old_values, const at::Tensor& returns, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                   double clip_low, double clip_high, bool clip, c10::string_view criterion, double delta, bool clip_only, std::optional<double> loss_clamp,
                   c10::string_view reduction, std::optional<double> batch_num_tokens, std::optional<double> global_batch_size, double dp_size,
                   std::optional<double> loss_scale_factor, int64_t time_dim) {
  const Arguments args(kOp, "values", values, cu_seqlens, time_dim);
  const TokenArguments token = {clip, {number(clip_low), {}}, {number(clip_high), {}}, criterion, delta, clip_only, optional_number(loss_clamp)};
  return forward(args, values, old_values, returns, mask, token, reduction, optional_number(batch_num_tokens), optional_number(global_batch_size), dp_size,
                 loss_scale_factor);
}

Outputs value_loss_tensor(const at::Tensor& values, const OptionalTensor& old_values, const at::Tensor& returns, const OptionalTensor& mask,
                          const OptionalTensor& cu_seqlens, const OptionalTensor& clip_low, const OptionalTensor& clip_high, const OptionalTensor& batch_num_tokens,
                          const OptionalTensor& global_batch_size, const OptionalTensor& loss_clamp, bool clip, c10::string_view criterion, double delta,
                          bool clip_only, c10::string_view reduction, double dp_size, std::optional<double> loss_scale_factor, int64_t time_dim) {
  const Arguments args(kOp, "values", values, cu_seqlens, time_dim);
  const auto read = [&](const char* name, const OptionalTensor& x) { return x.has_value() ? std::optional<Number>(args.number(name, *x)) : std::nullopt; };
  const auto bound = [&](const char* name, const OptionalTensor& x) -> Bound {
    if (!clip) return {number(0), {}};
    TORCH_CHECK_VALUE(x.has_value(), kOp, ": ", name, ": expected a tensor, got None (clip=False: no clipping)");
    if (x->dim() == 0) return {args.number(name, *x), {}};
    TORCH_CHECK_VALUE(x->sizes() == values.sizes(), kOp, ": ", name, ": expected a number, a 0-d tensor or shape ", values.sizes(), " (that of values), got shape ",
                      x->sizes(), "; nothing is broadcast");
    return {number(0), x};
  };
  const TokenArguments token = {clip, bound("clip_low", clip_low), bound("clip_high", clip_high), criterion, delta, clip_only, read("loss_clamp", loss_clamp)};
  return forward(args, values, old_values, returns, mask, token, reduction, read("batch_num_tokens", batch_num_tokens), read("global_batch_size", global_batch_size),
                 dp_size, loss_scale_factor);
}

at::Tensor value_loss_backward(const at::Tensor& grad_loss, const at::Tensor& values, const OptionalTensor& old_values, const at::Tensor& returns,
                               const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const at::Tensor& residuals, const OptionalTensor& clip_low,
                               const OptionalTensor& clip_high, bool clip, c10::string_view reduction, int64_t time_dim, c10::string_view criterion, double delta,
                               bool clip_only, bool clamp) {
  const Arguments args(kBackwardOp, "values", values, cu_seqlens, time_dim);
  ValueLossBackwardParams p;
  p.layout = args.layout();
  p.values = args.floating("values", values);
  TORCH_CHECK_VALUE(!clip || old_values.has_value(), kBackwardOp, ": old_values: expected a tensor with clip=True, got None");
  if (clip) p.old_values = args.floating("old_values", old_values);
  p.returns = args.floating("returns", returns);
  p.mask = args.per_token("mask", mask);
  p.options.clip = clip;
  const OptionalTensor lows = clip ? clip_low : std::nullopt, highs = clip ? clip_high : std::nullopt;
  p.options.clip_lows = args.floating("clip_low", lows);
  p.options.clip_highs = args.floating("clip_high", highs);
  p.options.criterion = parse_criterion(kBackwardOp, criterion, delta);
  p.options.clip_only = clip_only;
  p.options.clamp = clamp;
  const Reduction r = parse_reduction(kBackwardOp, reduction);
  p.seq_scale = r == Reduction::kSeqMeanTokenMean;
  const int64_t expected = kSeqScale + (p.seq_scale ? p.layout.num_seqs : 0) + clamp;
  TORCH_CHECK_VALUE(residuals.dim() == 1 && residuals.numel() == expected && residuals.scalar_type() == at::kDouble && residuals.device() == values.device(), kBackwardOp,
                    ": residuals: expected the third output of value_loss (float64 [", expected, "] on ", values.device(), "), got ", residuals.scalar_type(), " ",
                    residuals.sizes(), " on ", residuals.device());
  const at::Tensor contiguous_residuals = residuals.contiguous();
  p.residuals = contiguous_residuals.const_data_ptr<double>();
  if (clamp) p.loss_clamp = p.residuals + expected - 1;
  const at::ScalarType type = accumulation_type(values, clip ? old_values : std::nullopt, returns, lows, highs);
  // A gradient in another dtype comes from a caller's own graph only; torch casts the ones it makes itself.
  const at::Tensor grad = grad_loss.scalar_type() == type ? grad_loss : grad_loss.to(type);
  if (r == Reduction::kNone) {
    p.grad_loss = args.floating("grad_loss", grad);
  } else {
    TORCH_CHECK_VALUE(grad.dim() == 0 && grad.device() == values.device(), kBackwardOp, ": grad_loss: expected a 0-d tensor on ", values.device(), ", got shape ",
                      grad.sizes(), " on ", grad.device());
    p.grad_loss.data = grad.const_data_ptr();
    p.grad_loss.dtype = storage_type(kBackwardOp, "grad_loss", grad);
  }
  at::Tensor grad_values = at::empty_like(values);
  p.grad_values = args.output(grad_values);
  if (args.empty()) return grad_values;
  if (type == at::kDouble) {
    run<double>(p, values.device());
  } else {
    run<float>(p, values.device());
  }
  return grad_values;
}

// --- autograd -------------------------------------------------------------------------------------------------------------------

const auto& backward_operator() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_critic::value_loss_backward", "").typed<decltype(value_loss_backward)>();
  return op;
}

// What both overloads say alike, beside the tensors.
struct CallOptions {
  bool clip;
  c10::string_view criterion;
  double delta;
  bool clip_only, clamp;
  c10::string_view reduction;
  int64_t time_dim;
};

struct ValueLossNode : torch::autograd::Node {
  torch::autograd::SavedVariable values, old_values, returns, mask, cu_seqlens, residuals, clip_low, clip_high;
  bool clip = true, clip_only = false, clamp = false;
  double delta = 1;
  std::string criterion, reduction;
  int64_t time_dim = -1;

  std::string name() const override { return "FusedCriticValueLossBackward"; }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return {at::Tensor()};
    return {backward_operator().call(grads[0], values.unpack(), unpack_optional(old_values), returns.unpack(), unpack_optional(mask), unpack_optional(cu_seqlens),
                                     residuals.unpack(), unpack_optional(clip_low), unpack_optional(clip_high), clip, reduction, time_dim, criterion, delta,
                                     clip_only, clamp)};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* saved : {&values, &old_values, &returns, &mask, &cu_seqlens, &residuals, &clip_low, &clip_high}) saved->reset_data();
  }
};

// `call` runs the operator below autograd.
template <typename Call>
Outputs with_autograd(const at::Tensor& values, const OptionalTensor& old_values, const at::Tensor& returns, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                      const OptionalTensor& clip_low, const OptionalTensor& clip_high, const OptionalTensor& loss_clamp, const CallOptions& options, const Call& call) {
  forbid_forward_mode(kOp, values, old_values, returns, mask);
  const bool recording = at::GradMode::is_enabled();
  if (recording) {
    const auto constant = [](const char* name, bool needs) {
      TORCH_CHECK_VALUE(!needs, kOp, ": ", name, ": expected a tensor without gradient (the loss is differentiable in values alone), got one with requires_grad; detach() it");
    };
    constant("old_values", needs_grad(old_values));
    constant("returns", needs_grad(returns));
    constant("mask", needs_grad(mask));
    constant("clip_low", needs_grad(clip_low));
    constant("clip_high", needs_grad(clip_high));
    constant("loss_clamp", needs_grad(loss_clamp));
  }
  Outputs out;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    out = call();
  }
  if (!recording || !needs_grad(values)) return out;
  const auto node = make_node<ValueLossNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(values));
  node->values = torch::autograd::SavedVariable(values, false);
  node->old_values = torch::autograd::SavedVariable(options.clip ? old_values : std::nullopt, false);
  node->returns = torch::autograd::SavedVariable(returns, false);
  node->mask = torch::autograd::SavedVariable(mask, false);
  node->cu_seqlens = torch::autograd::SavedVariable(cu_seqlens, false);
  node->residuals = torch::autograd::SavedVariable(std::get<2>(out), false);
  const auto per_token = [&](const OptionalTensor& bound) { return options.clip && bound.has_value() && bound->dim() > 0; };
  if (per_token(clip_low)) node->clip_low = torch::autograd::SavedVariable(clip_low, false);
  if (per_token(clip_high)) node->clip_high = torch::autograd::SavedVariable(clip_high, false);
  node->clip = options.clip;
  node->clip_only = options.clip_only;
  node->clamp = options.clamp;
  node->delta = options.delta;
  node->criterion = std::string(options.criterion);
  node->reduction = std::string(options.reduction);
  node->time_dim = options.time_dim;
  torch::autograd::set_history(std::get<0>(out), node);
  return out;
}

Outputs value_loss_autograd(const at::Tensor& values, const OptionalTensor& old_values, const at::Tensor& returns, const OptionalTensor& mask,
                            const OptionalTensor& cu_seqlens, double clip_low, double clip_high, bool clip, c10::string_view criterion, double delta, bool clip_only,
                            std::optional<double> loss_clamp, c10::string_view reduction, std::optional<double> batch_num_tokens,
                            std::optional<double> global_batch_size, double dp_size, std::optional<double> loss_scale_factor, int64_t time_dim) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_critic::value_loss", "").typed<decltype(value_loss)>();
  const CallOptions options = {clip, criterion, delta, clip_only, loss_clamp.has_value(), reduction, time_dim};
  return with_autograd(values, old_values, returns, mask, cu_seqlens, {}, {}, {}, options, [&] {
    return op.call(values, old_values, returns, mask, cu_seqlens, clip_low, clip_high, clip, criterion, delta, clip_only, loss_clamp, reduction, batch_num_tokens,
                   global_batch_size, dp_size, loss_scale_factor, time_dim);
  });
}

Outputs value_loss_tensor_autograd(const at::Tensor& values, const OptionalTensor& old_values, const at::Tensor& returns, const OptionalTensor& mask,
                                   const OptionalTensor& cu_seqlens, const OptionalTensor& clip_low, const OptionalTensor& clip_high,
                                   const OptionalTensor& batch_num_tokens, const OptionalTensor& global_batch_size, const OptionalTensor& loss_clamp, bool clip,
                                   c10::string_view criterion, double delta, bool clip_only, c10::string_view reduction, double dp_size,
                                   std::optional<double> loss_scale_factor, int64_t time_dim) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_critic::value_loss", "tensor").typed<decltype(value_loss_tensor)>();
  const CallOptions options = {clip, criterion, delta, clip_only, loss_clamp.has_value(), reduction, time_dim};
  return with_autograd(values, old_values, returns, mask, cu_seqlens, clip_low, clip_high, loss_clamp, options, [&] {
    return op.call(values, old_values, returns, mask, cu_seqlens, clip_low, clip_high, batch_num_tokens, global_batch_size, loss_clamp, clip, criterion, delta, clip_only,
                   reduction, dp_size, loss_scale_factor, time_dim);
  });
}

at::Tensor value_loss_backward_autograd(const at::Tensor& grad_loss, const at::Tensor& values, const OptionalTensor& old_values, const at::Tensor& returns,
                                        const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const at::Tensor& residuals, const OptionalTensor& clip_low,
                                        const OptionalTensor& clip_high, bool clip, c10::string_view reduction, int64_t time_dim, c10::string_view criterion,
                                        double delta, bool clip_only, bool clamp) {
  forbid_forward_mode(kOp, grad_loss, values, old_values, returns, mask);
  at::Tensor out;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    out = backward_operator().call(grad_loss, values, old_values, returns, mask, cu_seqlens, residuals, clip_low, clip_high, clip, reduction, time_dim, criterion, delta,
                                   clip_only, clamp);
  }
  forbid_double_backward("fused_critic.value_loss: double backward is not supported: its gradient cannot be differentiated again", {grad_loss, values}, {out});
  return out;
}

void register_device(torch::Library& m) {
  m.impl("value_loss", TORCH_FN(value_loss));
  m.impl("value_loss.tensor", TORCH_FN(value_loss_tensor));
  m.impl("value_loss_backward", TORCH_FN(value_loss_backward));
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_critic, CPU, m) { register_device(m); }
#ifdef FUSED_CRITIC_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_critic, CUDA, m) { register_device(m); }
#endif

TORCH_LIBRARY_IMPL(fused_critic, Autograd, m) {
  m.impl("value_loss", TORCH_FN(value_loss_autograd));
  m.impl("value_loss.tensor", TORCH_FN(value_loss_tensor_autograd));
  m.impl("value_loss_backward", TORCH_FN(value_loss_backward_autograd));
}

}  // namespace fused_critic
