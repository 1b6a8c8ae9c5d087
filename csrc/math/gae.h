// GAE and its adjoint as recurrences of one carried scalar. CUDA kernels call it; the CPU's lanes (cpu/gae_kernel.h) are the same maps.
#pragma once

#include <cmath>

#include "affine.h"
#include "platform.h"

namespace fused_critic {

// What the steps need of gamma and lambda.
template <typename T>
struct GaeFactors {
  T gamma, gamma_lam;
  T value;  // of V in the carry, see gae_leaving
};

template <typename T>
FUSED_CRITIC_HD GaeFactors<T> gae_factors(double gamma, double lam, bool has_next_values) {
  const double gamma_lam = gamma * lam;
  return {static_cast<T>(gamma), static_cast<T>(gamma_lam), static_cast<T>((has_next_values ? 0 : gamma) - gamma_lam)};
}

// --- forward: scanned from the last position to the first -------------------------------------------------------------------
// Without next_values the carry that enters a step is x = gamma lam A_next + gamma V_next; it starts as gamma * bootstrap.
// With next_values it is x = gamma lam A_next and starts as 0. The step itself:
//   u = terminated or truncated ? 0 : x          (truncated needs next_values, so without them u = 0 means terminated)
//   return = r + u  [+ gamma (1 - terminated) next_value],   A = return - V,   leaving: gamma lam A [+ gamma V without next_values].
// A masked position is the identity map and emits 0.
template <typename T>
FUSED_CRITIC_HD T gae_leaving(T ret, T value, T gamma_lam, T value_factor) {
  return std::fma(gamma_lam, ret, value_factor * value);  // so that the product of V does not wait for the return
}

// --- adjoint: scanned from the first position to the last --------------------------------------------------------------------
// The carry that enters is q = (1 - done) p of the previous valid position, 0 at the start: p = g + gamma lam q, leaving (1 - done) p.
// Without next_values there is no truncation, so gamma q is also what V receives from the position before.
template <typename T>
FUSED_CRITIC_HD T gae_adjoint(T grad, T q, T gamma_lam) {
  return grad + gamma_lam * q;
}

}  // namespace fused_critic
