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

// What a tile's mask is. A floating one weighs tokens; any other, or the padding of a tile's end, only says which are there.
enum class MaskKind { kNone, kFlags, kWeights };

template <typename T>
struct MaskTile {
  MaskKind kind;     // kNone also where flags are all set: padding leaves most tiles so
  bool empty;        // no token is there
  const T* weights;  // 0 and 1 but for kWeights
};

template <typename T>
struct Ones {
  T value[kTile];
  constexpr Ones() : value() {
    for (T& x : value) x = T(1);
  }
};
template <typename T>
constexpr Ones<T> kOnes;

template <typename T>
inline MaskTile<T> load_mask(const Operand& mask, const TileSpec& tile, T* scratch) {
  if (mask.data == nullptr) return {MaskKind::kNone, false, kOnes<T>.value};
  const Placement at = place(tile, mask.seq_stride, mask.time_stride);
  if (mask.dtype == DType::kInt8 && at.stride == 1 && (tile.lines == 1 || at.line_stride == tile.length)) {
    const size_t n = size_t(tile.lines * tile.length);
    const char* bytes = static_cast<const char*>(mask.data) + at.origin;
    if (bytes[0] != 0 && std::memchr(bytes, 0, n) == nullptr) return {MaskKind::kNone, false, kOnes<T>.value};
    if (bytes[0] == 0 && std::memcmp(bytes, bytes + 1, n - 1) == 0) return {MaskKind::kFlags, true, nullptr};
  }
  const bool floating = mask.dtype == DType::kFloat64 || mask.dtype == DType::kFloat32 || mask.dtype == DType::kBFloat16 || mask.dtype == DType::kFloat16;
  return {floating ? MaskKind::kWeights : MaskKind::kFlags, false, load_tile(mask, tile, scratch)};
}

// math/value_loss.h in lanes, without its factor 0.5.
template <typename T>
struct LossLanes {
  Vec<T> d, dc;                  // v - R and vc - R
  Vec<T> unclipped, clipped;     // their squares
  Vec<T> vc, low_bound;
};

template <typename T, bool kClip>
FUSED_CRITIC_INLINE LossLanes<T> token_loss(const Vec<T>& v, const Vec<T>& old, const Vec<T>& ret, const Vec<T>& low, const Vec<T>& high) {
  LossLanes<T> out;
  out.d = v - ret;
  out.unclipped = out.d * out.d;
  if constexpr (kClip) {
    out.low_bound = old + low;
    out.vc = min(max(v, out.low_bound), old + high);  // NaN where old is NaN
    out.dc = out.vc - ret;
    out.clipped = out.dc * out.dc;
  }
  return out;
}

// A tile is read twice, from the first-level cache: one walk for the loss and one for the moments, so that the sums of each stay in registers.
template <typename T>
struct LossSums {
  Vec<T> loss;                                    // without the factor 0.5
  Mask<T> tokens, clipped, outside;               // counters; tokens: only if there is a mask
  Vec<T> weight, clipped_weight, outside_weight;  // MaskKind::kWeights
};

// One group of kLanes tokens. Masked ones are computed like the others and dropped at the end.
template <typename T, bool kClip, MaskKind kMask>
FUSED_CRITIC_INLINE void accumulate_loss(LossSums<T>& s, const T* v, const T* old, const T* ret, const T* weights, const Vec<T>& low, const Vec<T>& high, T* token_out) {
  const Vec<T> zero = Vec<T>::all(T(0)), w = Vec<T>::load(weights), value = Vec<T>::load(v);
  const Mask<T> valid = w != zero;
  const LossLanes<T> l = token_loss<T, kClip>(value, kClip ? Vec<T>::load(old) : zero, Vec<T>::load(ret), low, high);
  Vec<T> loss = l.unclipped;
  if constexpr (kClip) {
    loss = max(l.clipped, l.unclipped);  // NaN where v or R is
    loss = loss + select(l.low_bound != l.low_bound, l.low_bound, zero);
    Mask<T> clipped = l.clipped > l.unclipped, outside = l.vc != value;
    if constexpr (kMask != MaskKind::kNone) {
      clipped = clipped & valid;
      outside = outside & valid;
    }
    if constexpr (kMask == MaskKind::kWeights) {
      s.clipped_weight = s.clipped_weight + select(clipped, w, zero);
      s.outside_weight = s.outside_weight + select(outside, w, zero);
    } else {
      s.clipped = s.clipped + clipped;
      s.outside = s.outside + outside;
    }
  }
  if constexpr (kMask == MaskKind::kWeights) {
    loss = w * loss;
    s.weight = s.weight + w;
  }
  if constexpr (kMask != MaskKind::kNone) {
    loss = select(valid, loss, zero);
    s.tokens = s.tokens + valid;
  }
  if (token_out != nullptr) (loss * Vec<T>::all(T(0.5))).store(token_out);
  s.loss = s.loss + loss;
}

// Value, return and error are summed about a centre (the tile's first valid token), so that their squares keep their digits when the mean is
// far from zero; the raw moments are put together in double. The error's own sum follows from the other two.
template <typename T>
struct MomentSums {
  Vec<T> value, value_sq, ret, ret_sq, error_sq, value_min, value_max;
};

// One group of kLanes tokens. Masked ones are put on the centre, whatever lies there: they add 0 to every moment.
template <typename T, MaskKind kMask>
FUSED_CRITIC_INLINE void accumulate_moments(MomentSums<T>& s, const T* values, const T* returns, const T* weights, const Vec<T>& centre_v, const Vec<T>& centre_r) {
  Vec<T> v = Vec<T>::load(values), ret = Vec<T>::load(returns);
  const Vec<T> w = Vec<T>::load(weights);
  if constexpr (kMask != MaskKind::kNone) {
    const Mask<T> valid = w != Vec<T>::all(T(0));
    v = select(valid, v, centre_v);
    ret = select(valid, ret, centre_r);
  }
  const Vec<T> dv = v - centre_v, dr = ret - centre_r, de = dr - dv;
  constexpr bool kWeighted = kMask == MaskKind::kWeights;
  const Vec<T> wv = kWeighted ? w * dv : dv, wr = kWeighted ? w * dr : dr, we = kWeighted ? w * de : de;
  s.value = s.value + wv;
  s.value_sq = s.value_sq + wv * dv;
  s.ret = s.ret + wr;
  s.ret_sq = s.ret_sq + wr * dr;
  s.error_sq = s.error_sq + we * de;
  s.value_min = min(v, s.value_min);
  s.value_max = max(v, s.value_max);
}

inline void add_centred(double* moments, Moment first, double weight, double centre, double sum, double sum_sq) {
  moments[first] += weight * centre + sum;
  moments[first + 1] += weight * centre * centre + 2 * centre * sum + sum_sq;
}

template <typename T, bool kClip, MaskKind kMask>
inline void loss_tile(const T* v, const T* old, const T* ret, const T* w, int64_t n, T low, T high, double* moments, T* token_loss_out) {
  int64_t first = 0;
  while (first < n && w[first] == T(0)) ++first;
  if (first == n) {
    if (token_loss_out != nullptr) std::fill(token_loss_out, token_loss_out + n, T(0));
    return;
  }
  const Vec<T> lows = Vec<T>::all(low), highs = Vec<T>::all(high);
  const Vec<T> centre_v = Vec<T>::all(v[first]), centre_r = Vec<T>::all(ret[first]);
  LossSums<T> s = {};
  MomentSums<T> m = {};
  m.value_min = m.value_max = centre_v;
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    accumulate_loss<T, kClip, kMask>(s, v + i, kClip ? old + i : nullptr, ret + i, w + i, lows, highs, token_loss_out != nullptr ? token_loss_out + i : nullptr);
  }
  for (int64_t i = 0; i < whole; i += kLanes) accumulate_moments<T, kMask>(m, v + i, ret + i, w + i, centre_v, centre_r);
  double tokens = kMask == MaskKind::kNone ? double(whole) : 0;
  if (whole < n) {  // the last n % kLanes tokens, padded with masked ones
    T tail[4][kLanes] = {}, out[kLanes];
    std::copy(v + whole, v + n, tail[0]);
    if constexpr (kClip) std::copy(old + whole, old + n, tail[1]);
    std::copy(ret + whole, ret + n, tail[2]);
    std::copy(w + whole, w + n, tail[3]);
    constexpr MaskKind kTailMask = kMask == MaskKind::kNone ? MaskKind::kFlags : kMask;
    accumulate_loss<T, kClip, kTailMask>(s, tail[0], tail[1], tail[2], tail[3], lows, highs, out);
    accumulate_moments<T, kTailMask>(m, tail[0], tail[2], tail[3], centre_v, centre_r);
    if (token_loss_out != nullptr) std::copy(out, out + (n - whole), token_loss_out + whole);
  }
  tokens += count(s.tokens);
  constexpr bool kWeighted = kMask == MaskKind::kWeights;
  const double weight = kWeighted ? sum(s.weight) : tokens, sum_v = sum(m.value), sum_r = sum(m.ret);
  const double cv = first_lane(centre_v), cr = first_lane(centre_r), ce = first_lane(centre_r - centre_v);
  moments[kTokens] += tokens;
  moments[kWeight] += weight;
  moments[kLoss] += 0.5 * sum(s.loss);
  moments[kClipped] += kWeighted ? sum(s.clipped_weight) : count(s.clipped);
  moments[kOutside] += kWeighted ? sum(s.outside_weight) : count(s.outside);
  add_centred(moments, kValue, weight, cv, sum_v, sum(m.value_sq));
  add_centred(moments, kReturn, weight, cr, sum_r, sum(m.ret_sq));
  add_centred(moments, kError, weight, ce, sum_r - sum_v, sum(m.error_sq));
  T lanes[kLanes];
  m.value_min.store(lanes);
  for (T x : lanes) moments[kValueMin] = std::min(moments[kValueMin], double(x));
  m.value_max.store(lanes);
  for (T x : lanes) moments[kValueMax] = std::max(moments[kValueMax], double(x));
}

template <typename T, bool kClip>
inline void loss_tile(MaskKind mask, const T* v, const T* old, const T* ret, const T* w, int64_t n, T low, T high, double* moments, T* token_loss_out) {
  switch (mask) {
    case MaskKind::kNone: return loss_tile<T, kClip, MaskKind::kNone>(v, old, ret, w, n, low, high, moments, token_loss_out);
    case MaskKind::kFlags: return loss_tile<T, kClip, MaskKind::kFlags>(v, old, ret, w, n, low, high, moments, token_loss_out);
    case MaskKind::kWeights: return loss_tile<T, kClip, MaskKind::kWeights>(v, old, ret, w, n, low, high, moments, token_loss_out);
  }
}

template <typename T>
void loss_forward(const ValueLossParams& p, const TileSpec& tile, T low, T high, double* moments, T* token_loss_out, T* token_weight) {
  alignas(64) T scratch[4][kTile];
  const int64_t n = tile.lines * tile.length;
  const MaskTile<T> mask = load_mask(p.mask, tile, scratch[2]);
  if (mask.empty) {
    if (token_loss_out != nullptr) std::fill(token_loss_out, token_loss_out + n, T(0));
    if (token_weight != nullptr) std::fill(token_weight, token_weight + n, T(0));
    return;
  }
  const T* v = load_tile(p.values, tile, scratch[0]);
  const T* ret = load_tile(p.returns, tile, scratch[1]);
  const T* w = mask.weights;
  if (p.clip) {
    loss_tile<T, true>(mask.kind, v, load_tile(p.old_values, tile, scratch[3]), ret, w, n, low, high, moments, token_loss_out);
  } else {
    loss_tile<T, false>(mask.kind, v, nullptr, ret, w, n, low, high, moments, token_loss_out);
  }
  if (token_weight != nullptr) std::copy(w, w + n, token_weight);
}

// upstream: what a token's own gradient v - R is multiplied by, its weight included.
template <typename T, bool kClip>
FUSED_CRITIC_INLINE void grad_lanes(const T* v, const T* old, const T* ret, const T* w, const Vec<T>& upstream, const Vec<T>& low, const Vec<T>& high, T* out) {
  const Vec<T> zero = Vec<T>::all(T(0));
  const LossLanes<T> l = token_loss<T, kClip>(Vec<T>::load(v), kClip ? Vec<T>::load(old) : zero, Vec<T>::load(ret), low, high);
  Vec<T> grad = l.d;
  if constexpr (kClip) grad = select(l.unclipped >= l.clipped, grad, (grad * zero) * l.dc);  // 0, or NaN where one of the two is
  select(Vec<T>::load(w) != zero, upstream * grad, zero).store(out);
}

// upstream per token, or where that is null one for all.
template <typename T, bool kClip>
inline void grad_tile(const T* v, const T* old, const T* ret, const T* w, const T* upstream, T uniform, int64_t n, T low, T high, T* out) {
  const Vec<T> lows = Vec<T>::all(low), highs = Vec<T>::all(high), uniforms = Vec<T>::all(uniform);
  const int64_t whole = n / kLanes * kLanes;
  if (upstream == nullptr) {
    for (int64_t i = 0; i < whole; i += kLanes) grad_lanes<T, kClip>(v + i, kClip ? old + i : nullptr, ret + i, w + i, uniforms, lows, highs, out + i);
  } else {
    for (int64_t i = 0; i < whole; i += kLanes) {
      grad_lanes<T, kClip>(v + i, kClip ? old + i : nullptr, ret + i, w + i, Vec<T>::load(upstream + i), lows, highs, out + i);
    }
  }
  if (whole == n) return;
  T tail[5][kLanes] = {}, last[kLanes];  // as in loss_tile
  std::copy(v + whole, v + n, tail[0]);
  if constexpr (kClip) std::copy(old + whole, old + n, tail[1]);
  std::copy(ret + whole, ret + n, tail[2]);
  std::copy(w + whole, w + n, tail[3]);
  if (upstream != nullptr) std::copy(upstream + whole, upstream + n, tail[4]);
  grad_lanes<T, kClip>(tail[0], tail[1], tail[2], tail[3], upstream != nullptr ? Vec<T>::load(tail[4]) : uniforms, lows, highs, last);
  std::copy(last, last + (n - whole), out + whole);
}

template <typename T>
void loss_backward(const ValueLossBackwardParams& p, const TileSpec& tile, T low, T high, double scale, const T* seq_factor) {
  alignas(64) T scratch[6][kTile];
  const int64_t n = tile.lines * tile.length;
  const Placement at = place(tile, p.grad_values.seq_stride, p.grad_values.time_stride);
  T* direct = direct_rect<T>(p.grad_values, at.origin, at.line_stride, at.stride, Rect{tile.lines, tile.length});
  T* out = direct != nullptr ? direct : scratch[5];
  const auto finish = [&] {
    if (direct == nullptr) store_rect(out, p.grad_values, at.origin, at.line_stride, at.stride, Rect{tile.lines, tile.length});
  };
  const MaskTile<T> mask = load_mask(p.mask, tile, scratch[2]);
  if (mask.empty) {
    std::fill(out, out + n, T(0));
    return finish();
  }
  const T* v = load_tile(p.values, tile, scratch[0]);
  const T* ret = load_tile(p.returns, tile, scratch[1]);
  const T* w = mask.weights;
  // The incoming gradient and the call's scale; then the sequence's factor and the weight.
  const bool one_gradient = p.grad_loss.seq_stride == 0 && p.grad_loss.time_stride == 0, weights = mask.kind == MaskKind::kWeights;
  const T uniform = one_gradient ? T(double(*static_cast<const T*>(p.grad_loss.data)) * scale) : T(0);
  T* upstream = nullptr;
  if (!one_gradient || seq_factor != nullptr || weights) {
    upstream = scratch[4];
    const T* grad_loss = one_gradient ? nullptr : load_tile(p.grad_loss, tile, scratch[4]);
    for (int64_t i = 0; i < n; ++i) upstream[i] = one_gradient ? uniform : T(double(grad_loss[i]) * scale);
    for (int64_t i = 0; seq_factor != nullptr && i < n; ++i) upstream[i] *= seq_factor[i];
    for (int64_t i = 0; weights && i < n; ++i) upstream[i] *= w[i];
  }
  if (p.clip) {
    grad_tile<T, true>(v, load_tile(p.old_values, tile, scratch[3]), ret, w, upstream, uniform, n, low, high, out);
  } else {
    grad_tile<T, false>(v, nullptr, ret, w, upstream, uniform, n, low, high, out);
  }
  finish();
}

template <typename T>
void store_tokens(const T* tokens, const Output& y, const TileSpec& tile) {
  const Placement at = place(tile, y.seq_stride, y.time_stride);
  store_rect(tokens, y, at.origin, at.line_stride, at.stride, Rect{tile.lines, tile.length});
}

}  // namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE
