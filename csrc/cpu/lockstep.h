// Eight sequences walked side by side, a lane each: a recurrence then needs no scan, and masks and ends are selections of lanes. Blocks of
// eight tokens are turned on the way in and out, so that sequences may lie anywhere. A lane whose sequence is through takes the next one.
// Included once per instruction set (see simd.h).
//
// An operator is a
//
//   struct Op {
//     using Scalar;                                 // accumulation type T
//     static constexpr bool kReverse;               // from the last token to the first
//     static constexpr int kNumbers, kFlags, kOutputs;
//     const Operand& number(int) const;             // the operands; data == nullptr: absent, its pointers stay null
//     const Operand& flags(int) const;
//     const Output& output(int) const;
//     LaneSequence trim(const LaneSequence&) const; // what is to be walked of a sequence; the rest it writes itself
//     struct State;                                 // arrays of kLanes numbers
//     void enter(State&, int lane, int64_t seq) const;
//     void leave(const State&, int lane, int64_t seq) const;
//     // `blocks` blocks of every lane, in scan order. `live` says which tokens exist: bit kLanes * lane + token, all of them but in a sequence's
//     // last block, where blocks == 1.
//     void walk(State&, const LaneBlocks<Op>&, int64_t blocks, uint64_t live) const;
//   };

namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE {

constexpr int kTurn = kLanes;  // tokens of a lane in a block

// What a walk reads and writes: element i of a lane lies at pointer[lane][i].
template <typename Op>
struct LaneBlocks {
  using T = typename Op::Scalar;
  const T* number[Op::kNumbers][kLanes];
  const uint8_t* flags[Op::kFlags][kLanes];
  T* output[Op::kOutputs][kLanes];
};

// Of eight lanes, tokens [at, at + kTurn): steps[i] holds token at + i of every lane.
template <typename T>
FUSED_CRITIC_INLINE void load_turned(const T* const (&lane)[kLanes], int64_t at, Vec<T> (&steps)[kTurn]) {
  for (int i = 0; i < kLanes; ++i) steps[i] = Vec<T>::load(lane[i] + at);
  transpose(steps);
}

template <typename T>
FUSED_CRITIC_INLINE void store_turned(Vec<T> (&steps)[kTurn], T* const (&lane)[kLanes], int64_t at) {
  transpose(steps);
  for (int i = 0; i < kLanes; ++i) steps[i].store(lane[i] + at);
}

// Bit kLanes * lane + token is set where the flag is.
FUSED_CRITIC_INLINE uint64_t load_bits(const uint8_t* const (&lane)[kLanes], int64_t at) {
  uint64_t words[kLanes], bits = 0;
  for (int i = 0; i < kLanes; ++i) std::memcpy(words + i, lane[i] + at, kTurn);
  for (int i = 0; i < kLanes; i += 2) bits |= uint64_t(bits_of(words[i], words[i + 1])) << (kTurn * i);
  return bits;
}

// Bit kLanes * lane + token becomes bit kTurn * token + lane.
FUSED_CRITIC_INLINE uint64_t turn_bits(uint64_t x) {
  const auto swap = [&](int by, uint64_t mask) {
    const uint64_t moved = (x ^ (x >> by)) & mask;
    x ^= moved ^ (moved << by);
  };
  swap(7, 0x00AA00AA00AA00AAull);
  swap(14, 0x0000CCCC0000CCCCull);
  swap(28, 0x00000000F0F0F0F0ull);
  return x;
}

template <typename Op>
class Lockstep {
 public:
  using T = typename Op::Scalar;

  explicit Lockstep(const Op& op) : op_(op) {
    for (int k = 0; k < Op::kNumbers; ++k) direct_number_[k] = op.number(k).time_stride == 1 && op.number(k).dtype == dtype_of<T>();
    for (int k = 0; k < Op::kFlags; ++k) direct_flags_[k] = op.flags(k).time_stride == 1 && op.flags(k).dtype == DType::kInt8;
    for (int k = 0; k < Op::kOutputs; ++k) direct_output_[k] = op.output(k).time_stride == 1 && op.output(k).dtype == dtype_of<T>();
  }

  // Walks n sequences.
  void walk(const LaneSequence* sequences, int64_t n) {
    const LaneSequence* const end = sequences + n;
    typename Op::State state{};
    while (true) {
      int64_t shortest = kStretch;
      bool any = false;
      for (int lane = 0; lane < kLanes; ++lane) {
        while (left_[lane] == 0) {
          if (seq_[lane] >= 0) op_.leave(state, lane, seq_[lane]);
          seq_[lane] = -1;
          if (sequences == end) break;
          start(lane, *sequences++);
          op_.enter(state, lane, seq_[lane]);
        }
        if (left_[lane] == 0) continue;
        any = true;
        shortest = std::min(shortest, left_[lane]);
      }
      if (!any) return;
      if (shortest >= kTurn) {
        whole_blocks(state, shortest / kTurn);
      } else {
        part_of_block(state);
      }
    }
  }

 private:
  static constexpr int64_t kStretch = 128;  // tokens of a lane between two looks at the lanes; what is converted meanwhile stays in the first-level cache

  void start(int lane, const LaneSequence& whole) {
    const LaneSequence s = op_.trim(whole);
    seq_[lane] = s.seq;
    left_[lane] = s.length;
    at_[lane] = s.origin + (Op::kReverse ? s.length : 0);
  }

  template <typename Tensor>
  int64_t element(const Tensor& x, int lane, int64_t at) const { return seq_[lane] * x.seq_stride + at * x.time_stride; }

  void whole_blocks(typename Op::State& state, int64_t blocks) {
    const int64_t n = blocks * kTurn;
    LaneBlocks<Op> b;
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool idle = left_[lane] == 0;
      const int64_t at = Op::kReverse ? at_[lane] - n : at_[lane];
      for (int k = 0; k < Op::kNumbers; ++k) {
        const Operand& x = op_.number(k);
        if (x.data == nullptr) continue;
        b.number[k][lane] = idle ? idle_ : direct_number_[k] ? static_cast<const T*>(x.data) + element(x, lane, at) : numbers_[k][lane];
        if (!idle && !direct_number_[k]) convert_run(x, element(x, lane, at), x.time_stride, n, numbers_[k][lane]);
      }
      for (int k = 0; k < Op::kFlags; ++k) {
        const Operand& x = op_.flags(k);
        if (x.data == nullptr) continue;
        b.flags[k][lane] = idle ? idle_flags_ : direct_flags_[k] ? static_cast<const uint8_t*>(x.data) + element(x, lane, at) : load_flags(x, element(x, lane, at), x.time_stride, n, flags_[k][lane]);
      }
      for (int k = 0; k < Op::kOutputs; ++k) {
        const Output& y = op_.output(k);
        b.output[k][lane] = !idle && direct_output_[k] ? static_cast<T*>(y.data) + element(y, lane, at) : outputs_[k][lane];
      }
    }
    op_.walk(state, b, blocks, ~uint64_t(0));
    for (int lane = 0; lane < kLanes; ++lane) {
      if (left_[lane] == 0) continue;
      const int64_t at = Op::kReverse ? at_[lane] - n : at_[lane];
      for (int k = 0; k < Op::kOutputs; ++k) {
        const Output& y = op_.output(k);
        if (y.data != nullptr && !direct_output_[k]) store_run(outputs_[k][lane], n, y, element(y, lane, at), y.time_stride);
      }
      advance(lane, n);
    }
  }

  // Lanes that have fewer than kTurn tokens left take them in scratch, at the end where the walk begins.
  void part_of_block(typename Op::State& state) {
    LaneBlocks<Op> b;
    uint64_t live = 0;
    int64_t tokens[kLanes];
    const auto first = [&](int lane) { return Op::kReverse ? kTurn - tokens[lane] : 0; };
    const auto at = [&](int lane) { return Op::kReverse ? at_[lane] - tokens[lane] : at_[lane]; };
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t n = tokens[lane] = std::min<int64_t>(kTurn, left_[lane]);
      live |= ((uint64_t(1) << n) - 1) << (kTurn * lane + first(lane));
      for (int k = 0; k < Op::kNumbers; ++k) {
        const Operand& x = op_.number(k);
        b.number[k][lane] = numbers_[k][lane];
        if (x.data == nullptr || n == 0) continue;
        convert_run(x, element(x, lane, at(lane)), x.time_stride, n, numbers_[k][lane] + first(lane));
      }
      for (int k = 0; k < Op::kFlags; ++k) {
        const Operand& x = op_.flags(k);
        b.flags[k][lane] = flags_[k][lane];
        if (x.data == nullptr || n == 0) continue;
        const uint8_t* from = load_flags(x, element(x, lane, at(lane)), x.time_stride, n, flags_[k][lane]);
        std::memmove(flags_[k][lane] + first(lane), from, n);
      }
      for (int k = 0; k < Op::kOutputs; ++k) b.output[k][lane] = outputs_[k][lane];
    }
    op_.walk(state, b, 1, live);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (tokens[lane] == 0) continue;
      for (int k = 0; k < Op::kOutputs; ++k) {
        const Output& y = op_.output(k);
        if (y.data != nullptr) store_run(outputs_[k][lane] + first(lane), tokens[lane], y, element(y, lane, at(lane)), y.time_stride);
      }
      advance(lane, tokens[lane]);
    }
  }

  void advance(int lane, int64_t n) {
    left_[lane] -= n;
    at_[lane] += Op::kReverse ? -n : n;
  }

  const Op op_;
  bool direct_number_[Op::kNumbers], direct_flags_[Op::kFlags], direct_output_[Op::kOutputs];
  // Of the sequence in each lane: its number (-1: none), the tokens that are left and where they begin (or end, if kReverse).
  int64_t seq_[kLanes] = {-1, -1, -1, -1, -1, -1, -1, -1}, left_[kLanes] = {}, at_[kLanes] = {};
  alignas(64) T numbers_[Op::kNumbers][kLanes][kStretch] = {};
  alignas(64) T outputs_[Op::kOutputs][kLanes][kStretch];
  alignas(64) T idle_[kStretch] = {};
  alignas(64) uint8_t flags_[Op::kFlags][kLanes][kStretch] = {}, idle_flags_[kStretch] = {};
};

}  // namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE
