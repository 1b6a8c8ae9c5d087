// The clipped value loss of one token. CUDA kernels call it; the CPU's lanes (cpu/value_loss_kernel.h) are the same in vectors.
#pragma once

#include "platform.h"

namespace fused_critic {

// The greater and the lesser of two numbers, NaN if one of them is.
template <typename T>
FUSED_CRITIC_HD T max_or_nan(T a, T b) { return a > b || a != a ? a : b; }
template <typename T>
FUSED_CRITIC_HD T min_or_nan(T a, T b) { return a < b || a != a ? a : b; }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
FUSED_CRITIC_HD float max_or_nan(float a, float b) {
  float x;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}
template <>
FUSED_CRITIC_HD float min_or_nan(float a, float b) {
  float x;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}
#endif

// l = 0.5 max((v - R)^2, (vc - R)^2) with vc = min(max(v, old + low), old + high), evaluated in the accumulation type T.
// A NaN among v, old, R makes `clipped` NaN, hence both loss and gradient. Without clipping vc is v.
template <typename T>
struct TokenLoss {
  T d;                   // v - R
  T vc;                  // inside the range v itself, bit for bit
  T unclipped, clipped;  // (v - R)^2 and (vc - R)^2

  FUSED_CRITIC_HD T twice() const { return max_or_nan(unclipped, clipped); }
  // d l / d v: v - R, or 0 where the clipped branch is strictly greater; at a tie the whole v - R, never a half.
  FUSED_CRITIC_HD T grad() const {
    const T g = clipped > unclipped ? T(0) : d;
    return vc != vc ? vc : g;
  }
};

template <typename T>
FUSED_CRITIC_HD TokenLoss<T> clipped_value_loss(T v, T old, T ret, T low, T high) {
  TokenLoss<T> x;
  x.d = v - ret;
  x.vc = min_or_nan(max_or_nan(v, old + low), old + high);
  const T dc = x.vc - ret;
  x.unclipped = x.d * x.d;
  x.clipped = dc * dc;
  return x;
}

template <typename T>
FUSED_CRITIC_HD TokenLoss<T> plain_value_loss(T v, T ret) {
  const T d = v - ret;
  return {d, v, d * d, d * d};
}

}  // namespace fused_critic
