// Autograd nodes written as torch's own operators have them: cheaper per call than torch::autograd::Function, and torch.func
// transforms pass through them.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

namespace fused_critic {

// torch::autograd holds nodes by std::shared_ptr up to some release and by c10::intrusive_ptr from there on.
template <typename Node, typename... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_same_v<decltype(torch::autograd::Edge::function), std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<Node>(new Node(std::forward<Args>(args)...), [](auto* node) { deleteNode(node); });  // found beside Node where it exists
  } else {
    return c10::make_intrusive<Node>(std::forward<Args>(args)...);
  }
}

inline bool needs_grad(const at::Tensor& x) { return x.defined() && x.requires_grad(); }
inline bool needs_grad(const std::optional<at::Tensor>& x) { return x.has_value() && needs_grad(*x); }

inline std::optional<at::Tensor> unpack_optional(const torch::autograd::SavedVariable& x) {
  at::Tensor y = x.unpack();
  return y.defined() ? std::optional<at::Tensor>(std::move(y)) : std::nullopt;
}

inline bool has_tangent(const at::Tensor& x) { return x.defined() && x._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const std::optional<at::Tensor>& x) { return x.has_value() && has_tangent(*x); }

// Forward-mode differentiation has no formula here; without this check the tangents of `inputs` would be dropped in silence.
template <typename... Tensors>
void forbid_forward_mode(const char* op, const Tensors&... inputs) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(inputs) || ...), op, ": forward-mode differentiation (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad) is not "
                              "supported; reverse mode is (torch.func.grad, vjp, jacrev)");
}

// Lets a gradient be computed but not be differentiated again: that raises `message`.
inline void forbid_double_backward(const char* message, const torch::autograd::variable_list& inputs, const torch::autograd::variable_list& outputs) {
  if (!torch::autograd::compute_requires_grad(inputs)) return;
  const auto node = make_node<torch::autograd::Error>(std::string(message), torch::autograd::collect_next_edges(inputs));
  for (const at::Tensor& x : outputs) {
    if (x.defined() && x.numel() > 0) torch::autograd::set_history(x, node);
  }
}

}  // namespace fused_critic
