#include <ATen/Version.h>

#include "kernels.h"

namespace fused_critic::cpu {

const Kernels& kernels() {
  static const Kernels chosen = []() -> Kernels {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return {"AVX512", &kAvx512Floats, &kAvx2Doubles};
    if (capability == "AVX2") return {"AVX2", &kAvx2Floats, &kAvx2Doubles};
#endif
    return {"DEFAULT", &kDefaultFloats, &kDefaultDoubles};
  }();
  return chosen;
}

}  // namespace fused_critic::cpu
