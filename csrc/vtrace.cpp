// V-trace: host entry (checks, allocation, dispatch by device). Its results carry no gradient.
#include "vtrace.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "host.h"
#ifdef FUSED_CRITIC_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace fused_critic {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kOp = "fused_critic.vtrace";
constexpr double kNoClip = std::numeric_limits<double>::infinity();

struct Numbers {
  Number gamma, lam, rho_clip, c_clip, pg_rho_clip;
};

void check_factor(const char* name, const Number& x) {
  TORCH_CHECK_VALUE(!known(x) || (x.value >= 0 && x.value <= 1), kOp, ": ", name, ": expected a number in [0, 1], got ", x.value);
}

void check_clip(const char* name, const Number& x) {
  TORCH_CHECK_VALUE(!known(x) || x.value >= 0, kOp, ": ", name, ": expected a number >= 0 or None (no clipping), got ", x.value);
}

template <typename T>
void run(const VTraceParams& p, const at::Device& device) {
#ifdef FUSED_CRITIC_WITH_CUDA
  if (device.is_cuda()) {
    launch_on(device, cuda::vtrace_workspace<T>(p), [&](void* workspace, cudaStream_t stream) { cuda::launch_vtrace<T>(p, workspace, stream); });
    return;
  }
#endif
  (void)device;
  cpu::vtrace<T>(p);
}

bool is_double(const at::Tensor& x) { return x.scalar_type() == at::kDouble; }
bool is_double(const OptionalTensor& x) { return x.has_value() && is_double(*x); }

Outputs forward(const Arguments& args, const at::Tensor& rewards, const at::Tensor& values, const OptionalTensor& log_rhos, const OptionalTensor& ratios,
                const OptionalTensor& mask, const OptionalTensor& terminated, const OptionalTensor& truncated, const OptionalTensor& next_values,
                const OptionalTensor& bootstrap_values, const Numbers& numbers) {
  TORCH_CHECK_VALUE(log_rhos.has_value() != ratios.has_value(), kOp, ": log_rhos: expected exactly one of log_rhos and ratios, got ",
                    log_rhos.has_value() ? "both" : "neither");
  TORCH_CHECK_VALUE(!truncated.has_value() || next_values.has_value(), kOp, ": next_values: expected a tensor beside truncated (the value of the state that was cut off; "
                    "the next position's value belongs to another episode), got None");
  TORCH_CHECK_VALUE(!bootstrap_values.has_value() || !next_values.has_value(), kOp, ": bootstrap_values: expected None beside next_values (which hold the last position's "
                    "next value too), got a tensor");
  check_factor("gamma", numbers.gamma);
  check_factor("lam", numbers.lam);
  check_clip("rho_clip", numbers.rho_clip);
  check_clip("c_clip", numbers.c_clip);
  check_clip("pg_rho_clip", numbers.pg_rho_clip);
  VTraceParams p;
  p.layout = args.layout();
  p.rewards = args.floating("rewards", rewards);
  p.values = args.floating("values", values);
  p.ratios = log_rhos.has_value() ? args.floating("log_rhos", log_rhos) : args.floating("ratios", ratios);
  p.ratios_are_logs = log_rhos.has_value();
  p.mask = args.per_token("mask", mask);
  p.terminated = args.per_token("terminated", terminated);
  p.truncated = args.per_token("truncated", truncated);
  p.next_values = args.floating("next_values", next_values);
  p.bootstrap_values = args.per_sequence("bootstrap_values", bootstrap_values);
  p.gamma = numbers.gamma;
  p.lam = numbers.lam;
  p.rho_clip = numbers.rho_clip;
  p.c_clip = numbers.c_clip;
  p.pg_rho_clip = numbers.pg_rho_clip;
  const bool wide = is_double(rewards) || is_double(values) || is_double(log_rhos) || is_double(ratios) || is_double(next_values) || is_double(bootstrap_values);
  const auto options = rewards.options().dtype(wide ? at::kDouble : at::kFloat);
  keep_pages(rewards.device(), 3 * rewards.numel() * int64_t(options.dtype().itemsize()));
  at::Tensor vs = at::empty_like(rewards, options), pg_advantages = at::empty_like(rewards, options), advantages = at::empty_like(rewards, options), following;
  p.vs = args.output(vs);
  p.pg_advantages = args.output(pg_advantages);
  p.advantages = args.output(advantages);
  if (rewards.is_cuda() && !next_values.has_value()) {
    following = at::empty_like(rewards, options);
    p.following = args.output(following);
  }
  if (!args.empty()) {
    if (wide) {
      run<double>(p, rewards.device());
    } else {
      run<float>(p, rewards.device());
    }
  }
  return {std::move(vs), std::move(pg_advantages), std::move(advantages)};
}

Outputs vtrace(const at::Tensor& rewards, const at::Tensor& values, const OptionalTensor& log_rhos, const OptionalTensor& ratios, const OptionalTensor& mask,
               const OptionalTensor& terminated, const OptionalTensor& truncated, const OptionalTensor& next_values, const OptionalTensor& bootstrap_values,
               const OptionalTensor& cu_seqlens, double gamma, double lam, std::optional<double> rho_clip, std::optional<double> c_clip,
               std::optional<double> pg_rho_clip, int64_t time_dim) {
  const Arguments args(kOp, "rewards", rewards, cu_seqlens, time_dim);
  const auto clip = [](std::optional<double> x) { return number(x.value_or(kNoClip)); };
  return forward(args, rewards, values, log_rhos, ratios, mask, terminated, truncated, next_values, bootstrap_values,
                 {number(gamma), number(lam), clip(rho_clip), clip(c_clip), clip(pg_rho_clip)});
}

Outputs vtrace_tensor(const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& gamma, const at::Tensor& lam, const OptionalTensor& rho_clip,
                      const OptionalTensor& c_clip, const OptionalTensor& pg_rho_clip, const OptionalTensor& log_rhos, const OptionalTensor& ratios,
                      const OptionalTensor& mask, const OptionalTensor& terminated, const OptionalTensor& truncated, const OptionalTensor& next_values,
                      const OptionalTensor& bootstrap_values, const OptionalTensor& cu_seqlens, int64_t time_dim) {
  const Arguments args(kOp, "rewards", rewards, cu_seqlens, time_dim);
  const auto clip = [&](const char* name, const OptionalTensor& x) { return x.has_value() ? args.number(name, *x) : number(kNoClip); };
  return forward(args, rewards, values, log_rhos, ratios, mask, terminated, truncated, next_values, bootstrap_values,
                 {args.number("gamma", gamma), args.number("lam", lam), clip("rho_clip", rho_clip), clip("c_clip", c_clip), clip("pg_rho_clip", pg_rho_clip)});
}

// Below autograd, so that no output requires a gradient.
Outputs vtrace_autograd(const at::Tensor& rewards, const at::Tensor& values, const OptionalTensor& log_rhos, const OptionalTensor& ratios, const OptionalTensor& mask,
                        const OptionalTensor& terminated, const OptionalTensor& truncated, const OptionalTensor& next_values,
                        const OptionalTensor& bootstrap_values, const OptionalTensor& cu_seqlens, double gamma, double lam, std::optional<double> rho_clip,
                        std::optional<double> c_clip, std::optional<double> pg_rho_clip, int64_t time_dim) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_critic::vtrace", "").typed<decltype(vtrace)>();
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(rewards, values, log_rhos, ratios, mask, terminated, truncated, next_values, bootstrap_values, cu_seqlens, gamma, lam, rho_clip, c_clip,
                 pg_rho_clip, time_dim);
}

Outputs vtrace_tensor_autograd(const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& gamma, const at::Tensor& lam, const OptionalTensor& rho_clip,
                               const OptionalTensor& c_clip, const OptionalTensor& pg_rho_clip, const OptionalTensor& log_rhos, const OptionalTensor& ratios,
                               const OptionalTensor& mask, const OptionalTensor& terminated, const OptionalTensor& truncated, const OptionalTensor& next_values,
                               const OptionalTensor& bootstrap_values, const OptionalTensor& cu_seqlens, int64_t time_dim) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_critic::vtrace", "tensor").typed<decltype(vtrace_tensor)>();
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(rewards, values, gamma, lam, rho_clip, c_clip, pg_rho_clip, log_rhos, ratios, mask, terminated, truncated, next_values, bootstrap_values,
                 cu_seqlens, time_dim);
}

void register_device(torch::Library& m) {
  m.impl("vtrace", TORCH_FN(vtrace));
  m.impl("vtrace.tensor", TORCH_FN(vtrace_tensor));
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_critic, CPU, m) { register_device(m); }
#ifdef FUSED_CRITIC_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_critic, CUDA, m) { register_device(m); }
#endif

TORCH_LIBRARY_IMPL(fused_critic, Autograd, m) {
  m.impl("vtrace", TORCH_FN(vtrace_autograd));
  m.impl("vtrace.tensor", TORCH_FN(vtrace_tensor_autograd));
}

}  // namespace fused_critic
