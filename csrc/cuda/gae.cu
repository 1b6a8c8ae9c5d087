// GAE and its adjoint: two operators of the scan kernels (scan.cuh). Formulas: math/gae.h.
//
// Bytes per token, fp32 with a 1-byte mask: forward 9 read and 8 written; the adjoint moves the gradients and flags that are given and
// the gradients that are wanted. Few long rows are read twice (the second time mostly from L2). Deterministic: the same bits on every
// run and every GPU.
#include "../math/gae.h"

#include "launch.h"
#include "scan.cuh"

namespace fused_critic::cuda {
namespace {

struct GaeScanParams {
  ScanInput rewards, values, mask, terminated, truncated, next_values;
  Operand bootstrap;
  Number gamma, lam;
  ScanOutput advantages, returns;
};

// Scanned from the last token to the first. kConstant: no mask, no flags, no next values: every step's factor is gamma lam.
template <typename T, bool kConstant>
class GaeScan {
 public:
  using Scalar = T;
  static constexpr bool kReverse = true;
  static constexpr bool kConstantFactor = kConstant;

  using Params = GaeScanParams;

  template <typename At>
  struct Raw {
    typename At::Numbers reward, value, next_value;
    typename At::Flags valid, terminated, truncated;
  };

  struct Token {
    GaeStep<T> step;
    bool valid;
  };

  __device__ __forceinline__ explicit GaeScan(const Params& p) : p_(p) {
    const double gamma = load_number(p.gamma), lam = load_number(p.lam);
    gamma_ = static_cast<T>(gamma);
    gamma_lam_ = static_cast<T>(gamma * lam);
    gamma_carried_ = !kConstant && p.next_values ? T(0) : gamma_;
  }

  template <typename At>
  __device__ __forceinline__ Raw<At> fetch(const At& at) const {
    Raw<At> raw;
    raw.reward = at.fetch(p_.rewards);
    raw.value = at.fetch(p_.values);
    if constexpr (!kConstant) {
      raw.valid = at.fetch_valid(p_.mask);
      raw.terminated = at.fetch_flags(p_.terminated);
      raw.truncated = at.fetch_flags(p_.truncated);
      raw.next_value = at.fetch_optional(p_.next_values);
    }
    return raw;
  }

  template <typename At>
  __device__ __forceinline__ void decode(const At& at, const Raw<At>& raw, Token (&tokens)[At::kTokens]) const {
    constexpr int N = At::kTokens;
    T reward[N], value[N];
    at.numbers(p_.rewards, raw.reward, reward);
    at.numbers(p_.values, raw.value, value);
    if constexpr (kConstant) {
#pragma unroll
      for (int i = 0; i < N; ++i) tokens[i] = {gae_step(reward[i], value[i], false), true};
    } else {
      if (p_.next_values) {
        T next_value[N];
        at.numbers(p_.next_values, raw.next_value, next_value);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          tokens[i].step = gae_step(reward[i], value[i], next_value[i], at.test(raw.terminated, i), at.test(raw.truncated, i), gamma_);
        }
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) tokens[i].step = gae_step(reward[i], value[i], at.test(raw.terminated, i));
      }
#pragma unroll
      for (int i = 0; i < N; ++i) tokens[i].valid = at.test(raw.valid, i);
    }
  }

  __device__ __forceinline__ Affine<T> map(const Token& t) const {
    const Affine<T> m = gae_map(t.step, t.step.value, gamma_carried_, gamma_lam_);
    // Selected number by number: as a whole it becomes a branch, which diverges.
    return {t.valid ? m.a : T(1), t.valid ? m.b : T(0)};
  }

  template <typename At>
  __device__ __forceinline__ void emit(const At& at, const Token (&tokens)[At::kTokens], const T (&entering)[At::kTokens]) const {
    T advantage[At::kTokens], ret[At::kTokens];
#pragma unroll
    for (int i = 0; i < At::kTokens; ++i) {
      const T a = gae_advantage(tokens[i].step, entering[i]);
      advantage[i] = tokens[i].valid ? a : T(0);
      ret[i] = tokens[i].valid ? a + tokens[i].step.value : T(0);
    }
    at.write(p_.advantages, advantage);
    at.write(p_.returns, ret);
  }

  __device__ __forceinline__ T factor() const { return gamma_lam_; }

  __device__ __forceinline__ T initial(int64_t seq) const {
    const bool used = p_.bootstrap.data != nullptr && (kConstant || !p_.next_values);
    return used ? gamma_ * load<T>(p_.bootstrap.data, p_.bootstrap.dtype, seq * p_.bootstrap.seq_stride) : T(0);
  }

  __device__ __forceinline__ void finish(int64_t, T) const {}

 private:
  const Params p_;
  T gamma_, gamma_lam_;
  T gamma_carried_;  // the factor of V in the carry: gamma without next_values, 0 with them
};

struct GaeAdjointParams {
  ScanInput grad_advantages, grad_returns, mask, terminated, truncated;
  bool has_next_values;
  Number gamma, lam;
  ScanOutput grad_rewards, grad_values, grad_next_values;
  Output grad_bootstrap;
};

// Scanned from the first token to the last. kConstant: no mask and no flags.
template <typename T, bool kConstant>
class GaeAdjointScan {
 public:
  using Scalar = T;
  static constexpr bool kReverse = false;
  static constexpr bool kConstantFactor = kConstant;

  using Params = GaeAdjointParams;

  template <typename At>
  struct Raw {
    typename At::Numbers grad_advantage, grad_return;
    typename At::Flags valid, terminated, truncated;
  };

  struct Token {
    T grad;         // of the advantage, whether it leaves as such or within the return
    T grad_return;
    bool valid, terminated, done;
  };

  __device__ __forceinline__ explicit GaeAdjointScan(const Params& p) : p_(p) {
    const double gamma = load_number(p.gamma), lam = load_number(p.lam);
    gamma_ = static_cast<T>(gamma);
    gamma_lam_ = static_cast<T>(gamma * lam);
  }

  template <typename At>
  __device__ __forceinline__ Raw<At> fetch(const At& at) const {
    Raw<At> raw;
    raw.grad_advantage = at.fetch_optional(p_.grad_advantages);
    raw.grad_return = at.fetch_optional(p_.grad_returns);
    if constexpr (!kConstant) {
      raw.valid = at.fetch_valid(p_.mask);
      raw.terminated = at.fetch_flags(p_.terminated);
      raw.truncated = at.fetch_flags(p_.truncated);
    }
    return raw;
  }

  template <typename At>
  __device__ __forceinline__ void decode(const At& at, const Raw<At>& raw, Token (&tokens)[At::kTokens]) const {
    constexpr int N = At::kTokens;
    T grad_advantage[N] = {}, grad_return[N] = {};
    if (p_.grad_advantages) at.numbers(p_.grad_advantages, raw.grad_advantage, grad_advantage);
    if (p_.grad_returns) at.numbers(p_.grad_returns, raw.grad_return, grad_return);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      tokens[i] = {grad_advantage[i] + grad_return[i], grad_return[i], true, false, false};
      if constexpr (!kConstant) {
        tokens[i].valid = at.test(raw.valid, i);
        tokens[i].terminated = at.test(raw.terminated, i);
        tokens[i].done = tokens[i].terminated || at.test(raw.truncated, i);
      }
    }
  }

  __device__ __forceinline__ Affine<T> map(const Token& t) const {
    const Affine<T> m = gae_adjoint_map(t.grad, t.done, gamma_lam_);
    return {t.valid ? m.a : T(1), t.valid ? m.b : T(0)};
  }

  template <typename At>
  __device__ __forceinline__ void emit(const At& at, const Token (&tokens)[At::kTokens], const T (&entering)[At::kTokens]) const {
    T reward[At::kTokens], value[At::kTokens], next_value[At::kTokens];
#pragma unroll
    for (int i = 0; i < At::kTokens; ++i) {
      const Token& t = tokens[i];
      const T p = t.grad + gamma_lam_ * entering[i];
      const T from_before = p_.has_next_values ? T(0) : gamma_ * entering[i];
      reward[i] = t.valid ? p : T(0);
      value[i] = t.valid ? t.grad_return - p + from_before : T(0);
      next_value[i] = t.valid && !t.terminated ? gamma_ * p : T(0);
    }
    if (p_.grad_rewards) at.write(p_.grad_rewards, reward);
    if (p_.grad_values) at.write(p_.grad_values, value);
    if (p_.grad_next_values) at.write(p_.grad_next_values, next_value);
  }

  __device__ __forceinline__ T factor() const { return gamma_lam_; }
  __device__ __forceinline__ T initial(int64_t) const { return T(0); }

  // The carry that leaves is (1 - done) p of the last valid token; a bootstrap is used without next_values only, where done is terminated.
  __device__ __forceinline__ void finish(int64_t seq, T leaving) const {
    const Output& out = p_.grad_bootstrap;
    if (out.data != nullptr) static_cast<T*>(out.data)[seq * out.seq_stride] = p_.has_next_values ? T(0) : gamma_ * leaving;
  }

 private:
  const Params p_;
  T gamma_, gamma_lam_;
};

template <typename T>
constexpr DType accumulation_type() {
  return sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
}

struct GaeCall {
  GaeScanParams params;
  ScanPlan plan;
  bool constant;
};

template <typename T>
GaeCall prepare(const GaeParams& p) {
  const Output& reference = p.advantages;
  ScanTensors add(p.layout, reference.data, reference.dtype, reference.seq_stride, reference.time_stride, accumulation_type<T>());
  GaeCall call;
  call.params = {add.number(p.rewards), add.number(p.values), add.flag(p.mask), add.flag(p.terminated), add.flag(p.truncated),
                 add.number(p.next_values), p.bootstrap_values, p.gamma, p.lam, add.output(p.advantages), add.output(p.returns)};
  call.plan = add.plan();
  call.constant = p.mask.data == nullptr && p.terminated.data == nullptr && p.truncated.data == nullptr && p.next_values.data == nullptr;
  return call;
}

struct GaeAdjointCall {
  GaeAdjointParams params;
  ScanPlan plan;
  bool constant;
};

template <typename T>
GaeAdjointCall prepare(const GaeBackwardParams& p) {
  // Any one of the tensors that are present tells how the caller lays tokens out; outputs are never expanded.
  Operand reference = p.grad_advantages;
  for (const Output* out : {&p.grad_next_values, &p.grad_values, &p.grad_rewards}) {
    if (out->data != nullptr) reference = {out->data, out->dtype, out->seq_stride, out->time_stride};
  }
  ScanTensors add(p.layout, reference.data, reference.dtype, reference.seq_stride, reference.time_stride, accumulation_type<T>());
  GaeAdjointCall call;
  call.params = {add.number(p.grad_advantages), add.number(p.grad_returns), add.flag(p.mask), add.flag(p.terminated), add.flag(p.truncated),
                 p.has_next_values, p.gamma, p.lam, add.output(p.grad_rewards), add.output(p.grad_values), add.output(p.grad_next_values),
                 p.grad_bootstrap};
  call.plan = add.plan();
  call.constant = p.mask.data == nullptr && p.terminated.data == nullptr && p.truncated.data == nullptr;
  return call;
}

// Instantiations: for float by access, and for plain access with and without the products; for double, which serves tests of gradients,
// general access alone.
template <typename T, template <typename, bool> class Op, typename Call>
void launch(const Call& call, void* workspace, cudaStream_t stream) {
  const bool chunked = call.plan.shape == ScanShape::kChunkedRows;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (call.plan.access == Access::kPlain) {
      if (call.constant && !chunked) {
        launch_scan<Op<T, true>, Access::kPlain>(call.params, call.plan, workspace, stream);
      } else {
        launch_scan<Op<T, false>, Access::kPlain>(call.params, call.plan, workspace, stream);
      }
      return;
    }
    if (call.plan.access == Access::kRegular) {
      launch_scan<Op<T, false>, Access::kRegular>(call.params, call.plan, workspace, stream);
      return;
    }
  }
  launch_scan<Op<T, false>, Access::kGeneral>(call.params, call.plan, workspace, stream);
}

}  // namespace

template <typename T>
int64_t gae_workspace(const GaeParams& p) {
  return scan_workspace<T>(prepare<T>(p).plan);
}

template <typename T>
int64_t gae_backward_workspace(const GaeBackwardParams& p) {
  return scan_workspace<T>(prepare<T>(p).plan);
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
