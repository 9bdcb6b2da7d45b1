// The row kernels of the CPU, one table of functions per instruction set (cpu_rows.cpp is compiled once for each).
// Plain pointers and no library headers: code shared between differently compiled copies would be linked once,
// with the widest instructions, and crash on an older processor.
#pragma once
#include "cpu_types.h"

namespace corral {

// Causal attention over B rows of T positions. q, k, v lie in one buffer qkv [B * T, stride]: H query heads, then K
// key heads, then K value heads, of D numbers each. Position i of a row sees positions start[i] .. i of that row
// (start null: 0 .. i), which covers padding on the left, packed documents and sliding windows.
struct Attention {
  const void* qkv;
  const int64_t* start;
  int64_t batch, time, heads, kv_heads, head_dim, stride;
  double scale;
  void* out;  // [B * T, H * D]
  void* lse;  // accumulator type [B, H, T]: log of the softmax's denominator
  // backward only
  const void* dout;  // [B * T, H * D]
  void* dqkv;        // [B * T, stride]
};

// One more token a row: its query heads attend over the keys and values that are cached in the row's slot, positions
// first (null: 0) .. position, after its own key and value were written there.
struct Decode {
  const void* qkv;                          // [B, stride], in the order of Attention
  void *keys, *values;                      // [slots, K, capacity, D]
  const int64_t *slot, *position, *first;   // [B]
  int64_t heads, kv_heads, head_dim, stride, capacity;
  double scale;
  void* out;  // [B, H * D]
};

// y = x w^T + add for few rows: x [R, I] (accumulator type), w [O, I], y [R, O]; add null, [R, O] (add_rows) or [O].
struct FewRows {
  const void *x, *w, *add;
  int64_t rows, inputs, outputs;
  bool add_rows;
  void* y;
};

struct RowKernels {
  // One task is one row b and one key-value head with all its query heads; scratch has attention_scratch(...) bytes.
  void (*attention)(Type, const Attention&, int64_t b, int64_t kv_head, void* scratch);
  void (*attention_backward)(Type, const Attention&, int64_t b, int64_t kv_head, void* scratch);
  int64_t (*attention_scratch)(Type, const Attention&, bool backward);
  // One task is one row b and one key-value head; scratch holds H / K * (2 * D + capacity) accumulators.
  void (*decode_attention)(Type, const Decode&, int64_t b, int64_t kv_head, void* scratch);
  // One task is the outputs first .. last.
  void (*few_rows)(Type, const FewRows&, int64_t first, int64_t last);
  // y[r,:] = x[r,:] * rstd[r] * (w + offset), rstd[r] = 1 / sqrt(mean(x[r,:]^2) + eps)
  void (*rms_norm)(Type, const void* x, const void* w, double offset, void* y, void* rstd, int64_t rows, int64_t c,
                   double eps);
  // y = x * rstd * (w + offset) with a saved rstd
  void (*rms_apply)(Type, const void* x, const void* w, double offset, const void* rstd, void* y, int64_t rows, int64_t c);
  // dx = residual + d rms_norm; dw_partial[c] += sum over rows (accumulator type)
  void (*rms_backward)(Type, const void* dy, const void* x, const void* w, double offset, const void* rstd,
                       const void* residual, void* dx, void* dw_partial, int64_t rows, int64_t c);
  // rotates the first `heads` heads of each row of x [rows, stride] in place; tables [positions, d/2]
  void (*rope)(Type, void* x, const int64_t* position, const void* cos, const void* sin, int64_t rows, int64_t stride,
               int64_t heads, int64_t d, bool inverse);
  // a = silu(g) * u for gu [rows, 2f] = (g | u)
  void (*swiglu)(Type, const void* gu, void* a, int64_t rows, int64_t f);
  // in place: da becomes a = silu(g) * u, gu becomes d gu
  void (*swiglu_backward)(Type, void* gu, void* da, int64_t rows, int64_t f);
  // logp[r] = log softmax(logits[r,:])[label[r]], 0 where label < 0. With coef: logits becomes
  // coef[r] * (onehot - softmax), the gradient of sum(coef * logp). With entropy: the rows' entropies.
  void (*log_softmax)(Type, void* logits, const int64_t* label, const void* coef, void* logp, void* entropy,
                      int64_t rows, int64_t v);
  // AdamW with decoupled decay; copy may be null, else receives the new values rounded to bfloat16
  void (*adamw)(Type, void* p, const void* g, void* m, void* v, void* copy, int64_t n, double lr, double beta1,
                double beta2, double eps, double decay, double correction1, double correction2, double grad_scale);
  double (*sum_squares)(Type, const void* x, int64_t n);
  // y = x / (1 - p) where the element's random bits are at least threshold = p 2^32, else 0; `first`: what the first column counts
  // as; see kernels/src/ops
  void (*dropout)(Type, const void* x, void* y, const int64_t* row, uint64_t key, uint32_t threshold, double scale,
                  uint32_t first, int64_t rows, int64_t c);
  // dst[i] (accumulator type) += src[i] (Type), or = if not accumulate
  void (*accumulate)(Type, void* dst, const void* src, int64_t n, bool accumulate);
  // Numbers first .. first + n of the key's stream of normal numbers, times std
  void (*normal)(float* out, int64_t n, uint64_t key, uint64_t first, double std);
};

// The table for the best instruction set of this processor.
const RowKernels& row_kernels();

}  // namespace corral
