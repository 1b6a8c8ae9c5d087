// Reverse scan: host entry (checks, allocation, dispatch by device) and autograd.
#include "reverse_scan.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "autograd.h"
#include "host.h"
#ifdef FUSED_CRITIC_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace fused_critic {
namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kOp = "fused_critic.reverse_scan";
constexpr const char* kBackwardOp = "fused_critic.reverse_scan_backward";

template <typename T>
void run(const ReverseScanParams& p, const at::Device& device) {
#ifdef FUSED_CRITIC_WITH_CUDA
  if (device.is_cuda()) {
    launch_on(device, cuda::reverse_scan_workspace<T>(p), [&](void* workspace, cudaStream_t stream) { cuda::launch_reverse_scan<T>(p, workspace, stream); });
    return;
  }
#endif
  (void)device;
  cpu::reverse_scan<T>(p);
}

template <typename T>
void run(const ReverseScanBackwardParams& p, const at::Device& device) {
#ifdef FUSED_CRITIC_WITH_CUDA
  if (device.is_cuda()) {
    launch_on(device, cuda::reverse_scan_backward_workspace<T>(p),
              [&](void* workspace, cudaStream_t stream) { cuda::launch_reverse_scan_backward<T>(p, workspace, stream); });
    return;
  }
#endif
  (void)device;
  cpu::reverse_scan_backward<T>(p);
}

template <typename Params>
void run(bool wide, const Params& p, const at::Device& device) {
  if (wide) {
    run<double>(p, device);
  } else {
    run<float>(p, device);
  }
}

bool is_double(const at::Tensor& x) { return x.scalar_type() == at::kDouble; }
bool is_double(const OptionalTensor& x) { return x.has_value() && is_double(*x); }

// One value per sequence as one per token of the packed [N]. cu_seqlens may hold anything: the index stays in bounds.
at::Tensor per_packed_token(const at::Tensor& x, const at::Tensor& cu_seqlens, int64_t tokens) {
  const at::Tensor positions = at::arange(tokens, cu_seqlens.options());
  const at::Tensor index = at::searchsorted(cu_seqlens, positions, /*out_int32=*/false, /*right=*/true).sub_(1).clamp_(0, x.size(0) - 1);
  return x.index_select(0, index);
}

// `decay` in any of its forms, for the parameter blocks.
struct Decay {
  at::Tensor expanded;  // keeps what `steps` refers to alive
  Operand steps;
  Number factor;

  explicit Decay(double decay) : factor(number(decay)) {}
  Decay(const Arguments& args, const char* op, const at::Tensor& x, const at::Tensor& decay, const OptionalTensor& cu_seqlens) {
    const bool packed = cu_seqlens.has_value() && cu_seqlens->defined();
    const int64_t num_seqs = args.layout().num_seqs;
    if (decay.dim() == 0) {
      factor = args.number("decay", decay);
      return;
    }
    const bool per_step = decay.sizes() == x.sizes();
    TORCH_CHECK_VALUE(per_step || (decay.dim() == 1 && decay.size(0) == num_seqs), op, ": decay: expected a number, a 0-d tensor, shape [", num_seqs,
                      "] (one value per sequence) or shape ", x.sizes(), " (one per position), got shape ", decay.sizes());
    if (per_step) {
      if (decay.scalar_type() != at::kBool) check_floating(op, "decay", decay);
      steps = args.per_token("decay", decay);
      return;
    }
    steps = args.per_sequence("decay", decay);
    if (packed && !args.empty()) {
      expanded = per_packed_token(decay, *cu_seqlens, x.size(0));
      steps = args.per_token("decay", expanded);
    }
  }
};

at::Tensor forward(const Arguments& args, const at::Tensor& x, const Decay& decay, bool wide_decay, const OptionalTensor& init) {
  ReverseScanParams p;
  p.layout = args.layout();
  p.x = args.floating("x", x);
  p.decay = decay.steps;
  p.factor = decay.factor;
  p.init = args.per_sequence("init", init);
  const bool wide = is_double(x) || is_double(init) || wide_decay;
  at::Tensor y = at::empty_like(x, x.options().dtype(wide ? at::kDouble : at::kFloat));
  p.y = args.output(y);
  if (!args.empty()) run(wide, p, x.device());
  return y;
}

at::Tensor reverse_scan(const at::Tensor& x, const OptionalTensor& init, const OptionalTensor& cu_seqlens, double decay, int64_t time_dim) {
  const Arguments args(kOp, "x", x, cu_seqlens, time_dim);
  return forward(args, x, Decay(decay), false, init);
}

at::Tensor reverse_scan_tensor(const at::Tensor& x, const at::Tensor& decay, const OptionalTensor& init, const OptionalTensor& cu_seqlens, int64_t time_dim) {
  const Arguments args(kOp, "x", x, cu_seqlens, time_dim);
  return forward(args, x, Decay(args, kOp, x, decay, cu_seqlens), decay.dim() > 0 && is_double(decay), init);
}

// The sum of each sequence: what leaves an adjoint scan without decay. Its order depends on the shape alone. float64.
at::Tensor sums(const Arguments& args, const at::Tensor& x) {
  at::Tensor out = at::zeros({args.layout().num_seqs}, x.options().dtype(at::kDouble));
  if (args.empty()) return out;
  ReverseScanBackwardParams p;
  p.layout = args.layout();
  p.grad = args.per_token("grad_decay", x);
  p.factor = number(1);
  p.grad_init = args.per_sequence_output(out);
  run<double>(p, x.device());
  return out;
}

enum Wanted : size_t { kX, kDecay, kInit };

Gradients reverse_scan_backward(const at::Tensor& grad, const OptionalTensor& x, const at::Tensor& decay, const OptionalTensor& init, const OptionalTensor& cu_seqlens,
                                std::array<bool, 3> wanted, int64_t time_dim) {
  TORCH_CHECK_VALUE(!wanted[kDecay] || x.has_value(), kBackwardOp, ": x: expected a tensor where the gradient of decay is wanted, got None");
  const Arguments args(kBackwardOp, "grad", grad, cu_seqlens, time_dim);
  const bool wide = is_double(grad);
  const auto options = grad.options().dtype(wide ? at::kDouble : at::kFloat);
  const at::Tensor none = at::empty({0}, options);
  const Decay factors(args, kBackwardOp, grad, decay, cu_seqlens);
  ReverseScanBackwardParams backward;
  backward.layout = args.layout();
  backward.grad = args.floating("grad", grad);
  backward.decay = factors.steps;
  backward.factor = factors.factor;
  at::Tensor grad_x = none, grad_decay = none, grad_init = none;
  if (wanted[kX] || wanted[kDecay]) {
    grad_x = at::empty(grad.sizes(), options);
    backward.p = args.output(grad_x);
  }
  if (wanted[kInit]) {
    grad_init = at::zeros({args.layout().num_seqs}, options);
    backward.grad_init = args.per_sequence_output(grad_init);
  }
  if (!args.empty()) run(wide, backward, grad.device());
  if (wanted[kDecay]) {
    ReverseScanParams again;  // y_{t+1} once more, rather than kept since the forward pass
    again.layout = args.layout();
    again.x = args.floating("x", *x);
    again.decay = factors.steps;
    again.factor = factors.factor;
    again.init = args.per_sequence("init", init);
    again.shifted = true;
    grad_decay = at::empty(grad.sizes(), options);
    again.y = args.output(grad_decay);
    if (!args.empty()) run(wide, again, grad.device());
    grad_decay.mul_(grad_x);
    if (decay.sizes() != grad.sizes()) {
      at::Tensor total = sums(args, grad_decay);
      if (decay.dim() == 0) total = sums(Arguments(kBackwardOp, "grad_decay", total, std::nullopt, -1), total).reshape({});
      grad_decay = total.to(options.dtype());
    }
  }
  return {wanted[kX] ? grad_x : none.clone(), grad_decay, wanted[kInit] ? grad_init : none.clone()};
}

// --- autograd -------------------------------------------------------------------------------------------------------------------

const auto& backward_operator() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_critic::reverse_scan_backward", "").typed<decltype(reverse_scan_backward)>();
  return op;
}

struct ReverseScanNode : torch::autograd::Node {
  torch::autograd::SavedVariable x, decay, init, cu_seqlens;  // x and init: where decay needs a gradient
  std::array<at::ScalarType, 3> dtypes{};                     // of x, decay, init
  bool init_is_0d = false;
  int64_t time_dim = -1;

  std::string name() const override { return "FusedCriticReverseScanBackward"; }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    torch::autograd::variable_list out(3);
    if (!grads[0].defined()) return out;
    std::array<bool, 3> wanted;
    for (size_t i = 0; i < 3; ++i) wanted[i] = task_should_compute_output(i);
    auto [grad_x, grad_decay, grad_init] =
        backward_operator().call(grads[0], unpack_optional(x), decay.unpack(), unpack_optional(init), unpack_optional(cu_seqlens), wanted, time_dim);
    const std::array<at::Tensor, 3> all = {grad_x, grad_decay, init_is_0d && wanted[kInit] ? grad_init.reshape({}) : grad_init};
    for (size_t i = 0; i < 3; ++i) {
      if (wanted[i]) out[i] = all[i].to(dtypes[i]);
    }
    return out;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* saved : {&x, &decay, &init, &cu_seqlens}) saved->reset_data();
  }
};

// `call` runs the operator below autograd; `known` is the decay where `decay` is no tensor.
template <typename Call>
at::Tensor with_autograd(const at::Tensor& x, const at::Tensor& decay, double known, const OptionalTensor& init, const OptionalTensor& cu_seqlens, int64_t time_dim, const Call& call) {
  forbid_forward_mode(kOp, x, decay, init);
  at::Tensor y;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    y = call();
  }
  if (!at::GradMode::is_enabled() || !(needs_grad(x) || needs_grad(decay) || needs_grad(init))) return y;
  const auto node = make_node<ReverseScanNode>();
  const at::Tensor none;
  node->set_next_edges(torch::autograd::collect_next_edges(x, decay, init.has_value() ? *init : none));
  if (needs_grad(decay)) {
    node->x = torch::autograd::SavedVariable(x, false);
    node->init = torch::autograd::SavedVariable(init, false);
  }
  node->decay = torch::autograd::SavedVariable(decay.defined() ? decay : at::full({}, known, at::TensorOptions().dtype(at::kDouble)), false);
  node->cu_seqlens = torch::autograd::SavedVariable(cu_seqlens, false);
  node->dtypes = {x.scalar_type(), decay.defined() ? decay.scalar_type() : at::kDouble, init.has_value() ? init->scalar_type() : at::kFloat};
  node->init_is_0d = init.has_value() && init->dim() == 0;
  node->time_dim = time_dim;
  torch::autograd::set_history(y, node);
  return y;
}

at::Tensor reverse_scan_autograd(const at::Tensor& x, const OptionalTensor& init, const OptionalTensor& cu_seqlens, double decay, int64_t time_dim) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_critic::reverse_scan", "").typed<decltype(reverse_scan)>();
  return with_autograd(x, at::Tensor(), decay, init, cu_seqlens, time_dim, [&] { return op.call(x, init, cu_seqlens, decay, time_dim); });
}

at::Tensor reverse_scan_tensor_autograd(const at::Tensor& x, const at::Tensor& decay, const OptionalTensor& init, const OptionalTensor& cu_seqlens, int64_t time_dim) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_critic::reverse_scan", "tensor").typed<decltype(reverse_scan_tensor)>();
  return with_autograd(x, decay, 0, init, cu_seqlens, time_dim, [&] { return op.call(x, decay, init, cu_seqlens, time_dim); });
}

Gradients reverse_scan_backward_autograd(const at::Tensor& grad, const OptionalTensor& x, const at::Tensor& decay, const OptionalTensor& init,
                                         const OptionalTensor& cu_seqlens, std::array<bool, 3> wanted, int64_t time_dim) {
  forbid_forward_mode(kOp, grad, x, decay, init);
  Gradients out;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    out = backward_operator().call(grad, x, decay, init, cu_seqlens, wanted, time_dim);
  }
  const auto tensor = [](const OptionalTensor& x) { return x.has_value() ? *x : at::Tensor(); };
  forbid_double_backward("fused_critic.reverse_scan: double backward is not supported: its gradient cannot be differentiated again",
                         {grad, tensor(x), decay, tensor(init)}, {std::get<kX>(out), std::get<kDecay>(out), std::get<kInit>(out)});
  return out;
}

void register_device(torch::Library& m) {
  m.impl("reverse_scan", TORCH_FN(reverse_scan));
  m.impl("reverse_scan.tensor", TORCH_FN(reverse_scan_tensor));
  m.impl("reverse_scan_backward", TORCH_FN(reverse_scan_backward));
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_critic, CPU, m) { register_device(m); }
#ifdef FUSED_CRITIC_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_critic, CUDA, m) { register_device(m); }
#endif

TORCH_LIBRARY_IMPL(fused_critic, Autograd, m) {
  m.impl("reverse_scan", TORCH_FN(reverse_scan_autograd));
  m.impl("reverse_scan.tensor", TORCH_FN(reverse_scan_tensor_autograd));
  m.impl("reverse_scan_backward", TORCH_FN(reverse_scan_backward_autograd));
}

}  // namespace fused_critic
