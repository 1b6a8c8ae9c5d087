#pragma once
#include <cuda_runtime.h>

#include <string_view>

struct AddParams {
  const float* a;
  const float* b;
  float* out;
  float alpha;
  int n;
};
enum Dtype { F32, BF16 };
void add(const AddParams& p, cudaStream_t stream);
void block_sum(const void* x, float* partial, unsigned* ticket, float* out, int n, int blocks, Dtype t, cudaStream_t stream);
void scan_rows(const void* x, void* y, int rows, int n, bool reverse, Dtype t, cudaStream_t stream);
void chained_scan(const float* x, float* y, unsigned long long* words, int n, cudaStream_t stream);
// Launches one of the faulty kernels; returns the runtime's error.
extern "C" int fault(const char* name, const float* x, float* y, int n, cudaStream_t stream);
