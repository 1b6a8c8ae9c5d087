// V-trace (Espeholt et al. 2018, arXiv:1802.01561) of one token, as the affine map of one carried scalar. Shared by CUDA and CPU.
#pragma once

#include "platform.h"

namespace fused_critic {

template <typename T>
struct VTraceFactors {
  T gamma, lam, rho_clip, c_clip, pg_rho_clip;
};

// With a the corrections v_s - V(x_s), and `next` the advantage a_{t+1} of the next valid position (0 at the end):
//   a_t = delta + factor next,  pg_advantage_t = pg_base + pg_slope next.
template <typename T>
struct VTraceStep {
  T delta, factor, pg_base, pg_slope;
};

// NaN stays NaN.
template <typename T>
FUSED_CRITIC_HD T clip_above(T x, T most) {
  return x > most ? most : x;
}

// next_value: V of the next state; not used where terminated. done: terminated or truncated, the trace stops. The policy gradient's
// v_{t+1} is next_value + next, so next_value alone where the trace stops.
template <typename T>
FUSED_CRITIC_HD VTraceStep<T> vtrace_step(const VTraceFactors<T>& f, T reward, T value, T next_value, T ratio, bool terminated, bool done) {
  const T difference = (reward - value) + (terminated ? T(0) : f.gamma * next_value);  // of a temporal difference
  const T pg_rho = clip_above(ratio, f.pg_rho_clip), continued = done ? T(0) : f.gamma;
  return {clip_above(ratio, f.rho_clip) * difference, continued * (f.lam * clip_above(ratio, f.c_clip)), pg_rho * difference, pg_rho * continued};
}

}  // namespace fused_critic
