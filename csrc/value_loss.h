// Value loss: parameter blocks and the kernels' entry points. Formulas: docs/design.md, math/value_loss.h.
#pragma once

#include <limits>

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
// (the second factor exists for kSeqMeanTokenMean only, where it is 1 / row weight, or 0 for an empty row; elsewhere it is 1). The last one is
// the loss clamp, where there is one.
enum Residual : int32_t { kScale, kClipLow, kClipHigh, kSeqScale };

// The criterion c of a difference d (v - R or vc - R) as numbers: curvature d^2 / 2 where |d| <= delta, else slope (|d| - offset).
//              delta   curvature   slope   offset
//   mse        inf     1           1       0
//   huber      delta   1           delta   delta / 2
//   smooth_l1  delta   1 / delta   1       delta / 2
//   l1         0       0           1       0
struct Criterion {
  double delta = std::numeric_limits<double>::infinity(), curvature = 1, slope = 1, offset = 0;
};

// How a token's loss is made, chosen once per call: the two common ones have code of their own.
enum class Form {
  kPlain,    // mse, no clipping
  kClipped,  // the greater of mse at v and at vc, for one range
  kOptions,  // anything: criteria, clip_only, a loss clamp, a range per token, with or without clipping
};

// The options of a call, the same forward and backward.
struct LossOptions {
  bool clip = true;
  bool clip_only = false;  // c(vc - R) alone; its gradient is 0 where v is outside of the range
  bool clamp = false;      // min(l, loss clamp); the gradient is 0 where l is greater
  Criterion criterion;
  Operand clip_lows, clip_highs;  // a bound per token, each in place of the one number
};

inline Form form_of(const LossOptions& o) {
  const bool mse = o.criterion.curvature == 1 && o.criterion.delta == std::numeric_limits<double>::infinity();
  if (!mse || o.clip_only || o.clamp || o.clip_lows.data != nullptr || o.clip_highs.data != nullptr) return Form::kOptions;
  return o.clip ? Form::kClipped : Form::kPlain;
}

struct ValueLossParams {
  Layout layout;
  Operand values, old_values, returns, mask;  // old_values absent without clipping, mask absent: every token has weight 1
  LossOptions options;
  Number clip_low, clip_high;                 // the range is [old + clip_low, old + clip_high]
  Number loss_clamp;                          // where options.clamp
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
  double* clamp_residual = nullptr;           // where options.clamp
};

struct ValueLossBackwardParams {
  Layout layout;
  Operand values, old_values, returns, mask;
  LossOptions options;
  bool seq_scale = false;                     // residuals carry one factor per sequence
  const double* residuals = nullptr;
  const double* loss_clamp = nullptr;         // where options.clamp
  Operand grad_loss;                          // in the accumulation type; both strides 0 for the 0-d loss
  Output grad_values;                         // in the dtype of values; exactly 0 at masked tokens
};

namespace cpu {
// T: accumulation type, float or double.
template <typename T> void value_loss(const ValueLossParams& p);
template <typename T> void value_loss_backward(const ValueLossBackwardParams& p);
}  // namespace cpu

}  // namespace fused_critic
