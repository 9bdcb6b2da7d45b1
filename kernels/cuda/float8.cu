// bfloat16 to 8-bit floats with one scale for a tensor, as kernels/src/ops/float8.rs composes it, bit for bit.
#include "common.cuh"
#include <cuda_fp8.h>

constexpr int W = 8;      // elements of a pack
constexpr int TILE = 64;  // of a transposition

// *amax = the largest of it and the magnitudes of x [rows, columns], whose rows lie `stride` apart, as bits: their order is
// that of the numbers, and a NaN is above all. Packs of 8.
extern "C" __global__ void float8_amax(const bf16* x, int* amax, i64 rows, i64 columns, i64 stride) {
  const i64 packs = columns / W, n = rows * packs;
  int most = 0;
  float a[W];
  for (i64 i = blockIdx.x * i64(blockDim.x) + threadIdx.x; i < n; i += gridDim.x * i64(blockDim.x)) {
    load(x + i / packs * stride, i % packs * W, columns, true, a);
#pragma unroll
    for (int j = 0; j < W; j++) most = max(most, magnitude(a[j]));
  }
  most = block_max(most);
  if (threadIdx.x == 0) atomicMax(amax, most);  // a maximum is the same in any order
}

__device__ __forceinline__ float factor(int amax, float largest) {
  const float a = __int_as_float(amax);
  return largest / (a > 1e-12f || a != a ? a : 1e-12f);
}

__device__ __forceinline__ unsigned char to_float8(float x, bool e5m2) {
  return e5m2 ? __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2) : __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

// Writes a block's tile, transposed, to out [columns, rows].
__device__ __forceinline__ void store_transposed(const unsigned char (*tile)[TILE + 16], unsigned char* out, i64 row0, i64 column0,
                                                 i64 rows, i64 columns) {
  for (int i = threadIdx.x; i < TILE * TILE / 16; i += blockDim.x) {
    const int c = i / (TILE / 16), r = i % (TILE / 16) * 16;
    if (column0 + c >= columns || row0 + r >= rows) continue;
    *reinterpret_cast<Pack<unsigned char, 16>*>(out + (column0 + c) * rows + row0 + r) =
        *reinterpret_cast<const Pack<unsigned char, 16>*>(&tile[c][r]);
  }
}

// out [columns, rows] = the transpose of x [rows, columns], of bytes. Rows and columns are multiples of 16, x is aligned to 16 bytes.
// A block of 256 threads works on a tile of 64 x 64.
extern "C" __global__ void float8_transpose(const unsigned char* x, unsigned char* out, i64 rows, i64 columns) {
  __shared__ __align__(16) unsigned char tile[TILE][TILE + 16];
  const i64 across = (columns + TILE - 1) / TILE, row0 = blockIdx.x / across * TILE, column0 = blockIdx.x % across * TILE;
  for (int i = threadIdx.x; i < TILE * TILE / 16; i += blockDim.x) {
    const int r = i / (TILE / 16), c = i % (TILE / 16) * 16;
    if (row0 + r >= rows || column0 + c >= columns) continue;
    const Pack<unsigned char, 16> y =
        *reinterpret_cast<const Pack<unsigned char, 16>*>(x + (row0 + r) * columns + column0 + c);
#pragma unroll
    for (int j = 0; j < 16; j++) tile[c + j][r] = y.v[j];
  }
  __syncthreads();
  store_transposed(tile, out, row0, column0, rows, columns);
}

// out = x * factor, in e4m3 or e5m2: [rows, columns], or, transposed, [columns, rows]; *scale = 1 / factor. Rows and columns are
// multiples of 16. A block of 256 threads works on a tile of 64 x 64.
extern "C" __global__ void float8_cast(const bf16* x, const int* amax, unsigned char* out, float* scale, i64 rows, i64 columns,
                                       i64 stride, bool transposed, bool e5m2) {
  __shared__ __align__(16) unsigned char tile[TILE][TILE + 16];
  const float f = factor(*amax, e5m2 ? 57344.f : 448.f);
  if (blockIdx.x == 0 && threadIdx.x == 0) *scale = 1.f / f;
  const i64 across = (columns + TILE - 1) / TILE, row0 = blockIdx.x / across * TILE, column0 = blockIdx.x % across * TILE;
  float a[W];
  for (int i = threadIdx.x; i < TILE * TILE / W; i += blockDim.x) {
    const int r = i / (TILE / W), c = i % (TILE / W) * W;
    if (row0 + r >= rows || column0 + c >= columns) continue;
    load(x + (row0 + r) * stride, column0 + c, columns, true, a);
    Pack<unsigned char, W> y;
#pragma unroll
    for (int j = 0; j < W; j++) y.v[j] = to_float8(a[j] * f, e5m2);
    if (transposed) {
#pragma unroll
      for (int j = 0; j < W; j++) tile[c + j][r] = y.v[j];
    } else {
      *reinterpret_cast<Pack<unsigned char, W>*>(out + (row0 + r) * columns + column0 + c) = y;
    }
  }
  if (!transposed) return;
  __syncthreads();
  store_transposed(tile, out, row0, column0, rows, columns);
}
