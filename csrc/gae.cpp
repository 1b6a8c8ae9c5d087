// GAE: host entry (checks, allocation, dispatch by device) and autograd.
#include "gae.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "autograd.h"
#include "host.h"
#ifdef FUSED_CRITIC_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace fused_critic {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kOp = "fused_critic.gae";
constexpr const char* kBackwardOp = "fused_critic.gae_backward";

// The mask and its mode, to GaeParams or GaeBackwardParams.
template <typename Params>
void set_mask(const char* op, const Arguments& args, const OptionalTensor& mask, c10::string_view mask_mode, Params& p) {
  const bool ignore = mask_mode == "ignore", zero = mask_mode == "zero", reset = mask_mode == "reset";
  TORCH_CHECK_VALUE(mask_mode == "skip" || ignore || zero || reset, op, ": mask_mode: expected one of skip, zero, reset, ignore, got '", mask_mode, "'");
  p.mask = args.per_token("mask", mask);
  p.mask_mode = zero ? MaskMode::kZero : (reset ? MaskMode::kReset : MaskMode::kSkip);
  if (ignore) p.mask = Operand{};
}

// gamma and the lambdas, to GaeParams or GaeBackwardParams. Returns with the lambda of the advantages need no recursion of their own.
template <typename Params>
void set_factors(const Number& gamma, const Number& lam, const std::optional<Number>& returns_lam, Params& p) {
  p.gamma = gamma;
  p.lam = lam;
  p.has_returns_lam = returns_lam.has_value() && !(known(lam) && known(*returns_lam) && lam.value == returns_lam->value);
  if (p.has_returns_lam) p.returns_lam = *returns_lam;
}

void check_factor(const char* name, const Number& x) {
  TORCH_CHECK_VALUE(!known(x) || (x.value >= 0 && x.value <= 1), kOp, ": ", name, ": expected a number in [0, 1], got ", x.value);
}

// gamma or a lambda as a tensor. One number per sequence is checked on the CPU only; a 0-d tensor's, where the host knows it, by check_factor.
Number factor(const Arguments& args, const char* name, const at::Tensor& x) {
  const Number out = args.number_per_sequence(name, x);
  if (x.dim() == 1 && x.is_cpu()) {
    const at::Tensor wide = x.detach().to(at::kDouble).contiguous();
    for (int64_t i = 0; i < wide.numel(); ++i) {
      const double element = wide.const_data_ptr<double>()[i];
      TORCH_CHECK_VALUE(element >= 0 && element <= 1, kOp, ": ", name, ": expected numbers in [0, 1], got ", element, " at index ", i);
    }
  }
  return out;
}

template <typename T>
void run(const GaeParams& p, const at::Device& device) {
#ifdef FUSED_CRITIC_WITH_CUDA
  if (device.is_cuda()) {
    launch_on(device, cuda::gae_workspace<T>(p), [&](void* workspace, cudaStream_t stream) { cuda::launch_gae<T>(p, workspace, stream); });
    return;
  }
#endif
  (void)device;
  cpu::gae<T>(p);
}

template <typename T>
void run(const GaeBackwardParams& p, const at::Device& device) {
#ifdef FUSED_CRITIC_WITH_CUDA
  if (device.is_cuda()) {
    launch_on(device, cuda::gae_backward_workspace<T>(p), [&](void* workspace, cudaStream_t stream) { cuda::launch_gae_backward<T>(p, workspace, stream); });
    return;
  }
#endif
  (void)device;
  cpu::gae_backward<T>(p);
}

bool is_double(const at::Tensor& x) { return x.scalar_type() == at::kDouble; }
bool is_double(const OptionalTensor& x) { return x.has_value() && is_double(*x); }

Outputs forward(const Arguments& args, const at::Tensor& rewards, const at::Tensor& values, const OptionalTensor& mask, const OptionalTensor& terminated,
                const OptionalTensor& truncated, const OptionalTensor& next_values, const OptionalTensor& bootstrap_values, const Number& gamma, const Number& lam,
                const std::optional<Number>& returns_lam, c10::string_view mask_mode) {
  check_factor("gamma", gamma);
  check_factor("lam", lam);
  if (returns_lam.has_value()) check_factor("returns_lam", *returns_lam);
  TORCH_CHECK_VALUE(!truncated.has_value() || next_values.has_value(), kOp, ": next_values: expected a tensor beside truncated (the value of the state that was cut off; "
                    "the next position's value belongs to another episode), got None");
  TORCH_CHECK_VALUE(!bootstrap_values.has_value() || !next_values.has_value(), kOp, ": bootstrap_values: expected None beside next_values (which hold the last position's "
                    "next value too), got a tensor");
  GaeParams p;
  p.layout = args.layout();
  p.rewards = args.floating("rewards", rewards);
  p.values = args.floating("values", values);
  set_mask(kOp, args, mask, mask_mode, p);
  p.terminated = args.per_token("terminated", terminated);
  p.truncated = args.per_token("truncated", truncated);
  p.next_values = args.floating("next_values", next_values);
  p.bootstrap_values = args.per_sequence("bootstrap_values", bootstrap_values);
  set_factors(gamma, lam, returns_lam, p);
  const bool wide = is_double(rewards) || is_double(values) || is_double(next_values) || is_double(bootstrap_values);
  const auto options = rewards.options().dtype(wide ? at::kDouble : at::kFloat);
  keep_pages(rewards.device(), 2 * rewards.numel() * int64_t(options.dtype().itemsize()));
  at::Tensor advantages = at::empty_like(rewards, options), returns = at::empty_like(rewards, options);
  p.advantages = args.output(advantages);
  p.returns = args.output(returns);
  if (!args.empty()) {
    if (wide) {
      run<double>(p, rewards.device());
    } else {
      run<float>(p, rewards.device());
    }
  }
  return {std::move(advantages), std::move(returns)};
}

Outputs gae(const at::Tensor& rewards, const at::Tensor& values, const OptionalTensor& mask, const OptionalTensor& terminated, const OptionalTensor& truncated,
            const OptionalTensor& next_values, const OptionalTensor& bootstrap_values, const OptionalTensor& cu_seqlens, double gamma, double lam,
            c10::string_view mask_mode, int64_t time_dim, std::optional<double> returns_lam) {
  const Arguments args(kOp, "rewards", rewards, cu_seqlens, time_dim);
  const auto own = returns_lam.has_value() ? std::optional<Number>(number(*returns_lam)) : std::nullopt;
  return forward(args, rewards, values, mask, terminated, truncated, next_values, bootstrap_values, number(gamma), number(lam), own, mask_mode);
}

Outputs gae_tensor(const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& gamma, const at::Tensor& lam, const OptionalTensor& mask,
                   const OptionalTensor& terminated, const OptionalTensor& truncated, const OptionalTensor& next_values, const OptionalTensor& bootstrap_values,
                   const OptionalTensor& cu_seqlens, const OptionalTensor& returns_lam, c10::string_view mask_mode, int64_t time_dim) {
  const Arguments args(kOp, "rewards", rewards, cu_seqlens, time_dim);
  const auto own = returns_lam.has_value() ? std::optional<Number>(factor(args, "returns_lam", *returns_lam)) : std::nullopt;
  return forward(args, rewards, values, mask, terminated, truncated, next_values, bootstrap_values, factor(args, "gamma", gamma), factor(args, "lam", lam), own,
                 mask_mode);
}

enum Wanted : size_t { kRewards, kValues, kNextValues, kBootstrapValues };

Gradients gae_backward(const OptionalTensor& grad_advantages, const OptionalTensor& grad_returns, const OptionalTensor& mask, const OptionalTensor& terminated,
                       const OptionalTensor& truncated, const OptionalTensor& cu_seqlens, const at::Tensor& gamma, const at::Tensor& lam,
                       const OptionalTensor& returns_lam, bool has_next_values, std::array<bool, 4> wanted, c10::string_view mask_mode, int64_t time_dim) {
  TORCH_CHECK_VALUE(grad_advantages.has_value() || grad_returns.has_value(), kBackwardOp, ": grad_advantages: expected a tensor here or in grad_returns, got neither");
  const at::Tensor& reference = grad_advantages.has_value() ? *grad_advantages : *grad_returns;
  const Arguments args(kBackwardOp, grad_advantages.has_value() ? "grad_advantages" : "grad_returns", reference, cu_seqlens, time_dim);
  const bool wide = is_double(grad_advantages) || is_double(grad_returns);
  GaeBackwardParams p;
  p.layout = args.layout();
  p.grad_advantages = args.floating("grad_advantages", grad_advantages);
  p.grad_returns = args.floating("grad_returns", grad_returns);
  set_mask(kBackwardOp, args, mask, mask_mode, p);
  p.terminated = args.per_token("terminated", terminated);
  p.truncated = args.per_token("truncated", truncated);
  p.has_next_values = has_next_values;
  const auto own = returns_lam.has_value() ? std::optional<Number>(args.number_per_sequence("returns_lam", *returns_lam)) : std::nullopt;
  set_factors(args.number_per_sequence("gamma", gamma), args.number_per_sequence("lam", lam), own, p);
  const auto options = reference.options().dtype(wide ? at::kDouble : at::kFloat);
  std::array<at::Tensor, 4> grads;
  for (size_t i : {kRewards, kValues, kNextValues}) {
    const bool present = wanted[i] && (i != kNextValues || has_next_values);
    grads[i] = present ? at::empty(reference.sizes(), options) : at::empty({0}, options);
    Output& out = i == kRewards ? p.grad_rewards : i == kValues ? p.grad_values : p.grad_next_values;
    if (present) out = args.output(grads[i]);
  }
  const bool bootstrap = wanted[kBootstrapValues] && !has_next_values;
  grads[kBootstrapValues] = bootstrap ? at::full({p.layout.num_seqs}, 0, options) : at::empty({0}, options);
  if (bootstrap) p.grad_bootstrap = args.per_sequence_output(grads[kBootstrapValues]);
  if (!args.empty()) {
    if (wide) {
      run<double>(p, reference.device());
    } else {
      run<float>(p, reference.device());
    }
  }
  return {grads[0], grads[1], grads[2], grads[3]};
}

// --- autograd -------------------------------------------------------------------------------------------------------------------

const auto& backward_operator() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_critic::gae_backward", "").typed<decltype(gae_backward)>();
  return op;
}

struct GaeNode : torch::autograd::Node {
  torch::autograd::SavedVariable mask, terminated, truncated, cu_seqlens, gamma, lam, returns_lam;
  bool has_next_values = false;
  std::array<at::ScalarType, 4> dtypes{};  // of rewards, values, next_values, bootstrap_values
  bool bootstrap_is_0d = false;
  std::string mask_mode;
  int64_t time_dim = -1;

  std::string name() const override { return "FusedCriticGaeBackward"; }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    torch::autograd::variable_list out(4);
    std::array<bool, 4> wanted;
    for (size_t i = 0; i < 4; ++i) wanted[i] = task_should_compute_output(i);
    const auto optional = [](const at::Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; };
    if (!grads[0].defined() && !grads[1].defined()) return out;
    auto [rewards, values, next_values, bootstrap_values] =
        backward_operator().call(optional(grads[0]), optional(grads[1]), unpack_optional(mask), unpack_optional(terminated), unpack_optional(truncated),
                                 unpack_optional(cu_seqlens), gamma.unpack(), lam.unpack(), unpack_optional(returns_lam), has_next_values, wanted, mask_mode, time_dim);
    const std::array<at::Tensor, 4> all = {rewards, values, next_values, bootstrap_is_0d && wanted[kBootstrapValues] ? bootstrap_values.reshape({}) : bootstrap_values};
    for (size_t i = 0; i < 4; ++i) {
      if (wanted[i]) out[i] = all[i].to(dtypes[i]);
    }
    return out;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* saved : {&mask, &terminated, &truncated, &cu_seqlens, &gamma, &lam, &returns_lam}) saved->reset_data();
  }
};

// `call` runs the operator below autograd; `numbers` gives gamma, lam and returns_lam as tensors.
template <typename Call, typename Numbers>
Outputs with_autograd(const at::Tensor& rewards, const at::Tensor& values, const OptionalTensor& mask, const OptionalTensor& terminated, const OptionalTensor& truncated,
                      const OptionalTensor& next_values, const OptionalTensor& bootstrap_values, const OptionalTensor& cu_seqlens, c10::string_view mask_mode,
                      int64_t time_dim, const Call& call, const Numbers& numbers) {
  forbid_forward_mode(kOp, rewards, values, next_values, bootstrap_values);
  Outputs out;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    out = call();
  }
  const bool any = needs_grad(rewards) || needs_grad(values) || needs_grad(next_values) || needs_grad(bootstrap_values);
  if (!any || !at::GradMode::is_enabled()) return out;
  const auto node = make_node<GaeNode>();
  const auto tensor = [](const OptionalTensor& x) { return x.has_value() ? *x : at::Tensor(); };
  node->set_next_edges(torch::autograd::collect_next_edges(rewards, values, tensor(next_values), tensor(bootstrap_values)));
  node->mask = torch::autograd::SavedVariable(mask, false);
  node->terminated = torch::autograd::SavedVariable(terminated, false);
  node->truncated = torch::autograd::SavedVariable(truncated, false);
  node->cu_seqlens = torch::autograd::SavedVariable(cu_seqlens, false);
  const auto [gamma, lam, returns_lam] = numbers();
  node->gamma = torch::autograd::SavedVariable(gamma, false);
  node->lam = torch::autograd::SavedVariable(lam, false);
  node->returns_lam = torch::autograd::SavedVariable(returns_lam, false);
  node->has_next_values = next_values.has_value();
  const auto dtype = [](const OptionalTensor& x) { return x.has_value() ? x->scalar_type() : at::kFloat; };
  node->dtypes = {rewards.scalar_type(), values.scalar_type(), dtype(next_values), dtype(bootstrap_values)};
  node->bootstrap_is_0d = bootstrap_values.has_value() && bootstrap_values->dim() == 0;
  node->mask_mode = std::string(mask_mode);
  node->time_dim = time_dim;
  torch::autograd::set_history(std::get<0>(out), node);
  torch::autograd::set_history(std::get<1>(out), node);
  return out;
}

Outputs gae_autograd(const at::Tensor& rewards, const at::Tensor& values, const OptionalTensor& mask, const OptionalTensor& terminated, const OptionalTensor& truncated,
                     const OptionalTensor& next_values, const OptionalTensor& bootstrap_values, const OptionalTensor& cu_seqlens, double gamma, double lam,
                     c10::string_view mask_mode, int64_t time_dim, std::optional<double> returns_lam) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_critic::gae", "").typed<decltype(gae)>();
  return with_autograd(
      rewards, values, mask, terminated, truncated, next_values, bootstrap_values, cu_seqlens, mask_mode, time_dim,
      [&] { return op.call(rewards, values, mask, terminated, truncated, next_values, bootstrap_values, cu_seqlens, gamma, lam, mask_mode, time_dim, returns_lam); },
      [&] {
        const auto number = [](double x) { return at::full({}, x, at::TensorOptions().dtype(at::kDouble)); };
        return std::make_tuple(number(gamma), number(lam), returns_lam.has_value() ? OptionalTensor(number(*returns_lam)) : std::nullopt);
      });
}

Outputs gae_tensor_autograd(const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& gamma, const at::Tensor& lam, const OptionalTensor& mask,
                            const OptionalTensor& terminated, const OptionalTensor& truncated, const OptionalTensor& next_values,
                            const OptionalTensor& bootstrap_values, const OptionalTensor& cu_seqlens, const OptionalTensor& returns_lam,
                            c10::string_view mask_mode, int64_t time_dim) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_critic::gae", "tensor").typed<decltype(gae_tensor)>();
  if (at::GradMode::is_enabled()) {
    for (const auto& [name, x] : {std::pair("gamma", OptionalTensor(gamma)), std::pair("lam", OptionalTensor(lam)), std::pair("returns_lam", returns_lam)}) {
      TORCH_CHECK_VALUE(!needs_grad(x), kOp, ": ", name, ": expected a number or a tensor without gradient, got one with requires_grad; detach() it");
    }
  }
  return with_autograd(
      rewards, values, mask, terminated, truncated, next_values, bootstrap_values, cu_seqlens, mask_mode, time_dim,
      [&] { return op.call(rewards, values, gamma, lam, mask, terminated, truncated, next_values, bootstrap_values, cu_seqlens, returns_lam, mask_mode, time_dim); },
      [&] { return std::make_tuple(gamma, lam, returns_lam); });
}

Gradients gae_backward_autograd(const OptionalTensor& grad_advantages, const OptionalTensor& grad_returns, const OptionalTensor& mask, const OptionalTensor& terminated,
                                const OptionalTensor& truncated, const OptionalTensor& cu_seqlens, const at::Tensor& gamma, const at::Tensor& lam,
                                const OptionalTensor& returns_lam, bool has_next_values, std::array<bool, 4> wanted, c10::string_view mask_mode, int64_t time_dim) {
  forbid_forward_mode(kOp, grad_advantages, grad_returns);
  Gradients out;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    out = backward_operator().call(grad_advantages, grad_returns, mask, terminated, truncated, cu_seqlens, gamma, lam, returns_lam, has_next_values, wanted, mask_mode,
                                  time_dim);
  }
  const auto tensor = [](const OptionalTensor& x) { return x.has_value() ? *x : at::Tensor(); };
  forbid_double_backward("fused_critic.gae: double backward is not supported: its gradient cannot be differentiated again",
                         {tensor(grad_advantages), tensor(grad_returns)}, {std::get<0>(out), std::get<1>(out), std::get<2>(out), std::get<3>(out)});
  return out;
}

void register_device(torch::Library& m) {
  m.impl("gae", TORCH_FN(gae));
  m.impl("gae.tensor", TORCH_FN(gae_tensor));
  m.impl("gae_backward", TORCH_FN(gae_backward));
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_critic, CPU, m) { register_device(m); }
#ifdef FUSED_CRITIC_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_critic, CUDA, m) { register_device(m); }
#endif

TORCH_LIBRARY_IMPL(fused_critic, Autograd, m) {
  m.impl("gae", TORCH_FN(gae_autograd));
  m.impl("gae.tensor", TORCH_FN(gae_tensor_autograd));
  m.impl("gae_backward", TORCH_FN(gae_backward_autograd));
}

}  // namespace fused_critic
