// Weights in 4 and 8 bits, compiled for each dtype: DTYPE is float or bf16. They do what kernels/src/quant/composed.rs
// says, bit for bit: products and sums that are rounded one by one are written so.
#include "common.cuh"

typedef DTYPE T;

constexpr int W = 16 / sizeof(T);  // elements of a pack

__constant__ float NF4[16] = {-1.0f,
                              -0.6961928009986877f,
                              -0.5250730514526367f,
                              -0.39491748809814453f,
                              -0.28444138169288635f,
                              -0.18477343022823334f,
                              -0.09105003625154495f,
                              0.0f,
                              0.07958029955625534f,
                              0.16093020141124725f,
                              0.24611230194568634f,
                              0.33791524171829224f,
                              0.44070982933044434f,
                              0.5626170039176941f,
                              0.7229568362236023f,
                              1.0f};

__device__ __forceinline__ int nf4_code(float y) {
  int code = 0;
#pragma unroll
  for (int k = 0; k < 15; k++) code += y > (NF4[k] + NF4[k + 1]) / 2;
  return code;
}

// A warp takes a block of 64 values, a thread two of them.
extern "C" __global__ void nf4_quantize(const T* x, unsigned char* packed, float* absmax, i64 n) {
  const i64 block = blockIdx.x * i64(blockDim.x / 32) + threadIdx.x / 32;
  if (block * 64 >= n) return;  // the whole warp
  const i64 i = block * 64 + threadIdx.x % 32 * 2;
  const float a = i < n ? to_float(x[i]) : 0.f, b = i + 1 < n ? to_float(x[i + 1]) : 0.f;
  const float most = __int_as_float(warp_max(max(magnitude(a), magnitude(b))));
  const float inverse = 1.f / fmaxf(most, 1e-38f);
  if (threadIdx.x % 32 == 0) absmax[block] = most;
  if (i < n) packed[i / 2] = nf4_code(a * inverse) << 4 | nf4_code(b * inverse);
}

// out [rows, columns] = the weight's values from `row` and `column` on; its rows are `width` long. One block works on one
// row. The scale of block b is absmax[b], or, where `codes` is not null, map[codes[b]] * absmax[b / 256] + *offset. `wide`:
// packs of the weight lie at whole bytes within one block, and those of out at 16 bytes.
extern "C" __global__ void nf4_dequantize(const unsigned char* packed, const float* absmax, const unsigned char* codes,
                                          const float* map, const float* offset, i64 width, i64 row, i64 column, T* out,
                                          int columns, bool wide) {
  __shared__ float value[16];
  if (threadIdx.x < 16) value[threadIdx.x] = NF4[threadIdx.x];
  __syncthreads();
  auto scale = [&](i64 block) {
    return codes ? __fadd_rn(__fmul_rn(map[codes[block]], absmax[block / 256]), *offset) : absmax[block];
  };
  const i64 first = (row + blockIdx.x) * width + column;
  T* to = out + blockIdx.x * i64(columns);
  float y[W];
  for (int i = threadIdx.x * W; i < columns; i += blockDim.x * W) {
    const i64 e = first + i;
    if (wide) {
      const float s = scale(e / 64);
#pragma unroll
      for (int j = 0; j < W; j += 2) {
        const int byte = packed[(e + j) / 2];
        y[j] = value[byte >> 4] * s;
        y[j + 1] = value[byte & 15] * s;
      }
    } else {
#pragma unroll
      for (int j = 0; j < W; j++) {
        if (i + j >= columns) break;
        const int byte = packed[(e + j) / 2];
        y[j] = value[(e + j) % 2 ? byte & 15 : byte >> 4] * scale((e + j) / 64);
      }
    }
    store(to, i, columns, wide, y);
  }
}

// One block works on one row of c values.
extern "C" __global__ void int8_quantize(const T* x, signed char* q, float* absmax, int c) {
  const i64 at = blockIdx.x * i64(c);
  int most = 0;
  for (int i = threadIdx.x; i < c; i += blockDim.x) most = max(most, magnitude(to_float(x[at + i])));
  const float a = __int_as_float(block_max(most)), s = a / 127.f, divisor = s > 0.f ? s : 1.f;
  if (threadIdx.x == 0) absmax[blockIdx.x] = a;
  for (int i = threadIdx.x; i < c; i += blockDim.x)
    q[at + i] = (signed char)fminf(fmaxf(rintf(to_float(x[at + i]) / divisor), -127.f), 127.f);
}

// As nf4_dequantize; one scale a row. `wide`: packs of out lie at 16 bytes.
extern "C" __global__ void int8_dequantize(const signed char* q, const float* absmax, i64 width, i64 row, i64 column, T* out,
                                           int columns, bool wide) {
  const signed char* from = q + (row + blockIdx.x) * width + column;
  const float s = absmax[row + blockIdx.x] / 127.f;
  T* to = out + blockIdx.x * i64(columns);
  float y[W];
  for (int i = threadIdx.x * W; i < columns; i += blockDim.x * W) {
#pragma unroll
    for (int j = 0; j < W; j++) y[j] = i + j < columns ? float(from[i + j]) * s : 0.f;
    store(to, i, columns, wide, y);
  }
}
