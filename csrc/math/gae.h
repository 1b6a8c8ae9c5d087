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
};

template <typename T>
FUSED_CRITIC_HD GaeFactors<T> gae_factors(double gamma, double lam) {
  return {static_cast<T>(gamma), static_cast<T>(gamma * lam)};
}

// --- forward: scanned from the last position to the first -------------------------------------------------------------------
// The carry that enters a step is x = gamma lam A_next + gamma V_next, starting as gamma * bootstrap; with next_values it is
// x = gamma lam A_next, starting as 0. A step alone is
//   A = (r - V) + (terminated or truncated ? 0 : x)  [+ gamma (1 - terminated) next_value]     (truncated needs next_values)
// and a masked position is the identity map and emits 0.
//
// x and V are as large as the values are, A only as large as the errors are. So a run of neighbouring steps keeps A and V apart,
//   A = (r - (V - gamma V_next)) + gamma lam A_next,
// and its first step counts x from its own V, which cancels: A = r + (x - V). Roundings of the size of V then arise once per run. A run whose
// last advantage would be A if x were V_first, and grows by `power` with x, leaves gae_leaving as the constant part of its map.
template <typename T>
FUSED_CRITIC_HD T gae_leaving(T advantage, T gamma_lam, T gamma_last_value, T power, T first_value) {
  return std::fma(gamma_lam, advantage, std::fma(-power, first_value, gamma_last_value));
}

// --- adjoint: scanned from the first position to the last --------------------------------------------------------------------
// The carry that enters is q = (1 - done) p of the previous valid position, 0 at the start: p = g + gamma lam q, leaving (1 - done) p.
// Without next_values there is no truncation, so gamma q is also what V receives from the position before.
template <typename T>
FUSED_CRITIC_HD T gae_adjoint(T grad, T q, T gamma_lam) {
  return grad + gamma_lam * q;
}

}  // namespace fused_critic
