#include <ATen/Version.h>

#include "kernels.h"

namespace fused_critic::cpu {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return kAvx512Kernels;
    if (capability == "AVX2") return kAvx2Kernels;
#endif
    return kDefaultKernels;
  }();
  return chosen;
}

}  // namespace fused_critic::cpu
