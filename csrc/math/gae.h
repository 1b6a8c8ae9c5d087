// GAE and its adjoint as recurrences of one carried scalar. CUDA kernels call it; the CPU's lanes (cpu/gae_kernel.h) are the same maps.
#pragma once

#include <cmath>
#include <type_traits>

#include "affine.h"
#include "pair.h"
#include "platform.h"

namespace fused_critic {

// What the steps need of gamma and lambda. C: T, or Pair<T> where the returns have a lambda of their own (the second).
template <typename T, typename C = T>
struct GaeFactors {
  T gamma;
  C gamma_lam;
};

template <typename T, typename C = T>
FUSED_CRITIC_HD GaeFactors<T, C> gae_factors(double gamma, double lam, double returns_lam) {
  const T gamma_lam = static_cast<T>(gamma * lam);
  if constexpr (std::is_same_v<C, T>) {
    return {static_cast<T>(gamma), gamma_lam};
  } else {
    return {static_cast<T>(gamma), C(gamma_lam, static_cast<T>(gamma * returns_lam))};
  }
}

// --- forward: scanned from the last position to the first -------------------------------------------------------------------
// The carry that enters a step is x = gamma lam A_next + gamma V_next, starting as gamma * bootstrap; with next_values it is
// x = gamma lam A_next, starting as 0. A step alone is
//   A = (r - V) + (terminated or truncated ? 0 : x)  [+ gamma (1 - terminated) next_value]     (truncated needs next_values)
// and a masked position emits 0; its map is the identity (skip), that of a step with r = V = next_value = 0 (zero), or 0 (reset).
//
// x and V are as large as the values are, A only as large as the errors are. So a run of neighbouring steps keeps A and V apart,
//   A = (r - (V - gamma V_next)) + gamma lam A_next,
// and its first step counts x from its own V, which cancels: A = r + (x - V). Roundings of the size of V then arise once per run. A run whose
// last advantage would be A if x were V_first, and grows by `power` with x, leaves gae_leaving as the constant part of its map.
template <typename C, typename T>
FUSED_CRITIC_HD C gae_leaving(C advantage, C gamma_lam, T gamma_last_value, C power, T first_value) {
  using std::fma;
  return fma(gamma_lam, advantage, fma(-power, C(first_value), C(gamma_last_value)));
}

// --- adjoint: scanned from the first position to the last --------------------------------------------------------------------
// The carry that enters is q = (1 - done) p of the previous valid position, 0 at the start: p = g + gamma lam q, leaving (1 - done) p.
// A masked position: the identity (skip), a step with g = 0 (zero), or 0 (reset). Without next_values there is no truncation, so gamma q is also what V receives from the position before.
template <typename T>
FUSED_CRITIC_HD T gae_adjoint(T grad, T q, T gamma_lam) {
  return grad + gamma_lam * q;
}

}  // namespace fused_critic
