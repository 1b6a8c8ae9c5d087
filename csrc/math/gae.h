// GAE and its adjoint as affine maps of one carried scalar. CUDA kernels call it; the CPU's lanes (cpu/gae_kernel.h) are the same in vectors.
#pragma once

#include "affine.h"
#include "platform.h"

namespace fused_critic {

// --- forward: scanned from the last position to the first -------------------------------------------------------------------
// Without next_values the carry that enters a step is x = gamma lam A_next + gamma V_next; it starts as gamma * bootstrap.
// With next_values it is x = gamma lam A_next and starts as 0. The step itself:
//   u = terminated or truncated ? 0 : x          (truncated needs next_values, so without them u = 0 means terminated)
//   A = (r - V) + u  [+ gamma (1 - terminated) next_value],   return = A + V,   leaving: gamma lam A [+ gamma V without next_values].
// A masked position is the identity map and emits 0.
template <typename T>
struct GaeStep {
  T base;   // what A is for u = 0: r - V [+ gamma (1 - terminated) next_value]
  T value;  // V
  T keep;   // 0 where the episode ends here, else 1
};

template <typename T>
FUSED_CRITIC_HD GaeStep<T> gae_step(T reward, T value, bool done) {
  return {reward - value, value, done ? T(0) : T(1)};
}

template <typename T>
FUSED_CRITIC_HD GaeStep<T> gae_step(T reward, T value, T next_value, bool terminated, bool truncated, T gamma) {
  // A select, not a product: next_values at a terminated position may hold anything.
  return {(reward - value) + (terminated ? T(0) : gamma * next_value), value, (terminated || truncated) ? T(0) : T(1)};
}

// The carry's map across the step. carried_value is V without next_values, 0 with them.
template <typename T>
FUSED_CRITIC_HD Affine<T> gae_map(const GaeStep<T>& s, T carried_value, T gamma, T gamma_lam) {
  return {gamma_lam * s.keep, gamma_lam * s.base + gamma * carried_value};
}

template <typename T>
FUSED_CRITIC_HD T gae_advantage(const GaeStep<T>& s, T x) {
  return s.base + s.keep * x;
}

// --- adjoint: scanned from the first position to the last --------------------------------------------------------------------
// The carry that enters is q = (1 - done) p of the previous valid position, 0 at the start: p = g + gamma lam q, leaving (1 - done) p.
// Without next_values there is no truncation, so gamma q is also what V receives from the position before.
template <typename T>
FUSED_CRITIC_HD Affine<T> gae_adjoint_map(T grad, bool done, T gamma_lam) {
  return done ? Affine<T>{T(0), T(0)} : Affine<T>{gamma_lam, grad};
}

}  // namespace fused_critic
