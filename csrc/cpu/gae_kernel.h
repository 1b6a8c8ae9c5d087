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
  Vec<T> rest, gamma_lam;        // rest: gamma (1 - lam)
  LanePowers<T> token, segment;  // of gamma lam: a lane is a token, or a segment of kSegment tokens

  explicit GaeCoefficients(const GaePowers<T>& powers)
      : rest(Vec<T>::all(powers.rest)), gamma_lam(Vec<T>::all(powers.token[kPowers - 1])), token(powers.token), segment(powers.segment) {}
};

// The carry, and the composed map a x + b of the range so far (aggregating modes). Numbers, not lanes: they stay in registers from call to call.
template <typename T>
struct GaeCarry {
  T carry, b, a;
};

// Passes the map a x + b, b in the first lane.
template <ScanMode kMode, typename T>
FUSED_CRITIC_INLINE void pass(GaeCarry<T>& state, T a, const Vec<T>& b) {
  const T constant = first_lane(b);
  if constexpr (kMode != ScanMode::kAggregate) state.carry = a * state.carry + constant;
  if constexpr (kMode != ScanMode::kEmit) {
    state.b = a * state.b + constant;
    state.a = a * state.a;
  }
}

// The carry gamma (V + lam A) is as large as the values are, the advantages only as large as the errors. Rounding it at every step would
// cost them digits where values are far from zero. So within a tile values and the lambda return G = A + V count from a centre near its
// last valid value: with u = V - centre and the carry gamma lam G + gamma (1 - lam) u, a step is G = (r - (1 - gamma) centre) + carry and A = G - u.
// Nothing in it is large, and no difference of neighbouring values is rounded.
template <typename T>
struct GaeCentre {
  T centre, drift, carry, rest;  // (1 - gamma) centre, gamma centre, gamma (1 - lam) centre

  // next_values leave no V in the carry, and nothing to centre.
  template <bool kNextValues>
  static GaeCentre of(const GaeTile<T>& t, const GaePowers<T>& powers) {
    if constexpr (kNextValues) return {};
    const int64_t last = last_valid(t);
    T centre = last >= 0 ? t.value[last] : T(0);
    if (last >= 3) {  // the mean of four is nearer to the others; where a mask cuts them, it is not worth a search
      const T* v = t.value + last - 3;
      const uint8_t* valid = t.valid + (t.valid != nullptr ? last - 3 : 0);
      if (t.valid == nullptr || (valid[0] != 0 && valid[1] != 0 && valid[2] != 0)) centre = T(0.25) * ((v[0] + v[1]) + (v[2] + v[3]));
    }
    if (centre - centre != T(0)) centre = T(0);  // inf or NaN
    return {centre, powers.drift * centre, powers.gamma * centre, powers.rest * centre};
  }
};

// With next_values the carry is gamma lam A, and a step A = (r - V) + carry.
template <bool kNextValues, typename T>
struct GaeLanes {
  Vec<T> base, centred, value;  // base: what a step adds to its carry; centred: u

  FUSED_CRITIC_INLINE Vec<T> advantages(const Vec<T>& stepped) const {
    if constexpr (kNextValues) return stepped;
    return stepped - centred;
  }
};

template <bool kNextValues, typename T>
FUSED_CRITIC_INLINE GaeLanes<kNextValues, T> load_lanes(const T* reward, const T* value, const GaeCentre<T>& c) {
  const Vec<T> r = Vec<T>::load(reward), v = Vec<T>::load(value);
  if constexpr (kNextValues) return {r - v, v, v};
  return {r - Vec<T>::all(c.drift), v - Vec<T>::all(c.centre), v};
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
FUSED_CRITIC_INLINE Vec<T> constant_parts(const GaeLanes<kNextValues, T>& in, const GaeCoefficients<T>& c) {
  if constexpr (kNextValues) return c.gamma_lam * in.base;
  return c.gamma_lam * in.base + c.rest * in.centred;
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
  const Vec<T> b = scan_alike(constants, powers), carry = Vec<T>::all(state.carry);
  pass<kMode>(state, *powers.entering(kLanes), b);
  return shift_down<1>(Vec<T>::load(powers.entering(kLanes)) * carry + b, carry);
}

template <bool kNextValues, ScanMode kMode, typename T>
FUSED_CRITIC_INLINE GaeOutputs<T> dense_group(const GaeLanes<kNextValues, T>& in, const GaeCoefficients<T>& c, GaeCarry<T>& state) {
  const Vec<T> advantages = in.advantages(in.base + entering_alike<kMode>(constant_parts(in, c), c.token, state));
  return {advantages, advantages + in.value};
}

// Fetches the block that lies `offset` elements from p into the first-level cache. Streams end with every page, and hardware follows them no
// further; here the walk knows where it goes on. Harmless where nothing is.
template <typename T>
FUSED_CRITIC_INLINE void prefetch_block(const T* p, int64_t offset) {
  const uintptr_t block = reinterpret_cast<uintptr_t>(p) + offset * int64_t(sizeof(T));
  for (size_t line = 0; line < kBlock * sizeof(T); line += 64) __builtin_prefetch(reinterpret_cast<const void*>(block + line));
}

// Of a block, transposed: lane i holds a segment of kBlockGroups tokens.
template <typename T>
struct BlockScratch {
  Vec<T> constant[kBlockGroups];  // of a token's step
  Vec<T> segment;  // the constant parts of the maps of the segments, in order; later what enters them, in transposed order
};

// `blocks` blocks, all valid and without ends. What V adds to the carry is counted with the next step, G_t = (r_t + gamma (1 - lam) V_{t+1}) + gamma lam G_{t+1},
// which has fewer operations. In three passes, because a pass of its own has short chains of operations and overlaps with itself. What enters the last
// token is in the carry; V counts as the centre there.
template <bool kNextValues, ScanMode kMode, typename T>
inline GaeCarry<T> dense_blocks(const T* reward, const T* value, T* advantages, T* returns, int64_t blocks, const GaeCoefficients<T>& c, const GaeCentre<T>& of_tile,
                                GaeCarry<T> state, BlockScratch<T>* scratch) {
  const T first_value = value[0];
  const Vec<T> centre = Vec<T>::all(of_tile.centre), offset = Vec<T>::all(of_tile.drift + of_tile.rest);
  alignas(64) T following[kLanes];  // the last lanes' next values
  shift_down<1>(Vec<T>::load(value + blocks * kBlock - kLanes), centre).store(following);
  const T* next_lanes = following;
  for (int64_t k = blocks - 1; k >= 0; --k) {
    if constexpr (kMode != ScanMode::kAggregate) {
      prefetch_block(advantages, k * kBlock);
      prefetch_block(returns, k * kBlock);
    }
    Vec<T> x[kBlockGroups];
    for (int i = kBlockGroups - 1; i >= 0; --i) {
      const int64_t from = k * kBlock + i * kLanes;
      const Vec<T> r = Vec<T>::load(reward + from);
      if constexpr (kNextValues) {
        x[i] = r - Vec<T>::load(value + from);
      } else {
        x[i] = (r - offset) + c.rest * Vec<T>::load(next_lanes);
        next_lanes = value + from - kLanes + 1;
      }
    }
    transpose_in_halves(x);
    const Vec<T> first_two = c.gamma_lam * x[1] + x[0], last_two = c.gamma_lam * x[3] + x[2];
    scratch[k].segment = interleave_halves(c.gamma_lam * (c.token.two * last_two + first_two));
    if constexpr (kMode != ScanMode::kAggregate) {
      for (int i = 0; i < kBlockGroups; ++i) scratch[k].constant[i] = x[i];
    }
  }
  for (int64_t k = blocks - 1; k >= 0; --k) scratch[k].segment = separate_halves(entering_alike<kMode>(scratch[k].segment, c.segment, state));
  if constexpr (!kNextValues) {
    const T next = first_lane(c.rest) * (first_value - of_tile.centre);
    state.carry += next;
    if constexpr (kMode != ScanMode::kEmit) state.b += next;
  }
  if constexpr (kMode == ScanMode::kAggregate) return state;
  for (int64_t k = blocks - 1; k >= 0; --k) {
    prefetch_block(reward, k * kBlock - kTile);  // of the next tile
    prefetch_block(value, k * kBlock - kTile);
    Vec<T> x[kBlockGroups], carry = scratch[k].segment;
    for (int i = kBlockGroups - 1; i >= 0; --i) {
      x[i] = scratch[k].constant[i] + carry;
      carry = c.gamma_lam * x[i];
    }
    transpose_in_halves(x);
    for (int i = 0; i < kBlockGroups; ++i) {
      const int64_t from = k * kBlock + i * kLanes;
      const Vec<T> v = Vec<T>::load(value + from), adv = kNextValues ? x[i] : x[i] - (v - centre);
      GaeOutputs<T>{adv, adv + v}.store(advantages + from, returns + from);
    }
  }
  return state;
}

// Some lanes are not valid, none is an end.
template <bool kNextValues, ScanMode kMode, typename T>
FUSED_CRITIC_INLINE GaeOutputs<T> gappy_group(const GaeLanes<kNextValues, T>& in, uint32_t valid, const GaeCoefficients<T>& c, GaeCarry<T>& state) {
  const LaneMoves& moves = kLaneMoves.of[valid];
  const Mask<T> lanes = lanes_of<T>(valid);
  const Vec<T> zero = Vec<T>::all(T(0)), carry = Vec<T>::all(state.carry);
  const Vec<T> b = scan_alike(permute(select(lanes, constant_parts(in, c), zero), moves.together), c.token);
  const T* powers = c.token.entering(moves.count);
  pass<kMode>(state, *powers, b);
  const Vec<T> advantages = in.advantages(in.base + permute(Vec<T>::load(powers) * carry + b, moves.after));
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

// At an end A is r - V, and G counts r from the centre.
template <bool kNextValues, ScanMode kMode, typename T>
FUSED_CRITIC_INLINE GaeOutputs<T> ending_group(GaeLanes<kNextValues, T> in, const T* reward, uint32_t valid, uint32_t ends, const GaeCoefficients<T>& c, const T& centre,
                                               GaeCarry<T>& state) {
  const Vec<T> zero = Vec<T>::all(T(0)), one = Vec<T>::all(T(1)), carry = Vec<T>::all(state.carry);
  const Mask<T> lanes = lanes_of<T>(valid), ending = lanes_of<T>(ends);
  const Vec<T> keep = select(ending, zero, one);
  if constexpr (!kNextValues) in.base = select(ending, Vec<T>::load(reward) - Vec<T>::all(centre), in.base);
  const AffineLanes<T> identity{one, zero};
  AffineLanes<T> m{select(lanes, c.gamma_lam * keep, one), select(lanes, constant_parts(in, c), zero)};
  m = scan_round<1>(m, identity);
  m = scan_round<2>(m, identity);
  m = scan_round<4>(m, identity);
  pass<kMode>(state, first_lane(m.a), m.b);
  const Vec<T> advantages = in.advantages(in.base + keep * shift_down<1>(m.a * carry + m.b, carry));
  return {select(lanes, advantages, zero), select(lanes, advantages + in.value, zero)};
}

template <bool kNextValues, ScanMode kMode, typename T>
FUSED_CRITIC_INLINE GaeOutputs<T> gae_group(const T* reward, const T* value, uint32_t valid, uint32_t ends, const GaeCoefficients<T>& c, const GaeCentre<T>& centre,
                                            GaeCarry<T>& state) {
  if (valid == 0) return {Vec<T>::all(T(0)), Vec<T>::all(T(0))};
  const GaeLanes<kNextValues, T> in = load_lanes<kNextValues>(reward, value, centre);
  if (ends != 0) return ending_group<kNextValues, kMode>(in, reward, valid, ends, c, centre.centre, state);
  if (valid != kAllLanes) return gappy_group<kNextValues, kMode>(in, valid, c, state);
  return dense_group<kNextValues, kMode>(in, c, state);
}

template <bool kNextValues, ScanMode kMode, typename T>
inline GaeCarry<T> gae_tile(const GaeTile<T>& tile, const GaePowers<T>& powers, GaeCarry<T> state) {
  const GaeTile<T> t = tile;  // a copy, which no store can change
  const GaeCoefficients<T> c(powers);
  BlockScratch<T> scratch[kTile / kBlock];
  const GaeCentre<T> centre = GaeCentre<T>::template of<kNextValues>(t, powers);
  state.carry -= centre.carry;
  state.b -= centre.carry;
  int64_t end = t.n;
  while (true) {
    if (const int64_t run = plain_run(t, end); run > 0) {
      end -= run;
      state = dense_blocks<kNextValues, kMode>(t.reward + end, t.value + end, t.advantages + end, t.returns + end, run / kBlock, c, centre, state, scratch);
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
  state.carry += centre.carry;
  state.b += centre.carry;
  return state;
}

template <bool kNextValues, typename T>
inline GaeCarry<T> gae_tile(const GaeTile<T>& t, const GaePowers<T>& powers, GaeCarry<T> state, ScanMode mode) {
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
  GaeCarry<T> state{carry, T(0), T(1)};
  const auto in_place = [&](const auto& x, auto zero) {
    return direct_rect<decltype(zero)>(x, seq * x.seq_stride + seq_origin * x.time_stride, 0, x.time_stride, {1, end});
  };
  // What most calls look like, without the questions of the others for every tile.
  if (p.terminated.data == nullptr && p.truncated.data == nullptr && p.next_values.data == nullptr) {
    const T *reward = in_place(p.rewards, T(0)), *value = in_place(p.values, T(0));
    const int8_t* valid = p.mask.data != nullptr ? in_place(p.mask, int8_t(0)) : nullptr;
    const bool writes = mode != ScanMode::kAggregate;
    T *advantages = writes ? in_place(p.advantages, T(0)) : nullptr, *returns = writes ? in_place(p.returns, T(0)) : nullptr;
    if (reward != nullptr && value != nullptr && (valid != nullptr || p.mask.data == nullptr) && (!writes || (advantages != nullptr && returns != nullptr))) {
      for (int64_t stop = end; stop > begin; stop -= kTile) {
        const int64_t start = std::max(begin, stop - kTile);
        const auto* flags = valid != nullptr ? reinterpret_cast<const uint8_t*>(valid) + start : nullptr;
        const GaeTile<T> t{stop - start, reward + start, value + start, flags, nullptr, writes ? advantages + start : nullptr, writes ? returns + start : nullptr};
        state = gae_tile<false>(t, powers, state, mode);
      }
      if (mode != ScanMode::kEmit) *total = {state.a, state.b};
      return state.carry;
    }
  }
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
  if (mode != ScanMode::kEmit) *total = {state.a, state.b};
  return state.carry;
}

template <typename T>
T element(const Operand& x, int64_t index) {
  T value = T(0);
  convert_run(x, index, 1, 1, &value);
  return value;
}

// --- eight sequences at a time, a lane each ---------------------------------------------------------------------------------------

// The factors of one sequence: of GaeParams or GaeBackwardParams. gamma_second: of returns with a lambda of their own.
template <typename T>
struct GaeDiscount {
  T gamma, gamma_lam, gamma_second;

  template <typename Params>
  GaeDiscount(const Params& p, int64_t seq) {
    const auto number = [&](const Number& x) { return x.data != nullptr ? element<double>({x.data, x.dtype}, seq * x.seq_stride) : x.value; };
    const double g = number(p.gamma);
    gamma = T(g);
    gamma_lam = T(g * number(p.lam));
    gamma_second = p.has_returns_lam ? T(g * number(p.returns_lam)) : T(0);
  }
};

// Those of many sequences, looked up once where they are the same for all.
template <typename T>
class GaeDiscounts {
 public:
  explicit GaeDiscounts(const GaeParams& p) : p_(p), shared_(p.gamma.data == nullptr && p.lam.data == nullptr && p.returns_lam.data == nullptr), common_(p, 0) {}
  GaeDiscount<T> of(int64_t seq) const { return shared_ ? common_ : GaeDiscount<T>(p_, seq); }

 private:
  const GaeParams& p_;
  const bool shared_;
  const GaeDiscount<T> common_;
};

// Carried by each of many sequences, and their factors. second: the advantage of the returns' own recursion, with its factor.
template <typename T, int kCount>
struct GaeCarries {
  alignas(64) T advantage[kCount], value[kCount], second[kCount], gamma[kCount], gamma_lam[kCount], gamma_second[kCount];

  void enter(const GaeParams& p, const GaeDiscounts<T>& discounts, int64_t at, int64_t seq) {
    const GaeDiscount<T> discount = discounts.of(seq);
    gamma[at] = discount.gamma;
    gamma_lam[at] = discount.gamma_lam;
    gamma_second[at] = discount.gamma_second;
    const bool bootstrap = p.next_values.data == nullptr && p.bootstrap_values.data != nullptr;
    value[at] = bootstrap ? element<T>(p.bootstrap_values, seq * p.bootstrap_values.seq_stride) : T(0);
    advantage[at] = second[at] = T(0);
  }
};

// Eight of them, in registers.
template <typename T>
struct GaeLaneCarries {
  Vec<T> advantage, value, second;

  template <int kCount>
  FUSED_CRITIC_INLINE static GaeLaneCarries load(const GaeCarries<T, kCount>& c, int64_t at) {
    return {Vec<T>::load(c.advantage + at), Vec<T>::load(c.value + at), Vec<T>::load(c.second + at)};
  }
  template <int kCount>
  FUSED_CRITIC_INLINE void store(GaeCarries<T, kCount>& c, int64_t at) const {
    advantage.store(c.advantage + at);
    value.store(c.value + at);
    second.store(c.second + at);
  }
};

// Bits of eight lanes. ends: terminated or truncated; read at tokens that are steps (valid, or all of them in mask mode "zero").
struct StepFlags {
  uint32_t live, valid, terminated, ends;

  StepFlags lanes(int64_t at) const { return {live >> at & kAllLanes, valid >> at & kAllLanes, terminated >> at & kAllLanes, ends >> at & kAllLanes}; }
};

// One step of eight sequences; `carries` in place. kOptions: a mask mode other than "skip", returns with a lambda of their own, numbers per sequence.
template <bool kNextValues, bool kOptions, typename T>
FUSED_CRITIC_INLINE GaeOutputs<T> gae_step(const GaeParams& p, Vec<T> reward, Vec<T> value, Vec<T> next_value, const StepFlags& flags, const Vec<T>& gamma,
                                           const Vec<T>& gamma_lam, const Vec<T>& gamma_second, GaeLaneCarries<T>& carries) {
  const Vec<T> zero = Vec<T>::all(T(0));
  const auto lanes = [](uint32_t bits) { return lanes_of<T>(bits); };
  const Mask<T> valid = lanes(flags.valid), ending = lanes(flags.ends);
  if (kOptions && p.mask_mode == MaskMode::kZero) {
    reward = select(valid, reward, zero);
    value = select(valid, value, zero);
    if constexpr (kNextValues) next_value = select(valid, next_value, zero);
  }
  const Vec<T> following = kNextValues ? select(lanes(flags.terminated), zero, next_value) : select(ending, zero, carries.value);
  const Vec<T> delta = reward + gamma * following - value;
  const Vec<T> advantage = delta + gamma_lam * select(ending, zero, carries.advantage);
  const auto carry = [&](const Vec<T>& stepped, Vec<T>& carried) {
    if constexpr (!kOptions) {
      carried = select(valid, stepped, carried);
      return;
    }
    const bool skip = p.mask_mode == MaskMode::kSkip;
    const Vec<T> out = p.mask_mode == MaskMode::kReset ? select(valid, stepped, zero) : stepped;
    carried = select(lanes(skip ? flags.valid : flags.live), out, carried);
  };
  Vec<T> second = advantage;
  if (kOptions && p.has_returns_lam) {
    second = delta + gamma_second * select(ending, zero, carries.second);
    carry(second, carries.second);
  }
  carry(advantage, carries.advantage);
  carry(value, carries.value);
  return {select(valid, advantage, zero), select(valid, second + value, zero)};
}

// Without them the factors are the same for all sequences.
inline bool has_options(const GaeParams& p) {
  return p.has_returns_lam || p.gamma.data != nullptr || p.lam.data != nullptr || (p.mask.data != nullptr && p.mask_mode != MaskMode::kSkip);
}

// The step of eight sequences that are valid, without ends, next values or options.
template <typename T>
FUSED_CRITIC_INLINE GaeOutputs<T> gae_plain_step(const Vec<T>& reward, const Vec<T>& value, const Vec<T>& gamma, const Vec<T>& gamma_lam, GaeLaneCarries<T>& carries) {
  carries.advantage = (reward + gamma * carries.value - value) + gamma_lam * carries.advantage;
  carries.value = value;
  return {carries.advantage, carries.advantage + value};
}

// One time step of n sequences, in arrays of T. Flags: non-zero where set; null: all valid, no ends.
template <typename T>
struct GaeColumns {
  int64_t n;
  const T *reward, *value, *next_value;
  const uint8_t *valid, *terminated, *truncated;
  T *advantages, *returns;
  struct {
    int64_t reward, value, advantages, returns;
  } next_step;  // how many elements further those of the step lie that is taken next
  bool fetches_ahead;

  FUSED_CRITIC_INLINE void prefetch_next_step(int64_t at) const {
    if (!fetches_ahead) return;
    prefetch_block(reward + at, next_step.reward);
    prefetch_block(value + at, next_step.value);
    prefetch_block(advantages + at, next_step.advantages);
    prefetch_block(returns + at, next_step.returns);
  }
};

template <bool kNextValues, bool kOptions, typename T>
inline void gae_step_of_columns(const GaeParams& p, const GaeColumns<T>& columns, GaeCarries<T, kTile>& carried) {
  const GaeColumns<T> t = columns;
  const bool reads_masked = kOptions && p.mask_mode == MaskMode::kZero;
  const bool flagged = kNextValues || kOptions || t.valid != nullptr || t.terminated != nullptr;
  // Of the columns [at, at + n), n <= kBlock: 32 lanes of StepFlags.
  const auto load_flags = [&](int64_t at, int64_t n) {
    const uint32_t all = ~uint32_t(0) >> (kBlock - n);
    const auto bits = [&](const uint8_t* flags, uint32_t missing) {
      return flags == nullptr ? missing : n == kBlock ? bits_of(flags + at) : bits_of(flags + at, n);
    };
    const uint32_t valid = bits(t.valid, all), steps = reads_masked ? all : valid, terminated = bits(t.terminated, 0) & steps;
    return StepFlags{all, valid, terminated, terminated | (bits(t.truncated, 0) & steps)};
  };
  const Vec<T> shared_gamma = Vec<T>::all(carried.gamma[0]), shared_gamma_lam = Vec<T>::all(carried.gamma_lam[0]);
  const auto step = [&](const T* reward, const T* value, const T* next_value, const StepFlags& flags, int64_t at) {
    GaeLaneCarries<T> carries = GaeLaneCarries<T>::load(carried, at);
    const GaeOutputs<T> out = gae_step<kNextValues, kOptions>(
        p, Vec<T>::load(reward), Vec<T>::load(value), kNextValues ? Vec<T>::load(next_value) : Vec<T>::all(T(0)), flags,
        kOptions ? Vec<T>::load(carried.gamma + at) : shared_gamma, kOptions ? Vec<T>::load(carried.gamma_lam + at) : shared_gamma_lam,
        kOptions ? Vec<T>::load(carried.gamma_second + at) : shared_gamma_lam, carries);
    carries.advantage.store(carried.advantage + at);
    carries.value.store(carried.value + at);
    if constexpr (kOptions) carries.second.store(carried.second + at);
    return out;
  };
  const auto plain_steps = [&](int64_t at, int64_t end) {
    const GaeColumns<T> t = columns;  // copies, which no store can change
    const Vec<T> gamma = shared_gamma, gamma_lam = shared_gamma_lam;
    for (; at < end; at += kLanes) {
      GaeLaneCarries<T> carries = GaeLaneCarries<T>::load(carried, at);
      gae_plain_step(Vec<T>::load(t.reward + at), Vec<T>::load(t.value + at), gamma, gamma_lam, carries)
          .store(t.advantages + at, t.returns + at);
      carries.advantage.store(carried.advantage + at);
      carries.value.store(carried.value + at);
    }
  };
  int64_t at = 0;
  while (t.n - at >= kLanes) {
    const int64_t n = std::min<int64_t>(kBlock, (t.n - at) / kLanes * kLanes);
    t.prefetch_next_step(at);
    const StepFlags flags = flagged ? load_flags(at, n) : StepFlags{0, 0, 0, 0};
    if (!kNextValues && !kOptions && flags.valid == flags.live && flags.ends == 0) {
      plain_steps(at, at + n);
    } else {
      for (int64_t i = 0; i < n; i += kLanes) {
        step(t.reward + at + i, t.value + at + i, t.next_value + at + i, flags.lanes(i), at + i).store(t.advantages + at + i, t.returns + at + i);
      }
    }
    at += n;
  }
  if (const int64_t rest = t.n - at; rest > 0) {  // the last n % kLanes sequences, with lanes that do not exist
    T reward[kLanes] = {}, value[kLanes] = {}, next_value[kLanes] = {}, advantages[kLanes], returns[kLanes];
    std::copy(t.reward + at, t.reward + t.n, reward);
    std::copy(t.value + at, t.value + t.n, value);
    if constexpr (kNextValues) std::copy(t.next_value + at, t.next_value + t.n, next_value);
    step(reward, value, next_value, load_flags(at, rest), at).store(advantages, returns);
    std::copy(advantages, advantages + rest, t.advantages + at);
    std::copy(returns, returns + rest, t.returns + at);
  }
}

// The same where all is valid, without ends, next values or options, in at least eight sequences, and not the step taken first. What is carried lies in
// the outputs and values of the step before and is read there, mostly from the first-level cache: arrays of carries would double the stores.
template <typename T>
inline void gae_step_after(const GaeColumns<T>& columns, T gamma, T gamma_lam) {
  const GaeColumns<T> t = columns;  // a copy, which no store can change
  const T *advantages_before = t.advantages - t.next_step.advantages, *values_before = t.value - t.next_step.value;
  const Vec<T> gammas = Vec<T>::all(gamma), gamma_lams = Vec<T>::all(gamma_lam);
  const auto step = [&](int64_t at) __attribute__((always_inline)) {
    GaeLaneCarries<T> carries{Vec<T>::load(advantages_before + at), Vec<T>::load(values_before + at), gammas};
    gae_plain_step(Vec<T>::load(t.reward + at), Vec<T>::load(t.value + at), gammas, gamma_lams, carries).store(t.advantages + at, t.returns + at);
  };
  const int64_t whole = t.n - t.n % kLanes;
  for (int64_t at = 0; at < whole;) {
    t.prefetch_next_step(at);
    for (const int64_t end = t.fetches_ahead ? std::min<int64_t>(at + kBlock, whole) : whole; at < end; at += kLanes) step(at);
  }
  if (whole < t.n) step(t.n - kLanes);  // some of its sequences for a second time
}

template <typename T>
void gae_columns(const GaeParams& p, int64_t first, int64_t count) {
  const bool next = p.next_values.data != nullptr, options = has_options(p);
  const bool plain = !next && !options && p.mask.data == nullptr && p.terminated.data == nullptr && p.truncated.data == nullptr && count >= kLanes;
  // Fetching ahead costs a fifth while a shared cache holds the call and saves up to a half where it does not; a page is too short for the
  // hardware to see where a walk goes on.
  constexpr int64_t kBeyondCaches = int64_t(12) << 20;
  const bool fetches_ahead = p.layout.seq_len * p.layout.num_seqs * int64_t(4 * sizeof(T)) > kBeyondCaches;
  GaeScratch<T> s;
  GaeCarries<T, kTile> carried;
  const GaeDiscounts<T> discounts(p);
  const int64_t lanes = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < lanes; ++i) carried.enter(p, discounts, i, first + std::min(i, count - 1));
  const Rect rect{1, count};
  for (int64_t step = p.layout.seq_len - 1; step >= 0; --step) {
    const auto origin = [&](const auto& x) { return first * x.seq_stride + step * x.time_stride; };
    const auto numbers = [&](const Operand& x, T* scratch) { return x.data == nullptr ? nullptr : load_rect(x, origin(x), 0, x.seq_stride, rect, scratch); };
    const auto flags = [&](const Operand& x, uint8_t* scratch) { return x.data == nullptr ? nullptr : load_flags(x, origin(x), x.seq_stride, count, scratch); };
    T* direct_advantages = direct_rect<T>(p.advantages, origin(p.advantages), 0, p.advantages.seq_stride, rect);
    T* direct_returns = direct_rect<T>(p.returns, origin(p.returns), 0, p.returns.seq_stride, rect);
    const GaeColumns<T> t{count, numbers(p.rewards, s.reward), numbers(p.values, s.value), numbers(p.next_values, s.next), flags(p.mask, s.valid),
                          flags(p.terminated, s.terminated), flags(p.truncated, s.ends), direct_advantages != nullptr ? direct_advantages : s.advantages,
                          direct_returns != nullptr ? direct_returns : s.returns,
                          {-p.rewards.time_stride, -p.values.time_stride, -p.advantages.time_stride, -p.returns.time_stride}, fetches_ahead};
    if (plain && step < p.layout.seq_len - 1 && t.value != s.value && direct_advantages != nullptr && direct_returns != nullptr) {
      gae_step_after(t, carried.gamma[0], carried.gamma_lam[0]);
    } else if (next) {
      options ? gae_step_of_columns<true, true>(p, t, carried) : gae_step_of_columns<true, false>(p, t, carried);
    } else {
      options ? gae_step_of_columns<false, true>(p, t, carried) : gae_step_of_columns<false, false>(p, t, carried);
    }
    if (direct_advantages == nullptr) store_run(t.advantages, count, p.advantages, origin(p.advantages), p.advantages.seq_stride);
    if (direct_returns == nullptr) store_run(t.returns, count, p.returns, origin(p.returns), p.returns.seq_stride);
  }
}

// Rows, walked side by side (lockstep.h).
template <typename T, bool kNextValues, bool kOptions>
class GaeLockstep {
 public:
  using Scalar = T;
  static constexpr bool kReverse = true;
  static constexpr int kNumbers = kNextValues ? 3 : 2, kFlags = 3, kOutputs = 2;
  using State = GaeCarries<T, kLanes>;
  using Blocks = LaneBlocks<GaeLockstep>;

  explicit GaeLockstep(const GaeParams& p)
      : p_(p), discounts_(p), flagged_(p.mask.data != nullptr || p.terminated.data != nullptr || p.truncated.data != nullptr),
        trims_(p.mask.data != nullptr && p.mask.dtype == DType::kInt8 && p.mask.time_stride == 1 && direct(p.advantages) && direct(p.returns)) {}

  const Operand& number(int k) const { return k == 0 ? p_.rewards : k == 1 ? p_.values : p_.next_values; }
  const Operand& flags(int k) const { return k == 0 ? p_.mask : k == 1 ? p_.terminated : p_.truncated; }
  const Output& output(int k) const { return k == 0 ? p_.advantages : p_.returns; }

  // Masked stretches at both ends are not walked.
  LaneSequence trim(LaneSequence s) const {
    if (kOptions || !trims_) return s;
    const uint8_t* valid = static_cast<const uint8_t*>(p_.mask.data) + s.seq * p_.mask.seq_stride + s.origin;
    int64_t end = s.length, begin = 0;
    while (end >= kBlock && bits_of(valid + end - kBlock) == 0) end -= kBlock;
    while (end - begin >= kBlock && bits_of(valid + begin) == 0) begin += kBlock;
    const auto clear = [&](int64_t from, int64_t to) {
      for (const Output* y : {&p_.advantages, &p_.returns}) {
        T* at = static_cast<T*>(y->data) + s.seq * y->seq_stride + s.origin;
        std::fill(at + from, at + to, T(0));
      }
    };
    clear(0, begin);
    clear(end, s.length);
    return {s.seq, s.origin + begin, end - begin};
  }

  void enter(State& state, int lane, int64_t seq) const { state.enter(p_, discounts_, lane, seq); }
  void leave(const State&, int, int64_t) const {}

  void walk(State& state, const Blocks& b, int64_t blocks, uint64_t live) const {
    for (int64_t block = blocks - 1; block >= 0;) {
      int64_t plain = 0;
      if (!kNextValues && !kOptions && !flagged_ && ~live == 0) plain = block + 1;
      while (plain <= block && is_plain(b, block - plain, live)) ++plain;
      if (plain > 0) {
        plain_blocks(state, b, block - plain + 1, block + 1);
        block -= plain;
      } else {
        flagged_block(state, b, block * kTurn, live);
        --block;
      }
    }
  }

 private:
  // As StepFlags, of a block.
  struct Flags {
    uint64_t valid, terminated, ends;
  };

  FUSED_CRITIC_INLINE Flags load_flags(const Blocks& b, int64_t at, uint64_t live) const {
    const uint64_t valid = p_.mask.data != nullptr ? load_bits(b.flags[0], at) & live : live;
    const uint64_t steps = kOptions && p_.mask_mode == MaskMode::kZero ? live : valid;
    const uint64_t terminated = p_.terminated.data != nullptr ? load_bits(b.flags[1], at) & steps : 0;
    return {valid, terminated, p_.truncated.data != nullptr ? terminated | (load_bits(b.flags[2], at) & steps) : terminated};
  }

  FUSED_CRITIC_INLINE bool is_plain(const Blocks& b, int64_t block, uint64_t live) const {
    if (kNextValues || (kOptions && p_.has_returns_lam)) return false;
    const Flags flags = load_flags(b, block * kTurn, live);
    return ~flags.valid == 0 && flags.ends == 0;
  }

  // Blocks [first, end), all valid and without ends: delta is made of whole rows, so that it alone is turned on the way in.
  FUSED_CRITIC_NOINLINE void plain_blocks(State& state, const Blocks& b, int64_t first, int64_t end) const {
    const Blocks lanes = b;  // a copy, which no store can change
    const Vec<T> gamma_lam = Vec<T>::load(state.gamma_lam);
    T gamma[kLanes], following_value[kLanes];
    std::copy(state.gamma, state.gamma + kLanes, gamma);
    std::copy(state.value, state.value + kLanes, following_value);
    Vec<T> next = Vec<T>::load(state.advantage);
    const auto block = [&](int64_t at, const auto& following) __attribute__((always_inline)) {
      Vec<T> x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const Vec<T> v = Vec<T>::load(lanes.number[1][i] + at);
        x[i] = Vec<T>::load(lanes.number[0][i] + at) + Vec<T>::all(gamma[i]) * following(i, v) - v;
      }
      transpose(x);
      for (int i = kTurn - 1; i >= 0; --i) next = x[i] = gamma_lam * next + x[i];
      transpose(x);
      for (int i = 0; i < kLanes; ++i) {
        x[i].store(lanes.output[0][i] + at);
        (x[i] + Vec<T>::load(lanes.number[1][i] + at)).store(lanes.output[1][i] + at);
      }
    };
    int64_t at = (end - 1) * kTurn;
    block(at, [&](int i, const Vec<T>& v) { return shift_down<1>(v, Vec<T>::all(following_value[i])); });
    for (at -= kTurn; at >= first * kTurn; at -= kTurn) block(at, [&](int i, const Vec<T>&) { return Vec<T>::load(lanes.number[1][i] + at + 1); });
    next.store(state.advantage);
    for (int i = 0; i < kLanes; ++i) state.value[i] = lanes.number[1][i][first * kTurn];
  }

  FUSED_CRITIC_NOINLINE void flagged_block(State& state, const Blocks& b, int64_t at, uint64_t live) const {
    const Flags flags = load_flags(b, at, live);
    const uint64_t live_steps = kOptions ? turn_bits(live) : 0, valid = turn_bits(flags.valid);  // live_steps: without options nothing asks
    const uint64_t terminated = kNextValues ? turn_bits(flags.terminated) : 0, ends = turn_bits(flags.ends);
    const Vec<T> gamma = Vec<T>::load(state.gamma), gamma_lam = Vec<T>::load(state.gamma_lam), gamma_second = Vec<T>::load(state.gamma_second);
    GaeLaneCarries<T> carries = GaeLaneCarries<T>::load(state, 0);
    Vec<T> reward[kTurn], value[kTurn], next_value[kTurn];
    load_turned(b.number[0], at, reward);
    load_turned(b.number[1], at, value);
    if constexpr (kNextValues) load_turned(b.number[2], at, next_value);
    const auto step = [&](int i) __attribute__((always_inline)) {
      const auto lanes = [&](uint64_t bits) { return uint32_t(bits >> (kLanes * i) & kAllLanes); };
      const GaeOutputs<T> out =
          gae_step<kNextValues, kOptions>(p_, reward[i], value[i], next_value[i], {lanes(live_steps), lanes(valid), lanes(terminated), lanes(ends)}, gamma, gamma_lam,
                                          gamma_second, carries);
      reward[i] = out.advantages;
      value[i] = out.returns;
    };
    if constexpr (sizeof(T) == sizeof(float)) {
#pragma GCC unroll 8  // kTurn: the steps stay in registers
      for (int i = kTurn - 1; i >= 0; --i) step(i);
    } else {
#pragma GCC unroll 1  // they are too many registers, and unrolled a third of the build's time
      for (int i = kTurn - 1; i >= 0; --i) step(i);
    }
    store_turned(reward, b.output[0], at);
    store_turned(value, b.output[1], at);
    carries.store(state, 0);
  }

  static bool direct(const Output& y) { return y.time_stride == 1 && y.dtype == dtype_of<T>(); }

  const GaeParams p_;
  const GaeDiscounts<T> discounts_;
  const bool flagged_, trims_;
};

template <typename T>
void gae_lockstep(const GaeParams& p, const LaneSequence* sequences, int64_t n) {
  const auto walk = [&](const auto& op) { Lockstep(op).walk(sequences, n); };
  if (p.next_values.data != nullptr) {
    has_options(p) ? walk(GaeLockstep<T, true, true>(p)) : walk(GaeLockstep<T, true, false>(p));
  } else {
    has_options(p) ? walk(GaeLockstep<T, false, true>(p)) : walk(GaeLockstep<T, false, false>(p));
  }
}

// The adjoint (gae.h) is a plain loop: it runs only where somebody differentiates through GAE.
template <typename T>
void gae_adjoint(const GaeBackwardParams& p, int64_t seq, int64_t seq_origin, int64_t length) {
  alignas(64) T grad_adv[kTile], grad_ret[kTile], valid[kTile], terminated[kTile], truncated[kTile], d_reward[kTile], d_value[kTile], d_next[kTile];
  const GaeDiscount<T> discount(p, seq);
  const T gamma = discount.gamma;
  T q = T(0), second_q = T(0);  // the second carry is that of returns with their own lambda
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
      const bool ended = terminated[i] != T(0), done = ended || truncated[i] != T(0);
      if (valid[i] == T(0)) {
        d_reward[i] = d_value[i] = d_next[i] = T(0);
        if (p.mask_mode == MaskMode::kSkip) continue;
        const bool stops = done || p.mask_mode == MaskMode::kReset;
        q = stops ? T(0) : discount.gamma_lam * q;
        second_q = stops ? T(0) : discount.gamma_second * second_q;
        continue;
      }
      const T first = (p.has_returns_lam ? grad_adv[i] : grad_adv[i] + grad_ret[i]) + discount.gamma_lam * q;
      const T second = p.has_returns_lam ? grad_ret[i] + discount.gamma_second * second_q : T(0);
      const T grad = first + second;
      d_reward[i] = grad;
      d_value[i] = grad_ret[i] - grad + (p.has_next_values ? T(0) : gamma * (q + second_q));
      d_next[i] = ended ? T(0) : gamma * grad;
      q = done ? T(0) : first;
      second_q = done ? T(0) : second;
    }
    const auto store = [&](const T* from, const Output& y) {
      if (y.data != nullptr) store_run(from, n, y, origin(y), y.time_stride);
    };
    store(d_reward, p.grad_rewards);
    store(d_value, p.grad_values);
    store(d_next, p.grad_next_values);
  }
  if (p.grad_bootstrap.data != nullptr) {
    const T grad = gamma * (q + second_q);
    store_run(&grad, 1, p.grad_bootstrap, seq * p.grad_bootstrap.seq_stride, 1);
  }
}

}  // namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE
