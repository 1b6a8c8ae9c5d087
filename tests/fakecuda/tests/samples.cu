// Kernels as they occur in practice; inputs and references are in cases.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

// 0. trivial
extern "C" __global__ void vec_add(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_down_sync(0xffffffffu, v, o);
  return v;
}

// 1. block reduction with shuffles + atomicAdd, float4 loads through __ldg
extern "C" __global__ void __launch_bounds__(256) reduce_sum(const float* __restrict__ x, float* __restrict__ out, int n) {
  __shared__ float part[32];
  const float4* x4 = reinterpret_cast<const float4*>(x);
  int n4 = n >> 2;
  float s = 0.f;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n4; i += gridDim.x * blockDim.x) {
    float4 v = __ldg(x4 + i);
    s += (v.x + v.y) + (v.z + v.w);
  }
  int tail = (n4 << 2) + blockIdx.x * blockDim.x + threadIdx.x;
  if (tail < n) s += x[tail];
  s = warp_sum(s);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    s = threadIdx.x < (blockDim.x >> 5) ? part[threadIdx.x] : 0.f;
    s = warp_sum(s);
    if (threadIdx.x == 0) atomicAdd(out, s);
  }
}

// 1b. the same, but scalar strided-by-thread (uncoalesced) and a shared-memory tree
extern "C" __global__ void __launch_bounds__(256) reduce_sum_bad(const float* __restrict__ x, float* __restrict__ out, int n) {
  __shared__ float buf[256];
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  int total = gridDim.x * blockDim.x;
  int per = (n + total - 1) / total;
  float s = 0.f;
  for (int k = 0; k < per; ++k) {
    int i = t * per + k;
    if (i < n) s += x[i];
  }
  buf[threadIdx.x] = s;
  __syncthreads();
  for (int o = 128; o > 0; o >>= 1) {
    if (threadIdx.x < o) buf[threadIdx.x] += buf[threadIdx.x + o];
    __syncthreads();
  }
  if (threadIdx.x == 0) atomicAdd(out, buf[0]);
}

// 2. reverse scan of affine maps, one block per row, A_t = delta_t + c_t * A_{t+1};
//    chunks of blockDim.x steps from the end, warp shuffles + shared memory.
extern "C" __global__ void __launch_bounds__(256)
    reverse_affine_scan(const float* __restrict__ rew, const float* __restrict__ val, const float* __restrict__ done,
                        float* __restrict__ adv, int T, float gamma, float lam) {
  __shared__ float wa[32], wb[32];
  __shared__ float carry_s;
  const int row = blockIdx.x, tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, nw = blockDim.x >> 5;
  const float* r = rew + (size_t)row * T;
  const float* v = val + (size_t)row * (T + 1);
  const float* d = done + (size_t)row * T;
  float* o = adv + (size_t)row * T;
  float carry = 0.f;
  for (int base = 0; base < T; base += blockDim.x) {
    int t = T - 1 - (base + tid);
    float a = 1.f, b = 0.f;  // map x -> a*x + b
    if (t >= 0) {
      float nd = 1.f - d[t];
      a = gamma * lam * nd;
      b = r[t] + gamma * nd * v[t + 1] - v[t];
    }
#pragma unroll
    for (int k = 1; k < 32; k <<= 1) {
      float pa = __shfl_up_sync(0xffffffffu, a, k), pb = __shfl_up_sync(0xffffffffu, b, k);
      if (lane >= k) {
        b = fmaf(a, pb, b);
        a *= pa;
      }
    }
    if (lane == 31) {
      wa[warp] = a;
      wb[warp] = b;
    }
    __syncthreads();
    if (warp == 0) {
      float ca = lane < nw ? wa[lane] : 1.f, cb = lane < nw ? wb[lane] : 0.f;
#pragma unroll
      for (int k = 1; k < 32; k <<= 1) {
        float pa = __shfl_up_sync(0xffffffffu, ca, k), pb = __shfl_up_sync(0xffffffffu, cb, k);
        if (lane >= k) {
          cb = fmaf(ca, pb, cb);
          ca *= pa;
        }
      }
      if (lane < nw) {
        wa[lane] = ca;
        wb[lane] = cb;
      }
    }
    __syncthreads();
    float pre = carry;
    if (warp > 0) pre = fmaf(wa[warp - 1], carry, wb[warp - 1]);
    float res = fmaf(a, pre, b);
    if (t >= 0) o[t] = res;
    if (tid == blockDim.x - 1) carry_s = res;
    __syncthreads();
    carry = carry_s;
  }
}

// 3. sum with a clipped ratio, with bf16 128-bit loads, block reduce, last-block finish via __threadfence
__device__ unsigned int g_ticket = 0;
extern "C" __global__ void __launch_bounds__(256)
    clipped_ratio_bf16(const __nv_bfloat16* __restrict__ lp, const __nv_bfloat16* __restrict__ lp_old, const float* __restrict__ adv,
                       const uint8_t* __restrict__ mask, float* __restrict__ partial, float* __restrict__ out, int n, float eps) {
  __shared__ float ps[8], pm[8];
  __shared__ bool last;
  float s = 0.f, m = 0.f;
  int nv = n >> 3;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < nv; i += gridDim.x * blockDim.x) {
    uint4 A = __ldg(reinterpret_cast<const uint4*>(lp) + i);
    uint4 B = __ldg(reinterpret_cast<const uint4*>(lp_old) + i);
    float4 v0 = __ldg(reinterpret_cast<const float4*>(adv) + 2 * i), v1 = __ldg(reinterpret_cast<const float4*>(adv) + 2 * i + 1);
    uint2 mk = __ldg(reinterpret_cast<const uint2*>(mask) + i);
    float av[8] = {v0.x, v0.y, v0.z, v0.w, v1.x, v1.y, v1.z, v1.w};
    uint32_t aw[4] = {A.x, A.y, A.z, A.w}, bw[4] = {B.x, B.y, B.z, B.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float2 fa = __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&aw[k]));
      float2 fb = __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&bw[k]));
      float mv0 = ((k < 2 ? mk.x : mk.y) >> ((2 * k & 3) * 8)) & 0xff ? 1.f : 0.f;
      float mv1 = ((k < 2 ? mk.x : mk.y) >> (((2 * k + 1) & 3) * 8)) & 0xff ? 1.f : 0.f;
      float r0 = __expf(fa.x - fb.x), r1 = __expf(fa.y - fb.y);
      float c0 = fminf(fmaxf(r0, 1.f - eps), 1.f + eps), c1 = fminf(fmaxf(r1, 1.f - eps), 1.f + eps);
      s -= mv0 * fminf(r0 * av[2 * k], c0 * av[2 * k]) + mv1 * fminf(r1 * av[2 * k + 1], c1 * av[2 * k + 1]);
      m += mv0 + mv1;
    }
  }
  s = warp_sum(s);
  m = warp_sum(m);
  int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
  if (lane == 0) {
    ps[w] = s;
    pm[w] = m;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int k = 1; k < (int)(blockDim.x >> 5); ++k) {
      s += ps[k];
      m += pm[k];
    }
    partial[2 * blockIdx.x] = s;
    partial[2 * blockIdx.x + 1] = m;
    __threadfence();
    unsigned t = atomicAdd(&g_ticket, 1u);
    last = (t == gridDim.x - 1);
  }
  __syncthreads();
  if (last) {
    __threadfence();
    s = 0.f;
    m = 0.f;
    for (unsigned k = threadIdx.x; k < gridDim.x; k += blockDim.x) {
      s += __ldcg(&partial[2 * k]);
      m += __ldcg(&partial[2 * k + 1]);
    }
    s = warp_sum(s);
    m = warp_sum(m);
    if (lane == 0) {
      ps[w] = s;
      pm[w] = m;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int k = 1; k < (int)(blockDim.x >> 5); ++k) {
        s += ps[k];
        m += pm[k];
      }
      out[0] = s / fmaxf(m, 1.f);
      out[1] = m;
      g_ticket = 0;
    }
  }
}

// 4. backward of it: bf16 output
extern "C" __global__ void __launch_bounds__(256)
    clipped_ratio_backward_bf16(const __nv_bfloat16* __restrict__ lp, const __nv_bfloat16* __restrict__ lp_old,
                                const float* __restrict__ adv, const uint8_t* __restrict__ mask, const float* __restrict__ fwd,
                                __nv_bfloat16* __restrict__ grad, int n, float eps) {
  int i = (blockIdx.x * blockDim.x + threadIdx.x) * 2;
  if (i + 1 >= n) return;
  float inv = 1.f / fmaxf(fwd[1], 1.f);
  float2 a = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(lp + i));
  float2 b = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(lp_old + i));
  float2 v = *reinterpret_cast<const float2*>(adv + i);
  float g[2];
  float aa[2] = {a.x, a.y}, bb[2] = {b.x, b.y}, vv[2] = {v.x, v.y};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    float r = expf(aa[k] - bb[k]);
    bool clipped = (vv[k] > 0.f && r > 1.f + eps) || (vv[k] < 0.f && r < 1.f - eps);
    g[k] = (mask[i + k] && !clipped) ? -r * vv[k] * inv : 0.f;
  }
  *reinterpret_cast<__nv_bfloat162*>(grad + i) = __floats2bfloat162_rn(g[0], g[1]);
}

// 5. decoupled look-back inclusive sum (chained scan), one 64-bit word per tile: flag<<32 | float bits
extern "C" __global__ void __launch_bounds__(256)
    lookback_scan(const float* __restrict__ x, float* __restrict__ y, unsigned long long* state, unsigned int* counter, int n) {
  __shared__ float ws[8];
  __shared__ float pre_s;
  __shared__ unsigned tile_s;
  if (threadIdx.x == 0) tile_s = atomicAdd(counter, 1u);
  __syncthreads();
  unsigned tile = tile_s;
  int i = tile * blockDim.x + threadIdx.x;
  int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
  float v = i < n ? x[i] : 0.f;
#pragma unroll
  for (int k = 1; k < 32; k <<= 1) {
    float p = __shfl_up_sync(0xffffffffu, v, k);
    if (lane >= k) v += p;
  }
  if (lane == 31) ws[w] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    float tot = 0.f;
    for (int k = 0; k < 8; ++k) {
      float q = ws[k];
      ws[k] = tot;
      tot += q;
    }
    float pre = 0.f;
    volatile unsigned long long* st = state;
    if (tile == 0) {
      __threadfence();
      st[0] = (2ull << 32) | __float_as_uint(tot);
    } else {
      st[tile] = (1ull << 32) | __float_as_uint(tot);
      __threadfence();
      for (int j = (int)tile - 1; j >= 0;) {
        unsigned long long q = st[j];
        unsigned f = (unsigned)(q >> 32);
        if (f == 0) continue;
        pre += __uint_as_float((unsigned)q);
        if (f == 2) break;
        --j;
      }
      st[tile] = (2ull << 32) | __float_as_uint(pre + tot);
    }
    pre_s = pre;
  }
  __syncthreads();
  if (i < n) y[i] = v + ws[w] + pre_s;
}

// 6. fp16 and vote/match/ballot helpers
extern "C" __global__ void half_axpy(const __half* __restrict__ x, const __half* __restrict__ y, __half* __restrict__ z, float a, int n,
                                     int* count) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float v = i < n ? __half2float(x[i]) * a + __half2float(y[i]) : 0.f;
  unsigned b = __ballot_sync(0xffffffffu, v > 0.f);
  if (i < n) z[i] = __float2half_rn(v);
  if ((threadIdx.x & 31) == 0) atomicAdd(count, __popc(b));
}

// 7. dynamic shared memory
extern "C" __global__ void dyn_rev(const int* x, int* y, int n) {
  extern __shared__ int buf[];
  int t = threadIdx.x;
  if (t < n) buf[t] = x[t];
  __syncthreads();
  if (t < n) y[t] = buf[n - 1 - t];
}

// 8. deliberately broken: missing barrier (race) and out-of-bounds read
extern "C" __global__ void racy(const int* x, int* y, int n) {
  __shared__ int buf[128];
  buf[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = buf[127 - threadIdx.x];
}
extern "C" __global__ void oob(const int* x, int* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i];  // no i<n guard
}
