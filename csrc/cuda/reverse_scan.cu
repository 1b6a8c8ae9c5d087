// The reverse scan and its adjoint: operators of the scan kernels (scan.cuh).
//
// Bytes per token, fp32 with a decay per position: 8 read and 4 written, in either direction. Few long rows are read twice (the second time
// mostly from L2). Deterministic: the same bits on every run and every GPU.
#include "launch.h"
#include "scan_call.cuh"

namespace fused_critic::cuda {
namespace {

// A decay that all positions share: a number that the host knows, or a tensor that the kernel reads.
template <typename T>
__device__ __forceinline__ T load_factor(const Number& n) {
  return static_cast<T>(load_number(n));
}

template <typename T>
struct ReverseScanOperands {
  ScanInput x, decay, mask;  // decay: absent where it is `factor`; masked positions pass the carry on unchanged
  ScanOutput y;
  Operand init;
  Number factor;
  bool shifted;
};

template <typename T>
class ReverseScan {
 public:
  using Scalar = T;
  static constexpr bool kReverse = true;
  static constexpr bool kConstantFactor = false;

  using Params = ReverseScanOperands<T>;

  // What the call has no operand for stays unset and unread.
  template <typename At>
  struct Raw {
    typename At::Numbers x, decay;
    typename At::Flags valid;
  };

  // If 0 entered the thread's first token: its y, and how much that grows with what enters.
  struct Token {
    T y, power;
  };

  __device__ __forceinline__ explicit ReverseScan(const Params& p) : p_(p), factor_(load_factor<T>(p.factor)) {}

  template <typename At>
  __device__ __forceinline__ Raw<At> fetch(const At& at) const {
    Raw<At> raw;
    raw.x = at.fetch(p_.x);
    if (p_.decay) raw.decay = at.fetch(p_.decay);
    raw.valid = at.fetch_valid(p_.mask);
    return raw;
  }

  template <typename At>
  __device__ __forceinline__ Affine<T> compose(const At& at, const Raw<At>& raw, Token (&tokens)[At::kTokens]) const {
    constexpr int N = At::kTokens;
    T x[N], decay[N];
    at.numbers(p_.x, raw.x, x);
    if (p_.decay) at.numbers(p_.decay, raw.decay, decay);
    T y = T(0), power = T(1);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int i = in_scan_order<kReverse, N>(j);
      const bool valid = at.test(raw.valid, i);
      const T factor = p_.decay ? decay[i] : factor_;
      // Selected, never multiplied: what a skipped token holds may be anything.
      y = valid ? (j == 0 ? x[i] : x[i] + factor * y) : y;
      power = valid ? power * factor : power;
      tokens[i] = {y, power};
    }
    return {power, y};
  }

  template <typename At>
  __device__ __forceinline__ void emit(const At& at, const Token (&tokens)[At::kTokens], T entering) const {
    constexpr int N = At::kTokens;
    T out[N], next = entering;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int i = in_scan_order<kReverse, N>(j);
      const T y = tokens[i].y + tokens[i].power * entering;
      out[i] = p_.shifted ? next : y;
      next = y;
    }
    at.write(p_.y, out);
  }

  __device__ __forceinline__ T initial(int64_t seq) const {
    const Operand& init = p_.init;
    return init.data != nullptr ? load<T>(init.data, init.dtype, seq * init.seq_stride) : T(0);
  }

  __device__ __forceinline__ void finish(int64_t, T) const {}

 private:
  const Params p_;
  const T factor_;
};

template <typename T>
struct ReverseScanAdjointOperands {
  ScanInput grad, decay;  // decay: absent where it is `factor`
  ScanOutput p;
  Output grad_init;
  Number factor;
};

// The carry that enters a token is decay p of the token before it, 0 at the start.
template <typename T>
class ReverseScanAdjoint {
 public:
  using Scalar = T;
  static constexpr bool kReverse = false;
  static constexpr bool kConstantFactor = false;

  using Params = ReverseScanAdjointOperands<T>;

  template <typename At>
  struct Raw {
    typename At::Numbers grad, decay;
    typename At::Flags valid;
  };

  // If 0 entered the thread's first token: its p, and how much that grows with what enters.
  struct Token {
    T p, power;
  };

  __device__ __forceinline__ explicit ReverseScanAdjoint(const Params& p) : p_(p), factor_(load_factor<T>(p.factor)) {}

  template <typename At>
  __device__ __forceinline__ Raw<At> fetch(const At& at) const {
    Raw<At> raw;
    raw.grad = at.fetch(p_.grad);
    if (p_.decay) raw.decay = at.fetch(p_.decay);
    raw.valid = at.fetch_valid(ScanInput{});
    return raw;
  }

  template <typename At>
  __device__ __forceinline__ Affine<T> compose(const At& at, const Raw<At>& raw, Token (&tokens)[At::kTokens]) const {
    constexpr int N = At::kTokens;
    T grad[N], decay[N];
    at.numbers(p_.grad, raw.grad, grad);
    if (p_.decay) at.numbers(p_.decay, raw.decay, decay);
    T carry = T(0), power = T(1);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool live = at.test(raw.valid, i);
      const T factor = p_.decay ? decay[i] : factor_;
      tokens[i] = {grad[i] + carry, power};
      carry = live ? factor * tokens[i].p : carry;
      power = live ? factor * power : power;
    }
    return {power, carry};
  }

  template <typename At>
  __device__ __forceinline__ void emit(const At& at, const Token (&tokens)[At::kTokens], T entering) const {
    if (!p_.p) return;
    constexpr int N = At::kTokens;
    T out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = tokens[i].p + tokens[i].power * entering;
    at.write(p_.p, out);
  }

  __device__ __forceinline__ T initial(int64_t) const { return T(0); }

  __device__ __forceinline__ void finish(int64_t seq, T leaving) const {
    const Output& out = p_.grad_init;
    if (out.data != nullptr) static_cast<T*>(out.data)[seq * out.seq_stride] = leaving;
  }

 private:
  const Params p_;
  const T factor_;
};

template <typename T>
ScanCall<ReverseScan<T>> prepare(const ReverseScanParams& p, const Operand& mask) {
  ScanTensors add(p.layout, p.y.data, p.y.dtype, p.y.seq_stride, p.y.time_stride, accumulation_type<T>());
  ScanCall<ReverseScan<T>> call;
  call.params = {add.number(p.x), add.number(p.decay), add.flag(mask), add.output(p.y), p.init, p.factor, p.shifted};
  call.plan = add.plan();
  return call;
}

template <typename T>
ScanCall<ReverseScanAdjoint<T>> prepare(const ReverseScanBackwardParams& p) {
  Operand reference = p.grad;
  if (p.p.data != nullptr) reference = {p.p.data, p.p.dtype, p.p.seq_stride, p.p.time_stride};
  ScanTensors add(p.layout, reference.data, reference.dtype, reference.seq_stride, reference.time_stride, accumulation_type<T>());
  ScanCall<ReverseScanAdjoint<T>> call;
  call.params = {add.number(p.grad), add.number(p.decay), add.output(p.p), p.grad_init, p.factor};
  call.plan = add.plan();
  return call;
}

// V of the next valid position, at every position.
ReverseScanParams next_values(const NextValues& p) {
  ReverseScanParams scan;  // x = V and decay = 0 at valid positions, so y is the V of the first of them
  scan.layout = p.layout;
  scan.x = p.values;
  scan.init = p.bootstrap;
  scan.shifted = true;
  scan.y = p.next;
  return scan;
}

}  // namespace

template <typename T>
int64_t reverse_scan_workspace(const ReverseScanParams& p) {
  return scan_workspace<T>(prepare<T>(p, {}).plan);
}

template <typename T>
int64_t reverse_scan_backward_workspace(const ReverseScanBackwardParams& p) {
  return scan_workspace<T>(prepare<T>(p).plan);
}

template <typename T>
int64_t next_values_workspace(const NextValues& p) {
  return scan_workspace<T>(prepare<T>(next_values(p), p.mask).plan);
}

template <typename T>
void launch_reverse_scan(const ReverseScanParams& p, void* workspace, cudaStream_t stream) {
  launch_sparsely(prepare<T>(p, {}), workspace, stream);
}

template <typename T>
void launch_reverse_scan_backward(const ReverseScanBackwardParams& p, void* workspace, cudaStream_t stream) {
  launch_sparsely(prepare<T>(p), workspace, stream);
}

template <typename T>
void launch_next_values(const NextValues& p, void* workspace, cudaStream_t stream) {
  launch_sparsely(prepare<T>(next_values(p), p.mask), workspace, stream);
}

template int64_t reverse_scan_workspace<float>(const ReverseScanParams&);
template int64_t reverse_scan_workspace<double>(const ReverseScanParams&);
template int64_t reverse_scan_backward_workspace<float>(const ReverseScanBackwardParams&);
template int64_t reverse_scan_backward_workspace<double>(const ReverseScanBackwardParams&);
template int64_t next_values_workspace<float>(const NextValues&);
template int64_t next_values_workspace<double>(const NextValues&);
template void launch_reverse_scan<float>(const ReverseScanParams&, void*, cudaStream_t);
template void launch_reverse_scan<double>(const ReverseScanParams&, void*, cudaStream_t);
template void launch_reverse_scan_backward<float>(const ReverseScanBackwardParams&, void*, cudaStream_t);
template void launch_reverse_scan_backward<double>(const ReverseScanBackwardParams&, void*, cudaStream_t);
template void launch_next_values<float>(const NextValues&, void*, cudaStream_t);
template void launch_next_values<double>(const NextValues&, void*, cudaStream_t);

}  // namespace fused_critic::cuda
