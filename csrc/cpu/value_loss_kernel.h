// Vectorised value loss of one tile. Included once per instruction set (see simd.h).

namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE {

struct Placement {  // of a tile inside one operand
  int64_t origin, line_stride, stride;
};

inline Placement place(const TileSpec& tile, int64_t seq_stride, int64_t time_stride) {
  const int64_t origin = tile.first_seq * seq_stride + tile.first_t * time_stride;
  return tile.time_major ? Placement{origin, time_stride, seq_stride} : Placement{origin, seq_stride, time_stride};
}

template <typename T>
inline const T* load_tile(const Operand& x, const TileSpec& tile, T* scratch) {
  const Placement at = place(tile, x.seq_stride, x.time_stride);
  return load_rect(x, at.origin, at.line_stride, at.stride, Rect{tile.lines, tile.length}, scratch);
}

// The mask as weights; a missing one weighs every token 1.
template <typename T>
inline const T* load_weights(const Operand& mask, const TileSpec& tile, T* scratch) {
  if (mask.data != nullptr) return load_tile(mask, tile, scratch);
  for (int64_t i = 0; i < tile.lines * tile.length; ++i) scratch[i] = T(1);
  return scratch;
}

template <typename T>
struct LossInputs {
  Vec<T> v, old, ret, w;
};

// Masked tokens enter the arithmetic as zeros: whatever lies there has no influence.
template <typename T, bool kClip>
FUSED_CRITIC_INLINE LossInputs<T> load_inputs(const T* v, const T* old, const T* ret, const T* w) {
  const Vec<T> zero = Vec<T>::all(T(0));
  LossInputs<T> in;
  in.w = Vec<T>::load(w);
  const Mask<T> valid = in.w != zero;
  in.v = select(valid, Vec<T>::load(v), zero);
  in.old = kClip ? select(valid, Vec<T>::load(old), zero) : zero;
  in.ret = select(valid, Vec<T>::load(ret), zero);
  return in;
}

// math/value_loss.h in lanes.
template <typename T>
struct LossLanes {
  Vec<T> loss, grad;
  Mask<T> clipped, outside;
};

template <typename T, bool kClip>
FUSED_CRITIC_INLINE LossLanes<T> token_loss(const LossInputs<T>& in, const Vec<T>& low, const Vec<T>& high) {
  const Vec<T> zero = Vec<T>::all(T(0)), half = Vec<T>::all(T(0.5));
  LossLanes<T> out;
  const Vec<T> d = in.v - in.ret;
  const Vec<T> unclipped = half * d * d;
  if constexpr (!kClip) {
    out.loss = unclipped;
    out.grad = d;
    out.clipped = out.outside = zero != zero;
    return out;
  } else {
    const Vec<T> lo = in.old + low, hi = in.old + high;
    const Mask<T> below = in.v < lo, above = in.v > hi;
    const Vec<T> dc = select(below, lo, select(above, hi, in.v)) - in.ret;
    const Vec<T> clipped = half * dc * dc;
    const Vec<T> nan_of_old = select(lo != lo, lo, zero);
    out.clipped = clipped > unclipped;
    out.outside = below | above;
    out.loss = select(out.clipped, clipped, unclipped) + nan_of_old;
    out.grad = select(out.clipped, zero, d) + nan_of_old;
    return out;
  }
}

// Sums of one tile. Value, return and error are summed about a centre (the tile's first valid token), so that their squares keep
// their digits when the mean is far from zero; the raw moments are put together in double.
template <typename T>
struct LossSums {
  Vec<T> tokens, weight, loss, clipped, outside, value, value_sq, ret, ret_sq, error, error_sq, value_min, value_max;
};

// One group of kLanes tokens.
template <typename T, bool kClip>
FUSED_CRITIC_INLINE void accumulate(LossSums<T>& s, const LossInputs<T>& in, const Vec<T>& low, const Vec<T>& high, const Vec<T>& centre_v, const Vec<T>& centre_r, T* token_out) {
  const Vec<T> zero = Vec<T>::all(T(0)), one = Vec<T>::all(T(1));
  const Mask<T> valid = in.w != zero;
  const LossLanes<T> l = token_loss<T, kClip>(in, low, high);
  const Vec<T> weighted = in.w * l.loss;
  if (token_out != nullptr) weighted.store(token_out);
  s.loss = s.loss + weighted;
  s.tokens = s.tokens + select(valid, one, zero);
  s.weight = s.weight + in.w;
  if constexpr (kClip) {
    s.clipped = s.clipped + select(l.clipped, in.w, zero);
    s.outside = s.outside + select(l.outside, in.w, zero);
  }
  const Vec<T> dv = in.v - centre_v, dr = in.ret - centre_r, de = (in.ret - in.v) - (centre_r - centre_v);
  const Vec<T> wv = in.w * dv, wr = in.w * dr, we = in.w * de;
  s.value = s.value + wv;
  s.value_sq = s.value_sq + wv * dv;
  s.ret = s.ret + wr;
  s.ret_sq = s.ret_sq + wr * dr;
  s.error = s.error + we;
  s.error_sq = s.error_sq + we * de;
  s.value_min = select(valid, select(in.v < s.value_min, in.v, s.value_min), s.value_min);
  s.value_max = select(valid, select(in.v > s.value_max, in.v, s.value_max), s.value_max);
}

inline void add_centred(double* moments, Moment first, double weight, double centre, double sum, double sum_sq) {
  moments[first] += weight * centre + sum;
  moments[first + 1] += weight * centre * centre + 2 * centre * sum + sum_sq;
}

template <typename T, bool kClip>
inline void loss_tile(const T* v, const T* old, const T* ret, const T* w, int64_t n, T low, T high, double* moments, T* token_loss_out) {
  int64_t first = 0;
  while (first < n && w[first] == T(0)) ++first;
  if (first == n) {
    if (token_loss_out != nullptr) std::fill(token_loss_out, token_loss_out + n, T(0));
    return;
  }
  const Vec<T> zero = Vec<T>::all(T(0)), lows = Vec<T>::all(low), highs = Vec<T>::all(high);
  const Vec<T> centre_v = Vec<T>::all(v[first]), centre_r = Vec<T>::all(ret[first]);
  constexpr T kInf = std::numeric_limits<T>::infinity();
  LossSums<T> s{zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, Vec<T>::all(kInf), Vec<T>::all(-kInf)};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const LossInputs<T> in = load_inputs<T, kClip>(v + i, kClip ? old + i : nullptr, ret + i, w + i);
    accumulate<T, kClip>(s, in, lows, highs, centre_v, centre_r, token_loss_out != nullptr ? token_loss_out + i : nullptr);
  }
  if (i < n) {  // the last n % kLanes tokens, padded with masked ones
    T tail[4][kLanes] = {}, out[kLanes];
    std::copy(v + i, v + n, tail[0]);
    if constexpr (kClip) std::copy(old + i, old + n, tail[1]);
    std::copy(ret + i, ret + n, tail[2]);
    std::copy(w + i, w + n, tail[3]);
    accumulate<T, kClip>(s, load_inputs<T, kClip>(tail[0], tail[1], tail[2], tail[3]), lows, highs, centre_v, centre_r, out);
    if (token_loss_out != nullptr) std::copy(out, out + (n - i), token_loss_out + i);
  }
  const double weight = sum(s.weight), cv = first_lane(centre_v), cr = first_lane(centre_r), ce = first_lane(centre_r - centre_v);
  moments[kTokens] += sum(s.tokens);
  moments[kWeight] += weight;
  moments[kLoss] += sum(s.loss);
  moments[kClipped] += sum(s.clipped);
  moments[kOutside] += sum(s.outside);
  add_centred(moments, kValue, weight, cv, sum(s.value), sum(s.value_sq));
  add_centred(moments, kReturn, weight, cr, sum(s.ret), sum(s.ret_sq));
  add_centred(moments, kError, weight, ce, sum(s.error), sum(s.error_sq));
  T lanes[kLanes];
  s.value_min.store(lanes);
  for (T x : lanes) moments[kValueMin] = std::min(moments[kValueMin], double(x));
  s.value_max.store(lanes);
  for (T x : lanes) moments[kValueMax] = std::max(moments[kValueMax], double(x));
}

template <typename T>
void loss_forward(const ValueLossParams& p, const TileSpec& tile, T low, T high, double* moments, T* token_loss_out, T* token_weight) {
  alignas(64) T scratch[4][kTile];
  const int64_t n = tile.lines * tile.length;
  const T* v = load_tile(p.values, tile, scratch[0]);
  const T* ret = load_tile(p.returns, tile, scratch[1]);
  const T* w = load_weights(p.mask, tile, scratch[2]);
  if (p.clip) {
    loss_tile<T, true>(v, load_tile(p.old_values, tile, scratch[3]), ret, w, n, low, high, moments, token_loss_out);
  } else {
    loss_tile<T, false>(v, nullptr, ret, w, n, low, high, moments, token_loss_out);
  }
  if (token_weight != nullptr) std::copy(w, w + n, token_weight);
}

template <typename T, bool kClip>
FUSED_CRITIC_INLINE void grad_lanes(const T* v, const T* old, const T* ret, const T* w, const T* upstream, const Vec<T>& low, const Vec<T>& high, T* out) {
  const Vec<T> zero = Vec<T>::all(T(0));
  const LossInputs<T> in = load_inputs<T, kClip>(v, old, ret, w);
  const LossLanes<T> l = token_loss<T, kClip>(in, low, high);
  select(in.w != zero, Vec<T>::load(upstream) * (in.w * l.grad), zero).store(out);
}

template <typename T, bool kClip>
inline void grad_tile(const T* v, const T* old, const T* ret, const T* w, const T* upstream, int64_t n, T low, T high, T* out) {
  const Vec<T> lows = Vec<T>::all(low), highs = Vec<T>::all(high);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) grad_lanes<T, kClip>(v + i, kClip ? old + i : nullptr, ret + i, w + i, upstream + i, lows, highs, out + i);
  if (i < n) {  // as in loss_tile
    T tail[5][kLanes] = {}, last[kLanes];
    std::copy(v + i, v + n, tail[0]);
    if constexpr (kClip) std::copy(old + i, old + n, tail[1]);
    std::copy(ret + i, ret + n, tail[2]);
    std::copy(w + i, w + n, tail[3]);
    std::copy(upstream + i, upstream + n, tail[4]);
    grad_lanes<T, kClip>(tail[0], tail[1], tail[2], tail[3], tail[4], lows, highs, last);
    std::copy(last, last + (n - i), out + i);
  }
}

template <typename T>
void loss_backward(const ValueLossBackwardParams& p, const TileSpec& tile, T low, T high, double scale, const T* seq_factor) {
  alignas(64) T scratch[6][kTile];
  const int64_t n = tile.lines * tile.length;
  const T* v = load_tile(p.values, tile, scratch[0]);
  const T* ret = load_tile(p.returns, tile, scratch[1]);
  const T* w = load_weights(p.mask, tile, scratch[2]);
  // What every token's own gradient is multiplied by: the incoming gradient, the call's scale, the sequence's factor.
  T* upstream = scratch[4];
  if (p.grad_loss.seq_stride == 0 && p.grad_loss.time_stride == 0) {
    std::fill(upstream, upstream + n, T(double(*static_cast<const T*>(p.grad_loss.data)) * scale));
  } else {
    const T* grad_loss = load_tile(p.grad_loss, tile, scratch[4]);
    for (int64_t i = 0; i < n; ++i) upstream[i] = T(double(grad_loss[i]) * scale);
  }
  if (seq_factor != nullptr) {
    for (int64_t i = 0; i < n; ++i) upstream[i] *= seq_factor[i];
  }
  const Placement at = place(tile, p.grad_values.seq_stride, p.grad_values.time_stride);
  T* direct = direct_rect<T>(p.grad_values, at.origin, at.line_stride, at.stride, Rect{tile.lines, tile.length});
  T* out = direct != nullptr ? direct : scratch[5];
  if (p.clip) {
    grad_tile<T, true>(v, load_tile(p.old_values, tile, scratch[3]), ret, w, upstream, n, low, high, out);
  } else {
    grad_tile<T, false>(v, nullptr, ret, w, upstream, n, low, high, out);
  }
  if (direct == nullptr) store_rect(out, p.grad_values, at.origin, at.line_stride, at.stride, Rect{tile.lines, tile.length});
}

template <typename T>
void store_tokens(const T* tokens, const Output& y, const TileSpec& tile) {
  const Placement at = place(tile, y.seq_stride, y.time_stride);
  store_rect(tokens, y, at.origin, at.line_stride, at.stride, Rect{tile.lines, tile.length});
}

}  // namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE
