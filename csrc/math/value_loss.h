// The clipped value loss of one token. CUDA kernels call it; the CPU's lanes (cpu/value_loss_kernel.h) are the same in vectors.
#pragma once

#include "platform.h"

namespace fused_critic {

// l = 0.5 max((v - R)^2, (vc - R)^2) with vc = min(max(v, old + low), old + high), evaluated in the accumulation type T.
// A NaN among v, old, R makes both loss and gradient NaN.
template <typename T>
struct TokenLoss {
  T loss;
  T grad;        // d loss / d v: v - R, or 0 where the clipped branch is strictly greater; at a tie the whole v - R, never a half
  bool clipped;  // the clipped branch is strictly greater
  bool outside;  // v is outside of [old + low, old + high]
};

template <typename T>
FUSED_CRITIC_HD TokenLoss<T> clipped_value_loss(T v, T old, T ret, T low, T high) {
  const T lo = old + low, hi = old + high;
  const T vc = v < lo ? lo : (v > hi ? hi : v);  // inside the range v itself, bit for bit
  const T d = v - ret, dc = vc - ret;
  const T unclipped = T(0.5) * d * d, clipped = T(0.5) * dc * dc;
  TokenLoss<T> out;
  out.clipped = clipped > unclipped;
  out.outside = v < lo || v > hi;
  // A NaN in v or R shows in d, one in old only in the bounds: (lo + hi) * 0 carries it into the result.
  const T nan_of_old = (lo != lo) ? lo : T(0);
  out.loss = (out.clipped ? clipped : unclipped) + nan_of_old;
  out.grad = (out.clipped ? T(0) : d) + nan_of_old;
  return out;
}

template <typename T>
FUSED_CRITIC_HD TokenLoss<T> plain_value_loss(T v, T ret) {
  const T d = v - ret;
  return {T(0.5) * d * d, d, false, false};
}

}  // namespace fused_critic
