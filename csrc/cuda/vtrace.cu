// V-trace: an operator of the scan kernels (scan.cuh). Formulas: math/vtrace.h.
//
// What a token takes from the next one is gamma c a_next + gamma rho V_next. Its two coefficients are the token's own, so no single carried
// number serves both: a is carried, and V_next is an operand. Where the caller gives none, a scan before (launch_next_values) writes it.
// The policy gradient's v_next is V_next + a_next, so all three outputs come from one pass.
//
// Bytes per token, fp32 with a 1-byte mask: 17 read and 12 written; without next_values 5 read and 4 written before. Few long rows are read
// twice (the second time mostly from L2). Deterministic: the same bits on every run and every GPU.
#include "../math/vtrace.h"

#include <cmath>

#include "launch.h"
#include "scan_call.cuh"

namespace fused_critic::cuda {
namespace {

// Whether the host knows them (`factors`) or the kernel reads them.
template <typename T>
struct VTraceNumbers {
  VTraceFactors<T> factors;
  bool on_device;
  Number gamma, lam, rho_clip, c_clip, pg_rho_clip;

  VTraceNumbers() = default;
  explicit VTraceNumbers(const VTraceParams& p)
      : factors{static_cast<T>(p.gamma.value), static_cast<T>(p.lam.value), static_cast<T>(p.rho_clip.value), static_cast<T>(p.c_clip.value),
                static_cast<T>(p.pg_rho_clip.value)},
        on_device(false), gamma(p.gamma), lam(p.lam), rho_clip(p.rho_clip), c_clip(p.c_clip), pg_rho_clip(p.pg_rho_clip) {
    for (const Number* n : {&gamma, &lam, &rho_clip, &c_clip, &pg_rho_clip}) on_device = on_device || n->data != nullptr;
  }

  __device__ __forceinline__ VTraceFactors<T> load() const {
    if (!on_device) return factors;
    const auto number = [](const Number& n) { return static_cast<T>(load_number(n)); };
    return {number(gamma), number(lam), number(rho_clip), number(c_clip), number(pg_rho_clip)};
  }
};

template <typename T>
struct VTraceScanParams {
  ScanInput rewards, values, next_values, ratios, mask, terminated, truncated;
  ScanOutput vs, pg_advantages, advantages;
  VTraceNumbers<T> numbers;
  bool ratios_are_logs;
};

// Scanned from the last token to the first; the carry that enters a token is the advantage of the next valid one.
template <typename T>
class VTraceScan {
 public:
  using Scalar = T;
  static constexpr bool kReverse = true;
  static constexpr bool kConstantFactor = false;

  using Params = VTraceScanParams<T>;

  template <typename At>
  struct Raw {
    typename At::Numbers reward, value, next_value, ratio;
    typename At::Flags valid, terminated, truncated;
  };

  // The advantages if 0 entered the thread's first token, and how much they grow with what enters.
  struct Token {
    T advantage, power;
    T pg_advantage, pg_power;
    T value;
    bool valid;
  };

  __device__ __forceinline__ explicit VTraceScan(const Params& p) : p_(p), f_(p.numbers.load()) {}

  template <typename At>
  __device__ __forceinline__ Raw<At> fetch(const At& at) const {
    Raw<At> raw;
    raw.reward = at.fetch(p_.rewards);
    raw.value = at.fetch(p_.values);
    raw.next_value = at.fetch(p_.next_values);
    raw.ratio = at.fetch(p_.ratios);
    raw.valid = at.fetch_valid(p_.mask);
    raw.terminated = at.fetch_flags(p_.terminated);
    raw.truncated = at.fetch_flags(p_.truncated);
    return raw;
  }

  template <typename At>
  __device__ __forceinline__ Affine<T> compose(const At& at, const Raw<At>& raw, Token (&tokens)[At::kTokens]) const {
    constexpr int N = At::kTokens;
    T reward[N], value[N], next_value[N], ratio[N];
    at.numbers(p_.rewards, raw.reward, reward);
    at.numbers(p_.values, raw.value, value);
    at.numbers(p_.next_values, raw.next_value, next_value);
    at.numbers(p_.ratios, raw.ratio, ratio);
    T a = T(0), power = T(1);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int i = in_scan_order<kReverse, N>(j);
      const bool terminated = at.test(raw.terminated, i), done = terminated || at.test(raw.truncated, i);
      const T rho = p_.ratios_are_logs ? std::exp(ratio[i]) : ratio[i];
      const VTraceStep<T> s = vtrace_step(f_, reward[i], value[i], next_value[i], rho, terminated, done);
      Token& t = tokens[i];
      t.valid = at.test(raw.valid, i);
      t.value = value[i];
      t.pg_advantage = s.pg_base + s.pg_slope * a;
      t.pg_power = s.pg_slope * power;
      // Selected, never multiplied: what a skipped token holds may be anything.
      a = t.valid ? s.delta + s.factor * a : a;
      power = t.valid ? s.factor * power : power;
      t.advantage = a;
      t.power = power;
    }
    return {power, a};
  }

  template <typename At>
  __device__ __forceinline__ void emit(const At& at, const Token (&tokens)[At::kTokens], T entering) const {
    constexpr int N = At::kTokens;
    T vs[N], pg_advantage[N], advantage[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Token& t = tokens[i];
      const T a = t.advantage + t.power * entering;
      advantage[i] = t.valid ? a : T(0);
      vs[i] = t.valid ? a + t.value : T(0);
      pg_advantage[i] = t.valid ? t.pg_advantage + t.pg_power * entering : T(0);
    }
    at.write(p_.vs, vs);
    at.write(p_.pg_advantages, pg_advantage);
    at.write(p_.advantages, advantage);
  }

  __device__ __forceinline__ T initial(int64_t) const { return T(0); }
  __device__ __forceinline__ void finish(int64_t, T) const {}

 private:
  const Params p_;
  const VTraceFactors<T> f_;
};

template <typename T>
ScanCall<VTraceScan<T>> prepare(const VTraceParams& p) {
  ScanTensors add(p.layout, p.vs.data, p.vs.dtype, p.vs.seq_stride, p.vs.time_stride, accumulation_type<T>());
  const Output& following = p.following;
  const Operand next_values = following.data != nullptr ? Operand{following.data, following.dtype, following.seq_stride, following.time_stride} : p.next_values;
  ScanCall<VTraceScan<T>> call;
  call.params = {add.number(p.rewards), add.number(p.values), add.number(next_values), add.number(p.ratios), add.flag(p.mask), add.flag(p.terminated),
                 add.flag(p.truncated), add.output(p.vs), add.output(p.pg_advantages), add.output(p.advantages), VTraceNumbers<T>(p), p.ratios_are_logs};
  call.plan = add.plan();
  return call;
}

NextValues next_values(const VTraceParams& p) { return {p.layout, p.values, p.mask, p.bootstrap_values, p.following}; }

}  // namespace

// The launches follow each other on one stream, so they may share their scratch.
template <typename T>
int64_t vtrace_workspace(const VTraceParams& p) {
  const int64_t before = p.following.data != nullptr ? next_values_workspace<T>(next_values(p)) : 0;
  return std::max(before, scan_workspace<T>(prepare<T>(p).plan));
}

template <typename T>
void launch_vtrace(const VTraceParams& p, void* workspace, cudaStream_t stream) {
  if (p.following.data != nullptr) launch_next_values<T>(next_values(p), workspace, stream);
  launch_sparsely(prepare<T>(p), workspace, stream);
}

template int64_t vtrace_workspace<float>(const VTraceParams&);
template int64_t vtrace_workspace<double>(const VTraceParams&);
template void launch_vtrace<float>(const VTraceParams&, void*, cudaStream_t);
template void launch_vtrace<double>(const VTraceParams&, void*, cudaStream_t);

}  // namespace fused_critic::cuda
