// Generalised advantage estimation: parameter blocks and the kernels' entry points. Formulas: docs/design.md, math/gae.h.
#pragma once

#include "params.h"

namespace fused_critic {

// What a position with mask == 0 is to the recursion. In all modes 0 is written to it, and nothing but flags (kZero) is used of what it holds:
// NaN may lie there. An absent mask masks nothing. (mask_mode "ignore": the host passes no mask.)
enum class MaskMode : int32_t {
  kSkip,   // transparent: whatever is carried passes unchanged, its flags are not read
  kZero,   // a step like any other with V = r = next_value = 0 and the flags that it has
  kReset,  // whatever is carried becomes 0, a bootstrap behind it too; its flags are not read
};

// With returns_lam (has_returns_lam) the returns have a recursion of their own: advantages = A(lam), returns = A(returns_lam) + V.
struct GaeParams {
  Layout layout;
  Operand rewards, values, mask, terminated, truncated, next_values;  // from mask on: may be absent; flags are set where non-zero
  Operand bootstrap_values;                                           // [num_seqs], by seq_stride; may be absent (then 0)
  MaskMode mask_mode = MaskMode::kSkip;
  Number gamma, lam, returns_lam;  // in [0, 1], each one for all sequences or one per sequence
  bool has_returns_lam = false;
  Output advantages, returns;                                         // in the accumulation type
};

// The adjoint: a scan in the direction of time, whose carry q starts as 0. With g = grad_advantages + grad_returns a valid position has
//   p_t = g_t + gamma lam q,
//   grad_rewards = p_t,  grad_values = grad_returns_t - p_t + [no next_values] gamma q,  grad_next_values = gamma (1 - terminated_t) p_t,
// and leaves q = (1 - done_t) p_t. (Without next_values there is no truncation: done is terminated.) A masked position gets gradients of 0 and leaves
//   kSkip: q,  kZero: (1 - done_t) gamma lam q (its outputs are 0 and what it holds counts as 0, but p passes through it),  kReset: 0.
// grad_bootstrap = gamma q behind the last position, 0 for an empty sequence.
//
// With returns_lam there are two carries: p1 and q1 with g = grad_advantages and lam, p2 and q2 with g = grad_returns and returns_lam. The
// gradients are the above for p = p1 + p2 and q = q1 + q2.
struct GaeBackwardParams {
  Layout layout;
  Operand grad_advantages, grad_returns, mask, terminated, truncated;  // gradients in the accumulation type; either may be absent (zero)
  bool has_next_values = false;
  MaskMode mask_mode = MaskMode::kSkip;
  Number gamma, lam, returns_lam;  // as in GaeParams
  bool has_returns_lam = false;
  Output grad_rewards, grad_values, grad_next_values, grad_bootstrap;  // in the accumulation type; absent where not wanted. 0 at masked positions
};

namespace cpu {
// T: accumulation type, float or double.
template <typename T> void gae(const GaeParams& p);
template <typename T> void gae_backward(const GaeBackwardParams& p);
}  // namespace cpu

}  // namespace fused_critic
