// GAE and its adjoint as recurrences of one carried scalar. CUDA kernels call it; the CPU's lanes (cpu/gae_kernel.h) are the same maps.
#pragma once

#include <cmath>
#include <type_traits>

#include "affine.h"
#include "pair.h"
#include "platform.h"

namespace fused_critic {

// What the steps need of gamma and lambda, each number rounded once. C: T, or Pair<T> where the returns have a lambda of their own (the second).
template <typename T, typename C = T>
struct GaeFactors {
  T gamma, drift;  // drift: 1 - gamma
  C rest;          // gamma (1 - lam)
  C gamma_lam;
};

template <typename T, typename C = T>
FUSED_CRITIC_HD GaeFactors<T, C> gae_factors(double gamma, double lam, double returns_lam) {
  const auto discounted = [&](double weight, double returns_weight) {
    if constexpr (std::is_same_v<C, T>) {
      return static_cast<T>(gamma * weight);
    } else {
      return C(static_cast<T>(gamma * weight), static_cast<T>(gamma * returns_weight));
    }
  };
  return {static_cast<T>(gamma), static_cast<T>(1 - gamma), discounted(1 - lam, 1 - returns_lam), discounted(lam, returns_lam)};
}

// --- forward: scanned from the last position to the first -------------------------------------------------------------------
// The carry that enters a step is x = gamma lam A_next + gamma V_next, starting as gamma * bootstrap; with next_values it is
// x = gamma lam A_next, starting as 0. A step alone is
//   A = (r - V) + (terminated or truncated ? 0 : x)  [+ gamma (1 - terminated) next_value]     (truncated needs next_values)
// and a masked position emits 0; its map is the identity (skip), that of a step with r = V = next_value = 0 (zero), or 0 (reset).
//
// x and V are as large as the values are, A only as large as the errors are. So a run of neighbouring steps walks lambda returns that count
// from a centre c near its values, g = A + V - c, and its carry counts from gamma c:
//   g = (r - drift c) + (x - gamma c),   x - gamma c = gamma lam g_next + rest (V_next - c).
// With next_values x counts from 0, as x = gamma lam (g_next - (V_next - c)), and r + gamma next_value loses all of c. A run's first step takes
// what it does not know from x; where no x comes in, because the next step terminated, the carry is -gamma c.
template <typename T, typename C>
struct GaeRun {
  T centre, origin, drop;  // x counts from the origin; drop: what r loses
  C rest;                  // how much V - c weighs in the carry that leaves
};

// Any finite centre is right, and so is the first step's value whatever it is, as that reaches all of the run anyway. follows: the next value is
// that of the next step, and not of next_values.
template <typename T, typename C>
FUSED_CRITIC_HD GaeRun<T, C> gae_run(const GaeFactors<T, C>& f, T centre, bool follows) {
  if (follows) return {centre, f.gamma * centre, f.drift * centre, f.rest};
  return {centre, T(0), centre, -f.gamma_lam};
}

// --- adjoint: scanned from the first position to the last --------------------------------------------------------------------
// The carry that enters is q = (1 - done) p of the previous valid position, 0 at the start: p = g + gamma lam q, leaving (1 - done) p.
// A masked position: the identity (skip), a step with g = 0 (zero), or 0 (reset). Without next_values there is no truncation, so gamma q is also what V receives from the position before.
template <typename T>
FUSED_CRITIC_HD T gae_adjoint(T grad, T q, T gamma_lam) {
  return grad + gamma_lam * q;
}

}  // namespace fused_critic
