// Kernels over rows of activations, compiled for each dtype: DTYPE is float or bf16. Statistics, weights' gradients and
// log-probabilities are float. They do what kernels/src/ops/composed.rs says, rounding to T once. One block works on one row,
// unless said otherwise; i64 rows, int columns.
#include "common.cuh"

typedef DTYPE T;

constexpr int W = 16 / sizeof(T);  // elements of a pack

extern "C" __global__ void rms_norm(const T* x, const T* w, float offset, float eps, T* y, float* rstd, int c,
                                    bool wide) {
  const i64 at = blockIdx.x * i64(c);
  float sum = 0, a[W], b[W];
  for (int i = threadIdx.x * W; i < c; i += blockDim.x * W) {
    load(x + at, i, c, wide, a);
#pragma unroll
    for (int j = 0; j < W; j++) sum += a[j] * a[j];
  }
  const float r = 1.f / sqrtf(block_sum(sum) / c + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
  for (int i = threadIdx.x * W; i < c; i += blockDim.x * W) {
    load(x + at, i, c, wide, a);
    load(w, i, c, wide, b);
#pragma unroll
    for (int j = 0; j < W; j++) a[j] = a[j] * r * (b[j] + offset);
    store(y + at, i, c, wide, a);
  }
}

extern "C" __global__ void rms_apply(const T* x, const T* w, float offset, const float* rstd, T* y, int c, bool wide) {
  const i64 at = blockIdx.x * i64(c);
  const float r = rstd[blockIdx.x];
  float a[W], b[W];
  for (int i = threadIdx.x * W; i < c; i += blockDim.x * W) {
    load(x + at, i, c, wide, a);
    load(w, i, c, wide, b);
#pragma unroll
    for (int j = 0; j < W; j++) a[j] = a[j] * r * (b[j] + offset);  // in rms_norm's order: the same bits
    store(y + at, i, c, wide, a);
  }
}

// Block p of P takes the rows p, p + P, ...; partial[p, :] is its part of dw, kept in shared memory (c floats), where a
// thread only ever touches its own columns. `residual` may be null.
extern "C" __global__ void rms_backward(const T* dy, const T* x, const T* w, float offset, const float* rstd,
                                        const T* residual, T* dx, float* partial, i64 rows, int c, bool wide) {
  DYNAMIC_SHARED(float, dw);
  float g[W], a[W], b[W];
  for (int i = threadIdx.x * W; i < c; i += blockDim.x * W)
#pragma unroll
    for (int j = 0; j < W; j++)
      if (i + j < c) dw[i + j] = 0;
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    const i64 at = row * c;
    const float r = rstd[row];
    float sum = 0;
    for (int i = threadIdx.x * W; i < c; i += blockDim.x * W) {
      load(dy + at, i, c, wide, g);
      load(x + at, i, c, wide, a);
      load(w, i, c, wide, b);
#pragma unroll
      for (int j = 0; j < W; j++) {
        const float normed = a[j] * r;
        sum += g[j] * (b[j] + offset) * normed;
        if (i + j < c) dw[i + j] += g[j] * normed;
      }
    }
    const float mean = block_sum(sum) / c;
    for (int i = threadIdx.x * W; i < c; i += blockDim.x * W) {
      load(dy + at, i, c, wide, g);
      load(x + at, i, c, wide, a);
      load(w, i, c, wide, b);
#pragma unroll
      for (int j = 0; j < W; j++) a[j] = (g[j] * (b[j] + offset) - a[j] * r * mean) * r;
      if (residual) {
        load(residual + at, i, c, wide, g);
#pragma unroll
        for (int j = 0; j < W; j++) a[j] += g[j];
      }
      store(dx + at, i, c, wide, a);
    }
  }
  float* mine = partial + blockIdx.x * i64(c);
  for (int i = threadIdx.x * W; i < c; i += blockDim.x * W)
#pragma unroll
    for (int j = 0; j < W; j++)
      if (i + j < c) mine[i + j] = dw[i + j];
}

// dst[i] += the sum of partial[:, i], in order. Blocks of 32 columns x 8 rows.
extern "C" __global__ void add_columns(const float* partial, float* dst, int parts, int c) {
  __shared__ float sums[8][33];
  const int i = blockIdx.x * 32 + threadIdx.x;
  float sum = 0;
  if (i < c)
    for (int p = threadIdx.y; p < parts; p += 8) sum += partial[p * i64(c) + i];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= c) return;
  for (int k = 1; k < 8; k++) sum += sums[k][threadIdx.x];
  dst[i] += sum;
}

// In place, on the first `heads` heads of rows of `width` elements; half = D / 2.
extern "C" __global__ void rope(T* x, const i64* positions, const float* cos, const float* sin, int width, int heads,
                                int half, float sign, bool wide) {
  T* row = x + blockIdx.x * i64(width);
  const i64 table = positions[blockIdx.x] * half;
  const int packs = (half + W - 1) / W;
  float p[W], q[W], c[W], s[W];
  for (int k = threadIdx.x; k < heads * packs; k += blockDim.x) {
    T* first = row + (k / packs) * 2 * half;
    T* second = first + half;
    const int i = k % packs * W;
    load(first, i, half, wide, p);
    load(second, i, half, wide, q);
    load(cos + table, i, half, wide, c);
    load(sin + table, i, half, wide, s);
#pragma unroll
    for (int j = 0; j < W; j++) {
      const float a = p[j], b = q[j], si = sign * s[j];
      p[j] = a * c[j] - b * si;
      q[j] = b * c[j] + a * si;
    }
    store(first, i, half, wide, p);
    store(second, i, half, wide, q);
  }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

extern "C" __global__ void swiglu(const T* gu, T* a, int f, bool wide) {
  const T* gate = gu + blockIdx.x * 2 * i64(f);
  float g[W], u[W];
  for (int i = threadIdx.x * W; i < f; i += blockDim.x * W) {
    load(gate, i, f, wide, g);
    load(gate + f, i, f, wide, u);
#pragma unroll
    for (int j = 0; j < W; j++) u[j] *= g[j] * sigmoid(g[j]);
    store(a + blockIdx.x * i64(f), i, f, wide, u);
  }
}

// In place: gu becomes its gradient, da the activation.
extern "C" __global__ void swiglu_backward(T* gu, T* da, int f, bool wide) {
  T* gate = gu + blockIdx.x * 2 * i64(f);
  T* act = da + blockIdx.x * i64(f);
  float g[W], u[W], d[W];
  for (int i = threadIdx.x * W; i < f; i += blockDim.x * W) {
    load(gate, i, f, wide, g);
    load(gate + f, i, f, wide, u);
    load(act, i, f, wide, d);
#pragma unroll
    for (int j = 0; j < W; j++) {
      const float s = sigmoid(g[j]), silu = g[j] * s;
      g[j] = d[j] * u[j] * (s + silu * (1.f - s));
      d[j] *= silu;   // d u
      u[j] *= silu;   // the activation
    }
    store(gate, i, f, wide, g);
    store(gate + f, i, f, wide, d);
    store(act, i, f, wide, u);
  }
}

// What is known of some of a row's logits: their maximum, and the sums of e^(x - max) and of (x - max) e^(x - max).
struct Softmax {
  float max, sum, dot;

  // Measures from a larger maximum.
  __device__ __forceinline__ void raise(float to) {
    if (to == max) return;
    const float d = max - to, e = expf(d);
    dot = sum > 0 ? (dot + d * sum) * e : 0.f;  // nothing known: d is minus infinity
    sum *= e;
    max = to;
  }

  __device__ __forceinline__ void merge(Softmax o) {
    const float to = fmaxf(max, o.max);
    raise(to), o.raise(to);
    sum += o.sum, dot += o.dot;
  }
};

__device__ __forceinline__ Softmax merge_lanes(Softmax s, int lanes) {
  for (int d = lanes / 2; d > 0; d /= 2) {
    Softmax o;
    o.max = __shfl_xor_sync(ALL, s.max, d);
    o.sum = __shfl_xor_sync(ALL, s.sum, d);
    o.dot = __shfl_xor_sync(ALL, s.dot, d);
    s.merge(o);
  }
  return s;
}

// logp[row] = log softmax(logits)[label] (0 for a negative label, NaN for one beyond v); entropy, in nats, unless null. With
// coef, logits become coef (onehot - softmax). Blocks of 1024 threads; the row is read twice, the second time to be written.
extern "C" __global__ void __launch_bounds__(1024) log_softmax(T* logits, const i64* labels, const float* coef, float* logp,
                                                               float* entropy, int v, bool wide) {
  __shared__ Softmax part[32];
  T* row = logits + blockIdx.x * i64(v);
  const i64 label = labels[blockIdx.x];
  const bool known = label >= 0 && label < v;
  Softmax s = {-INF, 0, 0};
  float x[W];
  for (int i = threadIdx.x * W; i < v; i += blockDim.x * W) {
    load(row, i, v, wide, x, -INF);
    float max = x[0];
#pragma unroll
    for (int j = 1; j < W; j++) max = fmaxf(max, x[j]);
    if (max > s.max) s.raise(max);
#pragma unroll
    for (int j = 0; j < W; j++) {
      const float d = x[j] - s.max, e = x[j] == -INF ? 0.f : expf(d);
      s.sum += e;
      if (e > 0) s.dot += d * e;
    }
  }
  s = merge_lanes(s, 32);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
  __syncthreads();
  s = part[threadIdx.x % 32];
  s = merge_lanes(s, 32);
  const float log_sum = logf(s.sum);
  if (threadIdx.x == 0) {
    float p = label < 0 ? 0.f : QNAN;
    if (known) p = to_float(row[label]) - s.max - log_sum;
    logp[blockIdx.x] = p;
    if (entropy) entropy[blockIdx.x] = log_sum - s.dot / s.sum;
  }
  if (!coef) return;
  __syncthreads();  // the label's logit is read before it is written
  const float c = label < 0 ? 0.f : coef[blockIdx.x];
  const float scale = -c / s.sum;
  for (int i = threadIdx.x * W; i < v; i += blockDim.x * W) {
    load(row, i, v, wide, x);
#pragma unroll
    for (int j = 0; j < W; j++) x[j] = scale * expf(x[j] - s.max) + (i + j == label ? c : 0.f);
    store(row, i, v, wide, x);
  }
}

__device__ __forceinline__ unsigned long long mix(unsigned long long x) {  // SplitMix64's finalizer
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

__device__ __forceinline__ unsigned mix(unsigned x) {  // lowbias32 of hash-prospector
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// y = x * scale where an element's bits, a hash of (key, rows[row], first + column), are at least `threshold`, else 0.
extern "C" __global__ void dropout(const T* x, const i64* rows, T* y, unsigned long long key, unsigned threshold,
                                   float scale, unsigned first, int c, bool wide) {
  const i64 at = blockIdx.x * i64(c);
  const unsigned long long h = mix(key ^ mix((unsigned long long)rows[blockIdx.x]));
  const unsigned low = unsigned(h), high = unsigned(h >> 32);
  float a[W];
  for (int i = threadIdx.x * W; i < c; i += blockDim.x * W) {
    load(x + at, i, c, wide, a);
#pragma unroll
    for (int j = 0; j < W; j++) a[j] = mix(mix((first + unsigned(i + j)) ^ low) + high) >= threshold ? a[j] * scale : 0.f;
    store(y + at, i, c, wide, a);
  }
}

// dst += src, or = src; packs over all elements.
extern "C" __global__ void accumulate(float* dst, const T* src, i64 n, bool add, bool wide) {
  const i64 i = (blockIdx.x * i64(blockDim.x) + threadIdx.x) * W;
  if (i >= n) return;
  float x[W], y[W];
  load(src, i, n, wide, x);
  if (add) {
    load(dst, i, n, wide, y);
#pragma unroll
    for (int j = 0; j < W; j++) x[j] += y[j];
  }
  store(dst, i, n, wide, x);
}

constexpr int RUN = 128;  // tokens of an id that one block adds up

// The sum of dx[order[k], i .. i + W] over k in [first, end), added to `sum`, in order.
__device__ __forceinline__ void add_rows(const T* dx, const i64* order, i64 first, i64 end, int i, int c, bool wide,
                                         float (&sum)[W]) {
  float x[4][W];
  i64 k = first;
  for (; k + 4 <= end; k += 4) {  // four loads under way
#pragma unroll
    for (int u = 0; u < 4; u++) load(dx + order[k + u] * c, i, c, wide, x[u]);
#pragma unroll
    for (int u = 0; u < 4; u++)
#pragma unroll
      for (int j = 0; j < W; j++) sum[j] += x[u][j];
  }
  for (; k < end; k++) {
    load(dx + order[k] * c, i, c, wide, x[0]);
#pragma unroll
    for (int j = 0; j < W; j++) sum[j] += x[0][j];
  }
}

// Where in partial the sum of an id's tokens from the k-th of all on lies, which is a multiple of RUN after its first. Of two
// such places within RUN of each other one is an id's first.
__device__ __forceinline__ i64 partial_row(i64 k, bool first) { return k / RUN * 2 + (first ? 1 : 0); }

// dw[id, :] += the sum of dx[order[k], :] over the k with sorted[k] == id. `sorted` are the ids in ascending order, `order`
// where they came from; equal ids keep their order, so every sum has one order. An id's tokens are divided into runs of RUN,
// each the work of the block of its first token. Of an id with one run it goes into dw, of others into a row of partial [2 *
// ceil(n / RUN), c], which add_runs adds up. Ids outside of dw's v rows are left out.
extern "C" __global__ void embedding_backward(const T* dx, const i64* sorted, const i64* order, float* dw, float* partial,
                                              i64 n, i64 v, int c, bool wide) {
  const i64 first = blockIdx.x, id = sorted[first];
  if (id < 0 || id >= v) return;
  i64 low = 0, high = first;  // where the id begins
  while (low < high) {
    const i64 middle = (low + high) / 2;
    if (sorted[middle] < id) low = middle + 1;
    else high = middle;
  }
  if ((first - low) % RUN != 0) return;
  i64 end = first + 1;
  while (end < n && end < first + RUN && sorted[end] == id) end++;
  const bool one = first == low && (end == n || sorted[end] != id);
  float* to = one ? dw + id * c : partial + partial_row(first, first == low) * c;
  float sum[W];
  for (int i = threadIdx.x * W; i < c; i += blockDim.x * W) {
#pragma unroll
    for (int j = 0; j < W; j++) sum[j] = 0;
    if (one) load(to, i, c, wide, sum);
    add_rows(dx, order, first, end, i, c, wide, sum);
    store(to, i, c, wide, sum);
  }
}

// dw[id, :] += the rows of partial that embedding_backward left for an id, in order. The block of an id's first token does it.
extern "C" __global__ void add_runs(const i64* sorted, const float* partial, float* dw, i64 n, i64 v, int c) {
  const i64 first = blockIdx.x, id = sorted[first];
  if (id < 0 || id >= v || (first > 0 && sorted[first - 1] == id)) return;
  if (first + RUN >= n || sorted[first + RUN] != id) return;  // it has one run
  for (int i = threadIdx.x; i < c; i += blockDim.x) {
    float sum = dw[id * c + i];
    for (i64 k = first; k < n && sorted[k] == id; k += RUN) sum += partial[partial_row(k, k == first) * c + i];
    dw[id * c + i] = sum;
  }
}
