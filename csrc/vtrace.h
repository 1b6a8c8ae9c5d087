// V-trace: parameter block and the kernels' entry points. Formulas: math/vtrace.h.
#pragma once

#include "params.h"

namespace fused_critic {

// Positions with mask == 0 are transparent: nothing is read from them, 0 is written to them.
struct VTraceParams {
  Layout layout;
  Operand rewards, values, ratios;                         // ratios: of the policies' probabilities, or their logarithms
  Operand mask, terminated, truncated, next_values;        // may be absent; flags are set where non-zero
  Operand bootstrap_values;                                // [num_seqs], by seq_stride; may be absent (then 0). Not beside next_values
  bool ratios_are_logs = false;
  Number gamma, lam, rho_clip, c_clip, pg_rho_clip;        // a clip of infinity does not clip
  Output vs, pg_advantages, advantages;                    // in the accumulation type
  Output following;                                        // CUDA, without next_values: scratch, laid out as the outputs
};

namespace cpu {
// T: accumulation type, float or double.
template <typename T> void vtrace(const VTraceParams& p);
}  // namespace cpu

}  // namespace fused_critic
