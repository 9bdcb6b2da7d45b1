// Compiled once per instruction set with CORRAL_ISA = the name of its table. See cpu_rows.h.
#include "cpu_rows.h"

#include <math.h>
#include <string.h>

namespace corral {
namespace {

#include "cpu_types.inc"

// exp(x) for x <= 88, within 1 ulp or so (Cephes' polynomial), written so that compilers vectorise it.
inline float exp_(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float n = __builtin_floorf(x * 1.44269504088896341f + 0.5f);
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t b = (int32_t(n) + 127) << 23;
  float s;
  memcpy(&s, &b, 4);
  return p * s;
}
inline double exp_(double x) { return exp(x); }

template <class A>
inline A sigmoid(A x) {
  return A(1) / (A(1) + exp_(-x));
}

template <class T>
void rms_norm_t(const T* x, const T* w, double offset, T* y, typename acc<T>::type* rstd, int64_t rows, int64_t c,
                double eps) {
  using A = typename acc<T>::type;
  for (int64_t r = 0; r < rows; r++) {
    const T* xr = x + r * c;
    A s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < c; i++) s += load(xr[i]) * load(xr[i]);
    A k = A(1) / A(sqrt(s / A(c) + A(eps)));
    rstd[r] = k;
    T* yr = y + r * c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) store(yr + i, load(xr[i]) * k * (load(w[i]) + A(offset)));
  }
}

template <class T>
void rms_apply_t(const T* x, const T* w, double offset, const typename acc<T>::type* rstd, T* y, int64_t rows,
                 int64_t c) {
  using A = typename acc<T>::type;
  for (int64_t r = 0; r < rows; r++) {
    const T* xr = x + r * c;
    T* yr = y + r * c;
    A k = rstd[r];
#pragma omp simd
    for (int64_t i = 0; i < c; i++) store(yr + i, load(xr[i]) * k * (load(w[i]) + A(offset)));
  }
}

template <class T>
void rms_backward_t(const T* dy, const T* x, const T* w, double offset, const typename acc<T>::type* rstd,
                    const T* residual, T* dx, typename acc<T>::type* dw, int64_t rows, int64_t c) {
  using A = typename acc<T>::type;
  for (int64_t r = 0; r < rows; r++) {
    const T *g = dy + r * c, *xr = x + r * c;
    A k = rstd[r], s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < c; i++) {
      A gx = load(g[i]) * load(xr[i]);
      s += gx * (load(w[i]) + A(offset));
      dw[i] += gx * k;
    }
    A q = s * k * k * k / A(c);
    T* d = dx + r * c;
    if (residual) {
      const T* res = residual + r * c;
#pragma omp simd
      for (int64_t i = 0; i < c; i++) store(d + i, load(res[i]) + k * (load(w[i]) + A(offset)) * load(g[i]) - q * load(xr[i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < c; i++) store(d + i, k * (load(w[i]) + A(offset)) * load(g[i]) - q * load(xr[i]));
    }
  }
}

template <class T>
void rope_t(T* x, const int64_t* position, const typename acc<T>::type* cos, const typename acc<T>::type* sin,
            int64_t rows, int64_t stride, int64_t heads, int64_t d, bool inverse) {
  using A = typename acc<T>::type;
  int64_t half = d / 2;
  A sign = inverse ? A(-1) : A(1);
  for (int64_t r = 0; r < rows; r++) {
    const A *cr = cos + position[r] * half, *sr = sin + position[r] * half;
    for (int64_t h = 0; h < heads; h++) {
      T *a = x + r * stride + h * d, *b = a + half;
#pragma omp simd
      for (int64_t i = 0; i < half; i++) {
        A p = load(a[i]), q = load(b[i]), co = cr[i], si = sign * sr[i];
        store(a + i, p * co - q * si);
        store(b + i, q * co + p * si);
      }
    }
  }
}

template <class T>
void swiglu_t(const T* gu, T* a, int64_t rows, int64_t f) {
  using A = typename acc<T>::type;
  for (int64_t r = 0; r < rows; r++) {
    const T *g = gu + r * 2 * f, *u = g + f;
    T* o = a + r * f;
#pragma omp simd
    for (int64_t i = 0; i < f; i++) {
      A x = load(g[i]);
      store(o + i, x * sigmoid(x) * load(u[i]));
    }
  }
}

template <class T>
void swiglu_backward_t(T* gu, T* da, int64_t rows, int64_t f) {
  using A = typename acc<T>::type;
  for (int64_t r = 0; r < rows; r++) {
    T *g = gu + r * 2 * f, *u = g + f, *d = da + r * f;
#pragma omp simd
    for (int64_t i = 0; i < f; i++) {
      A x = load(g[i]), up = load(u[i]), dv = load(d[i]);
      A s = sigmoid(x), silu = x * s;
      store(d + i, silu * up);
      store(g + i, dv * up * (s + silu * (A(1) - s)));
      store(u + i, dv * silu);
    }
  }
}

template <class T>
void log_softmax_t(T* logits, const int64_t* label, const typename acc<T>::type* coef, typename acc<T>::type* logp,
                   typename acc<T>::type* entropy, int64_t rows, int64_t v) {
  using A = typename acc<T>::type;
  for (int64_t r = 0; r < rows; r++) {
    T* l = logits + r * v;
    A m = load(l[0]);
#pragma omp simd reduction(max : m)
    for (int64_t i = 0; i < v; i++) {
      A x = load(l[i]);
      m = x > m ? x : m;
    }
    A s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < v; i++) s += exp_(load(l[i]) - m);
    A lse = m + A(log(s));
    bool valid = label[r] >= 0;
    logp[r] = valid ? load(l[label[r]]) - lse : A(0);
    if (entropy) {
      A e = 0;
#pragma omp simd reduction(+ : e)
      for (int64_t i = 0; i < v; i++) e += exp_(load(l[i]) - lse) * (lse - load(l[i]));
      entropy[r] = e;
    }
    if (coef) {
      A k = valid ? -coef[r] : A(0);
      A onehot = valid ? load(l[label[r]]) : A(0);
#pragma omp simd
      for (int64_t i = 0; i < v; i++) store(l + i, k * exp_(load(l[i]) - lse));
      if (valid) store(l + label[r], k * (exp_(onehot - lse) - A(1)));
    }
  }
}

template <class A>
void adamw_t(A* p, const A* g, A* m, A* v, bf16* copy, int64_t n, double lr, double beta1, double beta2, double eps,
             double decay, double correction1, double correction2, double grad_scale) {
  A keep = A(1 - lr * decay), b1 = A(beta1), c1 = A(1 - beta1), b2 = A(beta2), c2 = A(1 - beta2);
  A step = A(lr / correction1), inv = A(1 / sqrt(correction2)), e = A(eps), scale = A(grad_scale);
  for (int64_t i = 0; i < n; i += 4096) {  // short runs: the copy finds p in the cache
    int64_t end = i + 4096 < n ? i + 4096 : n;
#pragma omp simd
    for (int64_t j = i; j < end; j++) {
      A gj = g[j] * scale;
      A mj = b1 * m[j] + c1 * gj;
      A vj = b2 * v[j] + c2 * gj * gj;
      m[j] = mj;
      v[j] = vj;
      p[j] = p[j] * keep - step * mj / (A(__builtin_sqrt(vj)) * inv + e);
    }
    if (copy) {
#pragma omp simd
      for (int64_t j = i; j < end; j++) store(copy + j, float(p[j]));
    }
  }
}

template <class A>
double sum_squares_t(const A* x, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; i += 4096) {  // float inside a short run, double across
    int64_t end = i + 4096 < n ? i + 4096 : n;
    A s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t j = i; j < end; j++) s += x[j] * x[j];
    total += double(s);
  }
  return total;
}

inline uint64_t mix(uint64_t x) {  // SplitMix64's finalizer (Steele et al. 2014)
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}
inline uint32_t mix(uint32_t x) {  // lowbias32 of hash-prospector
  x = (x ^ (x >> 16)) * 0x7feb352d;
  x = (x ^ (x >> 15)) * 0x846ca68b;
  return x ^ (x >> 16);
}

template <class T>
void dropout_t(const T* x, T* y, const int64_t* row, uint64_t key, uint32_t threshold, double scale, uint32_t first,
               int64_t rows, int64_t c) {
  using A = typename acc<T>::type;
  for (int64_t r = 0; r < rows; r++, x += c, y += c) {
    uint64_t h = mix(key ^ mix(uint64_t(row[r])));
    uint32_t low = uint32_t(h), high = uint32_t(h >> 32);
#pragma omp simd
    for (int64_t i = 0; i < c; i++) {
      uint32_t bits = mix(mix((first + uint32_t(i)) ^ low) + high);
      store(y + i, bits >= threshold ? load(x[i]) * A(scale) : A(0));
    }
  }
}

template <class T, class A>
void accumulate_t(A* dst, const T* src, int64_t n, bool add) {
  if (add) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) dst[i] += A(load(src[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) dst[i] = A(load(src[i]));
  }
}

#include "cpu_attention.inc"
#include "cpu_few_rows.inc"

// Calls f<T> for the element type.
#define BY_TYPE(type, ...)                                                     \
  switch (type) {                                                              \
    case Type::Float: {                                                        \
      using T = float;                                                         \
      using A = float;                                                         \
      __VA_ARGS__;                                                             \
      break;                                                                   \
    }                                                                          \
    case Type::Double: {                                                       \
      using T = double;                                                        \
      using A = double;                                                        \
      __VA_ARGS__;                                                             \
      break;                                                                   \
    }                                                                          \
    case Type::BFloat16: {                                                     \
      using T = bf16;                                                          \
      using A = float;                                                         \
      __VA_ARGS__;                                                             \
      break;                                                                   \
    }                                                                          \
  }

void attention(Type t, const Attention& a, int64_t b, int64_t kv_head, void* scratch) {
  BY_TYPE(t, attention_t<T>(a, b, kv_head, (A*)scratch))
}
void attention_backward(Type t, const Attention& a, int64_t b, int64_t kv_head, void* scratch) {
  BY_TYPE(t, (void)sizeof(T); attention_backward_t<T>(a, b, kv_head, (A*)scratch))
}
int64_t attention_scratch(Type t, const Attention& a, bool backward) {
  int64_t bytes = 0;
  BY_TYPE(t, (void)sizeof(T); bytes = scratch_size<A>(a, backward) * int64_t(sizeof(A)))
  return bytes;
}
void decode_attention(Type t, const Decode& a, int64_t b, int64_t kv_head, void* scratch) {
  BY_TYPE(t, decode_attention_t<T>(a, b, kv_head, (A*)scratch))
}
void few_rows(Type t, const FewRows& a, int64_t first, int64_t last) {
  BY_TYPE(t, (void)sizeof(A); few_rows_t<T>(a, first, last))
}
void rms_norm(Type t, const void* x, const void* w, double offset, void* y, void* rstd, int64_t rows, int64_t c,
              double eps) {
  BY_TYPE(t, rms_norm_t<T>((const T*)x, (const T*)w, offset, (T*)y, (A*)rstd, rows, c, eps))
}
void rms_apply(Type t, const void* x, const void* w, double offset, const void* rstd, void* y, int64_t rows, int64_t c) {
  BY_TYPE(t, rms_apply_t<T>((const T*)x, (const T*)w, offset, (const A*)rstd, (T*)y, rows, c))
}
void rms_backward(Type t, const void* dy, const void* x, const void* w, double offset, const void* rstd,
                  const void* residual, void* dx, void* dw, int64_t rows, int64_t c) {
  BY_TYPE(t, rms_backward_t<T>((const T*)dy, (const T*)x, (const T*)w, offset, (const A*)rstd, (const T*)residual,
                               (T*)dx, (A*)dw, rows, c))
}
void rope(Type t, void* x, const int64_t* position, const void* cos, const void* sin, int64_t rows, int64_t stride,
          int64_t heads, int64_t d, bool inverse) {
  BY_TYPE(t, rope_t<T>((T*)x, position, (const A*)cos, (const A*)sin, rows, stride, heads, d, inverse))
}
void swiglu(Type t, const void* gu, void* a, int64_t rows, int64_t f) {
  BY_TYPE(t, (void)sizeof(A); swiglu_t<T>((const T*)gu, (T*)a, rows, f))
}
void swiglu_backward(Type t, void* gu, void* da, int64_t rows, int64_t f) {
  BY_TYPE(t, (void)sizeof(A); swiglu_backward_t<T>((T*)gu, (T*)da, rows, f))
}
void log_softmax(Type t, void* logits, const int64_t* label, const void* coef, void* logp, void* entropy, int64_t rows,
                 int64_t v) {
  BY_TYPE(t, log_softmax_t<T>((T*)logits, label, (const A*)coef, (A*)logp, (A*)entropy, rows, v))
}
void adamw(Type t, void* p, const void* g, void* m, void* v, void* copy, int64_t n, double lr, double beta1,
           double beta2, double eps, double decay, double correction1, double correction2, double grad_scale) {
  if (t == Type::Double)
    adamw_t((double*)p, (const double*)g, (double*)m, (double*)v, (bf16*)copy, n, lr, beta1, beta2, eps, decay,
            correction1, correction2, grad_scale);
  else
    adamw_t((float*)p, (const float*)g, (float*)m, (float*)v, (bf16*)copy, n, lr, beta1, beta2, eps, decay,
            correction1, correction2, grad_scale);
}
double sum_squares(Type t, const void* x, int64_t n) {
  return t == Type::Double ? sum_squares_t((const double*)x, n) : sum_squares_t((const float*)x, n);
}
void dropout(Type t, const void* x, void* y, const int64_t* row, uint64_t key, uint32_t threshold, double scale,
             uint32_t first, int64_t rows, int64_t c) {
  BY_TYPE(t, (void)sizeof(A); dropout_t((const T*)x, (T*)y, row, key, threshold, scale, first, rows, c))
}
void accumulate(Type t, void* dst, const void* src, int64_t n, bool add) {
  BY_TYPE(t, accumulate_t((A*)dst, (const T*)src, n, add))
}

template <class To, class From>
inline To bits_as(From from) {
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// An integer of magnitude below 2^51 as a double, in operations that every vector unit has.
inline double to_double(int64_t i) { return bits_as<double>(i + 0x4338000000000000) - 0x1.8p52; }

// ln(x) for normal x > 0, within some 1e-15 of it: x = m 2^k with m in [sqrt(1/2), sqrt(2)), and the series of
// ln m = 2 artanh((m - 1) / (m + 1)).
inline double log_(double x) {
  constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  int64_t b = bits_as<int64_t>(x) - kSqrtHalf;
  double k = to_double(b >> 52);
  double m = bits_as<double>((b & 0x000fffffffffffff) + kSqrtHalf);
  double s = (m - 1.0) / (m + 1.0), t = s * s, p = 1.0 / 21;
  p = p * t + 1.0 / 19;
  p = p * t + 1.0 / 17;
  p = p * t + 1.0 / 15;
  p = p * t + 1.0 / 13;
  p = p * t + 1.0 / 11;
  p = p * t + 1.0 / 9;
  p = p * t + 1.0 / 7;
  p = p * t + 1.0 / 5;
  p = p * t + 1.0 / 3;
  return k * 0x1.62e42fefa39efp-1 + (2.0 * s + 2.0 * s * t * p);
}

// sin and cos for |x| <= pi / 4, by their series.
inline double sin_(double x) {
  double t = x * x, p = 1.0 / 355687428096000;
  p = p * t - 1.0 / 1307674368000;
  p = p * t + 1.0 / 6227020800;
  p = p * t - 1.0 / 39916800;
  p = p * t + 1.0 / 362880;
  p = p * t - 1.0 / 5040;
  p = p * t + 1.0 / 120;
  p = p * t - 1.0 / 6;
  return x + x * t * p;
}
inline double cos_(double x) {
  double t = x * x, p = 1.0 / 20922789888000;
  p = p * t - 1.0 / 87178291200;
  p = p * t + 1.0 / 479001600;
  p = p * t - 1.0 / 3628800;
  p = p * t + 1.0 / 40320;
  p = p * t - 1.0 / 720;
  p = p * t + 1.0 / 24;
  p = p * t - 1.0 / 2;
  return 1.0 + t * p;
}

// Numbers 2 i and 2 i + 1 of the stream (Box and Muller 1958): radius sqrt(-2 ln u) and angle 2 pi v, of 32 bits each.
void normal(float* out, int64_t n, uint64_t key, uint64_t first, double std) {
  constexpr int64_t kPairs = 256;
  float pairs[2 * kPairs];
  for (int64_t at = -int64_t(first & 1); at < n; at += 2 * kPairs) {
    const uint64_t begin = (first + uint64_t(at)) / 2;
#pragma omp simd
    for (int64_t i = 0; i < kPairs; i++) {
      const uint64_t bits = mix(key ^ mix(begin + uint64_t(i)));
      const double u = (to_double(int64_t(bits >> 32)) + 0.5) * 0x1p-32;
      const double radius = __builtin_sqrt(-2.0 * log_(u)) * std;
      // The angle is a multiple of a quarter turn and a rest of at most an eighth on either side.
      const int64_t v = int64_t(bits & 0xffffffff), quarter = (v + 0x20000000) >> 30;
      const double rest = (to_double(v - (quarter << 30)) + 0.5) * (6.283185307179586 * 0x1p-32);
      const double s = sin_(rest), c = cos_(rest);
      const double sine = quarter & 1 ? c : s, cosine = quarter & 1 ? s : c;
      pairs[2 * i] = float(radius * ((quarter + 1) & 2 ? -cosine : cosine));
      pairs[2 * i + 1] = float(radius * (quarter & 2 ? -sine : sine));
    }
    const int64_t from = at < 0 ? 0 : at, to = at + 2 * kPairs < n ? at + 2 * kPairs : n;
    for (int64_t j = from; j < to; j++) out[j] = pairs[j - at];
  }
}

}  // namespace

extern const RowKernels CORRAL_ISA;
const RowKernels CORRAL_ISA = {
    attention, attention_backward, attention_scratch, decode_attention, few_rows, rms_norm,    rms_apply, rms_backward,
    rope,      swiglu,             swiglu_backward,   log_softmax,      adamw,    sum_squares, dropout,   accumulate,
    normal,
};

}  // namespace corral
