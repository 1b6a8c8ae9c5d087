// Kernels of the sample extension, and kernels that are wrong on purpose, one for each kind of finding.
#include <cuda_bf16.h>

#include <cassert>
#include <cstdio>

#include "kernels.h"

__device__ unsigned launches_seen;  // a module-level variable
__constant__ float table[4] = {1.f, 2.f, 3.f, 4.f};

__device__ float load(const float* p) { return *p; }
__device__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ void store(float* p, float v) { *p = v; }
__device__ void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16(v); }

__global__ void add_kernel(const AddParams p) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) p.out[i] = p.a[i] + p.alpha * p.b[i];
}
void add(const AddParams& p, cudaStream_t stream) { add_kernel<<<(p.n + 255) / 256, 256, 0, stream>>>(p); }

// Sum of all elements; the block that ends last adds the partial sums.
template <class T>
__global__ void __launch_bounds__(256) sum_kernel(const T* x, float* partial, unsigned* ticket, float* out, int n) {
  __shared__ float warp[8];
  __shared__ bool last;
  float v = 0.f;
  for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) v += load(x + i);
  auto reduce = [&](float v) {
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x < 8 ? warp[threadIdx.x] : 0.f;
    if (threadIdx.x < 32)
      for (int o = 4; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
  };
  v = reduce(v);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = v;
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (last) atomicAdd(&launches_seen, 1u);
  }
  __syncthreads();
  if (!last) return;
  v = 0.f;
  for (int i = threadIdx.x; i < gridDim.x; i += 256) v += __ldcg(partial + i);
  v = reduce(v);
  if (threadIdx.x == 0) *out = v;
}
void block_sum(const void* x, float* partial, unsigned* ticket, float* out, int n, int blocks, Dtype t, cudaStream_t stream) {
  if (t == F32)
    sum_kernel<<<blocks, 256, 0, stream>>>((const float*)x, partial, ticket, out, n);
  else
    sum_kernel<<<blocks, 256, 0, stream>>>((const __nv_bfloat16*)x, partial, ticket, out, n);
}

// Inclusive scan of each row, one block per row, from the right if REVERSE; dynamic shared memory.
template <class T, bool REVERSE>
__global__ void scan_kernel(const T* x, T* y, int n) {
  extern __shared__ float buf[];
  const T* xr = x + (size_t)blockIdx.x * n;
  T* yr = y + (size_t)blockIdx.x * n;
  float carry = 0.f;
  for (int base = 0; base < n; base += blockDim.x) {
    int k = base + threadIdx.x, i = REVERSE ? n - 1 - k : k;
    float v = k < n ? load(xr + i) : 0.f;
    buf[threadIdx.x] = v;
    __syncthreads();
    for (int o = 1; o < blockDim.x; o <<= 1) {
      float u = threadIdx.x >= o ? buf[threadIdx.x - o] : 0.f;
      __syncthreads();
      buf[threadIdx.x] = v = v + u;
      __syncthreads();
    }
    if (k < n) store(yr + i, carry + v);
    carry += buf[blockDim.x - 1];
    __syncthreads();
  }
}
void scan_rows(const void* x, void* y, int rows, int n, bool reverse, Dtype t, cudaStream_t stream) {
  constexpr int block = 128;
  auto launch = [&](auto kernel, auto* in, auto* out) { kernel<<<rows, block, block * sizeof(float), stream>>>(in, out, n); };
  typedef __nv_bfloat16 B;
  if (t == F32 && reverse)
    launch(scan_kernel<float, true>, (const float*)x, (float*)y);
  else if (t == F32)
    launch(scan_kernel<float, false>, (const float*)x, (float*)y);
  else if (reverse)
    launch(scan_kernel<B, true>, (const B*)x, (B*)y);
  else
    launch(scan_kernel<B, false>, (const B*)x, (B*)y);
}

// Inclusive scan of a vector by decoupled look-back: a block spins until the one before it has published its sum. words[0] counts
// blocks, words[1 + tile] holds flag << 32 | bits of the sum up to the end of the tile.
__global__ void __launch_bounds__(128) chain_kernel(const float* x, float* y, unsigned long long* words, int n) {
  __shared__ float buf[128];
  __shared__ int tile;
  __shared__ float before;
  if (threadIdx.x == 0) tile = (int)atomicAdd(words, 1ull);
  __syncthreads();
  int i = tile * 128 + threadIdx.x;
  buf[threadIdx.x] = i < n ? x[i] : 0.f;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.f;
    if (tile > 0) {
      unsigned long long w;
      do w = *(volatile unsigned long long*)(words + tile);
      while (w >> 32 == 0);
      sum = __uint_as_float((unsigned)w);
    }
    before = sum;
    for (int k = 0; k < 128; k++) sum += buf[k];
    __threadfence();
    *(volatile unsigned long long*)(words + 1 + tile) = 1ull << 32 | __float_as_uint(sum);
  }
  __syncthreads();
  float v = before;
  for (int k = 0; k <= threadIdx.x; k++) v += buf[k];
  if (i < n) y[i] = v;
}
void chained_scan(const float* x, float* y, unsigned long long* words, int n, cudaStream_t stream) {
  chain_kernel<<<(n + 127) / 128, 128, 0, stream>>>(x, y, words, n);
}

// ---- wrong on purpose: x and y have n elements
__global__ void out_of_bounds(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i + 1];
}
__global__ void misaligned(const float* x, float* y, int n) {
  float4 v = *(const float4*)(x + 1);
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}
__global__ void race(const float* x, float* y, int n) {
  __shared__ float b[256];
  b[threadIdx.x] = x[threadIdx.x % n];
  y[threadIdx.x % n] = b[255 - threadIdx.x];  // no __syncthreads()
}
__global__ void race_in_warp(const float* x, float* y, int n) {
  __shared__ volatile float b[32];
  b[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = b[threadIdx.x ^ 1];  // no __syncwarp()
}
__global__ void uninitialised(const float* x, float* y, int n) {
  __shared__ float b[64];
  if (threadIdx.x < 63) b[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = b[threadIdx.x];
}
__global__ void wrong_mask(const float* x, float* y, int n) {
  float v = x[threadIdx.x];
  if (threadIdx.x >= 16) v += __shfl_xor_sync(0x0000ffffu, v, 1);
  y[threadIdx.x] = v;
}
__global__ void absent_lane(const float* x, float* y, int n) {
  float v = x[threadIdx.x];
  if (threadIdx.x < 16) v = __shfl_down_sync(0x0000ffffu, v, 8);
  y[threadIdx.x] = v;
}
__global__ void two_barriers(const float* x, float* y, int n) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 0;" ::: "memory");
  else
    asm volatile("bar.sync 0, 64;" ::: "memory");
  y[threadIdx.x] = x[threadIdx.x];
}
__global__ void blocks_disagree(const float* x, float* y, int n) {
  if (blockIdx.x > 0)
    asm volatile("st.volatile.global.u32 [%0], 1;" ::"l"(y + threadIdx.x) : "memory");
  else
    asm volatile("st.global.u32 [%0], 0;" ::"l"(y + threadIdx.x) : "memory");
}
__global__ void threads_disagree(const float* x, float* y, int n) { y[0] = threadIdx.x; }
__global__ void read_only_path(const float* __restrict__ x, float* __restrict__ y, int n) {  // x is y
  y[threadIdx.x] = 2.f;
  __syncthreads();
  y[threadIdx.x + 32] = __ldg(x + (threadIdx.x ^ 1));
}
__global__ void write_after_read_only(const float* __restrict__ x, float* __restrict__ y, int n) {  // x is y
  float v = __ldg(x + (threadIdx.x ^ 1));
  __syncthreads();
  y[threadIdx.x] = v + 1.f;
}
__global__ void endless(const float* x, float* y, int n) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    while (*(volatile const float*)x != -1.f) {
    }
  y[threadIdx.x] = 1.f;
}
__global__ void asserts(const float* x, float* y, int n) {
  int i = threadIdx.x;
  if (i == 1000) printf("never %f\n", x[i]);
  assert(i < n);
  y[i] = x[i];
}
__global__ void dynamic_shared(const float* x, float* y, int n) {
  extern __shared__ float d[];
  d[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = d[threadIdx.x] * table[n & 3];
}
__global__ void __launch_bounds__(64) bounded(const float* x, float* y, int n) { y[threadIdx.x % n] = x[threadIdx.x % n]; }
__global__ void many_registers(const float* x, float* y, int n) {
  float v[96];
#pragma unroll
  for (int k = 0; k < 96; k++) v[k] = *(volatile const float*)(x + (threadIdx.x + k) % n);
#pragma unroll
  for (int k = 95; k >= 0; k--) *(volatile float*)(y + (threadIdx.x + k) % n) = v[k];
}
__device__ __noinline__ float called(float v) { return v > 0.f ? v * v : called(v + 1.f); }
__global__ void calls(const float* x, float* y, int n) { y[threadIdx.x] = called(x[threadIdx.x]); }

extern "C" int fault(const char* name, const float* x, float* y, int n, cudaStream_t stream) {
  const std::string_view which = name;
  constexpr size_t large = 100 * 1024;
  if (which == "out_of_bounds") out_of_bounds<<<(n + 127) / 128, 128, 0, stream>>>(x, y, n);
  if (which == "misaligned") misaligned<<<1, 1, 0, stream>>>(x, y, n);
  if (which == "race") race<<<1, 256, 0, stream>>>(x, y, n);
  if (which == "race_in_warp") race_in_warp<<<1, 32, 0, stream>>>(x, y, n);
  if (which == "uninitialised") uninitialised<<<1, 64, 0, stream>>>(x, y, n);
  if (which == "wrong_mask") wrong_mask<<<1, 32, 0, stream>>>(x, y, n);
  if (which == "absent_lane") absent_lane<<<1, 32, 0, stream>>>(x, y, n);
  if (which == "two_barriers") two_barriers<<<1, 64, 0, stream>>>(x, y, n);
  if (which == "blocks_disagree") blocks_disagree<<<2, 32, 0, stream>>>(x, y, n);
  if (which == "threads_disagree") threads_disagree<<<1, 32, 0, stream>>>(x, y, n);
  if (which == "blocks_agree") blocks_disagree<<<1, 32, 0, stream>>>(x, y, n);
  if (which == "read_only_path") read_only_path<<<1, 32, 0, stream>>>(y, y, n);
  if (which == "write_after_read_only") write_after_read_only<<<1, 32, 0, stream>>>(y, y, n);
  if (which == "endless") endless<<<1, 64, 0, stream>>>(x, y, n);
  if (which == "asserts") asserts<<<1, n + 1, 0, stream>>>(x, y, n);
  if (which == "asserts_nothing") asserts<<<1, n, 0, stream>>>(x, y, n);
  if (which == "no_opt_in") dynamic_shared<<<1, 32, large, stream>>>(x, y, n);
  if (which == "opt_in") {
    cudaFuncSetAttribute(dynamic_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, large);
    dynamic_shared<<<1, 32, large, stream>>>(x, y, n);
  }
  if (which == "empty_grid") out_of_bounds<<<0, 128, 0, stream>>>(x, y, n);
  if (which == "large_block") out_of_bounds<<<1, 2048, 0, stream>>>(x, y, n);
  if (which == "beyond_launch_bounds") bounded<<<1, 65, 0, stream>>>(x, y, n);
  if (which == "many_registers") many_registers<<<1, 1024, 0, stream>>>(x, y, n);
  if (which == "calls") calls<<<1, 32, 0, stream>>>(x, y, n);
  if (which == "forgotten_stream") add_kernel<<<(n + 255) / 256, 256>>>(AddParams{x, x, y, 1.f, n});
  return cudaGetLastError();
}
