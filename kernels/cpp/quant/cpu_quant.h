// The quantization kernels of the CPU, one table of functions per instruction set, as in ops/cpu_rows.h; compiled without
// contraction of products and sums, so that all sets give the same bits. Formulas: kernels/src/quant.
#pragma once
#include "cpu_types.h"

namespace corral {

constexpr int64_t kNf4Block = 64;    // values of one scale
constexpr int64_t kCodeBlock = 256;  // values of one scale of a dynamic 8-bit code

// The scale of block b of nf4: absmax[b]; with codes, map[codes[b]] * absmax[b / 256] + offset.
struct Nf4 {
  const uint8_t* packed;
  const float* absmax;
  const uint8_t* codes;
  const float* map;
  float offset;
};

// The rows and columns of a weight, whose rows are `width` long, that are dequantized to rows of `columns`.
struct Panel {
  int64_t width, row, rows, column, columns;
};

// A moment of AdamW in 8 bit: value i is map[codes[i]] * absmax[i / 256]. midpoints[k] lies between map[k] and
// map[k + 1]; there are 255.
struct Moment {
  uint8_t* codes;
  float* absmax;
  const float *map, *midpoints;
};

struct AdamW8 {
  void *p, *copy;  // accumulator type; bfloat16 or null
  const void* g;   // accumulator type
  Moment m, v;
  int64_t n, decayed;  // the first `decayed` of n values have weight decay
  double lr, beta1, beta2, eps, decay, correction1, correction2, grad_scale;
};

struct QuantKernels {
  // x [n] from the beginning of a block
  void (*nf4)(const float* x, uint8_t* packed, float* absmax, int64_t n);
  void (*nf4_panel)(Type, const Nf4&, Panel, void* out);
  void (*int8)(const float* x, int8_t* q, float* absmax, int64_t rows, int64_t width);
  void (*int8_panel)(Type, const int8_t* q, const float* absmax, Panel, void* out);
  // the blocks of 256 values first .. last; Type is that of p: Float or Double
  void (*adamw8)(Type, const AdamW8&, int64_t first, int64_t last);
};

}  // namespace corral
