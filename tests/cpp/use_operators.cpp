// Calls both operators from C++ alone, by argument name; what is not given takes the schema's default.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdio>
#include <map>
#include <string>

using c10::IValue;

static std::vector<IValue> call(const char* name, const std::map<std::string, IValue>& given) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  std::vector<IValue> stack;
  for (const auto& argument : op.schema().arguments()) {
    const auto found = given.find(argument.name());
    stack.push_back(found != given.end() ? found->second : argument.default_value().value_or(IValue()));
  }
  op.callBoxed(stack);
  return stack;
}

static bool close(const char* what, const at::Tensor& got, const at::Tensor& expected) {
  const bool ok = at::allclose(got.to(at::kDouble), expected.to(at::kDouble), 0.0, 1e-6);
  std::printf("%s: %s\n", what, ok ? "ok" : "WRONG");
  return ok;
}

int main() {
  const auto values = at::tensor({1.0, 0.5}).set_requires_grad(true);
  const auto old_values = at::zeros(2, at::kDouble);
  const auto returns = at::tensor({0.0, 1.0});
  const auto loss = call("fused_critic::value_loss", {{"values", values}, {"old_values", old_values}, {"returns", returns}})[0];
  loss.toTensor().backward();
  bool ok = close("value_loss", loss.toTensor().detach(), at::scalar_tensor(0.41, at::kDouble));
  ok &= close("gradient of value_loss", values.grad(), at::tensor({0.5, 0.0}));

  const auto mask = at::tensor({1, 1, 0, 0, 1, 1, 0}).to(at::kBool);
  const auto rewards = at::tensor({0., 0., 0., 0., 0., 1., 0.});
  const auto v = at::tensor({.1, .2, .3, .4, .5, .6, .7});
  const auto advantages = call("fused_critic::gae", {{"rewards", rewards}, {"values", v}, {"mask", mask}, {"gamma", 0.9}, {"lam", 0.8}})[0];
  ok &= close("gae", advantages.toTensor(), at::tensor({.4300352, .48616, 0., 0., .328, .4, 0.}));
  return ok ? 0 : 1;
}
