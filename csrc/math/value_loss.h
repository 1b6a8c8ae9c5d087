// The clipped value loss of one token. CUDA kernels call it; the CPU's lanes (cpu/value_loss_kernel.h) are the same in vectors.
#pragma once

#include <cmath>

#include "../value_loss.h"
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

// LossOptions in the accumulation type.
template <typename T>
struct TokenOptions {
  T delta, curvature, slope, offset;  // of the criterion
  T limit;                            // twice the loss clamp; infinity without
  bool clip, clip_only;

  FUSED_CRITIC_HD TokenOptions(const LossOptions& o, T limit_)
      : delta(static_cast<T>(o.criterion.delta)),
        curvature(static_cast<T>(o.criterion.curvature)),
        slope(static_cast<T>(o.criterion.slope)),
        offset(static_cast<T>(o.criterion.offset)),
        limit(limit_),
        clip(o.clip),
        clip_only(o.clip_only) {}

  // Twice the criterion, and its derivative.
  FUSED_CRITIC_HD T twice(T d) const { return fabs(d) > delta ? 2 * slope * (fabs(d) - offset) : curvature * d * d; }
  FUSED_CRITIC_HD T derivative(T d) const { return fabs(d) > delta ? (d < T(0) ? -slope : slope) : curvature * d; }
};

// The same as TokenLoss with options. A NaN among v, old, R and the bounds makes both loss and gradient NaN.
template <typename T>
struct TokenLossWithOptions {
  T vc;
  T unclipped, clipped;  // twice the criterion at v - R and at vc - R
  T twice_, grad_;

  FUSED_CRITIC_HD T twice() const { return twice_; }
  FUSED_CRITIC_HD T grad() const { return grad_; }
};

template <typename T>
FUSED_CRITIC_HD TokenLossWithOptions<T> value_loss_with_options(T v, T old, T ret, T low, T high, const TokenOptions<T>& o) {
  TokenLossWithOptions<T> x;
  x.vc = o.clip ? min_or_nan(max_or_nan(v, old + low), old + high) : v;
  const T d = v - ret, dc = x.vc - ret;
  x.unclipped = o.twice(d);
  x.clipped = o.twice(dc);
  const T loss = o.clip_only ? x.clipped : max_or_nan(x.unclipped, x.clipped);
  const bool no_gradient = (o.clip_only ? x.vc != v : x.clipped > x.unclipped) || loss > o.limit;
  x.twice_ = loss > o.limit ? o.limit : loss;
  x.grad_ = dc != dc ? dc : no_gradient ? T(0) : o.derivative(d);
  return x;
}

}  // namespace fused_critic
