// Kernels of the optimizer, in float; over packs of four elements of flat tensors.
#include "common.cuh"

// PyTorch's AdamW on p, m, v; `copy` (bf16), unless null, receives the new p. keep = 1 - lr * decay,
// step = lr / (1 - beta1^t), root = sqrt(1 - beta2^t).
extern "C" __global__ void adamw(float* p, const float* g, float* m, float* v, bf16* copy, i64 n, float keep, float beta1,
                                 float rest1, float beta2, float rest2, float eps, float step, float root,
                                 float grad_scale, bool wide) {
  const i64 i = (blockIdx.x * i64(blockDim.x) + threadIdx.x) * 4;
  if (i >= n) return;
  float x[4], d[4], a[4], b[4];
  load(p, i, n, wide, x);
  load(g, i, n, wide, d);
  load(m, i, n, wide, a);
  load(v, i, n, wide, b);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const float gi = d[j] * grad_scale;
    a[j] = a[j] * beta1 + gi * rest1;
    b[j] = b[j] * beta2 + gi * gi * rest2;
    x[j] = x[j] * keep - a[j] / (sqrtf(b[j]) / root + eps) * step;
  }
  store(p, i, n, wide, x);
  store(m, i, n, wide, a);
  store(v, i, n, wide, b);
  if (copy) store(copy, i, n, wide, x);
}

// out[slot] for every block: the sum of squares of its share, in float64. Then add_doubles, in one block.
extern "C" __global__ void sum_squares(const float* x, double* out, i64 n, bool wide) {
  double sum = 0;
  float a[4];
  for (i64 i = (blockIdx.x * i64(blockDim.x) + threadIdx.x) * 4; i < n; i += gridDim.x * i64(blockDim.x) * 4) {
    load(x, i, n, wide, a);
#pragma unroll
    for (int j = 0; j < 4; j++) sum += double(a[j]) * a[j];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// *out = the sum of x[0 .. n]
extern "C" __global__ void add_doubles(const double* x, double* out, int n) {
  double sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = sum;
}
