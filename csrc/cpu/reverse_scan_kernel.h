// The reverse scan and its adjoint. Included once per instruction set (see simd.h).

namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE {

// y_t of y_{t+1}.
template <typename T>
struct ReverseScanStep {
  FUSED_CRITIC_INLINE T operator()(T x, T decay, T next) const { return x + decay * next; }
};

// p_t of the carry decay_{t-1} p_{t-1}, which becomes decay_t p_t.
template <typename T>
struct ReverseScanAdjointStep {
  FUSED_CRITIC_INLINE T operator()(T grad, T decay, T& carry) const {
    const T p = grad + carry;
    carry = decay * p;
    return p;
  }
};

template <typename T>
void reverse_scan(const ReverseScanParams& p, const SequenceWalk& walk) {
  alignas(64) T x_scratch[kTile], decay_scratch[kTile], out[kTile], carry[kTile];
  const ReverseScanStep<T> step;
  load_per_sequence(p.init, walk, T(0), carry);
  walk_runs<true>(walk, [&](const Run& run) {
    const T* x = load_run(p.x, run, T(0), x_scratch);
    const T* decay = load_run(p.decay, run, T(p.factor.value), decay_scratch);
    walk_positions<true>(run, carry, [&](int64_t i, T& y) {
      const T next = y;
      y = step(x[i], decay[i], next);
      out[i] = p.shifted ? next : y;
    });
    store_run(out, run, p.y);
  });
}

template <typename T>
void reverse_scan_adjoint(const ReverseScanBackwardParams& p, const SequenceWalk& walk) {
  alignas(64) T grad_scratch[kTile], decay_scratch[kTile], out[kTile], carry[kTile];
  const ReverseScanAdjointStep<T> step;
  std::fill(carry, carry + walk.count, T(0));
  walk_runs<false>(walk, [&](const Run& run) {
    const T* grad = load_run(p.grad, run, T(0), grad_scratch);
    const T* decay = load_run(p.decay, run, T(p.factor.value), decay_scratch);
    walk_positions<false>(run, carry, [&](int64_t i, T& c) { out[i] = step(grad[i], decay[i], c); });
    store_run(out, run, p.p);
  });
  store_per_sequence(carry, walk, p.grad_init);
}

// Both, for eight sequences side by side (lockstep.h).
template <typename T>
class ReverseScanLockstep {
 public:
  using Scalar = T;
  static constexpr bool kReverse = true;
  static constexpr int kNumbers = 2, kFlags = 1, kOutputs = 1;
  struct State {
    alignas(64) T next[kLanes] = {};
  };

  explicit ReverseScanLockstep(const ReverseScanParams& p) : p_(p) {}

  const Operand& number(int k) const { return k == 0 ? p_.x : p_.decay; }
  const Operand& flags(int) const { return none_; }
  const Output& output(int) const { return p_.y; }
  LaneSequence trim(const LaneSequence& s) const { return s; }
  void enter(State& state, int lane, int64_t seq) const { state.next[lane] = p_.init.data != nullptr ? element<T>(p_.init, seq * p_.init.seq_stride) : T(0); }
  void leave(const State&, int, int64_t) const {}

  void walk(State& state, const LaneBlocks<ReverseScanLockstep>& b, int64_t blocks, uint64_t live) const {
    const LaneBlocks<ReverseScanLockstep> lanes = b;  // a copy, which no store can change
    Vec<T> y = Vec<T>::load(state.next), x[kTurn], decay[kTurn];
    std::fill(decay, decay + kTurn, Vec<T>::all(T(p_.factor.value)));
    const uint64_t tokens = turn_bits(live);
    for (int64_t at = (blocks - 1) * kTurn; at >= 0; at -= kTurn) {
      load_turned(lanes.number[0], at, x);
      if (p_.decay.data != nullptr) load_turned(lanes.number[1], at, decay);
#pragma GCC unroll 8  // kTurn: the steps stay in registers
      for (int i = kTurn - 1; i >= 0; --i) {
        const Vec<T> next = y;
        y = x[i] + decay[i] * next;
        if (~live != 0) y = select(lanes_of<T>(tokens >> (kLanes * i) & kAllLanes), y, next);
        x[i] = p_.shifted ? next : y;
      }
      store_turned(x, lanes.output[0], at);
    }
    y.store(state.next);
  }

 private:
  const ReverseScanParams p_;
  const Operand none_;
};

template <typename T>
class ReverseScanAdjointLockstep {
 public:
  using Scalar = T;
  static constexpr bool kReverse = false;
  static constexpr int kNumbers = 2, kFlags = 1, kOutputs = 1;
  struct State {
    alignas(64) T carry[kLanes] = {};
  };

  explicit ReverseScanAdjointLockstep(const ReverseScanBackwardParams& p) : p_(p) {}

  const Operand& number(int k) const { return k == 0 ? p_.grad : p_.decay; }
  const Operand& flags(int) const { return none_; }
  const Output& output(int) const { return p_.p; }
  LaneSequence trim(const LaneSequence& s) const { return s; }
  void enter(State& state, int lane, int64_t) const { state.carry[lane] = T(0); }
  void leave(const State& state, int lane, int64_t seq) const {
    if (p_.grad_init.data != nullptr) store_run(state.carry + lane, 1, p_.grad_init, seq * p_.grad_init.seq_stride, 1);
  }

  void walk(State& state, const LaneBlocks<ReverseScanAdjointLockstep>& b, int64_t blocks, uint64_t live) const {
    const LaneBlocks<ReverseScanAdjointLockstep> lanes = b;  // a copy, which no store can change
    Vec<T> carry = Vec<T>::load(state.carry), grad[kTurn], decay[kTurn];
    std::fill(decay, decay + kTurn, Vec<T>::all(T(p_.factor.value)));
    const uint64_t tokens = turn_bits(live);
    for (int64_t at = 0; at < blocks * kTurn; at += kTurn) {
      load_turned(lanes.number[0], at, grad);
      if (p_.decay.data != nullptr) load_turned(lanes.number[1], at, decay);
#pragma GCC unroll 8  // kTurn: the steps stay in registers
      for (int i = 0; i < kTurn; ++i) {
        const Vec<T> p = grad[i] + carry, leaving = decay[i] * p;
        carry = ~live == 0 ? leaving : select(lanes_of<T>(tokens >> (kLanes * i) & kAllLanes), leaving, carry);
        grad[i] = p;
      }
      store_turned(grad, lanes.output[0], at);
    }
    carry.store(state.carry);
  }

 private:
  const ReverseScanBackwardParams p_;
  const Operand none_;
};

template <typename T>
void reverse_scan_lockstep(const ReverseScanParams& p, const LaneSequence* sequences, int64_t n) {
  Lockstep(ReverseScanLockstep<T>(p)).walk(sequences, n);
}

template <typename T>
void reverse_scan_adjoint_lockstep(const ReverseScanBackwardParams& p, const LaneSequence* sequences, int64_t n) {
  Lockstep(ReverseScanAdjointLockstep<T>(p)).walk(sequences, n);
}

}  // namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE
