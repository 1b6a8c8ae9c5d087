// Vectorised GAE. Included once per instruction set (see simd.h).
//
// Within a row, eight neighbouring steps are eight affine maps; three shift-and-compose rounds give each lane the composition of itself
// with everything to its right in the group, and one multiply-add per group carries the scalar to the next. Between sequences
// (time-major) lanes are sequences and no scan is needed.

namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE {

template <typename T>
struct AffineLanes {
  Vec<T> a, b;
};

// Lane i becomes lane_i after lane_{i+1} after ... lane_{7}.
template <int kBy, typename T>
FUSED_CRITIC_INLINE AffineLanes<T> scan_round(const AffineLanes<T>& m, const AffineLanes<T>& identity) {
  const Vec<T> a = shift_down<kBy>(m.a, identity.a), b = shift_down<kBy>(m.b, identity.b);
  return {m.a * a, m.a * b + m.b};
}

template <typename T>
FUSED_CRITIC_INLINE AffineLanes<T> suffix_compose(AffineLanes<T> m, const AffineLanes<T>& identity) {
  m = scan_round<1>(m, identity);
  m = scan_round<2>(m, identity);
  return scan_round<4>(m, identity);
}

// One tile of one sequence, already in arrays of T. keep: 0 where the episode ends, else 1. carried: gamma, or 0 with next_values.
template <typename T>
struct GaeTile {
  int64_t n;
  const T *reward, *value;  // reward includes gamma * next_value where next_values are given
  const T *valid, *keep;    // 0 or 1; both null when there are neither masks nor flags
  T *advantages, *returns;
};

template <typename T>
struct GaeLanes {
  Vec<T> base, value, valid, keep;
};

template <typename T>
struct GaeCoefficients {
  Vec<T> gamma_lam, carried;
  Vec<T> power[3];          // (gamma lam)^1, ^2, ^4: the products in the three rounds when every step is alike
  Vec<T> suffix;            // (gamma lam)^(8 - lane)
};

template <typename T>
inline GaeCoefficients<T> gae_coefficients(T gamma_lam, T carried) {
  T suffix[kLanes];
  T product = gamma_lam;
  for (int i = kLanes - 1; i >= 0; --i) {
    suffix[i] = product;
    product *= gamma_lam;
  }
  const T square = gamma_lam * gamma_lam;
  return {Vec<T>::all(gamma_lam), Vec<T>::all(carried), {Vec<T>::all(gamma_lam), Vec<T>::all(square), Vec<T>::all(square * square)}, Vec<T>::load(suffix)};
}

template <typename T, bool kFlags, ScanMode kMode>
FUSED_CRITIC_INLINE T gae_group(const GaeLanes<T>& in, const GaeCoefficients<T>& c, T carry, Affine<T>* total, T* advantages, T* returns) {
  const Vec<T> zero = Vec<T>::all(T(0)), one = Vec<T>::all(T(1));
  AffineLanes<T> m;
  if constexpr (kFlags) {
    const Mask<T> valid = in.valid != zero;
    m.a = select(valid, c.gamma_lam * in.keep, one);
    m.b = select(valid, c.gamma_lam * in.base + c.carried * in.value, zero);
    m = suffix_compose(m, AffineLanes<T>{one, zero});
  } else {
    m.b = c.gamma_lam * in.base + c.carried * in.value;
    m.b = c.power[0] * shift_down<1>(m.b, zero) + m.b;
    m.b = c.power[1] * shift_down<2>(m.b, zero) + m.b;
    m.b = c.power[2] * shift_down<4>(m.b, zero) + m.b;
    m.a = c.suffix;
  }
  const T a = first_lane(m.a), b = first_lane(m.b);
  if constexpr (kMode != ScanMode::kEmit) *total = compose(Affine<T>{a, b}, *total);
  if constexpr (kMode != ScanMode::kAggregate) {
    const Vec<T> carries = Vec<T>::all(carry);
    const Vec<T> entering = shift_down<1>(m.a * carries + m.b, carries);
    if constexpr (kFlags) {
      const Mask<T> valid = in.valid != zero;
      const Vec<T> adv = in.base + in.keep * entering;
      select(valid, adv, zero).store(advantages);
      select(valid, adv + in.value, zero).store(returns);
    } else {
      const Vec<T> adv = in.base + entering;
      adv.store(advantages);
      (adv + in.value).store(returns);
    }
  }
  return a * carry + b;
}

template <typename T, bool kFlags, ScanMode kMode>
inline T gae_tile(const GaeTile<T>& t, const GaeCoefficients<T>& c, T carry, Affine<T>* total) {
  int64_t i = t.n;
  for (; i >= kLanes; i -= kLanes) {
    const int64_t at = i - kLanes;
    GaeLanes<T> in;
    in.value = Vec<T>::load(t.value + at);
    in.base = Vec<T>::load(t.reward + at) - in.value;
    if constexpr (kFlags) {
      in.valid = Vec<T>::load(t.valid + at);
      in.keep = Vec<T>::load(t.keep + at);
    }
    carry = gae_group<T, kFlags, kMode>(in, c, carry, total, t.advantages + at, t.returns + at);
  }
  if (i > 0) {  // the first n % kLanes tokens, as the last lanes of a group whose other lanes are masked
    const int64_t pad = kLanes - i;
    T value[kLanes] = {}, reward[kLanes] = {}, valid[kLanes] = {}, keep[kLanes] = {}, adv[kLanes], ret[kLanes];
    std::copy(t.value, t.value + i, value + pad);
    std::copy(t.reward, t.reward + i, reward + pad);
    if constexpr (kFlags) {
      std::copy(t.valid, t.valid + i, valid + pad);
      std::copy(t.keep, t.keep + i, keep + pad);
    } else {
      std::fill(valid + pad, valid + kLanes, T(1));
      std::fill(keep + pad, keep + kLanes, T(1));
    }
    GaeLanes<T> in;
    in.value = Vec<T>::load(value);
    in.base = Vec<T>::load(reward) - in.value;
    in.valid = Vec<T>::load(valid);
    in.keep = Vec<T>::load(keep);
    carry = gae_group<T, true, kMode>(in, c, carry, total, adv, ret);
    if constexpr (kMode != ScanMode::kAggregate) {
      std::copy(adv + pad, adv + kLanes, t.advantages);
      std::copy(ret + pad, ret + kLanes, t.returns);
    }
  }
  return carry;
}

template <typename T, bool kFlags>
inline T gae_tile(const GaeTile<T>& t, const GaeCoefficients<T>& c, T carry, ScanMode mode, Affine<T>* total) {
  switch (mode) {
    case ScanMode::kEmit: return gae_tile<T, kFlags, ScanMode::kEmit>(t, c, carry, total);
    case ScanMode::kEmitAndAggregate: return gae_tile<T, kFlags, ScanMode::kEmitAndAggregate>(t, c, carry, total);
    case ScanMode::kAggregate: return gae_tile<T, kFlags, ScanMode::kAggregate>(t, c, carry, total);
  }
  return carry;
}

// The flags of n positions as factors (see GaeTile), and reward + gamma (1 - terminated) next_value. `load(operand, scratch)` brings an
// operand's positions.
template <typename T>
struct GaeScratch {
  alignas(64) T reward[kTile], value[kTile], valid[kTile], keep[kTile], next[kTile], flag[kTile], advantages[kTile], returns[kTile];
};

template <typename T, typename Load>
inline GaeTile<T> load_gae_tile(const GaeParams& p, int64_t n, T gamma, GaeScratch<T>& s, Load load) {
  GaeTile<T> t{n, load(p.rewards, s.reward), load(p.values, s.value), nullptr, nullptr, nullptr, nullptr};
  const bool ends = p.terminated.data != nullptr || p.truncated.data != nullptr;
  if (p.mask.data != nullptr || ends) {
    t.valid = p.mask.data != nullptr ? load(p.mask, s.valid) : s.valid;
    if (p.mask.data == nullptr) std::fill(s.valid, s.valid + n, T(1));
    t.keep = s.keep;
    std::fill(s.keep, s.keep + n, T(1));
  }
  const T* terminated = nullptr;
  if (p.truncated.data != nullptr) {
    const T* truncated = load(p.truncated, s.flag);
    for (int64_t i = 0; i < n; ++i) s.keep[i] = truncated[i] != T(0) ? T(0) : T(1);
  }
  if (p.terminated.data != nullptr) {
    terminated = load(p.terminated, s.flag);
    for (int64_t i = 0; i < n; ++i) s.keep[i] = terminated[i] != T(0) ? T(0) : s.keep[i];
  }
  if (p.next_values.data != nullptr) {
    const T* next = load(p.next_values, s.next);
    const T* reward = t.reward;
    for (int64_t i = 0; i < n; ++i) s.reward[i] = reward[i] + (terminated != nullptr && terminated[i] != T(0) ? T(0) : gamma * next[i]);
    t.reward = s.reward;
  }
  return t;
}

template <typename T>
T gae_rows(const GaeParams& p, int64_t seq, int64_t seq_origin, int64_t begin, int64_t end, T gamma, T gamma_lam, T carry, ScanMode mode, Affine<T>* total) {
  const GaeCoefficients<T> c = gae_coefficients<T>(gamma_lam, p.next_values.data != nullptr ? T(0) : gamma);
  GaeScratch<T> s;
  for (int64_t stop = end; stop > begin; stop -= kTile) {
    const int64_t start = std::max(begin, stop - kTile), n = stop - start;
    const Rect rect{1, n};
    const auto origin = [&](const auto& x) { return seq * x.seq_stride + (seq_origin + start) * x.time_stride; };
    GaeTile<T> t = load_gae_tile<T>(p, n, gamma, s, [&](const Operand& x, T* scratch) { return load_rect(x, origin(x), 0, x.time_stride, rect, scratch); });
    if (mode != ScanMode::kAggregate) {
      t.advantages = direct_rect<T>(p.advantages, origin(p.advantages), 0, p.advantages.time_stride, rect);
      t.returns = direct_rect<T>(p.returns, origin(p.returns), 0, p.returns.time_stride, rect);
    }
    const bool direct_advantages = t.advantages != nullptr, direct_returns = t.returns != nullptr;
    if (!direct_advantages) t.advantages = s.advantages;
    if (!direct_returns) t.returns = s.returns;
    carry = t.valid != nullptr ? gae_tile<T, true>(t, c, carry, mode, total) : gae_tile<T, false>(t, c, carry, mode, total);
    if (mode == ScanMode::kAggregate) continue;
    if (!direct_advantages) store_run(t.advantages, n, p.advantages, origin(p.advantages), p.advantages.time_stride);
    if (!direct_returns) store_run(t.returns, n, p.returns, origin(p.returns), p.returns.time_stride);
  }
  return carry;
}

template <typename T>
T element(const Operand& x, int64_t index) {
  T value = T(0);
  convert_run(x, index, 1, 1, &value);
  return value;
}

// One time step of `n` sequences: the carries move from right to left in place.
template <typename T, bool kFlags>
inline void gae_step_of_columns(const GaeTile<T>& t, T gamma_lam, T carried, T* carries) {
  for (int64_t i = 0; i < t.n; ++i) {
    const T base = t.reward[i] - t.value[i];
    const T adv = base + (kFlags ? t.keep[i] * carries[i] : carries[i]);
    const T ret = adv + t.value[i];
    const T left = gamma_lam * adv + carried * t.value[i];
    const bool valid = !kFlags || t.valid[i] != T(0);
    t.advantages[i] = valid ? adv : T(0);
    t.returns[i] = valid ? ret : T(0);
    carries[i] = valid ? left : carries[i];
  }
}

template <typename T>
void gae_columns(const GaeParams& p, int64_t first, int64_t count, T gamma, T gamma_lam) {
  const bool next = p.next_values.data != nullptr;
  const T carried = next ? T(0) : gamma;
  GaeScratch<T> s;
  alignas(64) T carries[kTile] = {};
  if (!next && p.bootstrap_values.data != nullptr) {
    convert_run(p.bootstrap_values, first * p.bootstrap_values.seq_stride, p.bootstrap_values.seq_stride, count, carries);
    for (int64_t i = 0; i < count; ++i) carries[i] *= gamma;
  }
  const Rect rect{1, count};
  for (int64_t step = p.layout.seq_len - 1; step >= 0; --step) {
    const auto origin = [&](const auto& x) { return first * x.seq_stride + step * x.time_stride; };
    GaeTile<T> t = load_gae_tile<T>(p, count, gamma, s, [&](const Operand& x, T* scratch) { return load_rect(x, origin(x), 0, x.seq_stride, rect, scratch); });
    T* direct_advantages = direct_rect<T>(p.advantages, origin(p.advantages), 0, p.advantages.seq_stride, rect);
    T* direct_returns = direct_rect<T>(p.returns, origin(p.returns), 0, p.returns.seq_stride, rect);
    t.advantages = direct_advantages != nullptr ? direct_advantages : s.advantages;
    t.returns = direct_returns != nullptr ? direct_returns : s.returns;
    if (t.valid != nullptr) {
      gae_step_of_columns<T, true>(t, gamma_lam, carried, carries);
    } else {
      gae_step_of_columns<T, false>(t, gamma_lam, carried, carries);
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
