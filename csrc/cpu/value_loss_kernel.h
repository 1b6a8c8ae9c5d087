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

// What is known of a stretch of tokens. A floating mask weighs them; any other only says which are there.
enum class MaskKind { kNone, kFlags, kWeights };

// The tokens of a tile, side by side.
template <typename T>
struct Tokens {
  const T *v, *old, *ret;  // old: null without clipping
  MaskKind mask;
  const int8_t* flags;     // kFlags: not zero where a token is there
  const T* weights;        // kWeights
  const T *low, *high;     // bounds of the clip range, where each token has its own; or null

  bool valid(int64_t i) const { return mask == MaskKind::kFlags ? flags[i] != 0 : mask == MaskKind::kNone || weights[i] != T(0); }

  // The first valid token of n; there is one.
  int64_t first_valid(int64_t n) const {
    int64_t i = 0;
    for (uint64_t word; mask == MaskKind::kFlags && i + int64_t(sizeof(word)) <= n; i += sizeof(word)) {
      std::memcpy(&word, flags + i, sizeof(word));
      if (word != 0) break;
    }
    while (!valid(i)) ++i;
    return i;
  }
};

template <typename T>
struct TokenScratch {
  alignas(64) T v[kTile], old[kTile], ret[kTile], weights[kTile], low[kTile], high[kTile];
  alignas(64) int8_t flags[kTile];
};

template <typename T>
inline Tokens<T> load_mask(const Operand& mask, const TileSpec& tile, TokenScratch<T>& scratch) {
  Tokens<T> x = {};
  if (mask.data == nullptr) return x;
  const DType dtype = mask.dtype;
  if (dtype == DType::kFloat64 || dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16) {
    x.mask = MaskKind::kWeights;
    x.weights = load_tile(mask, tile, scratch.weights);
  } else {
    x.mask = MaskKind::kFlags;
    x.flags = load_tile(mask, tile, scratch.flags);
  }
  return x;
}

template <typename T, typename Params>
inline void load_values(const Params& p, const TileSpec& tile, TokenScratch<T>& scratch, Tokens<T>& x) {
  x.v = load_tile(p.values, tile, scratch.v);
  if (p.options.clip) x.old = load_tile(p.old_values, tile, scratch.old);
  x.ret = load_tile(p.returns, tile, scratch.ret);
  if (p.options.clip_lows.data != nullptr) x.low = load_tile(p.options.clip_lows, tile, scratch.low);
  if (p.options.clip_highs.data != nullptr) x.high = load_tile(p.options.clip_highs, tile, scratch.high);
}

// Flags are looked at by blocks: padding and turns leave most of them all set or all clear, which saves the masking or the work itself.
constexpr int64_t kFlagBlock = 64;

// How many of a tile's tokens are there.
struct Occupancy {
  int64_t valid;                         // tokens
  uint8_t in_block[kTile / kFlagBlock];  // of them, where flags are mixed

  template <typename T>
  Occupancy(const Tokens<T>& x, int64_t n) : valid(n) {
    if (x.mask == MaskKind::kNone || n == 0) return;
    if (x.mask == MaskKind::kFlags && x.flags[0] != 0 && std::memchr(x.flags, 0, size_t(n)) == nullptr) return;
    valid = 0;
    if (x.mask == MaskKind::kFlags && x.flags[0] == 0 && std::memcmp(x.flags, x.flags + 1, size_t(n - 1)) == 0) return;
    for (int64_t block = 0; block < kTile / kFlagBlock && block * kFlagBlock < n; ++block) {
      const int64_t begin = block * kFlagBlock, end = std::min(n, begin + kFlagBlock);
      uint8_t sum = 0;  // of few bits, so that vectors hold many
      if (x.mask == MaskKind::kFlags) {
        for (int64_t i = begin; i < end; ++i) sum += x.flags[i] != 0;
      } else {
        for (int64_t i = begin; i < end; ++i) sum += x.weights[i] != T(0);
      }
      valid += in_block[block] = sum;
    }
  }
};

// Calls visit(begin, end, kind) for the stretches of whole groups of kLanes among n tokens, and clear(begin, end) for those with no token.
template <typename T, typename Visit, typename Clear>
FUSED_CRITIC_INLINE void for_each_stretch(const Tokens<T>& x, const Occupancy& there, int64_t n, const Visit& visit, const Clear& clear) {
  const int64_t whole = n / kLanes * kLanes;
  if (x.mask == MaskKind::kWeights) return visit(0, whole, x.mask);
  if (there.valid == n) return visit(0, whole, MaskKind::kNone);
  enum class Block { kClear, kSet, kMixed };
  const auto block_at = [&](int64_t i) {
    const int valid = there.in_block[i / kFlagBlock];
    return valid == 0 ? Block::kClear : valid == kFlagBlock ? Block::kSet : Block::kMixed;
  };
  for (int64_t begin = 0, end; begin < whole; begin = end) {
    const Block block = block_at(begin);
    for (end = begin + kFlagBlock; end < whole && block_at(end) == block;) end += kFlagBlock;
    end = std::min(end, whole);
    if (block == Block::kClear) {
      clear(begin, end);
    } else {
      visit(begin, end, block == Block::kSet ? MaskKind::kNone : MaskKind::kFlags);
    }
  }
}

// The last n % kLanes tokens, padded with masked ones.
template <typename T>
struct Tail {
  T v[kLanes] = {}, old[kLanes] = {}, ret[kLanes] = {}, weights[kLanes] = {};
  T low[kLanes], high[kLanes];
  int8_t flags[kLanes] = {};

  Tail(const Tokens<T>& x, int64_t from, int64_t n) {
    std::copy(x.v + from, x.v + n, v);
    if (x.old != nullptr) std::copy(x.old + from, x.old + n, old);
    std::copy(x.ret + from, x.ret + n, ret);
    for (int64_t i = 0; i < kLanes && from + i < n; ++i) flags[i] = x.valid(from + i);
    if (x.mask == MaskKind::kWeights) std::copy(x.weights + from, x.weights + n, weights);
    copy_bound(x.low, from, n, low);
    copy_bound(x.high, from, n, high);
  }
  // of: what it is the tail of
  Tokens<T> tokens(MaskKind mask, const Tokens<T>& of) const {
    return {v, of.old != nullptr ? old : nullptr, ret, mask, flags, weights, of.low != nullptr ? low : nullptr, of.high != nullptr ? high : nullptr};
  }

 private:
  static void copy_bound(const T* bound, int64_t from, int64_t n, T (&out)[kLanes]) {
    if (bound == nullptr) return;
    std::fill(out, out + kLanes, T(0));
    std::copy(bound + from, bound + n, out);
  }
};

template <typename T, MaskKind kMask>
FUSED_CRITIC_INLINE Mask<T> valid_lanes(const Tokens<T>& x, int64_t i) {
  if constexpr (kMask == MaskKind::kWeights) return Vec<T>::load(x.weights + i) != Vec<T>::all(T(0));
  return nonzero<T>(x.flags + i);
}

// LossOptions in lanes.
template <typename T>
struct OptionLanes {
  Vec<T> delta, curvature, twice_slope, slope, offset;  // of the criterion
  Vec<T> limit;                                         // twice the loss clamp; infinity without
  bool clip_only;

  OptionLanes(const LossOptions& o, const double* clamp)
      : delta(Vec<T>::all(T(o.criterion.delta))), curvature(Vec<T>::all(T(o.criterion.curvature))), twice_slope(Vec<T>::all(2 * T(o.criterion.slope))),
        slope(Vec<T>::all(T(o.criterion.slope))), offset(Vec<T>::all(T(o.criterion.offset))),
        limit(Vec<T>::all(clamp != nullptr ? 2 * T(*clamp) : std::numeric_limits<T>::infinity())), clip_only(o.clip_only) {}
};

// What the tokens of a tile have in common.
template <typename T>
struct TokenRule {
  Vec<T> low, high;               // of the clip range
  const OptionLanes<T>* options;  // Form::kOptions
};

// math/value_loss.h in lanes, without its factor 0.5.
template <typename T>
struct LossLanes {
  Vec<T> vc, d, dc;           // the clipped value, v - R and vc - R
  Vec<T> unclipped, clipped;  // their squares
};

template <typename T, Form kForm>
FUSED_CRITIC_INLINE LossLanes<T> token_loss(const Vec<T>& v, const T* old, const Vec<T>& ret, const TokenRule<T>& rule) {
  LossLanes<T> out;
  if constexpr (kForm == Form::kClipped) {
    const Vec<T> o = Vec<T>::load(old);
    out.vc = min(max(v, o + rule.low), o + rule.high);  // NaN where old is, but not where v is
    out.dc = out.vc - ret;
    out.clipped = out.dc * out.dc;
  }
  out.d = v - ret;
  out.unclipped = out.d * out.d;
  return out;
}

// The same with options. A NaN among v, R, old and the bounds makes loss and gradient NaN.
template <typename T>
struct OptionLossLanes {
  Vec<T> vc, loss, grad;
  Mask<T> clipped;  // c(vc - R) is strictly greater
};

template <typename T>
FUSED_CRITIC_INLINE Vec<T> nan_or(const Vec<T>& nan, const Vec<T>& x) { return select(nan != nan, nan, x); }

template <typename T>
FUSED_CRITIC_INLINE OptionLossLanes<T> token_loss_with_options(const Tokens<T>& x, int64_t i, const Vec<T>& v, const Vec<T>& ret, const TokenRule<T>& rule) {
  const OptionLanes<T>& o = *rule.options;
  const Vec<T> zero = Vec<T>::all(T(0));
  const auto magnitude = [&](const Vec<T>& d) { return select(d < zero, zero - d, d); };
  const auto criterion = [&](const Vec<T>& d) {  // twice c(d)
    const Vec<T> size = magnitude(d);
    return select(size > o.delta, o.twice_slope * (size - o.offset), o.curvature * d * d);
  };
  OptionLossLanes<T> out;
  out.vc = v;
  if (x.old != nullptr) {
    const Vec<T> old = Vec<T>::load(x.old + i);
    const Vec<T> low = old + (x.low != nullptr ? Vec<T>::load(x.low + i) : rule.low), high = old + (x.high != nullptr ? Vec<T>::load(x.high + i) : rule.high);
    out.vc = nan_or(v, nan_or(low, min(max(v, low), high)));  // min gives high where that is NaN
  }
  const Vec<T> d = v - ret, dc = out.vc - ret, unclipped = criterion(d), clipped = criterion(dc);
  out.clipped = clipped > unclipped;
  out.loss = o.clip_only ? clipped : nan_or(unclipped, max(unclipped, clipped));  // max gives clipped where that is NaN
  out.grad = select(magnitude(d) > o.delta, select(d < zero, zero - o.slope, o.slope), o.curvature * d);
  out.grad = select(o.clip_only ? out.vc != v : out.clipped, zero, out.grad);
  out.grad = nan_or(dc, select(out.loss > o.limit, zero, out.grad));
  out.loss = select(out.loss > o.limit, o.limit, out.loss);
  return out;
}

template <typename T>
struct LossSums {
  Vec<T> loss;               // without the factor 0.5
  Mask<T> clipped, outside;  // counters
};

// Value, return and error are summed about a centre (the tile's first valid token), so that their squares keep their digits when the mean is
// far from zero; the raw moments are put together in double. The error's own sum follows from the other two.
template <typename T>
struct MomentSums {
  Vec<T> value, value_sq, ret, ret_sq, error_sq, value_min, value_max;
};

template <typename T>
struct WeightSums {  // MaskKind::kWeights
  Vec<T> weight, clipped, outside;
};

template <typename T>
struct Sums {
  LossSums<T> loss;
  MomentSums<T> moments;
  WeightSums<T> weights;
};

template <typename T>
struct Centre {
  Vec<T> value, ret;
};

// Adds the groups of kLanes tokens in [begin, end). Masked ones are put on the centre, whatever lies there, so that they add 0 to every moment.
template <typename T, Form kForm, MaskKind kMask>
FUSED_CRITIC_NOINLINE void accumulate(Sums<T>& sums, const Tokens<T>& tokens, int64_t begin, int64_t end, const TokenRule<T>& rule, const Centre<T>& centre, T* token_loss_out) {
  const Tokens<T> x = tokens;
  const Vec<T> zero = Vec<T>::all(T(0));
  LossSums<T> loss_sums = sums.loss;
  MomentSums<T> m = sums.moments;
  WeightSums<T> weight_sums = sums.weights;
  for (int64_t i = begin; i < end; i += kLanes) {
    Vec<T> v = Vec<T>::load(x.v + i), ret = Vec<T>::load(x.ret + i), w;
    Mask<T> valid;
    if constexpr (kMask != MaskKind::kNone) {
      valid = valid_lanes<T, kMask>(x, i);
      v = select(valid, v, centre.value);
      ret = select(valid, ret, centre.ret);
    }
    constexpr bool kWeighted = kMask == MaskKind::kWeights;
    if constexpr (kWeighted) {
      w = Vec<T>::load(x.weights + i);
      weight_sums.weight = weight_sums.weight + w;
    }
    const Vec<T> dv = v - centre.value, dr = ret - centre.ret, de = dr - dv;
    const Vec<T> wv = kWeighted ? w * dv : dv, wr = kWeighted ? w * dr : dr, we = kWeighted ? w * de : de;
    m.value = m.value + wv;
    m.value_sq = m.value_sq + wv * dv;
    m.ret = m.ret + wr;
    m.ret_sq = m.ret_sq + wr * dr;
    m.error_sq = m.error_sq + we * de;
    m.value_min = min(v, m.value_min);
    m.value_max = max(v, m.value_max);

    Vec<T> loss;
    Mask<T> clipped, outside;
    if constexpr (kForm == Form::kOptions) {
      const OptionLossLanes<T> l = token_loss_with_options(x, i, v, ret, rule);
      loss = l.loss;
      clipped = l.clipped, outside = l.vc != v;
    } else {
      const LossLanes<T> l = token_loss<T, kForm>(v, kForm == Form::kClipped ? x.old + i : nullptr, ret, rule);
      loss = l.unclipped;
      if constexpr (kForm == Form::kClipped) {
        loss = max(l.unclipped, l.clipped);  // NaN where R or old is; see nan_values for v
        clipped = l.clipped > l.unclipped, outside = l.vc != v;
      }
    }
    if constexpr (kForm != Form::kPlain) {
      if constexpr (kMask != MaskKind::kNone) {
        clipped = clipped & valid;
        outside = outside & valid;
      }
      if constexpr (kWeighted) {
        weight_sums.clipped = weight_sums.clipped + select(clipped, w, zero);
        weight_sums.outside = weight_sums.outside + select(outside, w, zero);
      } else {
        loss_sums.clipped = loss_sums.clipped + clipped;
        loss_sums.outside = loss_sums.outside + outside;
      }
    }
    if constexpr (kWeighted) loss = w * loss;
    if constexpr (kMask != MaskKind::kNone) loss = select(valid, loss, zero);
    if (token_loss_out != nullptr) (loss * Vec<T>::all(T(0.5))).store(token_loss_out + i);
    loss_sums.loss = loss_sums.loss + loss;
  }
  sums.loss = loss_sums;
  sums.moments = m;
  if constexpr (kMask == MaskKind::kWeights) sums.weights = weight_sums;
}

template <typename T, Form kForm>
inline void accumulate(MaskKind mask, Sums<T>& s, const Tokens<T>& x, int64_t begin, int64_t end, const TokenRule<T>& rule, const Centre<T>& centre, T* token_loss_out) {
  switch (mask) {
    case MaskKind::kNone: return accumulate<T, kForm, MaskKind::kNone>(s, x, begin, end, rule, centre, token_loss_out);
    case MaskKind::kFlags: return accumulate<T, kForm, MaskKind::kFlags>(s, x, begin, end, rule, centre, token_loss_out);
    case MaskKind::kWeights: return accumulate<T, kForm, MaskKind::kWeights>(s, x, begin, end, rule, centre, token_loss_out);
  }
}

// The loss of a NaN value, which clipping hides: the sum of those in a tile (0 without any), also written for each token.
template <typename T>
inline double nan_values(const Tokens<T>& x, int64_t n, T* token_loss_out) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (x.v[i] == x.v[i] || !x.valid(i)) continue;
    sum += double(x.v[i]);
    if (token_loss_out != nullptr) token_loss_out[i] = x.v[i];
  }
  return sum;
}

inline void add_centred(double* moments, Moment first, double weight, double centre, double sum, double sum_sq) {
  moments[first] += weight * centre + sum;
  moments[first + 1] += weight * centre * centre + 2 * centre * sum + sum_sq;
}

template <typename T, Form kForm>
inline void loss_tile(const Tokens<T>& x, const Occupancy& there, int64_t n, const TokenRule<T>& rule, double* moments, T* token_loss_out) {
  const int64_t first = x.first_valid(n);
  const Centre<T> centre = {Vec<T>::all(x.v[first]), Vec<T>::all(x.ret[first])};
  Sums<T> s = {};
  s.moments.value_min = s.moments.value_max = centre.value;
  for_each_stretch(
      x, there, n, [&](int64_t begin, int64_t end, MaskKind mask) { accumulate<T, kForm>(mask, s, x, begin, end, rule, centre, token_loss_out); },
      [&](int64_t begin, int64_t end) {
        if (token_loss_out != nullptr) std::fill(token_loss_out + begin, token_loss_out + end, T(0));
      });
  const int64_t whole = n / kLanes * kLanes;
  const bool weighted = x.mask == MaskKind::kWeights;
  if (whole < n) {
    const Tail<T> tail(x, whole, n);
    const MaskKind mask = weighted ? MaskKind::kWeights : MaskKind::kFlags;
    T out[kLanes];
    accumulate<T, kForm>(mask, s, tail.tokens(mask, x), 0, kLanes, rule, centre, token_loss_out != nullptr ? out : nullptr);
    if (token_loss_out != nullptr) std::copy(out, out + (n - whole), token_loss_out + whole);
  }
  const double weight = weighted ? sum(s.weights.weight) : double(there.valid), sum_v = sum(s.moments.value), sum_r = sum(s.moments.ret);
  const double cv = first_lane(centre.value), cr = first_lane(centre.ret), ce = first_lane(centre.ret - centre.value);
  moments[kTokens] += double(there.valid);
  moments[kWeight] += weight;
  moments[kLoss] += 0.5 * sum(s.loss.loss);
  if (sum_v - sum_v != 0) moments[kLoss] += nan_values(x, n, token_loss_out);
  if constexpr (kForm != Form::kPlain) {
    moments[kClipped] += weighted ? sum(s.weights.clipped) : count(s.loss.clipped);
    moments[kOutside] += weighted ? sum(s.weights.outside) : count(s.loss.outside);
  }
  add_centred(moments, kValue, weight, cv, sum_v, sum(s.moments.value_sq));
  add_centred(moments, kReturn, weight, cr, sum_r, sum(s.moments.ret_sq));
  add_centred(moments, kError, weight, ce, sum_r - sum_v, sum(s.moments.error_sq));
  moments[kValueMin] = std::min(moments[kValueMin], double(lowest(s.moments.value_min)));
  moments[kValueMax] = std::max(moments[kValueMax], double(highest(s.moments.value_max)));
}

template <typename T>
void loss_forward(const ValueLossParams& p, const TileSpec& tile, T low, T high, double* moments, T* token_loss_out, T* token_weight) {
  TokenScratch<T> scratch;
  const int64_t n = tile.lines * tile.length;
  Tokens<T> x = load_mask(p.mask, tile, scratch);
  const Occupancy there(x, n);
  if (there.valid == 0) {
    if (token_loss_out != nullptr) std::fill(token_loss_out, token_loss_out + n, T(0));
    if (token_weight != nullptr) std::fill(token_weight, token_weight + n, T(0));
    return;
  }
  load_values(p, tile, scratch, x);
  TokenRule<T> rule = {Vec<T>::all(low), Vec<T>::all(high), nullptr};
  switch (form_of(p.options)) {
    case Form::kPlain: loss_tile<T, Form::kPlain>(x, there, n, rule, moments, token_loss_out); break;
    case Form::kClipped: loss_tile<T, Form::kClipped>(x, there, n, rule, moments, token_loss_out); break;
    case Form::kOptions: {
      const OptionLanes<T> options(p.options, p.options.clamp ? &p.loss_clamp.value : nullptr);
      rule.options = &options;
      loss_tile<T, Form::kOptions>(x, there, n, rule, moments, token_loss_out);
      break;
    }
  }
  if (token_weight == nullptr) return;
  switch (x.mask) {
    case MaskKind::kNone: std::fill(token_weight, token_weight + n, T(1)); break;
    case MaskKind::kFlags: std::transform(x.flags, x.flags + n, token_weight, [](int8_t flag) { return T(flag != 0); }); break;
    case MaskKind::kWeights: std::copy(x.weights, x.weights + n, token_weight); break;
  }
}

// What a token's own gradient v - R is multiplied by, its weight included: one number for the tile, or one for each token.
template <typename T>
struct Upstream {
  Vec<T> all;
  const T* each;  // or null
};

// Gradients of the groups of kLanes tokens in [begin, end). Returns lanes that are NaN if an old value was.
template <typename T, Form kForm, bool kFlags, bool kEach>
FUSED_CRITIC_INLINE Vec<T> grad_stretch(const Tokens<T>& tokens, int64_t begin, int64_t end, const Upstream<T>& upstream, const TokenRule<T>& rule, T* out) {
  const Tokens<T> x = tokens;
  const Vec<T> zero = Vec<T>::all(T(0));
  Vec<T> poison = zero;
  for (int64_t i = begin; i < end; i += kLanes) {
    const Vec<T> v = Vec<T>::load(x.v + i), ret = Vec<T>::load(x.ret + i);
    Vec<T> grad;
    if constexpr (kForm == Form::kOptions) {
      grad = token_loss_with_options(x, i, v, ret, rule).grad;
    } else {
      const LossLanes<T> l = token_loss<T, kForm>(v, kForm == Form::kClipped ? x.old + i : nullptr, ret, rule);
      grad = l.d;
      if constexpr (kForm == Form::kClipped) {
        grad = select(l.clipped > l.unclipped, zero, grad);  // NaN where v or R is
        poison = poison + l.dc;
      }
    }
    grad = grad * (kEach ? Vec<T>::load(upstream.each + i) : upstream.all);
    if constexpr (kFlags) grad = select(nonzero<T>(x.flags + i), grad, zero);
    grad.store(out + i);
  }
  return poison;
}

template <typename T, Form kForm, bool kEach>
inline void grad_tile(const Tokens<T>& x, const Occupancy& there, int64_t n, const Upstream<T>& upstream, const TokenRule<T>& rule, T* out) {
  Vec<T> poison = Vec<T>::all(T(0));
  for_each_stretch(
      x, there, n,
      [&](int64_t begin, int64_t end, MaskKind mask) {
        poison = poison + (mask == MaskKind::kNone ? grad_stretch<T, kForm, false, kEach>(x, begin, end, upstream, rule, out)
                                                   : grad_stretch<T, kForm, true, kEach>(x, begin, end, upstream, rule, out));
      },
      [&](int64_t begin, int64_t end) { std::fill(out + begin, out + end, T(0)); });
  const int64_t whole = n / kLanes * kLanes;
  if (whole < n) {
    const Tail<T> tail(x, whole, n);
    T each[kLanes] = {}, last[kLanes];
    if constexpr (kEach) std::copy(upstream.each + whole, upstream.each + n, each);
    poison = poison + grad_stretch<T, kForm, true, kEach>(tail.tokens(MaskKind::kFlags, x), 0, kLanes, {upstream.all, each}, rule, last);
    std::copy(last, last + (n - whole), out + whole);
  }
  const double poisoned = sum(poison);
  if (kForm != Form::kClipped || poisoned == poisoned) return;
  for (int64_t i = 0; i < n; ++i) {
    if (x.old[i] != x.old[i] && x.valid(i)) out[i] = x.old[i];
  }
}

template <typename T, Form kForm>
inline void grad_tile(const Tokens<T>& x, const Occupancy& there, int64_t n, const Upstream<T>& upstream, const TokenRule<T>& rule, T* out) {
  upstream.each != nullptr ? grad_tile<T, kForm, true>(x, there, n, upstream, rule, out) : grad_tile<T, kForm, false>(x, there, n, upstream, rule, out);
}

template <typename T>
void loss_backward(const ValueLossBackwardParams& p, const TileSpec& tile, T low, T high, double scale, const T* seq_factor) {
  TokenScratch<T> scratch;
  alignas(64) T each[kTile], grad[kTile];
  const Rect rect = {tile.lines, tile.length};
  const int64_t n = rect.size();
  const Placement at = place(tile, p.grad_values.seq_stride, p.grad_values.time_stride);
  T* direct = direct_rect<T>(p.grad_values, at.origin, at.line_stride, at.stride, rect);
  T* out = direct != nullptr ? direct : grad;
  Tokens<T> x = load_mask(p.mask, tile, scratch);
  const Occupancy there(x, n);
  const auto finish = [&] {
    if (direct == nullptr) store_rect(out, p.grad_values, at.origin, at.line_stride, at.stride, rect);
  };
  if (there.valid == 0) {
    std::fill(out, out + n, T(0));
    return finish();
  }
  load_values(p, tile, scratch, x);
  // The incoming gradient and the call's scale; then the sequence's factor and the weight.
  const bool one_gradient = p.grad_loss.seq_stride == 0 && p.grad_loss.time_stride == 0, weights = x.mask == MaskKind::kWeights;
  const T uniform = one_gradient ? T(double(*static_cast<const T*>(p.grad_loss.data)) * scale) : T(0);
  Upstream<T> upstream = {Vec<T>::all(uniform), nullptr};
  if (!one_gradient || seq_factor != nullptr || weights) {
    const T* grad_loss = one_gradient ? nullptr : load_tile(p.grad_loss, tile, each);
    for (int64_t i = 0; i < n; ++i) each[i] = one_gradient ? uniform : T(double(grad_loss[i]) * scale);
    for (int64_t i = 0; seq_factor != nullptr && i < n; ++i) each[i] *= seq_factor[i];
    for (int64_t i = 0; weights && i < n; ++i) each[i] *= x.weights[i];
    upstream.each = each;
  }
  if (weights) {  // all that is left of them
    for (int64_t i = 0; i < n; ++i) scratch.flags[i] = x.weights[i] != T(0);
    x.mask = MaskKind::kFlags;
    x.flags = scratch.flags;
  }
  TokenRule<T> rule = {Vec<T>::all(low), Vec<T>::all(high), nullptr};
  switch (form_of(p.options)) {
    case Form::kPlain: grad_tile<T, Form::kPlain>(x, there, n, upstream, rule, out); break;
    case Form::kClipped: grad_tile<T, Form::kClipped>(x, there, n, upstream, rule, out); break;
    case Form::kOptions: {
      const OptionLanes<T> options(p.options, p.loss_clamp);
      rule.options = &options;
      grad_tile<T, Form::kOptions>(x, there, n, upstream, rule, out);
      break;
    }
  }
  finish();
}

template <typename T>
void store_tokens(const T* tokens, const Output& y, const TileSpec& tile) {
  const Placement at = place(tile, y.seq_stride, y.time_stride);
  store_rect(tokens, y, at.origin, at.line_stride, at.stride, Rect{tile.lines, tile.length});
}

}  // namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE
