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

}  // namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE
