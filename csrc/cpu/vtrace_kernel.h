// V-trace. Included once per instruction set (see simd.h).

namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE {

// What passes from a valid position to the one before it.
template <typename T>
struct VTraceCarry {
  T advantage, value;
};

template <typename T>
void vtrace(const VTraceParams& p, const SequenceWalk& walk) {
  alignas(64) T reward_scratch[kTile], value_scratch[kTile], next_scratch[kTile], ratio_scratch[kTile], vs[kTile], pg_advantages[kTile], advantages[kTile];
  alignas(64) uint8_t valid_scratch[kTile], terminated_scratch[kTile], truncated_scratch[kTile];
  VTraceCarry<T> carry[kTile];
  const bool has_next_values = p.next_values.data != nullptr;
  const VTraceFactors<T> factors{T(p.gamma.value), T(p.lam.value), T(p.rho_clip.value), T(p.c_clip.value), T(p.pg_rho_clip.value)};
  load_per_sequence(p.bootstrap_values, walk, T(0), value_scratch);
  for (int64_t i = 0; i < walk.count; ++i) carry[i] = {T(0), value_scratch[i]};
  walk_runs<true>(walk, [&](const Run& run) {
    const T* reward = load_run(p.rewards, run, T(0), reward_scratch);
    const T* value = load_run(p.values, run, T(0), value_scratch);
    const T* next_value = load_run(p.next_values, run, T(0), next_scratch);
    const T* ratio = load_run(p.ratios, run, T(0), ratio_scratch);
    if (p.ratios_are_logs) {
      for (int64_t i = 0; i < run.n; ++i) ratio_scratch[i] = std::exp(ratio[i]);
      ratio = ratio_scratch;
    }
    const uint8_t* valid = load_run_flags(p.mask, run, 1, valid_scratch);
    const uint8_t* terminated = load_run_flags(p.terminated, run, 0, terminated_scratch);
    const uint8_t* truncated = load_run_flags(p.truncated, run, 0, truncated_scratch);
    walk_positions<true>(run, carry, [&](int64_t i, VTraceCarry<T>& next) {
      if (valid[i] == 0) {
        vs[i] = pg_advantages[i] = advantages[i] = T(0);
        return;
      }
      const VTraceStep<T> s = vtrace_step(factors, reward[i], value[i], has_next_values ? next_value[i] : next.value, ratio[i], terminated[i] != 0,
                                          (terminated[i] | truncated[i]) != 0);
      const T advantage = s.delta + s.factor * next.advantage;
      pg_advantages[i] = s.pg_base + s.pg_slope * next.advantage;
      advantages[i] = advantage;
      vs[i] = advantage + value[i];
      next = {advantage, value[i]};
    });
    store_run(vs, run, p.vs);
    store_run(pg_advantages, run, p.pg_advantages);
    store_run(advantages, run, p.advantages);
  });
}

}  // namespace fused_critic::cpu::FUSED_CRITIC_CPU_NAMESPACE
