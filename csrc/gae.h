// Generalised advantage estimation: parameter blocks and the kernels' entry points. Formulas: docs/design.md, math/gae.h.
#pragma once

#include "params.h"

namespace fused_critic {

// Positions with mask == 0 are transparent (mask_mode "skip"): nothing is read from them, 0 is written to them.
struct GaeParams {
  Layout layout;
  Operand rewards, values, mask, terminated, truncated, next_values;  // from mask on: may be absent; flags are set where non-zero
  Operand bootstrap_values;                                           // [num_seqs], by seq_stride; may be absent (then 0)
  Number gamma, lam;
  Output advantages, returns;                                         // in the accumulation type
};

// The adjoint: a scan in the direction of time. With g = grad_advantages + grad_returns over the valid positions of a sequence,
//   p_t = g_t + gamma lam (1 - done_{t-1}) p_{t-1}
//   grad_rewards = p_t,  grad_values = grad_returns_t - p_t + [no next_values] gamma (1 - terminated_{t-1}) p_{t-1},
//   grad_next_values = gamma (1 - terminated_t) p_t,  grad_bootstrap = gamma (1 - terminated_T) p_T at the last valid T, 0 for an empty sequence.
struct GaeBackwardParams {
  Layout layout;
  Operand grad_advantages, grad_returns, mask, terminated, truncated;  // gradients in the accumulation type; either may be absent (zero)
  bool has_next_values = false;
  Number gamma, lam;
  Output grad_rewards, grad_values, grad_next_values, grad_bootstrap;  // in the accumulation type; absent where not wanted. 0 at masked positions
};

namespace cpu {
// T: accumulation type, float or double.
template <typename T> void gae(const GaeParams& p);
template <typename T> void gae_backward(const GaeBackwardParams& p);
}  // namespace cpu

}  // namespace fused_critic
