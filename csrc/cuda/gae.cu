// GAE and its adjoint: two operators of the scan kernels (scan.cuh). Formulas: math/gae.h.
//
// Bytes per token, fp32 with a 1-byte mask: forward 9 read and 8 written; the adjoint moves the gradients and flags that are given and
// the gradients that are wanted. Few long rows are read twice (the second time mostly from L2). Deterministic: the same bits on every
// run and every GPU.
#include "../math/gae.h"

#include <type_traits>

#include "launch.h"
#include "scan.cuh"

namespace fused_critic::cuda {
namespace {

// gamma and the lambdas: their factors if the host knows all of them, else the tensors, which the kernel reads.
template <typename T>
struct Discount {
  GaeFactors<T, Pair<T>> factors;
  FactorPowers<T> powers, returns_powers;
  bool on_device, has_next_values;
  Number gamma, lam, returns_lam;

  Discount() = default;
  template <typename Params>
  Discount(const Params& p, bool has_next_values)
      : factors(gae_factors<T, Pair<T>>(p.gamma.value, p.lam.value, p.returns_lam.value)),
        powers(factor_powers<T>(p.gamma.value * p.lam.value)), returns_powers(factor_powers<T>(p.gamma.value * p.returns_lam.value)),
        on_device(p.gamma.data != nullptr || p.lam.data != nullptr || p.returns_lam.data != nullptr), has_next_values(has_next_values),
        gamma(p.gamma), lam(p.lam), returns_lam(p.returns_lam) {}

  // C: T, or Pair<T> with returns_lam.
  template <typename C>
  __device__ __forceinline__ GaeFactors<T, C> load(int64_t seq) const {
    constexpr bool kPair = !std::is_same_v<C, T>;
    if (on_device) return gae_factors<T, C>(load_number(gamma, seq), load_number(lam, seq), kPair ? load_number(returns_lam, seq) : 0);
    if constexpr (kPair) {
      return factors;
    } else {
      return {factors.gamma, factors.drift, factors.rest.first, factors.gamma_lam.first};
    }
  }

  // Of gamma times lambda.
  template <typename C>
  __device__ __forceinline__ FactorPowers<C> load_powers(int64_t seq) const {
    const auto powers_of = [&](const FactorPowers<T>& known, const Number& lambda) {
      return on_device ? factor_powers<T>(load_number(gamma, seq) * load_number(lambda, seq)) : known;
    };
    if constexpr (std::is_same_v<C, T>) {
      return powers_of(powers, lam);
    } else {
      return pair_of(powers_of(powers, lam), powers_of(returns_powers, returns_lam));
    }
  }
};

// What changes a step. kAll: any of terminated, truncated and next_values; kModes: those, and what masked tokens are is decided at run time.
enum class Ends { kNone, kTerminated, kAll, kModes };

inline Ends ends_of(bool terminated, bool others, bool modes) {
  if (modes) return Ends::kModes;
  return others ? Ends::kAll : (terminated ? Ends::kTerminated : Ends::kNone);
}

// Kernels for regular access have no code for kModes, with which they would spill registers on some architectures; such calls go the general way.
template <typename At>
constexpr bool kHasModes = At::kTokenAccess != Access::kRegular;

inline ScanPlan plan_of(const ScanTensors& tensors, Ends ends, bool pair) {
  const ScanPlan plan = tensors.plan(pair);
  return ends == Ends::kModes && plan.access == Access::kRegular ? tensors.plan(true) : plan;
}

// A mask whose tokens are not simply skipped.
template <typename Params>
bool has_mode(const Params& p) {
  return p.mask.data != nullptr && p.mask_mode != MaskMode::kSkip;
}

template <typename T>
struct GaeScanParams {
  ScanInput rewards, values, mask, terminated, truncated, next_values;
  ScanOutput advantages, returns;
  Operand bootstrap;  // used without next_values only
  Discount<T> discount;
  Ends ends;
  MaskMode mask_mode;  // kModes only
};

// Scanned from the last token to the first. kConstant: no mask, no flags, no next values: every step's factor is gamma lam. C: T, or Pair<T>
// for the advantages' recursion and the returns' with a lambda of its own, side by side.
template <typename T, bool kConstant, typename C = T>
class GaeScan {
 public:
  using Scalar = T;
  using Carry = C;
  static constexpr bool kReverse = true;
  static constexpr bool kConstantFactor = kConstant;
  static constexpr bool kCentred = kConstant;

  using Params = GaeScanParams<T>;

  // What the call has no operand for stays unset and unread.
  template <typename At>
  struct Raw {
    typename At::Numbers reward, value, next_value;
    typename At::Flags valid, terminated, truncated;
  };

  struct Token {
    C g;                       // see math/gae.h; if x = origin entered the thread's first token,
    C power;                   // and how much it grows with x (unset if kConstant)
    T offset, centre, origin;  // V - centre, and two numbers that are the same for all tokens of a thread
    bool valid;
  };

  __device__ __forceinline__ GaeScan(const Params& p, int64_t seq)
      : p_(p), f_(p.discount.template load<C>(seq)), powers_(p.discount.template load_powers<C>(seq)) {}

  template <typename At>
  __device__ __forceinline__ Raw<At> fetch(const At& at) const {
    Raw<At> raw;
    raw.reward = at.fetch(p_.rewards);
    raw.value = at.fetch(p_.values);
    if constexpr (!kConstant) {
      raw.valid = at.fetch_valid(p_.mask);
      if (p_.ends != Ends::kNone) raw.terminated = at.fetch_flags(p_.terminated);
      if (p_.ends >= Ends::kAll) {
        raw.truncated = at.fetch_flags(p_.truncated);
        raw.next_value = at.fetch_optional(p_.next_values);
      }
    }
    return raw;
  }

  // kCentred: the value of the thread's first token; what maps count from if it is their centre; and the maps.
  template <typename At>
  __device__ __forceinline__ T centre(const At& at, const Raw<At>& raw) const {
    T value[At::kTokens];
    at.numbers(p_.values, raw.value, value);
    return value[in_scan_order<kReverse, At::kTokens>(0)];
  }

  __device__ __forceinline__ C origin(T centre) const { return C(gae_run(f_, centre, true).origin); }

  template <typename At>
  __device__ __forceinline__ Affine<C> compose(const At& at, const Raw<At>& raw, T centre, Token (&tokens)[At::kTokens]) const {
    return compose_with<Ends::kNone>(at, raw, centre, tokens);
  }

  // Not kCentred: each thread has a centre of its own.
  template <typename At>
  __device__ __forceinline__ Affine<C> compose(const At& at, const Raw<At>& raw, Token (&tokens)[At::kTokens]) const {
    const T none = T(0);
    if constexpr (!std::is_same_v<C, T>) {
      return compose_with<Ends::kModes>(at, raw, none, tokens);
    } else {
      if (p_.ends == Ends::kNone) return compose_with<Ends::kNone>(at, raw, none, tokens);
      if (p_.ends == Ends::kTerminated) return compose_with<Ends::kTerminated>(at, raw, none, tokens);
      if (!kHasModes<At> || p_.ends == Ends::kAll) return compose_with<Ends::kAll>(at, raw, none, tokens);
      if constexpr (kHasModes<At>) return compose_with<Ends::kModes>(at, raw, none, tokens);
    }
  }

  template <typename At>
  __device__ __forceinline__ void emit(const At& at, const Token (&tokens)[At::kTokens], C x) const {
    using std::fma;
    constexpr int N = At::kTokens;
    T advantage[N], ret[N];
    if constexpr (!kConstant) x = x - C(tokens[0].origin);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int i = in_scan_order<kReverse, N>(j);
      const Token& t = tokens[i];
      C g = t.g;
      if constexpr (kConstant) {
        if (j > 0 && j % kVec == 0) x = x * powers_.packs[0];
        g = fma(powers_.tokens[j % kVec], x, g);
      } else {
        g = fma(t.power, x, g);
      }
      advantage[i] = t.valid ? first_of(g) - t.offset : T(0);
      ret[i] = t.valid ? second_of(g) + t.centre : T(0);
    }
    at.write(p_.advantages, advantage);
    at.write(p_.returns, ret);
  }

  __device__ __forceinline__ const FactorPowers<C>& powers() const { return powers_; }

  __device__ __forceinline__ C initial(int64_t seq) const {
    const Operand& bootstrap = p_.bootstrap;
    return C(bootstrap.data != nullptr ? f_.gamma * load<T>(bootstrap.data, bootstrap.dtype, seq * bootstrap.seq_stride) : T(0));
  }

  __device__ __forceinline__ void finish(int64_t, C) const {}

 private:
  template <Ends kEnds, typename At>
  __device__ __forceinline__ Affine<C> compose_with(const At& at, const Raw<At>& raw, T centre, Token (&tokens)[At::kTokens]) const {
    using std::fma;
    constexpr int N = At::kTokens;
    constexpr bool kModes = kEnds == Ends::kModes;
    T reward[N], value[N], next_value[N];
    at.numbers(p_.rewards, raw.reward, reward);
    at.numbers(p_.values, raw.value, value);
    if constexpr (kEnds >= Ends::kAll) at.numbers(p_.next_values, raw.next_value, next_value);
#pragma unroll
    for (int i = 0; i < N; ++i) tokens[i].valid = kConstant || at.test(raw.valid, i);
    if constexpr (!kConstant) {
      // The first valid token's value; selected, as all that follows, and never multiplied: what a skipped token holds may be anything.
#pragma unroll
      for (int j = N - 1; j >= 0; --j) {
        const int i = in_scan_order<kReverse, N>(j);
        centre = tokens[i].valid ? value[i] : centre;
      }
    }
    // Combined by & and |: the modes are the same for all threads, but a branch for each token would cost more than the products.
    const bool zero = kModes && p_.mask_mode == MaskMode::kZero, reset = kModes && p_.mask_mode == MaskMode::kReset;
    // The next value is that of the next valid token, if next_values do not say otherwise.
    const bool follows = kEnds < Ends::kAll || !p_.discount.has_next_values;
    const GaeRun<T, C> run = gae_run(f_, centre, follows);
    C g = C(0), rest_next = C(0);  // rest_next: rest (V_next - c)
    // The power at this token is before * ahead[0], and before * ahead[n] after n steps more of its pack.
    C before = C(1), ahead[kVec + 1];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int i = in_scan_order<kReverse, N>(j);
      Token& t = tokens[i];
      T r = reward[i], v = value[i];
      bool step = t.valid, cut = false;
      if constexpr (kModes) {
        r = t.valid ? r : T(0);
        v = t.valid ? v : T(0);
        step = t.valid | (zero & at.live(i));
        cut = reset & !t.valid & at.live(i);
      }
      if constexpr (kEnds != Ends::kNone) {
        const bool terminated = step && at.test(raw.terminated, i);
        bool done = terminated || cut;
        if constexpr (kEnds >= Ends::kAll) {
          done = done || (step && at.test(raw.truncated, i));
          r += terminated || follows || (kModes && !t.valid) ? T(0) : f_.gamma * next_value[i];
        }
        rest_next = done ? C(-run.origin) : rest_next;
        g = done ? C(0) : g;
        before = done ? C(0) : before;
      }
      if constexpr (!kConstant) {
        if (j % kVec == 0) {
          if (j > 0) before = before * ahead[0];
#pragma unroll
          for (int n = 0; n <= kVec; ++n) ahead[n] = n < kVec ? powers_.tokens[n] : powers_.packs[0];
        }
        t.power = before * ahead[0];
#pragma unroll
        for (int n = 0; n < kVec - j % kVec; ++n) ahead[n] = step ? ahead[n + 1] : ahead[n];
      }
      t.offset = v - run.centre;
      t.centre = run.centre;
      t.origin = run.origin;
      const C next = fma(f_.gamma_lam, g, C(r - run.drop) + rest_next);
      const C rest = run.rest * C(t.offset);
      if constexpr (kConstant) {
        g = next;
        rest_next = rest;
      } else {
        g = step ? next : g;
        rest_next = step ? rest : rest_next;
      }
      t.g = g;
    }
    const C leaving = fma(f_.gamma_lam, g, rest_next);
    if constexpr (kConstant) {
      return {C(1), leaving};  // the factor is known to whoever composes the map
    } else {
      return counted_from_zero(Affine<C>{before * ahead[0], leaving}, C(run.origin));
    }
  }

  const Params p_;
  const GaeFactors<T, C> f_;
  const FactorPowers<C> powers_;  // of gamma lam
};

template <typename T>
struct GaeAdjointParams {
  ScanInput grad_advantages, grad_returns, mask, terminated, truncated;
  ScanOutput grad_rewards, grad_values, grad_next_values;
  Output grad_bootstrap;
  Discount<T> discount;
  Ends ends;
  MaskMode mask_mode;  // kModes only
};

// Scanned from the first token to the last. kConstant: no mask and no flags. C: T, or Pair<T> for the advantages' adjoint and the returns' with
// a lambda of its own, side by side.
template <typename T, bool kConstant, typename C = T>
class GaeAdjointScan {
 public:
  using Scalar = T;
  using Carry = C;
  static constexpr bool kReverse = false;
  static constexpr bool kConstantFactor = kConstant;

  using Params = GaeAdjointParams<T>;

  // What the call has no operand for stays unset and unread.
  template <typename At>
  struct Raw {
    typename At::Numbers grad_advantage, grad_return;
    typename At::Flags valid, terminated, truncated;
  };

  struct Token {
    C p;      // if q = 0 entered the thread's first token,
    C power;  // and how much it grows with that q (unset if kConstant). A skipped token's p is the q that passes it.
    T grad_return;
    bool valid, terminated, done;
  };

  __device__ __forceinline__ GaeAdjointScan(const Params& p, int64_t seq)
      : p_(p), f_(p.discount.template load<C>(seq)), powers_(p.discount.template load_powers<C>(seq)) {}

  template <typename At>
  __device__ __forceinline__ Raw<At> fetch(const At& at) const {
    Raw<At> raw;
    raw.grad_advantage = at.fetch_optional(p_.grad_advantages);
    raw.grad_return = at.fetch_optional(p_.grad_returns);
    if constexpr (!kConstant) {
      raw.valid = at.fetch_valid(p_.mask);
      if (p_.ends != Ends::kNone) {
        raw.terminated = at.fetch_flags(p_.terminated);
        raw.truncated = at.fetch_flags(p_.truncated);
      }
    }
    return raw;
  }

  template <typename At>
  __device__ __forceinline__ Affine<C> compose(const At& at, const Raw<At>& raw, Token (&tokens)[At::kTokens]) const {
    if constexpr (!std::is_same_v<C, T>) {
      return compose_with<Ends::kModes>(at, raw, tokens);
    } else {
      if (kConstant || p_.ends == Ends::kNone) return compose_with<Ends::kNone>(at, raw, tokens);
      if (!kHasModes<At> || p_.ends != Ends::kModes) return compose_with<Ends::kAll>(at, raw, tokens);
      if constexpr (kHasModes<At>) return compose_with<Ends::kModes>(at, raw, tokens);
    }
  }

  template <typename At>
  __device__ __forceinline__ void emit(const At& at, const Token (&tokens)[At::kTokens], C q) const {
    constexpr int N = At::kTokens;
    T reward[N], value[N], next_value[N];
    const T gamma_carried = p_.discount.has_next_values ? T(0) : f_.gamma;
    C entered = kConstant ? f_.gamma_lam * q : q;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Token& t = tokens[i];
      C p = t.p;
      if constexpr (kConstant) {
        if (i > 0 && i % kVec == 0) entered = entered * powers_.packs[0];
        p = p + powers_.tokens[i % kVec] * entered;
      } else {
        p = p + t.power * entered;
      }
      const T v = (t.grad_return - total(p)) + gamma_carried * total(q);
      reward[i] = t.valid ? total(p) : T(0);
      value[i] = t.valid ? v : T(0);
      next_value[i] = t.valid && !t.terminated ? f_.gamma * total(p) : T(0);
      q = t.done ? C(0) : p;
    }
    if (p_.grad_rewards) at.write(p_.grad_rewards, reward);
    if (p_.grad_values) at.write(p_.grad_values, value);
    if (p_.grad_next_values) at.write(p_.grad_next_values, next_value);
  }

  __device__ __forceinline__ const FactorPowers<C>& powers() const { return powers_; }
  __device__ __forceinline__ C initial(int64_t) const { return C(0); }

  // The carry that leaves is (1 - done) p of the last token; a bootstrap is used without next_values only, where done is terminated.
  __device__ __forceinline__ void finish(int64_t seq, C leaving) const {
    const Output& out = p_.grad_bootstrap;
    if (out.data != nullptr) static_cast<T*>(out.data)[seq * out.seq_stride] = p_.discount.has_next_values ? T(0) : f_.gamma * total(leaving);
  }

 private:
  template <Ends kEnds, typename At>
  __device__ __forceinline__ Affine<C> compose_with(const At& at, const Raw<At>& raw, Token (&tokens)[At::kTokens]) const {
    constexpr int N = At::kTokens;
    constexpr bool kModes = kEnds == Ends::kModes;
    T grad_advantage[N] = {}, grad_return[N] = {};
    if (p_.grad_advantages) at.numbers(p_.grad_advantages, raw.grad_advantage, grad_advantage);
    if (p_.grad_returns) at.numbers(p_.grad_returns, raw.grad_return, grad_return);
    const bool zero = kModes && p_.mask_mode == MaskMode::kZero, reset = kModes && p_.mask_mode == MaskMode::kReset;
    C q = C(0), power = C(1);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Token& t = tokens[i];
      t = {both<C>(grad_advantage[i], grad_return[i]), C(0), grad_return[i], true, false, false};
      C factor = f_.gamma_lam;
      bool step = true;
      if constexpr (!kConstant) {
        t.valid = at.test(raw.valid, i);
        t.p = t.valid ? t.p : C(0);
        step = kModes ? t.valid | (zero & at.live(i)) : t.valid;
        factor = step ? factor : C(1);
      }
      if constexpr (kEnds != Ends::kNone) {
        t.terminated = step && at.test(raw.terminated, i);
        t.done = t.terminated || (step && at.test(raw.truncated, i));
      }
      if constexpr (kModes) t.done = t.done | (reset & !t.valid & at.live(i));
      if (i > 0) t.p = gae_adjoint(t.p, q, factor);
      power = power * factor;
      t.power = power;
      q = t.done ? C(0) : t.p;
      power = t.done ? C(0) : power;
    }
    return {power, q};
  }

  const Params p_;
  const GaeFactors<T, C> f_;
  const FactorPowers<C> powers_;  // of gamma lam
};

template <typename T>
constexpr DType accumulation_type() {
  return sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
}

template <typename T>
struct GaeCall {
  GaeScanParams<T> params;
  ScanPlan plan;
  bool constant, pair;
};

template <typename T>
GaeCall<T> prepare(const GaeParams& p) {
  const Output& reference = p.advantages;
  ScanTensors add(p.layout, reference.data, reference.dtype, reference.seq_stride, reference.time_stride, accumulation_type<T>());
  GaeCall<T> call;
  const bool has_next_values = p.next_values.data != nullptr;
  call.params = {add.number(p.rewards), add.number(p.values), add.flag(p.mask), add.flag(p.terminated), add.flag(p.truncated),
                 add.number(p.next_values), add.output(p.advantages), add.output(p.returns),
                 has_next_values ? Operand{} : p.bootstrap_values, Discount<T>(p, has_next_values),
                 ends_of(p.terminated.data != nullptr, has_next_values || p.truncated.data != nullptr, has_mode(p) || p.has_returns_lam),
                 p.mask_mode};
  call.pair = p.has_returns_lam;
  call.plan = plan_of(add, call.params.ends, call.pair);
  call.constant = p.mask.data == nullptr && call.params.ends == Ends::kNone;
  return call;
}

template <typename T>
struct GaeAdjointCall {
  GaeAdjointParams<T> params;
  ScanPlan plan;
  bool constant, pair;
};

template <typename T>
GaeAdjointCall<T> prepare(const GaeBackwardParams& p) {
  // Any one of the tensors that are present tells how the caller lays tokens out; outputs are never expanded.
  Operand reference = p.grad_advantages;
  for (const Output* out : {&p.grad_next_values, &p.grad_values, &p.grad_rewards}) {
    if (out->data != nullptr) reference = {out->data, out->dtype, out->seq_stride, out->time_stride};
  }
  ScanTensors add(p.layout, reference.data, reference.dtype, reference.seq_stride, reference.time_stride, accumulation_type<T>());
  GaeAdjointCall<T> call;
  call.params = {add.number(p.grad_advantages), add.number(p.grad_returns), add.flag(p.mask), add.flag(p.terminated), add.flag(p.truncated),
                 add.output(p.grad_rewards), add.output(p.grad_values), add.output(p.grad_next_values), p.grad_bootstrap,
                 Discount<T>(p, p.has_next_values),
                 ends_of(p.terminated.data != nullptr, p.truncated.data != nullptr, has_mode(p) || p.has_returns_lam), p.mask_mode};
  call.pair = p.has_returns_lam;
  call.plan = plan_of(add, call.params.ends, call.pair);
  call.constant = p.mask.data == nullptr && call.params.ends == Ends::kNone;
  return call;
}

// Instantiations: for float by access, and for plain access with and without the products; for double, which serves tests of gradients, and
// for pairs general access alone.
template <typename T, template <typename, bool, typename> class Op, typename Call>
void launch(const Call& call, void* workspace, cudaStream_t stream) {
  if (call.pair) {
    launch_scan<Op<T, false, Pair<T>>, Access::kGeneral>(call.params, call.plan, workspace, stream);
    return;
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    if (call.plan.access == Access::kPlain) {
      if (call.constant) {
        launch_scan<Op<T, true, T>, Access::kPlain>(call.params, call.plan, workspace, stream);
      } else {
        launch_scan<Op<T, false, T>, Access::kPlain>(call.params, call.plan, workspace, stream);
      }
      return;
    }
    if (call.plan.access == Access::kRegular) {
      launch_scan<Op<T, false, T>, Access::kRegular>(call.params, call.plan, workspace, stream);
      return;
    }
  }
  launch_scan<Op<T, false, T>, Access::kGeneral>(call.params, call.plan, workspace, stream);
}

template <typename T, typename Call>
int64_t workspace_of(const Call& call) {
  return call.pair ? scan_workspace<Pair<T>>(call.plan) : scan_workspace<T>(call.plan);
}

}  // namespace

template <typename T>
int64_t gae_workspace(const GaeParams& p) {
  return workspace_of<T>(prepare<T>(p));
}

template <typename T>
int64_t gae_backward_workspace(const GaeBackwardParams& p) {
  return workspace_of<T>(prepare<T>(p));
}

template <typename T>
void launch_gae(const GaeParams& p, void* workspace, cudaStream_t stream) {
  launch<T, GaeScan>(prepare<T>(p), workspace, stream);
}

template <typename T>
void launch_gae_backward(const GaeBackwardParams& p, void* workspace, cudaStream_t stream) {
  launch<T, GaeAdjointScan>(prepare<T>(p), workspace, stream);
}

template int64_t gae_workspace<float>(const GaeParams&);
template int64_t gae_workspace<double>(const GaeParams&);
template int64_t gae_backward_workspace<float>(const GaeBackwardParams&);
template int64_t gae_backward_workspace<double>(const GaeBackwardParams&);
template void launch_gae<float>(const GaeParams&, void*, cudaStream_t);
template void launch_gae<double>(const GaeParams&, void*, cudaStream_t);
template void launch_gae_backward<float>(const GaeBackwardParams&, void*, cudaStream_t);
template void launch_gae_backward<double>(const GaeBackwardParams&, void*, cudaStream_t);

}  // namespace fused_critic::cuda
