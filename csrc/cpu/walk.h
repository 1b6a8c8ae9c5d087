// A plain walk over positions in scan order, for recurrences whose step is a small functor. Included once per instruction set (see simd.h).

namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE {

// Neighbouring positions: n of one sequence from time t on, or those of n sequences at time t.
struct Run {
  int64_t seq, t, n;
  bool across;  // over sequences

  template <typename X>
  int64_t origin(const X& x) const { return seq * x.seq_stride + t * x.time_stride; }
  template <typename X>
  int64_t stride(const X& x) const { return across ? x.seq_stride : x.time_stride; }
};

// In place or converted into scratch, which has room for kTile; `missing` where the operand is absent.
template <typename T>
inline const T* load_run(const Operand& x, const Run& run, T missing, T* scratch) {
  if (x.data == nullptr) {
    std::fill(scratch, scratch + run.n, missing);
    return scratch;
  }
  if (run.stride(x) == 1 && x.dtype == dtype_of<T>()) return static_cast<const T*>(x.data) + run.origin(x);
  convert_run(x, run.origin(x), run.stride(x), run.n, scratch);
  return scratch;
}

// As bytes, non-zero where set; all `missing` where the operand is absent.
inline const uint8_t* load_run_flags(const Operand& x, const Run& run, uint8_t missing, uint8_t* scratch) {
  if (x.data != nullptr) return load_flags(x, run.origin(x), run.stride(x), run.n, scratch);
  std::fill(scratch, scratch + run.n, missing);
  return scratch;
}

template <typename T>
inline void store_run(const T* from, const Run& run, const Output& y) {
  if (y.data != nullptr) store_run(from, run.n, y, run.origin(y), run.stride(y));
}

// One value per sequence of a walk, into `to`; `missing` where the operand is absent.
template <typename T>
inline void load_per_sequence(const Operand& x, const SequenceWalk& walk, T missing, T* to) {
  if (x.data == nullptr) {
    std::fill(to, to + walk.count, missing);
  } else {
    convert_run(x, walk.first * x.seq_stride, x.seq_stride, walk.count, to);
  }
}

template <typename T>
inline void store_per_sequence(const T* from, const SequenceWalk& walk, const Output& y) {
  if (y.data != nullptr) store_run(from, walk.count, y, walk.first * y.seq_stride, y.seq_stride);
}

// f(run) for the runs of a walk, in scan order.
template <bool kReverse, typename F>
inline void walk_runs(const SequenceWalk& walk, const F& f) {
  const int64_t step = walk.across ? 1 : kTile, runs = (walk.length + step - 1) / step;
  for (int64_t k = 0; k < runs; ++k) {
    const int64_t start = (kReverse ? runs - 1 - k : k) * step, n = std::min(step, walk.length - start);
    f(Run{walk.first, walk.origin + start, walk.across ? walk.count : n, walk.across});
  }
}

// step(i, carry) for the positions of a run, in scan order, each with the carry of its sequence.
template <bool kReverse, typename Carry, typename Step>
FUSED_CRITIC_INLINE void walk_positions(const Run& run, Carry* carry, const Step& step) {
  if (run.across) {
    for (int64_t i = 0; i < run.n; ++i) step(i, carry[i]);
  } else {
    Carry local = carry[0];
    for (int64_t k = 0; k < run.n; ++k) step(kReverse ? run.n - 1 - k : k, local);
    carry[0] = local;
  }
}

}  // namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE
