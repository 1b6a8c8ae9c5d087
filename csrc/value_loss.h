// Value loss: parameter blocks and the kernels' entry points. Formulas: docs/design.md, math/value_loss.h.
#pragma once

#include "params.h"

namespace fused_critic {

enum class Reduction : int32_t { kTokenMean, kTokenSum, kSeqMeanTokenSum, kSeqMeanTokenSumNorm, kSeqMeanTokenMean, kNone };

// Mergeable moments, float64, in this order (the Python class ValueLossStats reads them by the same names).
// w is the mask (a floating mask is a weight), and every sum runs over the tokens with w != 0. min and max of nothing: +inf and -inf.
enum Moment : int32_t {
  kTokens,        // number of tokens with w != 0
  kWeight,        // sum w
  kLoss,          // sum w l
  kClipped,       // sum w [clipped loss strictly greater]
  kOutside,       // sum w [v outside of the clip range]
  kValue,         // sum w v
  kValueSq,       // sum w v^2
  kReturn,        // sum w R
  kReturnSq,      // sum w R^2
  kError,         // sum w (R - v)
  kErrorSq,       // sum w (R - v)^2
  kSequences,     // sequences with at least one token
  kValueMin,      // min v
  kValueMax,      // max v
  kNumMoments
};

// What forward leaves for backward, float64: d(loss)/d(w l) of a token of sequence s is residuals[kScale] * residuals[kSeqScale + s]
// (the second factor exists for kSeqMeanTokenMean only, where it is 1 / row weight, or 0 for an empty row; elsewhere it is 1).
enum Residual : int32_t { kScale, kClipLow, kClipHigh, kSeqScale };

struct ValueLossParams {
  Layout layout;
  Operand values, old_values, returns, mask;  // old_values absent without clipping, mask absent: every token has weight 1
  bool clip = true;
  Number clip_low, clip_high;                 // the range is [old + clip_low, old + clip_high]
  Reduction reduction = Reduction::kTokenMean;
  // Denominator: the given count (batch_num_tokens for kTokenMean, global_batch_size for kSeqMean*) if has_count, else the one counted
  // in this call (sum of weights; non-empty sequences). Not used by kTokenSum and kNone. A denominator of 0 gives scale 0, hence loss 0.
  bool has_count = false;
  Number count;
  double factor = 1;                          // dp_size; for kSeqMeanTokenSumNorm already divided by the loss scale factor
  Output tokens;                              // kNone: per-token losses w l (0 at masked tokens), in the accumulation type
  void* loss = nullptr;                       // every other reduction: the 0-d loss, in the accumulation type
  double* stats = nullptr;                    // [kNumMoments]
  double* residuals = nullptr;                // [kSeqScale], or [kSeqScale + num_seqs] for kSeqMeanTokenMean
};

struct ValueLossBackwardParams {
  Layout layout;
  Operand values, old_values, returns, mask;
  bool clip = true;
  bool seq_scale = false;                     // residuals carry one factor per sequence
  const double* residuals = nullptr;
  Operand grad_loss;                          // in the accumulation type; both strides 0 for the 0-d loss
  Output grad_values;                         // in the dtype of values; exactly 0 at masked tokens
};

namespace cpu {
// T: accumulation type, float or double.
template <typename T> void value_loss(const ValueLossParams& p);
template <typename T> void value_loss_backward(const ValueLossBackwardParams& p);
}  // namespace cpu

}  // namespace fused_critic
