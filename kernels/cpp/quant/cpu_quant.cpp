// Compiled once per instruction set with CORRAL_ISA = the name of its table. See cpu_quant.h.
#include "cpu_quant.h"

#include <string.h>

namespace corral {
namespace {

#include "cpu_types.inc"

// NF4's values (Dettmers et al. 2023, appendix E) and what lies halfway between them.
constexpr float kNf4[16] = {-1.0f,
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

struct Tables {
  float pair[256][2] = {};  // the two values of a byte
  float middle[15] = {};
  constexpr Tables() {
    for (int i = 0; i < 256; i++) pair[i][0] = kNf4[i >> 4], pair[i][1] = kNf4[i & 15];
    for (int i = 0; i < 15; i++) middle[i] = (kNf4[i] + kNf4[i + 1]) / 2;
  }
};
constexpr Tables kTables;

inline float sqrt_(float x) { return __builtin_sqrtf(x); }
inline double sqrt_(double x) { return __builtin_sqrt(x); }

// The largest |x|. Compared as integers, in which a NaN is larger than all numbers.
inline float absmax_of(const float* x, int64_t n) {
  int32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    int32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float a;
  memcpy(&a, &most, 4);
  return a;
}

void nf4(const float* x, uint8_t* packed, float* absmax, int64_t n) {
  for (int64_t first = 0; first < n; first += kNf4Block) {
    int64_t len = n - first < kNf4Block ? n - first : kNf4Block;
    const float* in = x + first;
    float a = absmax_of(in, len);
    absmax[first / kNf4Block] = a;
    float inverse = 1.0f / (a > 1e-38f ? a : 1e-38f);
    int32_t q[kNf4Block];
    q[(len - 1) | 1] = 7;  // after an odd end: a zero, as bitsandbytes fills up
#pragma omp simd
    for (int64_t i = 0; i < len; i++) {
      float y = in[i] * inverse;
      int32_t code = 0;
#pragma GCC unroll 15
      for (int k = 0; k < 15; k++) code += y > kTables.middle[k];
      q[i] = code;
    }
    uint8_t* out = packed + first / 2;
    for (int64_t i = 0; i < (len + 1) / 2; i++) out[i] = uint8_t(q[2 * i] << 4 | q[2 * i + 1]);
  }
}

inline float scale_of(const Nf4& w, int64_t block) {
  if (!w.codes) return w.absmax[block];
  return w.map[w.codes[block]] * w.absmax[block / kCodeBlock] + w.offset;
}

// x = the values of a whole block
inline void look_up(const uint8_t* bytes, float* x) {
#if defined(__AVX512F__)
  // Sixteen at a time: eight half bytes of each of two words, the high half of a byte first; the table is one register.
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef float Floats __attribute__((vector_size(64)));
  Floats table;
  memcpy(&table, kNf4, 64);
  for (int i = 0; i < kNf4Block / 2; i += 8) {
    uint32_t a, b;
    memcpy(&a, bytes + i, 4), memcpy(&b, bytes + i + 4, 4);
    Words at = Words{a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b} >>
               Words{4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24};
    *(Floats*)(x + 2 * i) = __builtin_shuffle(table, at & 15);
  }
#else
  for (int i = 0; i < kNf4Block / 2; i++) memcpy(x + 2 * i, kTables.pair[bytes[i]], 8);
#endif
}

template <class T>
void nf4_panel_t(const Nf4& w, Panel p, T* out) {
  alignas(64) float x[kNf4Block];
  for (int64_t r = 0; r < p.rows; r++) {
    int64_t e = (p.row + r) * p.width + p.column, end = e + p.columns;
    while (e < end) {
      int64_t block = e / kNf4Block, stop = (block + 1) * kNf4Block;
      int64_t len = (stop < end ? stop : end) - e;
      float s = scale_of(w, block);
      const uint8_t* bytes = w.packed + e / 2;
      if (len == kNf4Block) {
        look_up(bytes, x);
#pragma omp simd
        for (int i = 0; i < kNf4Block; i++) store(out + i, x[i] * s);
      } else {
        for (int64_t i = 0, first = e % 2; i < len; i++)
          store(out + i, kTables.pair[bytes[(first + i) / 2]][(first + i) % 2] * s);
      }
      e += len, out += len;
    }
  }
}

void int8(const float* x, int8_t* q, float* absmax, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++, x += width, q += width) {
    float a = absmax_of(x, width), s = a / 127.0f;
    absmax[r] = a;
    float divisor = s > 0 ? s : 1.0f;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
      float y = __builtin_rintf(x[i] / divisor);
      y = y > 127.0f ? 127.0f : y;
      y = y < -127.0f ? -127.0f : y;
      q[i] = int8_t(int32_t(y));
    }
  }
}

template <class T>
void int8_panel_t(const int8_t* q, const float* absmax, Panel p, T* out) {
  for (int64_t r = 0; r < p.rows; r++, out += p.columns) {
    const int8_t* in = q + (p.row + r) * p.width + p.column;
    float s = absmax[p.row + r] / 127.0f;
#pragma omp simd
    for (int64_t i = 0; i < p.columns; i++) store(out + i, float(in[i]) * s);
  }
}

// How many of the 255 midpoints are less than x: the nearest code. Written out, so that eight gathers come of it.
inline int32_t nearest(const float* midpoints, float x) {
  int32_t at = midpoints[127] < x ? 128 : 0;
  at += midpoints[at + 63] < x ? 64 : 0;
  at += midpoints[at + 31] < x ? 32 : 0;
  at += midpoints[at + 15] < x ? 16 : 0;
  at += midpoints[at + 7] < x ? 8 : 0;
  at += midpoints[at + 3] < x ? 4 : 0;
  at += midpoints[at + 1] < x ? 2 : 0;
  return at + (midpoints[at] < x ? 1 : 0);
}

inline void unpack(const Moment& m, int64_t first, int64_t n, float* x) {
  float s = m.absmax[first / kCodeBlock];
  const uint8_t* codes = m.codes + first;
  const float* map = m.map;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] = map[codes[i]] * s;
}

// least: no positive value gets a lower code
inline void pack(const Moment& m, int64_t first, int64_t n, const float* x, int32_t least) {
  float a = absmax_of(x, n), divisor = a > 0 ? a : 1.0f;
  m.absmax[first / kCodeBlock] = a;
  uint8_t* codes = m.codes + first;
  const float* midpoints = m.midpoints;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    int32_t code = nearest(midpoints, x[i] / divisor);
    codes[i] = uint8_t(code < least && x[i] > 0 ? least : code);
  }
}

template <class A>
void adamw8_t(const AdamW8& a, int64_t first_block, int64_t last_block) {
  const A keep = A(1 - a.lr * a.decay), scale = A(a.grad_scale), eps = A(a.eps);
  const float b1 = float(a.beta1), c1 = float(1 - a.beta1), b2 = float(a.beta2), c2 = float(1 - a.beta2);
  const A root = A(sqrt_(a.correction2)), step = A(a.lr / a.correction1);
  alignas(64) float m[kCodeBlock], v[kCodeBlock];
  for (int64_t b = first_block; b < last_block; b++) {
    int64_t first = b * kCodeBlock, n = a.n - first < kCodeBlock ? a.n - first : kCodeBlock;
    unpack(a.m, first, n, m), unpack(a.v, first, n, v);
    A* p = (A*)a.p + first;
    const A* g = (const A*)a.g + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      float gi = float(g[i] * scale);
      m[i] = m[i] * b1 + gi * c1;
      v[i] = v[i] * b2 + gi * gi * c2;
      p[i] = p[i] * (first + i < a.decayed ? keep : A(1)) - A(m[i]) / (sqrt_(A(v[i])) / root + eps) * step;
    }
    if (a.copy) {
      bf16* copy = (bf16*)a.copy + first;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) store(copy + i, float(p[i]));
    }
    pack(a.m, first, n, m, 0), pack(a.v, first, n, v, 1);
  }
}

void nf4_panel(Type t, const Nf4& w, Panel p, void* out) {
  switch (t) {
    case Type::Float: return nf4_panel_t(w, p, (float*)out);
    case Type::Double: return nf4_panel_t(w, p, (double*)out);
    case Type::BFloat16: return nf4_panel_t(w, p, (bf16*)out);
  }
}
void int8_panel(Type t, const int8_t* q, const float* absmax, Panel p, void* out) {
  switch (t) {
    case Type::Float: return int8_panel_t(q, absmax, p, (float*)out);
    case Type::Double: return int8_panel_t(q, absmax, p, (double*)out);
    case Type::BFloat16: return int8_panel_t(q, absmax, p, (bf16*)out);
  }
}
void adamw8(Type t, const AdamW8& a, int64_t first, int64_t last) {
  t == Type::Double ? adamw8_t<double>(a, first, last) : adamw8_t<float>(a, first, last);
}

}  // namespace

extern const QuantKernels CORRAL_ISA;
const QuantKernels CORRAL_ISA = {nf4, nf4_panel, int8, int8_panel, adamw8};

}  // namespace corral
