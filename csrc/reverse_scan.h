// First-order linear recurrence from the last position to the first: parameter blocks and the kernels' entry points.
#pragma once

#include "params.h"

namespace fused_critic {

// y_t = x_t + decay_t y_{t+1} within each sequence, y_{T+1} = init.
struct ReverseScanParams {
  Layout layout;
  Operand x;
  Operand decay;         // per position (a stride may be 0); absent: factor at all of them
  Number factor;
  Operand init;          // [num_seqs], by seq_stride; may be absent (then 0)
  bool shifted = false;  // y_{t+1} is written at t instead of y_t
  Output y;              // in the accumulation type
};

// The adjoint: a scan in the direction of time.
//   p_t = grad_t + decay_{t-1} p_{t-1},  grad_init = decay_T p_T at the last position T, 0 for an empty sequence.
// The gradient of x_t is p_t, that of decay_t is p_t y_{t+1}.
struct ReverseScanBackwardParams {
  Layout layout;
  Operand grad;
  Operand decay;
  Number factor;
  Output p, grad_init;  // in the accumulation type; either may be absent. grad_init: [num_seqs]
};

namespace cpu {
// T: accumulation type, float or double.
template <typename T> void reverse_scan(const ReverseScanParams& p);
template <typename T> void reverse_scan_backward(const ReverseScanBackwardParams& p);
}  // namespace cpu

}  // namespace fused_critic
