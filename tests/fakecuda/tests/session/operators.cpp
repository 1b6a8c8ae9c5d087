// The sample extension: operators over the kernels of kernels.cu, checked and guarded as an extension's should be where it is not said
// otherwise.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "kernels.h"
using at::Tensor;
using c10::cuda::getCurrentCUDAStream;

static Dtype dtype(const Tensor& t) { return t.scalar_type() == at::kFloat ? F32 : BF16; }
static void check(const Tensor& x) {
  TORCH_CHECK(x.is_cuda(), "x must be a CUDA tensor");
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "float32 or bfloat16 expected, got ", x.scalar_type());
}

Tensor add_cuda(const Tensor& a, const Tensor& b, double alpha) {
  TORCH_CHECK(a.scalar_type() == at::kFloat && a.sizes() == b.sizes() && a.device() == b.device(), "add: mismatch");
  c10::cuda::CUDAGuard guard(a.device());
  Tensor x = a.contiguous(), y = b.contiguous(), out = at::empty_like(x);
  if (out.numel() == 0) return out;
  add({x.const_data_ptr<float>(), y.const_data_ptr<float>(), out.mutable_data_ptr<float>(), (float)alpha, (int)x.numel()},
      getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor sum_cuda(const Tensor& a) {
  check(a);
  c10::cuda::CUDAGuard guard(a.device());
  Tensor x = a.contiguous();
  int sms = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, a.get_device()));
  int blocks = std::min<int64_t>((x.numel() + 1023) / 1024, sms);
  if (blocks == 0) return at::zeros({}, x.options().dtype(at::kFloat));
  Tensor partial = at::empty({blocks}, x.options().dtype(at::kFloat)), out = at::empty({}, partial.options());
  Tensor ticket = at::zeros({1}, x.options().dtype(at::kInt));
  block_sum(x.const_data_ptr(), partial.mutable_data_ptr<float>(), (unsigned*)ticket.mutable_data_ptr<int>(), out.mutable_data_ptr<float>(),
            (int)x.numel(), blocks, dtype(x), getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor scan_cuda(const Tensor& a, bool reverse) {
  check(a);
  TORCH_CHECK(a.dim() == 2, "scan: 2-d tensor expected");
  c10::cuda::CUDAGuard guard(a.device());
  Tensor x = a.contiguous(), y = at::empty_like(x);
  if (y.numel() == 0) return y;
  scan_rows(x.const_data_ptr(), y.mutable_data_ptr(), x.size(0), x.size(1), reverse, dtype(x), getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor chained_scan_cuda(const Tensor& a) {
  c10::cuda::CUDAGuard guard(a.device());
  Tensor x = a.contiguous(), y = at::empty_like(x), words = at::zeros({x.numel() / 128 + 2}, x.options().dtype(at::kLong));
  chained_scan(x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), (unsigned long long*)words.mutable_data_ptr<int64_t>(),
               (int)x.numel(), getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor fault_cuda(const Tensor& x, c10::string_view name) {
  c10::cuda::CUDAGuard guard(x.device());
  Tensor y = at::empty_like(x);
  C10_CUDA_CHECK((cudaError_t)fault(std::string(name).c_str(), x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), (int)x.numel(),
                                    getCurrentCUDAStream()));
  return y;
}

// The device guard is missing.
Tensor unguarded_cuda(const Tensor& x, int64_t n) {
  Tensor y = at::empty_like(x);
  add({x.const_data_ptr<float>(), x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), 1.f, (int)n}, getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

// A temporary is gone before the kernel reads it.
Tensor dangling_cuda(const Tensor& x) {
  const float* p = x.neg().const_data_ptr<float>();
  Tensor y = at::empty_like(x);
  add({p, p, y.mutable_data_ptr<float>(), 1.f, (int)x.numel()}, getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

// Host code reads device memory.
double peek_cuda(const Tensor& x) { return *x.const_data_ptr<float>(); }

static Tensor call_scan(const Tensor& x, bool reverse) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("sample::scan", "").typed<Tensor(const Tensor&, bool)>();
  return op.call(x, reverse);
}
struct Scan : torch::autograd::Function<Scan> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, bool reverse) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->saved_data["reverse"] = reverse;
    return call_scan(x, reverse);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list grads) {
    return {call_scan(grads[0], !context->saved_data["reverse"].toBool()), Tensor()};
  }
};

TORCH_LIBRARY(sample, m) {
  m.def("add(Tensor a, Tensor b, float alpha) -> Tensor");
  m.def("sum(Tensor x) -> Tensor");
  m.def("scan(Tensor x, bool reverse) -> Tensor");
  m.def("chained_scan(Tensor x) -> Tensor");
  m.def("fault(Tensor x, str name) -> Tensor");
  m.def("unguarded(Tensor x, int n) -> Tensor");
  m.def("dangling(Tensor x) -> Tensor");
  m.def("peek(Tensor x) -> float");
}
TORCH_LIBRARY_IMPL(sample, CUDA, m) {
  m.impl("add", add_cuda);
  m.impl("sum", sum_cuda);
  m.impl("scan", scan_cuda);
  m.impl("chained_scan", chained_scan_cuda);
  m.impl("fault", fault_cuda);
  m.impl("unguarded", unguarded_cuda);
  m.impl("dangling", dangling_cuda);
  m.impl("peek", peek_cuda);
}
TORCH_LIBRARY_IMPL(sample, Meta, m) {
  m.impl("scan", +[](const Tensor& x, bool) { return at::empty_like(x, x.options(), at::MemoryFormat::Contiguous); });
}
TORCH_LIBRARY_IMPL(sample, Autograd, m) {
  m.impl("scan", +[](const Tensor& x, bool reverse) { return Scan::apply(x, reverse); });
}
