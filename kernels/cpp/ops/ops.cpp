// The C ABI of the CPU operations: tensors in, threads split, row kernels called. Every function returns null, or a
// message that the caller frees.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "abi.h"
#include "cpu_rows.h"
#include "guard.h"
#include "tensors.h"

namespace corral {

extern const RowKernels rows_v2, rows_v3, rows_v4;

const RowKernels& row_kernels() {
  static const RowKernels& best = best_of(rows_v2, rows_v3, rows_v4);
  return best;
}

namespace {

// Rows of x where w has a weight for each column.
int64_t rows_of(const at::Tensor& x, const at::Tensor& w) {
  need(x, "x");
  int64_t c = w.numel();
  TORCH_CHECK(c > 0 && x.numel() % c == 0, "x of ", x.numel(), " elements has no rows of ", c);
  same(w, x.scalar_type(), c, "w");
  return x.numel() / c;
}

// Rows per task, so that a task has some 16k elements.
int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

}  // namespace
}  // namespace corral

using namespace corral;

extern "C" {

// For the CPU alone: setFloat32MatmulPrecision("medium") would do the same and round float32 products on GPUs to TF32.
char* corral_set_float32_onednn(bool on) {
  return guarded([&] {
    at::globalContext().setFloat32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL,
                                            on ? at::Float32Precision::BF16 : at::Float32Precision::NONE);
  });
}

char* corral_rms_norm(at::Tensor* x, at::Tensor* w, double offset, double eps, at::Tensor** y, at::Tensor** rstd) {
  return guarded([&] {
    int64_t c = w->numel(), rows = rows_of(*x, *w);
    auto out = at::empty_like(*x);
    auto k = at::empty({rows}, x->options().dtype(acc_of(*x)));
    Type t = type_of(*x);
    at::parallel_for(0, rows, grain(c), [&](int64_t a, int64_t b) {
      row_kernels().rms_norm(t, at_row(*x, a, c), w->data_ptr(), offset, at_row(out, a, c), at_row(k, a, 1), b - a, c,
                             eps);
    });
    *y = new at::Tensor(out), *rstd = new at::Tensor(k);
  });
}

char* corral_rms_apply(at::Tensor* x, at::Tensor* w, double offset, at::Tensor* rstd, at::Tensor** y) {
  return guarded([&] {
    int64_t c = w->numel(), rows = rows_of(*x, *w);
    same(*rstd, acc_of(*x), rows, "rstd");
    auto out = at::empty_like(*x);
    Type t = type_of(*x);
    at::parallel_for(0, rows, grain(c), [&](int64_t a, int64_t b) {
      row_kernels().rms_apply(t, at_row(*x, a, c), w->data_ptr(), offset, at_row(*rstd, a, 1), at_row(out, a, c), b - a,
                              c);
    });
    *y = new at::Tensor(out);
  });
}

// dw is added to. The rows are cut into as many parts as there are threads, summed in order: the result depends on
// the number of threads, not on their timing.
char* corral_rms_backward(at::Tensor* dy, at::Tensor* x, at::Tensor* w, double offset, at::Tensor* rstd,
                          at::Tensor* residual, at::Tensor* dw, at::Tensor** dx) {
  return guarded([&] {
    int64_t c = w->numel(), rows = rows_of(*x, *w);
    same(*dy, x->scalar_type(), rows * c, "dy"), same(*rstd, acc_of(*x), rows, "rstd");
    same(*dw, acc_of(*x), c, "dw");
    if (residual) same(*residual, x->scalar_type(), rows * c, "residual");
    auto out = at::empty_like(*x);
    Type t = type_of(*x);
    int64_t parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), rows));
    int64_t per = (rows + parts - 1) / parts;
    auto partial = at::zeros({parts, c}, dw->options());
    at::parallel_for(0, parts, 1, [&](int64_t p0, int64_t p1) {
      for (int64_t p = p0; p < p1; p++) {
        int64_t a = p * per, b = std::min(rows, a + per);
        if (a >= b) continue;
        row_kernels().rms_backward(t, at_row(*dy, a, c), at_row(*x, a, c), w->data_ptr(), offset, at_row(*rstd, a, 1),
                                   residual ? at_row(*residual, a, c) : nullptr, at_row(out, a, c),
                                   at_row(partial, p, c), b - a, c);
      }
    });
    for (int64_t p = 0; p < parts; p++) dw->add_(partial[p]);
    *dx = new at::Tensor(out);
  });
}

char* corral_rope(at::Tensor* x, at::Tensor* positions, at::Tensor* cos, at::Tensor* sin, int64_t heads, int64_t d,
                  bool inverse) {
  return guarded([&] {
    need(*x, "x");
    TORCH_CHECK(x->dim() == 2 && d > 0 && d % 2 == 0 && heads >= 0 && heads <= x->size(1) / d && cos->dim() == 2,
                "rope: shapes do not fit");
    int64_t rows = x->size(0), width = x->size(1), length = cos->size(0);
    same(*positions, at::kLong, rows, "positions");
    same(*cos, acc_of(*x), length * (d / 2), "cos"), same(*sin, acc_of(*x), length * (d / 2), "sin");
    const int64_t* position = positions->data_ptr<int64_t>();
    for (int64_t r = 0; r < rows; r++)
      TORCH_CHECK(position[r] >= 0 && position[r] < length, "position ", position[r], " is beyond the tables' ", length);
    Type t = type_of(*x);
    at::parallel_for(0, rows, grain(width), [&](int64_t a, int64_t b) {
      row_kernels().rope(t, at_row(*x, a, width), position + a, cos->data_ptr(), sin->data_ptr(),
                         b - a, width, heads, d, inverse);
    });
  });
}

// Shared by forward and backward: one task a row and key-value head, scratch per thread's share.
static void attention_tasks(const at::Tensor& qkv, Attention& a, bool backward) {
  Type t = type_of(qkv);
  int64_t tasks = a.batch * a.kv_heads, bytes = row_kernels().attention_scratch(t, a, backward);
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    auto scratch = at::empty({bytes + 64}, at::kByte);
    void* p = (void*)((uintptr_t(scratch.data_ptr()) + 63) & ~uintptr_t(63));
    for (int64_t i = first; i < last; i++) {
      auto f = backward ? row_kernels().attention_backward : row_kernels().attention;
      f(t, a, i / a.kv_heads, i % a.kv_heads, p);
    }
  });
}

static Attention attention_of(const at::Tensor& qkv, const at::Tensor* start, int64_t batch, int64_t heads,
                              int64_t kv_heads, int64_t head_dim, double scale) {
  need(qkv, "qkv");
  TORCH_CHECK(qkv.dim() == 2 && batch > 0 && heads > 0 && kv_heads > 0 && head_dim > 0 && qkv.size(0) % batch == 0 &&
                  qkv.size(1) == (heads + 2 * kv_heads) * head_dim && heads % kv_heads == 0,
              "attention: shapes do not fit");
  Attention a{};
  a.qkv = qkv.data_ptr();
  if (start) {
    same(*start, at::kLong, qkv.size(0), "start");
    a.start = start->data_ptr<int64_t>();
  }
  a.batch = batch, a.time = qkv.size(0) / batch, a.heads = heads, a.kv_heads = kv_heads, a.head_dim = head_dim;
  a.stride = qkv.size(1), a.scale = scale;
  return a;
}

char* corral_attention(at::Tensor* qkv, at::Tensor* start, int64_t batch, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, double scale, at::Tensor** out, at::Tensor** lse) {
  return guarded([&] {
    auto a = attention_of(*qkv, start, batch, heads, kv_heads, head_dim, scale);
    auto o = at::empty({qkv->size(0), heads * head_dim}, qkv->options());
    auto l = at::empty({batch, heads, a.time}, qkv->options().dtype(acc_of(*qkv)));
    a.out = o.data_ptr(), a.lse = l.data_ptr();
    attention_tasks(*qkv, a, false);
    *out = new at::Tensor(o), *lse = new at::Tensor(l);
  });
}

char* corral_attention_backward(at::Tensor* dout, at::Tensor* qkv, at::Tensor* out, at::Tensor* lse, at::Tensor* start,
                                int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, double scale,
                                at::Tensor** dqkv) {
  return guarded([&] {
    auto a = attention_of(*qkv, start, batch, heads, kv_heads, head_dim, scale);
    int64_t n = qkv->size(0) * heads;
    same(*dout, qkv->scalar_type(), n * head_dim, "dout"), same(*out, qkv->scalar_type(), n * head_dim, "out");
    same(*lse, acc_of(*qkv), n, "lse");
    auto d = at::empty_like(*qkv);
    a.out = out->data_ptr(), a.lse = lse->data_ptr(), a.dout = dout->data_ptr(), a.dqkv = d.data_ptr();
    attention_tasks(*qkv, a, true);
    *dqkv = new at::Tensor(d);
  });
}

char* corral_decode_attention(at::Tensor* qkv, at::Tensor* keys, at::Tensor* values, at::Tensor* slot,
                              at::Tensor* position, at::Tensor* first, int64_t heads, double scale,
                              at::Tensor** out) {
  return guarded([&] {
    need(*qkv, "qkv");
    TORCH_CHECK(qkv->dim() == 2 && keys->dim() == 4 && keys->sizes() == values->sizes(),
                "decode_attention: shapes do not fit");
    same(*keys, qkv->scalar_type(), keys->numel(), "keys"), same(*values, qkv->scalar_type(), keys->numel(), "values");
    Decode a{};
    int64_t batch = qkv->size(0), slots = keys->size(0);
    a.heads = heads, a.kv_heads = keys->size(1), a.capacity = keys->size(2), a.head_dim = keys->size(3);
    a.stride = qkv->size(1), a.scale = scale;
    TORCH_CHECK(heads > 0 && a.kv_heads > 0 && a.head_dim > 0 && heads % a.kv_heads == 0 &&
                    a.stride == (heads + 2 * a.kv_heads) * a.head_dim,
                "decode_attention: shapes do not fit");
    same(*slot, at::kLong, batch, "slot"), same(*position, at::kLong, batch, "position");
    a.slot = slot->data_ptr<int64_t>(), a.position = position->data_ptr<int64_t>();
    if (first) same(*first, at::kLong, batch, "first"), a.first = first->data_ptr<int64_t>();
    std::vector<bool> used(slots);
    for (int64_t b = 0; b < batch; b++) {
      TORCH_CHECK(a.slot[b] >= 0 && a.slot[b] < slots && !used[a.slot[b]], "slot ", a.slot[b], " of ", slots,
                  " is not there or named twice");
      used[a.slot[b]] = true;
      TORCH_CHECK(a.position[b] >= 0 && a.position[b] < a.capacity, "position ", a.position[b],
                  " is beyond the cache's ", a.capacity);
      TORCH_CHECK(!first || (a.first[b] >= 0 && a.first[b] <= a.position[b]), "first ", a.first ? a.first[b] : 0,
                  " is not between 0 and the position");
    }
    auto o = at::empty({batch, heads * a.head_dim}, qkv->options());
    a.qkv = qkv->data_ptr(), a.keys = keys->data_ptr(), a.values = values->data_ptr(), a.out = o.data_ptr();
    Type t = type_of(*qkv);
    int64_t scratch_size = heads / a.kv_heads * (2 * a.head_dim + a.capacity);
    at::parallel_for(0, batch * a.kv_heads, 1, [&](int64_t first, int64_t last) {
      auto scratch = at::empty({scratch_size}, qkv->options().dtype(acc_of(*qkv)));
      for (int64_t i = first; i < last; i++)
        row_kernels().decode_attention(t, a, i / a.kv_heads, i % a.kv_heads, scratch.data_ptr());
    });
    *out = new at::Tensor(o);
  });
}

// x [R, I] w [O, I]^T + add (null, [R, O] or [O]).
char* corral_few_rows(at::Tensor* x, at::Tensor* w, at::Tensor* add, at::Tensor** y) {
  return guarded([&] {
    need(*x, "x");
    TORCH_CHECK(x->dim() == 2 && w->dim() == 2 && x->size(1) == w->size(1), "few_rows: shapes do not fit");
    FewRows a{};
    a.rows = x->size(0), a.inputs = x->size(1), a.outputs = w->size(0);
    same(*w, x->scalar_type(), a.outputs * a.inputs, "w");
    if (add) {
      a.add_rows = add->dim() == 2;
      same(*add, x->scalar_type(), a.add_rows ? a.rows * a.outputs : a.outputs, "add");
      a.add = add->data_ptr();
    }
    auto wide = x->to(acc_of(*x));
    auto out = at::empty({a.rows, a.outputs}, x->options());
    a.x = wide.data_ptr(), a.w = w->data_ptr(), a.y = out.data_ptr();
    Type t = type_of(*x);
    // Tasks of whole tiles, some 64 KB of the weight each.
    int64_t tiles = (a.outputs + 11) / 12, per = std::max<int64_t>(1, 1365 / std::max<int64_t>(1, a.inputs));
    at::parallel_for(0, tiles, per, [&](int64_t first, int64_t last) {
      row_kernels().few_rows(t, a, first * 12, std::min(last * 12, a.outputs));
    });
    *y = new at::Tensor(out);
  });
}

char* corral_swiglu(at::Tensor* gu, at::Tensor** a_out) {
  return guarded([&] {
    need(*gu, "gu");
    TORCH_CHECK(gu->dim() == 2 && gu->size(1) % 2 == 0, "swiglu: gu must be [N, 2F]");
    int64_t rows = gu->size(0), f = gu->size(1) / 2;
    auto out = at::empty({rows, f}, gu->options());
    Type t = type_of(*gu);
    at::parallel_for(0, rows, grain(f), [&](int64_t a, int64_t b) {
      row_kernels().swiglu(t, at_row(*gu, a, 2 * f), at_row(out, a, f), b - a, f);
    });
    *a_out = new at::Tensor(out);
  });
}

char* corral_swiglu_backward(at::Tensor* gu, at::Tensor* da) {
  return guarded([&] {
    need(*gu, "gu");
    TORCH_CHECK(gu->dim() == 2 && gu->size(1) % 2 == 0, "swiglu: gu must be [N, 2F]");
    int64_t rows = gu->size(0), f = gu->size(1) / 2;
    same(*da, gu->scalar_type(), rows * f, "da");
    Type t = type_of(*gu);
    at::parallel_for(0, rows, grain(f), [&](int64_t a, int64_t b) {
      row_kernels().swiglu_backward(t, at_row(*gu, a, 2 * f), at_row(*da, a, f), b - a, f);
    });
  });
}

char* corral_log_softmax(at::Tensor* logits, at::Tensor* labels, at::Tensor* coef, at::Tensor* logp,
                         at::Tensor* entropy) {
  return guarded([&] {
    need(*logits, "logits");
    TORCH_CHECK(logits->dim() == 2 && logits->size(1) > 0, "log_softmax: logits must be [N, V]");
    int64_t rows = logits->size(0), v = logits->size(1);
    same(*labels, at::kLong, rows, "labels"), same(*logp, acc_of(*logits), rows, "logp");
    if (coef) same(*coef, acc_of(*logits), rows, "coef");
    if (entropy) same(*entropy, acc_of(*logits), rows, "entropy");
    const int64_t* label = labels->data_ptr<int64_t>();
    for (int64_t r = 0; r < rows; r++) TORCH_CHECK(label[r] < v, "label ", label[r], " is beyond the vocabulary of ", v);
    Type t = type_of(*logits);
    at::parallel_for(0, rows, 1, [&](int64_t a, int64_t b) {
      row_kernels().log_softmax(t, at_row(*logits, a, v), label + a, coef ? at_row(*coef, a, 1) : nullptr,
                                at_row(*logp, a, 1), entropy ? at_row(*entropy, a, 1) : nullptr, b - a, v);
    });
  });
}

char* corral_adamw(at::Tensor* p, at::Tensor* g, at::Tensor* m, at::Tensor* v, at::Tensor* copy, double lr,
                   double beta1, double beta2, double eps, double decay, double correction1, double correction2,
                   double grad_scale) {
  return guarded([&] {
    int64_t n = p->numel();
    for (auto [tensor, name] : {std::pair(p, "p"), {g, "g"}, {m, "m"}, {v, "v"}}) same(*tensor, acc_of(*p), n, name);
    if (copy) same(*copy, at::kBFloat16, n, "copy");
    Type t = type_of(*p);
    at::parallel_for(0, n, 32768, [&](int64_t a, int64_t b) {
      row_kernels().adamw(t, at_row(*p, a, 1), at_row(*g, a, 1), at_row(*m, a, 1), at_row(*v, a, 1),
                          copy ? at_row(*copy, a, 1) : nullptr, b - a, lr, beta1, beta2, eps, decay, correction1,
                          correction2, grad_scale);
    });
  });
}

char* corral_sum_squares(at::Tensor* x, double* out) {
  return guarded([&] {
    need(*x, "x");
    TORCH_CHECK(x->scalar_type() == at::kFloat || x->scalar_type() == at::kDouble, "sum_squares: float or double");
    const int64_t run = 1 << 16;
    int64_t n = x->numel(), runs = (n + run - 1) / run;
    std::vector<double> sums(runs);
    Type t = type_of(*x);
    at::parallel_for(0, runs, 1, [&](int64_t a, int64_t b) {
      for (int64_t i = a; i < b; i++)
        sums[i] = row_kernels().sum_squares(t, at_row(*x, i * run, 1), std::min(run, n - i * run));
    });
    double s = 0;
    for (double v : sums) s += v;
    *out = s;
  });
}

char* corral_dropout(at::Tensor* x, at::Tensor* rows, uint64_t key, uint32_t threshold, double scale, uint32_t first,
                     at::Tensor** y) {
  return guarded([&] {
    need(*x, "x");
    TORCH_CHECK(x->dim() == 2, "dropout: x must be [N, C]");
    int64_t n = x->size(0), c = x->size(1);
    same(*rows, at::kLong, n, "rows");
    auto out = at::empty_like(*x);
    Type t = type_of(*x);
    at::parallel_for(0, n, grain(c), [&](int64_t a, int64_t b) {
      row_kernels().dropout(t, at_row(*x, a, c), at_row(out, a, c), rows->data_ptr<int64_t>() + a, key, threshold, scale,
                            first, b - a, c);
    });
    *y = new at::Tensor(out);
  });
}

// dst (accumulator type) += or = src
char* corral_accumulate(at::Tensor* dst, at::Tensor* src, bool add) {
  return guarded([&] {
    need(*src, "src"), same(*dst, acc_of(*src), src->numel(), "dst");
    Type t = type_of(*src);
    at::parallel_for(0, src->numel(), 32768, [&](int64_t a, int64_t b) {
      row_kernels().accumulate(t, at_row(*dst, a, 1), at_row(*src, a, 1), b - a, add);
    });
  });
}

// Numbers first .. of the key's stream of normal numbers.
char* corral_fill_normal(at::Tensor* out, uint64_t key, uint64_t first, double std) {
  return guarded([&] {
    same(*out, at::kFloat, out->numel(), "out");
    float* data = out->data_ptr<float>();
    at::parallel_for(0, out->numel(), 16384, [&](int64_t a, int64_t b) {
      row_kernels().normal(data + a, b - a, key, first + uint64_t(a), std);
    });
  });
}

// dw[ids[n], :] += dx[n, :], in the order of n for every column: deterministic.
char* corral_embedding_backward(at::Tensor* dx, at::Tensor* ids, at::Tensor* dw) {
  return guarded([&] {
    TORCH_CHECK(dw->dim() == 2, "embedding: dw must be [V, C]");
    int64_t n = ids->numel(), c = dw->size(1), v = dw->size(0);
    same(*dx, dx->scalar_type(), n * c, "dx"), same(*ids, at::kLong, n, "ids"), same(*dw, acc_of(*dx), v * c, "dw");
    const int64_t* id = ids->data_ptr<int64_t>();
    for (int64_t i = 0; i < n; i++) TORCH_CHECK(id[i] >= 0 && id[i] < v, "token id ", id[i], " is beyond the vocabulary of ", v);
    Type t = type_of(*dx);
    at::parallel_for(0, c, std::max<int64_t>(64, c / at::get_num_threads()), [&](int64_t a, int64_t b) {
      for (int64_t i = 0; i < n; i++)
        row_kernels().accumulate(t, at_row(*dw, id[i], c) + a * dw->element_size(),
                                 at_row(*dx, i, c) + a * dx->element_size(), b - a, true);
    });
  });
}

}  // extern "C"
