// Kernels that use the instructions which ptxsim knows; their numpy references are in test_ptxsim.py.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cstdint>
#define GI (blockIdx.x * blockDim.x + threadIdx.x)
extern "C" __global__ void k_int(const int* a, const int* b, int* o, int n) {
  int i = GI;
  if (i >= n) return;
  int x = a[i], y = b[i];
  unsigned ux = x, uy = y;
  int* p = o + i * 24;
  p[0] = x / y;
  p[1] = x % y;
  p[2] = ux / uy;
  p[3] = ux % uy;
  p[4] = __popc(x);
  p[5] = __clz(x);
  p[6] = __brev(x);
  p[7] = __ffs(x);
  p[8] = __byte_perm(x, y, 0x5410);
  p[9] = __funnelshift_l(x, y, 7);
  p[10] = __funnelshift_r(x, y, y & 31);
  p[11] = __mulhi(x, y);
  p[12] = __umulhi(x, y);
  p[13] = min(x, y);
  p[14] = max(ux, uy);
  p[15] = abs(x);
  p[16] = x >> (y & 31);
  p[17] = ux >> (uy & 31);
  p[18] = x << (y & 31);
  p[19] = (x > y) ? x : y;
  p[20] = __sad(x, y, 3);
  p[21] = (int)((long long)x * y >> 13);
  p[22] = (x & 0xff) ^ (y | 0xf0);
  p[23] = ~x;
}
extern "C" __global__ void k_i64(const long long* a, const long long* b, long long* o, int n) {
  int i = GI;
  if (i >= n) return;
  long long x = a[i], y = b[i];
  long long* p = o + i * 10;
  p[0] = x / y;
  p[1] = x % y;
  p[2] = x * y;
  p[3] = (long long)((unsigned long long)x / (unsigned long long)y);
  p[4] = __popcll(x);
  p[5] = __clzll(x);
  p[6] = x >> (y & 63);
  p[7] = (long long)((unsigned long long)x >> (y & 63));
  p[8] = __mul64hi(x, y);
  p[9] = min(x, y);
}
extern "C" __global__ void k_f32(const float* a, const float* b, const float* c, float* o, int n) {
  int i = GI;
  if (i >= n) return;
  float x = a[i], y = b[i], z = c[i];
  float* p = o + i * 24;
  p[0] = fmaf(x, y, z);
  p[1] = x / y;
  p[2] = sqrtf(fabsf(x));
  p[3] = expf(x);
  p[4] = logf(fabsf(x));
  p[5] = __expf(x);
  p[6] = tanhf(x);
  p[7] = fminf(x, y);
  p[8] = fmaxf(x, y);
  p[9] = floorf(x);
  p[10] = rintf(x);
  p[11] = truncf(x);
  p[12] = __fmaf_rd(x, y, z);
  p[13] = __fadd_rz(x, y);
  p[14] = __fmul_ru(x, y);
  p[15] = __fdividef(x, y);
  p[16] = rsqrtf(fabsf(x));
  p[17] = copysignf(x, y);
  p[18] = log1pf(fabsf(x));
  p[19] = expm1f(x);
  p[20] = sinf(x);
  p[21] = powf(fabsf(x), y);
  p[22] = __saturatef(x);
  p[23] = erff(x);
}
extern "C" __global__ void k_cvt(const float* a, int* o, int n) {
  int i = GI;
  if (i >= n) return;
  float x = a[i];
  int* p = o + i * 12;
  p[0] = (int)x;
  p[1] = __float2int_rn(x);
  p[2] = __float2int_rd(x);
  p[3] = __float2int_ru(x);
  p[4] = (int)(unsigned)x;
  p[5] = (int)(signed char)(int)x;
  p[6] = __float_as_int((float)(int)(x * 1e5f));
  p[7] = __half_as_ushort(__float2half_rn(x));
  p[8] = __bfloat16_as_ushort(__float2bfloat16_rn(x));
  p[9] = __float_as_int(__half2float(__float2half_rz(x)));
  p[10] = (int)(long long)((double)x * 1e3);
  p[11] = __float_as_int((float)((double)x * 3.0));
}
extern "C" __global__ void k_half2(const __half2* a, const __half2* b, __half2* o, const __nv_bfloat162* c, const __nv_bfloat162* d,
                                   __nv_bfloat162* q, int n) {
  int i = GI;
  if (i >= n) return;
  o[3 * i] = __hadd2(a[i], b[i]);
  o[3 * i + 1] = __hmul2(a[i], b[i]);
  o[3 * i + 2] = __hfma2(a[i], b[i], a[i]);
  q[3 * i] = __hadd2(c[i], d[i]);
  q[3 * i + 1] = __hmul2(c[i], d[i]);
  q[3 * i + 2] = __hfma2(c[i], d[i], c[i]);
}
extern "C" __global__ void k_atom(const int* a, int* o, float* f, unsigned long long* u, int n) {
  __shared__ int s[4];
  if (threadIdx.x < 4) s[threadIdx.x] = 0;
  __syncthreads();
  int i = GI;
  if (i < n) {
    int x = a[i];
    atomicAdd(o, x);
    atomicMin(o + 1, x);
    atomicMax(o + 2, x);
    atomicOr(o + 3, x);
    atomicAnd(o + 4, x);
    atomicXor(o + 5, x);
    atomicAdd(f, 0.5f);
    atomicAdd(u, (unsigned long long)(unsigned)x);
    atomicInc((unsigned*)o + 6, 9u);
    atomicAdd(&s[x & 3], 1);
    int old = o[7], as;
    do {
      as = old;
      old = atomicCAS(o + 7, as, as + 2);
    } while (old != as);
    atomicExch(o + 8, 77);
  }
  __syncthreads();
  if (threadIdx.x < 4) atomicAdd(o + 9 + threadIdx.x, s[threadIdx.x]);
}
extern "C" __global__ void k_warp(const int* a, int* o, int n) {
  int i = GI;
  int x = i < n ? a[i] : 0;
  int* p = o + i * 8;
  unsigned m = 0xffffffffu;
  p[0] = __ballot_sync(m, x & 1);
  p[1] = __any_sync(m, x == 3);
  p[2] = __all_sync(m, x >= 0);
  p[3] = __match_any_sync(m, x & 3);
  p[4] = __shfl_xor_sync(m, x, 5);
  p[5] = __shfl_sync(m, x, 2, 8);
  p[6] = __reduce_add_sync(m, x);
  p[7] = __shfl_down_sync(m, x, 3, 16);
}
extern "C" __global__ void k_diverge(const int* a, int* o, int n) {  // divergent loops, switch, early return, partial shuffles
  int i = GI;
  if (i >= n) return;
  int x = a[i], r = 0;
  for (int k = 0; k < (x & 15); ++k) {
    if ((k ^ x) & 1)
      r += k * x;
    else
      r -= k;
    if (r > 100000) break;
  }
  switch (x & 7) {
    case 0:
      r += 1;
      break;
    case 1:
      r *= 3;
      break;
    case 2:
      r ^= 0x55;
      break;
    case 3:
      r -= 9;
      break;
    case 4:
      r = -r;
      break;
    case 5:
      r <<= 1;
      break;
    case 6:
      r |= 8;
      break;
    default:
      r &= 0xffff;
  }
  if (threadIdx.x & 16)
    r += __shfl_xor_sync(0xffff0000u, r, 1);
  else
    r -= __shfl_xor_sync(0x0000ffffu, r, 1);
  o[i] = r;
}
extern "C" __global__ void k_local(const int* a, int* o, int n) {
  int i = GI;
  if (i >= n) return;
  int buf[32];
  for (int k = 0; k < 32; ++k) buf[k] = a[i] * k;
  int j = a[i] & 31;
  int s = 0;
  for (int k = 0; k < 8; ++k) {
    s += buf[(j + k * 5) & 31];
    buf[(j * 3 + k) & 31] = s;
  }
  o[i] = s;
}
extern "C" __global__ void k_cnt(const int* a, int* o, int n) {
  int i = GI;
  int c = __syncthreads_count(i < n && a[i] > 0);
  int d = __syncthreads_or(i < n && a[i] == 5);
  if (threadIdx.x == 0) {
    o[2 * blockIdx.x] = c;
    o[2 * blockIdx.x + 1] = d;
  }
}
extern "C" __global__ void k_cpasync(const float4* a, float4* o, int n) {
  __shared__ float4 s[128];
  int i = GI;
  if (i < n) __pipeline_memcpy_async(&s[threadIdx.x], a + i, 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  int j = 127 - threadIdx.x;
  if ((int)(blockIdx.x * 128 + j) < n) o[blockIdx.x * 128 + j] = s[j];
}
__constant__ float ctab[4] = {1.f, 2.5f, -3.f, 0.125f};
struct P {
  int n;
  float s;
  const float* a;
  float v[3];
};
extern "C" __global__ void k_struct(P p, double* o) {
  int i = blockIdx.x * blockDim.x * blockDim.y + threadIdx.y * blockDim.x + threadIdx.x;
  if (i >= p.n) return;
  o[i] = (double)p.a[i] * p.s + ctab[i & 3] + p.v[i % 3];
}
extern "C" __global__ void k_cg(const float* a, float* o, int n) {
  namespace cg = cooperative_groups;
  auto b = cg::this_thread_block();
  auto t = cg::tiled_partition<8>(b);
  int i = GI;
  float v = i < n ? a[i] : 0.f;
  for (int k = t.size() / 2; k > 0; k /= 2) v += t.shfl_down(v, k);
  if (t.thread_rank() == 0) o[i / 8] = v;
  b.sync();
}
extern "C" __global__ void k_generic(int* g, int* o, int n) {  // pointer selected at run time: generic addressing
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x * 10;
  __syncthreads();
  int* p = (threadIdx.x & 1) ? g : s;
  o[threadIdx.x] = p[threadIdx.x ^ 2];
}
extern "C" __global__ void k_dead(int* o) {
  if (threadIdx.x < 32) {
    while (atomicAdd(o, 0) == 0) {
    }
  }
  __syncthreads();
}
extern "C" __global__ void k_div_bar(int* o) {
  if (threadIdx.x & 1) asm volatile("bar.sync 1, 64;");
  o[threadIdx.x] = 1;
}
extern "C" __global__ void k_badmask(int* o) {
  int v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_down_sync(0x0000ffffu, v, 8);
  o[threadIdx.x] = v;
}
extern "C" __global__ void k_bank(const float* a, float* o) {
  __shared__ float s[32 * 32];
  int t = threadIdx.x;
  for (int k = 0; k < 32; ++k) s[k * 32 + t] = a[k * 32 + t];
  __syncwarp();
  for (int k = 0; k < 32; ++k) o[t * 32 + k] = s[t * 32 + k];
}
extern "C" __global__ void k_nosyncwarp(const int* a, int* o) {
  __shared__ volatile int s[32];
  s[threadIdx.x] = a[threadIdx.x];
  o[threadIdx.x] = s[threadIdx.x ^ 1];
}
extern "C" __global__ void k_uninit(int* o) {
  __shared__ int s[64];
  if (threadIdx.x < 63) s[threadIdx.x] = 1;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void k_misalign(const float* a, float* o) {
  float2 v = *reinterpret_cast<const float2*>(a + 2 * threadIdx.x + 1);
  o[threadIdx.x] = v.x + v.y;
}

extern "C" __global__ void k_ncwrite(const float* __restrict__ a, float* __restrict__ o, int n) {
  o[threadIdx.x] = 2.f;
  __syncthreads();
  o[threadIdx.x + 64] = __ldg(a + (threadIdx.x ^ 1));
}
extern "C" __global__ void k_gww(int* o) { o[threadIdx.x] = blockIdx.x; }
extern "C" __global__ void k_gww1(int* o) { o[0] = threadIdx.x; }
