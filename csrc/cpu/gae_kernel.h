// Vectorised GAE. Included once per instruction set (see simd.h).
//
// Within a row, the tokens of a tile are taken from the last to the first in blocks of 32; a block is four groups of eight lanes. The flags
// of a block are two words of bits, and they say what is done:
//   block, all valid, no ends     turned so that every lane holds four tokens in a row, which need no shuffles; the lanes are scanned once
//   group, all valid, no ends     its steps are alike, so only the constant parts of their maps are scanned
//   group, some valid, no ends    the constant parts of the valid tokens are moved together, scanned as above and the results moved back
//   group with an end             the maps are scanned in full
//   none valid                    zeros; the carry passes
// Between sequences (time-major) lanes are sequences and no scan is needed.

namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE {

constexpr int kBlockGroups = kSegment, kBlock = kBlockGroups * kLanes;
static_assert(kPowers == kLanes);
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

// One tile of one sequence, or of one time step, already in arrays of T. reward includes gamma * next_value where next_values are given.
template <typename T>
struct GaeTile {
  int64_t n;
  const T *reward, *value;
  const uint8_t *valid, *ends;  // non-zero where set; null: all valid, no ends
  T *advantages, *returns;
};

struct FlagWords {
  uint32_t valid, ends;  // bit i for token i; ends only at valid ones
  bool plain;            // all valid, no ends

  uint32_t valid_lanes(int64_t at) const { return valid >> at & kAllLanes; }
  uint32_t ends_lanes(int64_t at) const { return ends >> at & kAllLanes; }
};

// Of the tokens [at, at + n) of a tile, 0 < n <= kBlock.
template <typename T>
FUSED_CRITIC_INLINE FlagWords flag_words(const GaeTile<T>& t, int64_t at, int64_t n) {
  const auto bits = [&](const uint8_t* flags) { return n == kBlock ? bits_of(flags + at) : bits_of(flags + at, n); };
  const uint32_t all = ~uint32_t(0) >> (kBlock - n);
  const uint32_t valid = t.valid != nullptr ? bits(t.valid) : all;
  const uint32_t ends = t.ends != nullptr ? bits(t.ends) & valid : 0;
  return {valid, ends, valid == all && ends == 0};
}

// -1 for none.
template <typename T>
inline int64_t last_valid(const GaeTile<T>& t) {
  if (t.valid == nullptr) return t.n - 1;
  for (int64_t end = t.n; end > 0; end -= kBlock) {
    const int64_t at = std::max<int64_t>(0, end - kBlock);
    const uint32_t bits = end >= kBlock ? bits_of(t.valid + at) : bits_of(t.valid, end);
    if (bits != 0) return at + 31 - __builtin_clz(bits);
  }
  return -1;
}

// How many of the tokens before `end` are whole blocks without a flag.
template <typename T>
FUSED_CRITIC_INLINE int64_t plain_run(const GaeTile<T>& t, int64_t end) {
  int64_t run = 0;
  if (t.valid == nullptr && t.ends == nullptr) return end / kBlock * kBlock;
  while (end - run >= kBlock && flag_words(t, end - run - kBlock, kBlock).plain) run += kBlock;
  return run;
}

// Powers of the slope that all lanes share.
template <typename T>
struct LanePowers {
  Vec<T> one, two;  // slope^1, slope^2
  Vec<T> across;    // slope^(4 - lane) in the lower half: from the upper half's first lane to there
  const T* down;    // see GaePowers

  explicit LanePowers(const T* down)
      : one(Vec<T>::all(down[kPowers - 1])), two(Vec<T>::all(down[kPowers - 2])), across(Vec<T>::load(down + kPowers - kLanes / 2)), down(down) {}
  // Lane i: from the entrance to the first n lanes to there, slope^(n - i); 1 at lane n.
  FUSED_CRITIC_INLINE const T* entering(int n) const { return down + kPowers - n; }
};

template <typename T>
struct GaeCoefficients {
  Vec<T> gamma, gamma_lam, cube;  // cube: (gamma lam)^3
  LanePowers<T> token, segment;   // of gamma lam: a lane is a token, or a segment of kSegment tokens

  explicit GaeCoefficients(const GaePowers<T>& powers)
      : gamma(Vec<T>::all(powers.gamma)), gamma_lam(Vec<T>::all(powers.token[kPowers - 1])), cube(Vec<T>::all(powers.token[kPowers - 3])), token(powers.token), segment(powers.segment) {}
};

// The carry in every lane, and the composed map of the range so far (aggregating modes), its constant part in every lane.
template <typename T>
struct GaeCarry {
  Vec<T> carry, b;
  T a;
};

// Passes the map a x + b, b in the first lane.
template <ScanMode kMode, typename T>
FUSED_CRITIC_INLINE void pass(GaeCarry<T>& state, T a, const Vec<T>& b) {
  const Vec<T> slope = Vec<T>::all(a), constant = broadcast_first(b);
  if constexpr (kMode != ScanMode::kAggregate) state.carry = slope * state.carry + constant;
  if constexpr (kMode != ScanMode::kEmit) {
    state.b = slope * state.b + constant;
    state.a = a * state.a;
  }
}

// The carry gamma (V + lam A) is as large as the values are, the advantages only as large as the errors. Rounding it at every step would
// cost them digits where values are far from zero. So within a tile values count from the mean of its last few valid ones: with
// u = V - centre and the carry gamma (u + lam A), a step is A = (r - (1 - gamma) centre - u) + carry, and nothing in it is large.
template <typename T>
struct GaeCentre {
  T centre, drift, carry;  // drift: (1 - gamma) centre; carry: gamma centre

  // next_values leave no V in the carry, and nothing to centre.
  template <bool kNextValues>
  static GaeCentre of(const GaeTile<T>& t, T gamma) {
    if constexpr (kNextValues) return {};
    const int64_t last = last_valid(t);
    T sum = T(0), count = T(0);
    for (int64_t i = std::max<int64_t>(0, last - kLanes + 1); i <= last; ++i) {
      if (t.valid != nullptr && t.valid[i] == 0) continue;
      sum += t.value[i];
      count += T(1);
    }
    const T centre = sum - sum == T(0) && last >= 0 ? sum / count : T(0);  // 0 where a value is inf or NaN
    return {centre, T((1 - double(gamma)) * double(centre)), gamma * centre};
  }
};

template <typename T>
struct GaeLanes {
  Vec<T> base, centred, value;  // base: what a step adds to its carry; centred: u
};

template <bool kNextValues, typename T>
FUSED_CRITIC_INLINE GaeLanes<T> load_lanes(const T* reward, const T* value, const GaeCentre<T>& c) {
  const Vec<T> r = Vec<T>::load(reward), v = Vec<T>::load(value);
  if constexpr (kNextValues) return {r - v, v, v};
  const Vec<T> centred = v - Vec<T>::all(c.centre);
  return {(r - Vec<T>::all(c.drift)) - centred, centred, v};
}

template <typename T>
struct GaeOutputs {
  Vec<T> advantages, returns;

  FUSED_CRITIC_INLINE void store(T* to_advantages, T* to_returns) const {
    advantages.store(to_advantages);
    returns.store(to_returns);
  }
};

// The constant parts of the steps' maps.
template <bool kNextValues, typename T>
FUSED_CRITIC_INLINE Vec<T> constant_parts(const GaeLanes<T>& in, const GaeCoefficients<T>& c) {
  if constexpr (kNextValues) return c.gamma_lam * in.base;
  return c.gamma_lam * in.base + c.gamma * in.centred;
}

// Maps of one slope: lane i becomes the constant part of lanes i to 7 composed. What a lane holds has no influence on those to its right.
template <typename T>
FUSED_CRITIC_INLINE Vec<T> scan_alike(Vec<T> b, const LanePowers<T>& powers) {
  b = powers.one * shift_down_in_halves<1>(b) + b;
  b = powers.two * shift_down_in_halves<2>(b) + b;
  return powers.across * upper_to_lower(b) + b;
}

// Maps of one slope, by their constant parts: what enters each of them. Passes them all.
template <ScanMode kMode, typename T>
FUSED_CRITIC_INLINE Vec<T> entering_alike(const Vec<T>& constants, const LanePowers<T>& powers, GaeCarry<T>& state) {
  const Vec<T> b = scan_alike(constants, powers), carry = state.carry;
  pass<kMode>(state, *powers.entering(kLanes), b);
  return shift_down<1>(Vec<T>::load(powers.entering(kLanes)) * carry + b, carry);
}

template <bool kNextValues, ScanMode kMode, typename T>
FUSED_CRITIC_INLINE GaeOutputs<T> dense_group(const GaeLanes<T>& in, const GaeCoefficients<T>& c, GaeCarry<T>& state) {
  const Vec<T> advantages = in.base + entering_alike<kMode>(constant_parts<kNextValues>(in, c), c.token, state);
  return {advantages, advantages + in.value};
}

// Of a block, transposed: lane i holds a segment of kBlockGroups tokens.
template <typename T>
struct BlockScratch {
  Vec<T> last[kBlockGroups - 1];  // the constant parts of the maps of its last three tokens, last two, and last
  Vec<T> segment;                 // of the whole, in order; later what enters it, in transposed order
};

// `blocks` blocks that start at token `at`, all valid and without ends: in three passes, because a pass of its own has short chains of
// operations and overlaps with itself.
template <bool kNextValues, ScanMode kMode, typename T>
inline GaeCarry<T> dense_blocks(const GaeTile<T>& t, int64_t at, int64_t blocks, const GaeCoefficients<T>& c, const GaeCentre<T>& centre,
                                const GaeCarry<T>& entering, BlockScratch<T>* scratch) {
  GaeCarry<T> state = entering;
  const T *reward = t.reward + at, *value = t.value + at;
  T *advantages = t.advantages + at, *returns = t.returns + at;
  for (int64_t k = blocks - 1; k >= 0; --k) {
    Vec<T> x[kBlockGroups];
    for (int i = 0; i < kBlockGroups; ++i) {
      const int64_t from = k * kBlock + i * kLanes;
      x[i] = constant_parts<kNextValues>(load_lanes<kNextValues>(reward + from, value + from, centre), c);
    }
    transpose_in_halves(x);
    const Vec<T> two = c.gamma_lam * x[3] + x[2], three = c.gamma_lam * two + x[1];
    scratch[k].segment = interleave_halves(c.gamma_lam * three + x[0]);
    if constexpr (kMode != ScanMode::kAggregate) {
      scratch[k].last[0] = three;
      scratch[k].last[1] = two;
      scratch[k].last[2] = x[3];
    }
  }
  for (int64_t k = blocks - 1; k >= 0; --k) scratch[k].segment = separate_halves(entering_alike<kMode>(scratch[k].segment, c.segment, state));
  if constexpr (kMode == ScanMode::kAggregate) return state;
  for (int64_t k = blocks - 1; k >= 0; --k) {
    const Vec<T>*last = scratch[k].last, x0 = scratch[k].segment;
    Vec<T> x[kBlockGroups] = {c.cube * x0 + last[0], c.token.two * x0 + last[1], c.gamma_lam * x0 + last[2], x0};
    transpose_in_halves(x);
    for (int i = 0; i < kBlockGroups; ++i) {
      const int64_t from = k * kBlock + i * kLanes;
      const GaeLanes<T> in = load_lanes<kNextValues>(reward + from, value + from, centre);
      const Vec<T> adv = in.base + x[i];
      GaeOutputs<T>{adv, adv + in.value}.store(advantages + from, returns + from);
    }
  }
  return state;
}

// Some lanes are not valid, none is an end.
template <bool kNextValues, ScanMode kMode, typename T>
FUSED_CRITIC_INLINE GaeOutputs<T> gappy_group(const GaeLanes<T>& in, uint32_t valid, const GaeCoefficients<T>& c, GaeCarry<T>& state) {
  const LaneMoves& moves = kLaneMoves.of[valid];
  const Mask<T> lanes = lanes_of<T>(moves);
  const Vec<T> zero = Vec<T>::all(T(0)), carry = state.carry;
  const Vec<T> b = scan_alike(permute(select(lanes, constant_parts<kNextValues>(in, c), zero), moves.together), c.token);
  const T* powers = c.token.entering(moves.count);
  pass<kMode>(state, *powers, b);
  const Vec<T> advantages = in.base + permute(Vec<T>::load(powers) * carry + b, moves.after);
  return {select(lanes, advantages, zero), select(lanes, advantages + in.value, zero)};
}

template <typename T>
struct AffineLanes {
  Vec<T> a, b;
};

// A round of a scan by shifting and composing: after rounds of 1, 2 and 4, lane i is lane_i after lane_{i + 1} ... after lane_7.
template <int kBy, typename T>
FUSED_CRITIC_INLINE AffineLanes<T> scan_round(const AffineLanes<T>& m, const AffineLanes<T>& identity) {
  const Vec<T> a = shift_down<kBy>(m.a, identity.a), b = shift_down<kBy>(m.b, identity.b);
  return {m.a * a, m.a * b + m.b};
}

// At an end A is r - V.
template <bool kNextValues, ScanMode kMode, typename T>
FUSED_CRITIC_INLINE GaeOutputs<T> ending_group(GaeLanes<T> in, const T* reward, uint32_t valid, uint32_t ends, const GaeCoefficients<T>& c, GaeCarry<T>& state) {
  const Vec<T> zero = Vec<T>::all(T(0)), one = Vec<T>::all(T(1)), carry = state.carry;
  const Mask<T> lanes = lanes_of<T>(kLaneMoves.of[valid]), ending = lanes_of<T>(kLaneMoves.of[ends]);
  const Vec<T> keep = select(ending, zero, one);
  in.base = select(ending, Vec<T>::load(reward) - in.value, in.base);
  const AffineLanes<T> identity{one, zero};
  AffineLanes<T> m{select(lanes, c.gamma_lam * keep, one), select(lanes, constant_parts<kNextValues>(in, c), zero)};
  m = scan_round<1>(m, identity);
  m = scan_round<2>(m, identity);
  m = scan_round<4>(m, identity);
  pass<kMode>(state, first_lane(m.a), m.b);
  const Vec<T> advantages = in.base + keep * shift_down<1>(m.a * carry + m.b, carry);
  return {select(lanes, advantages, zero), select(lanes, advantages + in.value, zero)};
}

template <bool kNextValues, ScanMode kMode, typename T>
FUSED_CRITIC_INLINE GaeOutputs<T> gae_group(const T* reward, const T* value, uint32_t valid, uint32_t ends, const GaeCoefficients<T>& c, const GaeCentre<T>& centre,
                                            GaeCarry<T>& state) {
  if (valid == 0) return {Vec<T>::all(T(0)), Vec<T>::all(T(0))};
  const GaeLanes<T> in = load_lanes<kNextValues>(reward, value, centre);
  if (ends != 0) return ending_group<kNextValues, kMode>(in, reward, valid, ends, c, state);
  if (valid != kAllLanes) return gappy_group<kNextValues, kMode>(in, valid, c, state);
  return dense_group<kNextValues, kMode>(in, c, state);
}

// By value: stores to the outputs could change what a reference refers to, for all the compiler knows.
template <bool kNextValues, ScanMode kMode, typename T>
inline GaeCarry<T> gae_tile(const GaeTile<T> t, const GaePowers<T>& powers, GaeCarry<T> state) {
  const GaeCoefficients<T> c(powers);
  BlockScratch<T> scratch[kTile / kBlock];
  const GaeCentre<T> centre = GaeCentre<T>::template of<kNextValues>(t, first_lane(c.gamma));
  const Vec<T> offset = Vec<T>::all(centre.carry);
  state.carry = state.carry - offset;
  state.b = state.b - offset;
  int64_t end = t.n;
  while (true) {
    if (const int64_t run = plain_run(t, end); run > 0) {
      end -= run;
      state = dense_blocks<kNextValues, kMode>(t, end, run / kBlock, c, centre, state, scratch);
    }
    if (end < kLanes) break;
    const int64_t tokens = std::min<int64_t>(kBlock, end / kLanes * kLanes), at = end - tokens;
    const FlagWords flags = flag_words(t, at, tokens);
    if (flags.valid != 0) {
      for (int64_t i = tokens - kLanes; i >= 0; i -= kLanes) {
        const int64_t from = at + i;
        const GaeOutputs<T> out = gae_group<kNextValues, kMode>(t.reward + from, t.value + from, flags.valid_lanes(i), flags.ends_lanes(i), c, centre, state);
        if constexpr (kMode != ScanMode::kAggregate) out.store(t.advantages + from, t.returns + from);
      }
    } else if constexpr (kMode != ScanMode::kAggregate) {
      std::fill(t.advantages + at, t.advantages + end, T(0));
      std::fill(t.returns + at, t.returns + end, T(0));
    }
    end = at;
  }
  if (end > 0) {  // the first n % kLanes tokens, as the last lanes of a group whose other lanes are masked
    const int64_t pad = kLanes - end;
    T value[kLanes] = {}, reward[kLanes] = {}, advantages[kLanes], returns[kLanes];
    std::copy(t.value, t.value + end, value + pad);
    std::copy(t.reward, t.reward + end, reward + pad);
    const FlagWords flags = flag_words(t, 0, end);
    const GaeOutputs<T> out = gae_group<kNextValues, kMode>(reward, value, flags.valid << pad, flags.ends << pad, c, centre, state);
    if constexpr (kMode != ScanMode::kAggregate) {
      out.store(advantages, returns);
      std::copy(advantages + pad, advantages + kLanes, t.advantages);
      std::copy(returns + pad, returns + kLanes, t.returns);
    }
  }
  state.carry = state.carry + offset;
  state.b = state.b + offset;
  return state;
}

template <bool kNextValues, typename T>
inline GaeCarry<T> gae_tile(const GaeTile<T>& t, const GaePowers<T>& powers, const GaeCarry<T>& state, ScanMode mode) {
  switch (mode) {
    case ScanMode::kEmit: return gae_tile<kNextValues, ScanMode::kEmit>(t, powers, state);
    case ScanMode::kEmitAndAggregate: return gae_tile<kNextValues, ScanMode::kEmitAndAggregate>(t, powers, state);
    case ScanMode::kAggregate: return gae_tile<kNextValues, ScanMode::kAggregate>(t, powers, state);
  }
  return state;
}

template <typename T>
struct GaeScratch {
  alignas(64) T reward[kTile], value[kTile], next[kTile], advantages[kTile], returns[kTile];
  alignas(64) uint8_t valid[kTile], terminated[kTile], ends[kTile];
};

// Brings n positions of the inputs: `load(operand, scratch)` those of one operand as T, `load_flags` as bytes.
template <typename T, typename Load, typename LoadFlags>
inline GaeTile<T> load_gae_tile(const GaeParams& p, int64_t n, T gamma, GaeScratch<T>& s, Load load, LoadFlags load_flags) {
  GaeTile<T> t{n, load(p.rewards, s.reward), load(p.values, s.value), nullptr, nullptr, nullptr, nullptr};
  const uint8_t* terminated = nullptr;
  if (p.mask.data != nullptr) t.valid = load_flags(p.mask, s.valid);
  if (p.terminated.data != nullptr) t.ends = terminated = load_flags(p.terminated, s.terminated);
  if (p.truncated.data != nullptr) {
    t.ends = load_flags(p.truncated, s.ends);
    if (terminated != nullptr) {
      const uint8_t* truncated = t.ends;
      for (int64_t i = 0; i < n; ++i) s.ends[i] = truncated[i] | terminated[i];
      t.ends = s.ends;
    }
  }
  if (p.next_values.data != nullptr) {
    const T* next = load(p.next_values, s.next);
    const T* reward = t.reward;
    if (terminated != nullptr) {
      for (int64_t i = 0; i < n; ++i) s.reward[i] = reward[i] + (terminated[i] != 0 ? T(0) : gamma * next[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) s.reward[i] = reward[i] + gamma * next[i];
    }
    t.reward = s.reward;
  }
  return t;
}

template <typename T>
T gae_rows(const GaeParams& p, int64_t seq, int64_t seq_origin, int64_t begin, int64_t end, const GaePowers<T>& powers, T carry, ScanMode mode, Affine<T>* total) {
  GaeCarry<T> state{Vec<T>::all(carry), Vec<T>::all(T(0)), T(1)};
  GaeScratch<T> s;
  for (int64_t stop = end; stop > begin; stop -= kTile) {
    const int64_t start = std::max(begin, stop - kTile), n = stop - start;
    const Rect rect{1, n};
    const auto origin = [&](const auto& x) { return seq * x.seq_stride + (seq_origin + start) * x.time_stride; };
    GaeTile<T> t = load_gae_tile<T>(
        p, n, powers.gamma, s, [&](const Operand& x, T* scratch) { return load_rect(x, origin(x), 0, x.time_stride, rect, scratch); },
        [&](const Operand& x, uint8_t* scratch) { return load_flags(x, origin(x), x.time_stride, n, scratch); });
    if (mode != ScanMode::kAggregate) {
      t.advantages = direct_rect<T>(p.advantages, origin(p.advantages), 0, p.advantages.time_stride, rect);
      t.returns = direct_rect<T>(p.returns, origin(p.returns), 0, p.returns.time_stride, rect);
    }
    const bool direct_advantages = t.advantages != nullptr, direct_returns = t.returns != nullptr;
    if (!direct_advantages) t.advantages = s.advantages;
    if (!direct_returns) t.returns = s.returns;
    state = p.next_values.data != nullptr ? gae_tile<true>(t, powers, state, mode) : gae_tile<false>(t, powers, state, mode);
    if (mode == ScanMode::kAggregate) continue;
    if (!direct_advantages) store_run(t.advantages, n, p.advantages, origin(p.advantages), p.advantages.time_stride);
    if (!direct_returns) store_run(t.returns, n, p.returns, origin(p.returns), p.returns.time_stride);
  }
  if (mode != ScanMode::kEmit) *total = {state.a, first_lane(state.b)};
  return first_lane(state.carry);
}

template <typename T>
T element(const Operand& x, int64_t index) {
  T value = T(0);
  convert_run(x, index, 1, 1, &value);
  return value;
}

// Of eight sequences: their next valid steps.
template <typename T>
struct NextSteps {
  Vec<T> advantage, value;
};

// And of all sequences that are walked together; room for whole groups.
template <typename T>
struct NextColumns {
  alignas(64) T advantage[kTile] = {}, value[kTile] = {};

  FUSED_CRITIC_INLINE NextSteps<T> load(int64_t at) const { return {Vec<T>::load(advantage + at), Vec<T>::load(value + at)}; }
  FUSED_CRITIC_INLINE void store(int64_t at, const NextSteps<T>& next) {
    next.advantage.store(advantage + at);
    next.value.store(value + at);
  }
};

// One time step of eight sequences, lanes being sequences; `next` in place.
template <bool kNextValues, typename T>
FUSED_CRITIC_INLINE GaeOutputs<T> dense_columns(const T* reward, const T* value, const GaeCoefficients<T>& c, NextSteps<T>& next) {
  const Vec<T> r = Vec<T>::load(reward), v = Vec<T>::load(value);
  const Vec<T> delta = kNextValues ? r - v : r + c.gamma * next.value - v;
  const Vec<T> advantages = delta + c.gamma_lam * next.advantage;
  next = {advantages, v};
  return {advantages, advantages + v};
}

template <bool kNextValues, typename T>
FUSED_CRITIC_INLINE GaeOutputs<T> flagged_columns(const T* reward, const T* value, uint32_t valid, uint32_t ends, const GaeCoefficients<T>& c, NextSteps<T>& next) {
  const Vec<T> zero = Vec<T>::all(T(0));
  const Mask<T> lanes = lanes_of<T>(kLaneMoves.of[valid]), ending = lanes_of<T>(kLaneMoves.of[ends]);
  NextSteps<T> steps{select(ending, zero, next.advantage), select(ending, zero, next.value)};
  const GaeOutputs<T> out = dense_columns<kNextValues>(reward, value, c, steps);
  next = {select(lanes, steps.advantage, next.advantage), select(lanes, steps.value, next.value)};
  return {select(lanes, out.advantages, zero), select(lanes, out.returns, zero)};
}

// One time step of n sequences.
template <bool kNextValues, typename T>
inline void gae_step_of_columns(const GaeTile<T> t, const GaeCoefficients<T> c, NextColumns<T>& following) {
  const bool flagged = t.valid != nullptr || t.ends != nullptr;
  int64_t at = 0;
  while (t.n - at >= kLanes) {
    const int64_t columns = std::min<int64_t>(flagged ? kBlock : t.n, (t.n - at) / kLanes * kLanes), end = at + columns;
    const FlagWords flags = flagged ? flag_words(t, at, columns) : FlagWords{0, 0, true};
    if (flags.plain) {
      for (; at < end; at += kLanes) {
        NextSteps<T> next = following.load(at);
        dense_columns<kNextValues>(t.reward + at, t.value + at, c, next).store(t.advantages + at, t.returns + at);
        following.store(at, next);
      }
    } else {
      for (int64_t i = 0; at < end; i += kLanes, at += kLanes) {
        NextSteps<T> next = following.load(at);
        flagged_columns<kNextValues>(t.reward + at, t.value + at, flags.valid_lanes(i), flags.ends_lanes(i), c, next).store(t.advantages + at, t.returns + at);
        following.store(at, next);
      }
    }
  }
  if (const int64_t rest = t.n - at; rest > 0) {  // the last n % kLanes sequences, other lanes masked
    T value[kLanes] = {}, reward[kLanes] = {}, advantages[kLanes], returns[kLanes];
    std::copy(t.value + at, t.value + t.n, value);
    std::copy(t.reward + at, t.reward + t.n, reward);
    const FlagWords flags = flag_words(t, at, rest);
    NextSteps<T> next = following.load(at);
    flagged_columns<kNextValues>(reward, value, flags.valid, flags.ends, c, next).store(advantages, returns);
    following.store(at, next);
    std::copy(advantages, advantages + rest, t.advantages + at);
    std::copy(returns, returns + rest, t.returns + at);
  }
}

template <typename T>
void gae_columns(const GaeParams& p, int64_t first, int64_t count, const GaePowers<T>& powers) {
  const bool next = p.next_values.data != nullptr;
  const GaeCoefficients<T> c(powers);
  GaeScratch<T> s;
  NextColumns<T> following;
  if (!next && p.bootstrap_values.data != nullptr) {
    convert_run(p.bootstrap_values, first * p.bootstrap_values.seq_stride, p.bootstrap_values.seq_stride, count, following.value);
  }
  const Rect rect{1, count};
  for (int64_t step = p.layout.seq_len - 1; step >= 0; --step) {
    const auto origin = [&](const auto& x) { return first * x.seq_stride + step * x.time_stride; };
    GaeTile<T> t = load_gae_tile<T>(
        p, count, powers.gamma, s, [&](const Operand& x, T* scratch) { return load_rect(x, origin(x), 0, x.seq_stride, rect, scratch); },
        [&](const Operand& x, uint8_t* scratch) { return load_flags(x, origin(x), x.seq_stride, count, scratch); });
    T* direct_advantages = direct_rect<T>(p.advantages, origin(p.advantages), 0, p.advantages.seq_stride, rect);
    T* direct_returns = direct_rect<T>(p.returns, origin(p.returns), 0, p.returns.seq_stride, rect);
    t.advantages = direct_advantages != nullptr ? direct_advantages : s.advantages;
    t.returns = direct_returns != nullptr ? direct_returns : s.returns;
    if (next) {
      gae_step_of_columns<true>(t, c, following);
    } else {
      gae_step_of_columns<false>(t, c, following);
    }
    if (direct_advantages == nullptr) store_run(t.advantages, count, p.advantages, origin(p.advantages), p.advantages.seq_stride);
    if (direct_returns == nullptr) store_run(t.returns, count, p.returns, origin(p.returns), p.returns.seq_stride);
  }
}

// The adjoint is a plain loop: it runs only where somebody differentiates through GAE.
template <typename T>
void gae_adjoint(const GaeBackwardParams& p, int64_t seq, int64_t seq_origin, int64_t length, T gamma, T gamma_lam) {
  alignas(64) T grad_adv[kTile], grad_ret[kTile], valid[kTile], terminated[kTile], truncated[kTile], d_reward[kTile], d_value[kTile], d_next[kTile];
  T carry = T(0);  // (1 - done) p of the previous valid position; without next_values there is no truncation, so it serves V too
  for (int64_t start = 0; start < length; start += kTile) {
    const int64_t n = std::min(kTile, length - start);
    const auto origin = [&](const auto& x) { return seq * x.seq_stride + (seq_origin + start) * x.time_stride; };
    const auto load = [&](const Operand& x, T missing, T* to) {
      if (x.data != nullptr) {
        convert_run(x, origin(x), x.time_stride, n, to);
      } else {
        std::fill(to, to + n, missing);
      }
    };
    load(p.grad_advantages, T(0), grad_adv);
    load(p.grad_returns, T(0), grad_ret);
    load(p.mask, T(1), valid);
    load(p.terminated, T(0), terminated);
    load(p.truncated, T(0), truncated);
    for (int64_t i = 0; i < n; ++i) {
      if (valid[i] == T(0)) {
        d_reward[i] = d_value[i] = d_next[i] = T(0);
        continue;
      }
      const T grad = (grad_adv[i] + grad_ret[i]) + gamma_lam * carry;
      d_reward[i] = grad;
      d_value[i] = grad_ret[i] - grad + (p.has_next_values ? T(0) : gamma * carry);
      d_next[i] = terminated[i] != T(0) ? T(0) : gamma * grad;
      carry = terminated[i] != T(0) || truncated[i] != T(0) ? T(0) : grad;
    }
    const auto store = [&](const T* from, const Output& y) {
      if (y.data != nullptr) store_run(from, n, y, origin(y), y.time_stride);
    };
    store(d_reward, p.grad_rewards);
    store(d_value, p.grad_values);
    store(d_next, p.grad_next_values);
  }
  if (p.grad_bootstrap.data != nullptr) {
    const T grad = gamma * carry;
    store_run(&grad, 1, p.grad_bootstrap, seq * p.grad_bootstrap.seq_stride, 1);
  }
}

}  // namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE
