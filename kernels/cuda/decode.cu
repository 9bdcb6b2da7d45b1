// Attention of one more token a row over cached keys and values, compiled for each dtype: DTYPE is float or bf16. The cache
// is read once, in its own dtype, and only where a row has tokens. A row's positions are divided into chunks that lie at
// fixed places, so that a row's result does not depend on the rows beside it; decode_combine adds up what the chunks found.
#include "common.cuh"

typedef DTYPE T;

constexpr int W = 16 / sizeof(T);  // elements of a pack
constexpr int CHUNK = 128;         // positions of a chunk
constexpr int THREADS = 128;
constexpr int TILE = 4;            // queries that share a load

// The positions that row b sees, [from, at]; false where they, or its slot, are not in the cache.
__device__ __forceinline__ bool seen(const i64* slot, const i64* position, const i64* first, i64 b, i64 slots, i64 capacity,
                                     int chunks, i64* from, i64* at) {
  *at = position[b], *from = first ? first[b] : 0;
  return slot[b] >= 0 && slot[b] < slots && *from >= 0 && *from <= *at && *at < capacity && *at / CHUNK < chunks;
}

__device__ __forceinline__ float warp_sum(float x, int lanes = 32) {
  for (int d = lanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(ALL, x, d);
  return x;
}

// One block for each row, key-value head and chunk. The block whose chunk has the row's new position writes its key and
// value. partial [B, H, chunks, d]: sums of e^(s - max) v; statistics [B, H, chunks, 2]: max and the sum of e^(s - max).
// `cap`, unless 0, makes a score s cap * tanh(s / cap). Shared memory: group * (d + CHUNK) + THREADS * TILE * W floats.
extern "C" __global__ void __launch_bounds__(128) decode_attention(const T* qkv, T* keys, T* values, const i64* slot,
                                                               const i64* position, const i64* first, float* partial,
                                                               float* statistics, i64 slots, i64 capacity, int heads,
                                                               int kv_heads, int d, int chunks, float scale, float cap,
                                                               bool wide) {
  const int chunk = blockIdx.x % chunks, kv = blockIdx.x / chunks % kv_heads, group = heads / kv_heads;
  const i64 b = blockIdx.x / chunks / kv_heads;
  i64 from, at;
  if (!seen(slot, position, first, b, slots, capacity, chunks, &from, &at)) return;
  const i64 begin = max(from, i64(chunk) * CHUNK), end = min(at + 1, i64(chunk + 1) * CHUNK);
  if (begin >= end) return;
  const int n = int(end - begin), packs = (d + W - 1) / W;
  const T* row = qkv + b * (heads + 2 * kv_heads) * i64(d);
  const i64 cache = (slot[b] * kv_heads + kv) * capacity * d;
  T* k = keys + cache;
  T* v = values + cache;
  if (end == at + 1)
    for (int i = threadIdx.x; i < d; i += THREADS) {
      k[at * d + i] = row[(heads + kv) * i64(d) + i];
      v[at * d + i] = row[(heads + kv_heads + kv) * i64(d) + i];
    }
  DYNAMIC_SHARED(float, q);  // the group's queries, scaled
  float* s = q + group * d;  // scores, [group, CHUNK]
  float* sums = s + group * CHUNK;
  for (int i = threadIdx.x; i < group * d; i += THREADS) q[i] = scale * to_float(row[kv * group * i64(d) + i]);
  __syncthreads();

  // A team of lanes takes a key.
  int lanes = 1;
  while (lanes < packs && lanes < 32) lanes *= 2;
  const int lane = threadIdx.x % lanes, team = threadIdx.x / lanes;
  float x[W];
  for (int j0 = 0; j0 < n; j0 += THREADS / lanes) {
    const int j = j0 + team;
    for (int g = 0; g < group; g += TILE) {
      float dot[TILE] = {};
      if (j < n)
        for (int p = lane; p < packs; p += lanes) {
          load(k + (begin + j) * d, p * W, d, wide, x);
#pragma unroll
          for (int t = 0; t < TILE; t++) {
            const float* y = q + (g + t) * d + p * W;
            if (g + t < group)
#pragma unroll
              for (int w = 0; w < W; w++)
                if (wide || p * W + w < d) dot[t] += x[w] * y[w];
          }
        }
#pragma unroll
      for (int t = 0; t < TILE; t++) {
        const float z = warp_sum(dot[t], lanes);
        if (lane == 0 && j < n && g + t < group) s[(g + t) * CHUNK + j] = cap > 0 ? cap * tanhf(z / cap) : z;
      }
    }
  }
  __syncthreads();

  // A warp takes a query's scores.
  for (int g = threadIdx.x / 32; g < group; g += THREADS / 32) {
    float most = -INF, sum = 0;
    for (int j = threadIdx.x % 32; j < n; j += 32) most = fmaxf(most, s[g * CHUNK + j]);
    for (int m = 16; m > 0; m /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, m));
    for (int j = threadIdx.x % 32; j < n; j += 32) sum += s[g * CHUNK + j] = expf(s[g * CHUNK + j] - most);
    sum = warp_sum(sum);
    float* mine = statistics + ((b * heads + kv * group + g) * chunks + chunk) * 2;
    if (threadIdx.x % 32 == 0) mine[0] = most, mine[1] = sum;
  }
  __syncthreads();

  // A thread takes a pack of columns, of every `rows`-th value; then those are added, in order.
  const int column = threadIdx.x % packs * W, r = threadIdx.x / packs, rows = THREADS / packs, padded = packs * W;
  for (int g = 0; g < group; g += TILE) {
    float sum[TILE][W] = {};
    if (r < rows) {
#pragma unroll 4
      for (int j = r; j < n; j += rows) {
        load(v + (begin + j) * d, column, d, wide, x);
#pragma unroll
        for (int t = 0; t < TILE; t++) {
          const float p = g + t < group ? s[(g + t) * CHUNK + j] : 0.f;
#pragma unroll
          for (int w = 0; w < W; w++) sum[t][w] += p * x[w];
        }
      }
#pragma unroll
      for (int t = 0; t < TILE; t++)
#pragma unroll
        for (int w = 0; w < W; w++) sums[(r * TILE + t) * padded + column + w] = sum[t][w];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE * d; i += THREADS) {
      const int t = i / d, c = i % d;
      if (g + t >= group) break;
      float total = 0;
      for (int k = 0; k < rows; k++) total += sums[(k * TILE + t) * padded + c];
      partial[((b * heads + kv * group + g + t) * chunks + chunk) * d + c] = total;
    }
    __syncthreads();
  }
}

// out [B, H, d] from the chunks of each row and head; NaN for a row that is not in the cache.
extern "C" __global__ void decode_combine(const float* partial, const float* statistics, const i64* slot, const i64* position,
                                          const i64* first, T* out, i64 slots, i64 capacity, int heads, int d, int chunks) {
  i64 from, at;
  const bool known = seen(slot, position, first, blockIdx.x / heads, slots, capacity, chunks, &from, &at);
  const float* stats = statistics + blockIdx.x * i64(chunks) * 2;
  const float* parts = partial + blockIdx.x * i64(chunks) * d;
  float most = -INF, total = 0;
  const int c0 = known ? int(from / CHUNK) : 0, c1 = known ? int(at / CHUNK) : -1;
  for (int c = c0; c <= c1; c++) most = fmaxf(most, stats[2 * c]);
  for (int c = c0; c <= c1; c++) total += expf(stats[2 * c] - most) * stats[2 * c + 1];
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    float sum = 0;
    for (int c = c0; c <= c1; c++) sum += expf(stats[2 * c] - most) * parts[c * i64(d) + i];
    from_float(known ? sum / total : QNAN, out + blockIdx.x * i64(d) + i);
  }
}
