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

// How many of the 255 midpoints are less than x: the nearest code.
__device__ __forceinline__ int nearest(const float* midpoints, float x) {
  int at = 0;
#pragma unroll
  for (int step = 128; step > 0; step /= 2) at += midpoints[at + step - 1] < x ? step : 0;
  return at;
}

// The same with moments in 8 bits: value i is map[codes[i]] * absmax[i / 256]. Blocks of 256 threads, one for each scale.
// The first `decayed` values have weight decay; no positive v gets the code of 0.
extern "C" __global__ void adamw8(float* p, const float* g, unsigned char* m_codes, float* m_absmax, const float* m_map,
                                  const float* m_midpoints, unsigned char* v_codes, float* v_absmax, const float* v_map,
                                  const float* v_midpoints, bf16* copy, i64 n, i64 decayed, float keep, float beta1,
                                  float rest1, float beta2, float rest2, float eps, float step, float root,
                                  float grad_scale) {
  __shared__ float m_middle[255], v_middle[255];
  if (threadIdx.x < 255) m_middle[threadIdx.x] = m_midpoints[threadIdx.x], v_middle[threadIdx.x] = v_midpoints[threadIdx.x];
  const i64 i = blockIdx.x * 256LL + threadIdx.x;
  float m = 0, v = 0;
  if (i < n) {
    const float gi = g[i] * grad_scale;
    m = m_map[m_codes[i]] * m_absmax[blockIdx.x] * beta1 + gi * rest1;
    v = v_map[v_codes[i]] * v_absmax[blockIdx.x] * beta2 + gi * gi * rest2;
    const float x = p[i] * (i < decayed ? keep : 1.f) - m / (sqrtf(v) / root + eps) * step;
    p[i] = x;
    if (copy) from_float(x, copy + i);
  }
  // They wait for all threads: the scales are read, and the midpoints there.
  const float m_most = __int_as_float(block_max(magnitude(m))), v_most = __int_as_float(block_max(magnitude(v)));
  if (threadIdx.x == 0) m_absmax[blockIdx.x] = m_most, v_absmax[blockIdx.x] = v_most;
  if (i >= n) return;
  m_codes[i] = nearest(m_middle, m / (m_most > 0 ? m_most : 1.f));
  v_codes[i] = max(nearest(v_middle, v / (v_most > 0 ? v_most : 1.f)), v > 0 ? 1 : 0);
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
