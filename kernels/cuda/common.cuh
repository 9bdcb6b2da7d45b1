// What the kernels share: wide loads and stores, sums over a block.
//
// Kernels work on packs of elements that threads take in turn. `wide` says that every row of every tensor starts at a
// multiple of 16 bytes, so that a pack is loaded at once; otherwise its elements are taken one by one, up to the row's end.
// No kernel adds floats atomically: the same input gives the same bits.
#include <cuda_bf16.h>

typedef __nv_bfloat16 bf16;
typedef long long i64;

// The launch's dynamic shared memory. The tests' emulator (testing/emulator) has its own.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

#define INF __int_as_float(0x7f800000)
#define QNAN __int_as_float(0x7fffffff)

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T v[N];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float x, float* y) { *y = x; }
__device__ __forceinline__ void from_float(float x, bf16* y) { *y = __float2bfloat16_rn(x); }

// x = row[i .. i + N], `fill` beyond n
template <class T, int N>
__device__ __forceinline__ void load(const T* row, i64 i, i64 n, bool wide, float (&x)[N], float fill = 0.f) {
  if (wide && i + N <= n) {
    Pack<T, N> p = *reinterpret_cast<const Pack<T, N>*>(row + i);
#pragma unroll
    for (int j = 0; j < N; j++) x[j] = to_float(p.v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < N; j++) x[j] = i + j < n ? to_float(row[i + j]) : fill;
  }
}

template <class T, int N>
__device__ __forceinline__ void store(T* row, i64 i, i64 n, bool wide, const float (&x)[N]) {
  if (wide && i + N <= n) {
    Pack<T, N> p;
#pragma unroll
    for (int j = 0; j < N; j++) from_float(x[j], &p.v[j]);
    *reinterpret_cast<Pack<T, N>*>(row + i) = p;
  } else {
#pragma unroll
    for (int j = 0; j < N; j++)
      if (i + j < n) from_float(x[j], row + i + j);
  }
}

constexpr unsigned ALL = 0xffffffffu;

// The sum over the block, on every thread, in an order that depends on the block's size alone. Blocks are whole warps.
template <class X>
__device__ __forceinline__ X block_sum(X x) {
  __shared__ X part[32];
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(ALL, x, d);
  const int warps = blockDim.x / 32;
  if (warps == 1) return x;
  __syncthreads();  // `part` may still be read from the call before
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  x = int(threadIdx.x % 32) < warps ? part[threadIdx.x % 32] : X(0);
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(ALL, x, d);
  return x;
}

__device__ __forceinline__ int warp_max(int x) {
  for (int d = 16; d > 0; d /= 2) x = max(x, __shfl_xor_sync(ALL, x, d));
  return x;
}

// The largest of the block's values, none negative, on every thread.
__device__ __forceinline__ int block_max(int x) {
  __shared__ int part[32];
  x = warp_max(x);
  const int warps = blockDim.x / 32;
  if (warps == 1) return x;
  __syncthreads();  // `part` may still be read from the call before
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_max(int(threadIdx.x % 32) < warps ? part[threadIdx.x % 32] : 0);
}

// The bits of |x|, whose order as integers is that of the numbers; a NaN is above all.
__device__ __forceinline__ int magnitude(float x) { return __float_as_int(x) & 0x7fffffff; }
