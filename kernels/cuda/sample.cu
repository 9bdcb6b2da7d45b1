// The next token of each row, compiled for each dtype of the logits: DTYPE is float or bf16. Computed in float. It does what
// src/generate/sampler.rs composes: greedy, or drawn after temperature, top-k and top-p. One block of 1024 threads works on
// one row.
#include "common.cuh"

typedef DTYPE T;
typedef unsigned long long u64;

constexpr int W = 16 / sizeof(T);                 // elements of a pack
constexpr int LOW_BITS = sizeof(T) == 2 ? 16 : 0;  // bits of a float that a logit does not have
constexpr u64 GAMMA = 0x9e3779b97f4a7c15ull;

__device__ __forceinline__ u64 mix(u64 x) {  // the finalizer of splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// The number in [0, 1) for a sample's token at a position: src/random.rs's Rng, whose key up to the index is `key`.
__device__ __forceinline__ double uniform(u64 key, u64 sample, u64 position) {
  const u64 index = mix(sample ^ mix(~position));
  const u64 state = mix((key + GAMMA) ^ mix(index + GAMMA));
  return double(mix(state + GAMMA) >> 11) * 0x1p-53;
}

// Integers in the order of the floats.
__device__ __forceinline__ unsigned ordered(float x) {
  const unsigned bits = unsigned(__float_as_int(x));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The largest of the block's numbers, on every thread.
__device__ __forceinline__ float block_largest(float x) {
  __shared__ float part[32];
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, d));
  __syncthreads();  // `part` may still be read from the call before
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : -INF;
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, d));
  return x;
}

// A row's logits, of which some may not be chosen.
struct Row {
  const T* x;
  int v;
  bool wide;
  const i64* ends;  // not chosen
  int num_ends;

  __device__ __forceinline__ void get(int i, float (&a)[W]) const {
    load(x, i, v, wide, a, -INF);
    for (int e = 0; e < num_ends; e++) {
      const i64 at = ends[e] - i;
      if (at >= 0 && at < W) {
#pragma unroll
        for (int j = 0; j < W; j++) a[j] = j == at ? -INF : a[j];
      }
    }
  }
};

// The largest threshold at which `measure`, which falls as thresholds rise, is at least `goal` for the sum over the row: bit
// by bit.
template <class M>
__device__ __forceinline__ unsigned threshold(const Row& row, float goal, M measure) {
  unsigned found = 0;
  float a[W];
  for (int bit = 31; bit >= LOW_BITS; bit--) {
    const unsigned tried = found | 1u << bit;
    float sum = 0;
    for (int i = threadIdx.x * W; i < row.v; i += blockDim.x * W) {
      row.get(i, a);
#pragma unroll
      for (int j = 0; j < W; j++)
        if (i + j < row.v && ordered(a[j]) >= tried) sum += measure(a[j]);
    }
    if (block_sum(sum) >= goal) found = tried;  // the same on every thread
  }
  return found;
}

// ids[row] = the choice; table[row] = the choice again, its log-probability at temperature 1 with nothing left out, that
// under the distribution that it was drawn from (0 where temperature is 0), and the logarithm of the softmax's denominator,
// which is not finite where a logit is not. `position`: tokens of the row's completion so far; `least`: below so many, none
// of `ends` is chosen. With `next`, ids and position are what the next step begins with: position[row] goes up by one. top_k
// 0 and top_p 1 leave nothing out.
extern "C" __global__ void __launch_bounds__(1024) sample(const T* logits, const i64* sample, i64* position, const i64* least,
                                                      const i64* ends, i64* ids, float* table, u64 key, float temperature,
                                                      float top_p, int top_k, int num_ends, int v, bool next, bool wide) {
  __shared__ int chosen;
  __shared__ float sums[32];
  const i64 r = blockIdx.x;
  const bool may_end = position[r] + 1 >= least[r];
  const Row all = {logits + r * v, v, wide, ends, 0}, row = {logits + r * v, v, wide, ends, may_end ? 0 : num_ends};
  float a[W];

  // The largest logit, and the first place of the largest that may be chosen.
  float most = -INF, best = -INF;
  int place = 0x7fffffff;
  bool numbers = true;
  for (int i = threadIdx.x * W; i < v; i += blockDim.x * W) {
    all.get(i, a);
#pragma unroll
    for (int j = 0; j < W; j++) most = fmaxf(most, a[j]), numbers = numbers && a[j] == a[j];
    row.get(i, a);
#pragma unroll
    for (int j = 0; j < W; j++)
      if (i + j < v && a[j] > best) best = a[j], place = i + j;
  }
  most = block_largest(most);
  const float top = block_largest(best);
  // The first place: the largest of the places' negatives.
  const int first = 0x7fffffff - block_max(best == top ? 0x7fffffff - place : 0);

  float sum = 0;
  for (int i = threadIdx.x * W; i < v; i += blockDim.x * W) {
    all.get(i, a);
#pragma unroll
    for (int j = 0; j < W; j++) sum += i + j < v ? expf(a[j] - most) : 0.f;
  }
  const float normalizer = block_max(!numbers) ? QNAN : most + logf(block_sum(sum));

  int id = first;
  float drawn = 0;
  if (temperature > 0) {
    unsigned lowest = ordered(-INF) + 1;  // what is minus infinity is never drawn
    if (top_k > 0 && top_k < v) lowest = max(lowest, threshold(row, float(top_k), [](float) { return 1.f; }));
    auto weight = [&](float x) { return expf((x - top) / temperature); };
    auto kept_weight = [&](float x) { return ordered(x) >= lowest ? weight(x) : 0.f; };
    auto mass = [&] {
      float sum = 0;
      for (int i = threadIdx.x * W; i < v; i += blockDim.x * W) {
        row.get(i, a);
#pragma unroll
        for (int j = 0; j < W; j++) sum += i + j < v ? kept_weight(a[j]) : 0.f;
      }
      return block_sum(sum);
    };
    float total = mass();
    if (top_p < 1) {
      const unsigned nucleus = threshold(row, top_p * total, kept_weight);
      lowest = max(lowest, nucleus);
      total = mass();
    }
    // The first place at which the sum of all weights up to it is above u * total, tile by tile.
    const float goal = float(uniform(key, u64(sample[r]), u64(position[r])) * double(total));
    if (threadIdx.x == 0) chosen = -1;
    int last = -1;
    float before = 0;
    for (int tile = 0; tile < v; tile += blockDim.x * W) {
      const int i = tile + threadIdx.x * W;
      float mine = 0;
      row.get(min(i, v), a);
#pragma unroll
      for (int j = 0; j < W; j++) {
        a[j] = i + j < v ? kept_weight(a[j]) : 0.f;
        mine += a[j];
        if (a[j] > 0) last = i + j;
      }
      float up_to = mine;  // of this warp
      for (int d = 1; d < 32; d *= 2) {
        const float other = __shfl_sync(ALL, up_to, int(threadIdx.x % 32) - d);
        if (int(threadIdx.x % 32) >= d) up_to += other;
      }
      __syncthreads();  // `sums` and `chosen` may still be read from the tile before
      if (threadIdx.x % 32 == 31) sums[threadIdx.x / 32] = up_to;
      __syncthreads();
      float start = before;
      for (int w = 0; w < int(threadIdx.x / 32); w++) start += sums[w];
      float at = start + (up_to - mine);
      // Rounding may leave a thread's end below the next one's start: the first that passes wins.
      if (mine > 0 && start + up_to > goal) {
        for (int j = 0; j < W; j++) {
          at += a[j];
          if (a[j] > 0 && (at > goal || j == W - 1)) {
            atomicMax(&chosen, 0x7fffffff - (i + j));
            break;
          }
        }
      }
      __syncthreads();
      for (int w = 0; w < int(blockDim.x / 32); w++) before += sums[w];
      if (chosen >= 0) break;  // the same on every thread
    }
    // Below the sum, whatever rounding left of it, lies a place with a weight.
    const int furthest = block_max(last + 1) - 1;
    id = chosen >= 0 ? 0x7fffffff - chosen : furthest;
    if (id >= 0 && id < v) drawn = (to_float(row.x[id]) - top) / temperature - logf(total);
  }
  __syncthreads();  // position is read by all before it changes
  if (threadIdx.x == 0) {
    if (id < 0 || id >= v) id = 0;  // nothing could be chosen
    ids[r] = id;
    table[r * 4] = float(id);
    table[r * 4 + 1] = to_float(row.x[id]) - normalizer;
    table[r * 4 + 2] = drawn;
    table[r * 4 + 3] = normalizer;
    if (next) position[r] += 1;
  }
}
