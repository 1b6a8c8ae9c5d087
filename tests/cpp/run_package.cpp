// Runs what torch._inductor.aoti_compile_and_package made of a critic step, on inputs that Python saved beside the results it expects.
//   run_package <package.pt2> <tensors.pt>      tensors.pt: torch.save((inputs, expected results)), both lists of tensors
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <vector>

static std::vector<at::Tensor> tensors(const c10::IValue& list) {
  std::vector<at::Tensor> result;
  for (const c10::IValue& x : list.toListRef()) result.push_back(x.toTensor());
  return result;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s <package.pt2> <tensors.pt>\n", argv[0]);
    return 2;
  }
  std::ifstream file(argv[2], std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const c10::IValue saved = torch::jit::pickle_load(bytes);
  const std::vector<at::Tensor> inputs = tensors(saved.toTupleRef().elements()[0]), expected = tensors(saved.toTupleRef().elements()[1]);

  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  const std::vector<at::Tensor> results = loader.run(inputs);
  if (results.size() != expected.size()) {
    std::printf("%zu results, expected %zu\n", results.size(), expected.size());
    return 1;
  }
  bool ok = true;
  for (size_t i = 0; i < results.size(); ++i) {
    const bool same = results[i].sizes() == expected[i].sizes() && at::allclose(results[i].to(at::kDouble), expected[i].to(at::kDouble), 1e-5, 1e-5);
    std::printf("result %zu: %s\n", i, same ? "ok" : "WRONG");
    ok &= same;
  }
  return ok ? 0 : 1;
}
