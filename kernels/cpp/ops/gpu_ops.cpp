// What CUDA runs through libtorch's own operations and tch does not offer: flash attention with its statistics, and
// products of bfloat16 with float32 results. They are reached through the dispatcher, so nothing of CUDA is linked here.
#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/_scaled_mm.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>

#include "abi.h"
#include "guard.h"

using corral::guarded;

namespace {

// Flash attention's backward adds up the queries' gradients in whatever order its blocks end, unless libtorch is told to be
// deterministic; then it may not fill every new tensor with NaN as well.
struct Determinism {
  at::Context& context = at::globalContext();
  bool on = context.deterministicAlgorithms(), warn_only = context.deterministicAlgorithmsWarnOnly(),
       fill = context.deterministicFillUninitializedMemory();
  explicit Determinism(bool wanted) {
    context.setDeterministicAlgorithms(wanted, false);
    context.setDeterministicFillUninitializedMemory(false);
  }
  ~Determinism() {
    context.setDeterministicFillUninitializedMemory(fill);
    context.setDeterministicAlgorithms(on, warn_only);
  }
};

// What flash attention takes: queries, keys and values as views of qkv [B * T, (H + 2K) * D]. With `cum_seq`, the tokens at which
// segments begin and the last one ends (int32 [S + 1], over all rows), they are [B * T, heads, D], and none sees another
// segment's; else [B, T, heads, D].
struct Flash {
  at::Tensor q, k, v;
  std::optional<at::Tensor> cum_seq;
  int64_t batch, time, heads, longest;
  std::optional<int64_t> left, right;  // of a sliding window: how many tokens before and after its own a query sees

  Flash(const at::Tensor& qkv, const at::Tensor* cum_seq, int64_t longest, int64_t window, int64_t batch, int64_t heads,
        int64_t kv_heads, int64_t d)
      : batch(batch), heads(heads), longest(longest) {
    TORCH_CHECK(qkv.is_contiguous() && qkv.dim() == 2 && batch > 0 && kv_heads > 0 && qkv.size(0) % batch == 0 &&
                    qkv.size(1) == (heads + 2 * kv_heads) * d && heads % kv_heads == 0,
                "attention: shapes do not fit");
    time = qkv.size(0) / batch;
    if (cum_seq) this->cum_seq = *cum_seq;
    if (!cum_seq) this->longest = time;
    if (window > 0) left = window - 1, right = 0;
    auto all = tokens(qkv, heads + 2 * kv_heads, d);
    q = all.narrow(-2, 0, heads), k = all.narrow(-2, heads, kv_heads), v = all.narrow(-2, heads + kv_heads, kv_heads);
  }

  at::Tensor tokens(const at::Tensor& x, int64_t heads, int64_t d) const {
    return cum_seq ? x.view({batch * time, heads, d}) : x.view({batch, time, heads, d});
  }
  // [B * T, heads * D]: no copy where the heads of a token lie side by side.
  at::Tensor rows(const at::Tensor& x) const { return x.reshape({batch * time, x.size(-2) * x.size(-1)}); }
  // Flash attention's statistics are [H, B * T] with segments, else [B, H, T]; ours are [B, H, T], as a view.
  at::Tensor statistics(const at::Tensor& x) const {
    return cum_seq ? x.view({heads, batch, time}).transpose(0, 1) : x;
  }
  at::Tensor flash_statistics(const at::Tensor& x) const {
    return cum_seq ? x.transpose(0, 1).reshape({heads, batch * time}) : x;
  }
};

}  // namespace

extern "C" {

// Causal. `cum_seq`: see Flash, null: rows alone divide the tokens; `longest`: tokens of the longest segment; `window`: how many
// tokens a query sees, its own among them, 0: all before it. out: [B * T, H * D], lse: float [B, H, T].
char* corral_flash_attention(at::Tensor* qkv, at::Tensor* cum_seq, int64_t longest, int64_t window, int64_t batch,
                             int64_t heads, int64_t kv_heads, int64_t head_dim, double scale, at::Tensor** out,
                             at::Tensor** lse) {
  return guarded([&] {
    at::AutoDispatchBelowAutograd no_autograd;
    Flash f(*qkv, cum_seq, longest, window, batch, heads, kv_heads, head_dim);
    auto result = at::_flash_attention_forward(f.q, f.k, f.v, f.cum_seq, f.cum_seq, f.longest, f.longest, /*dropout_p=*/0.0,
                                               /*is_causal=*/true, /*return_debug_mask=*/false, scale, f.left, f.right);
    auto o = f.rows(std::get<0>(result)), l = std::get<1>(result);
    TORCH_CHECK(l.numel() == batch * heads * f.time, "attention: unexpected statistics of shape ", l.sizes());
    *out = new at::Tensor(o.contiguous()), *lse = new at::Tensor(f.statistics(l));
  });
}

char* corral_flash_attention_backward(at::Tensor* dout, at::Tensor* qkv, at::Tensor* out, at::Tensor* lse,
                                      at::Tensor* cum_seq, int64_t longest, int64_t window, int64_t batch, int64_t heads,
                                      int64_t kv_heads, int64_t head_dim, double scale, bool deterministic,
                                      at::Tensor** dqkv) {
  return guarded([&] {
    at::AutoDispatchBelowAutograd no_autograd;
    Determinism determinism(deterministic);
    Flash f(*qkv, cum_seq, longest, window, batch, heads, kv_heads, head_dim);
    at::Tensor none, segments = f.cum_seq.value_or(none);  // no state of dropout
    auto d = at::_flash_attention_backward(f.tokens(*dout, heads, head_dim), f.q, f.k, f.v, f.tokens(*out, heads, head_dim),
                                           f.flash_statistics(*lse), segments, segments, f.longest, f.longest,
                                           /*dropout_p=*/0.0, /*is_causal=*/true, none, none, scale, f.left, f.right);
    // libtorch's form makes new tensors for the three: they are copied to lie side by side.
    *dqkv = new at::Tensor(at::cat({f.rows(std::get<0>(d)), f.rows(std::get<1>(d)), f.rows(std::get<2>(d))}, 1));
  });
}

// A copy in pinned host memory, which the GPU reads and writes by itself.
char* corral_pin(at::Tensor* t, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(t->pin_memory()); });
}

// dw (float) = or += dy^T x, for dy [N, O], x [N, I] in bfloat16 or float16; summed in float, rounded never.
char* corral_grad_weight(at::Tensor* dw, at::Tensor* dy, at::Tensor* x, bool add) {
  return guarded([&] {
    at::AutoDispatchBelowAutograd no_autograd;
    if (add)
      at::addmm_out(*dw, *dw, dy->t(), *x, at::kFloat);
    else
      at::mm_out(*dw, dy->t(), *x, at::kFloat);
  });
}

// Rows a[ends[e - 1] .. ends[e]] times b[e], for a [M, K], b [E, K, N]: [M, N]; or, for b [M, N] and a [K, M], the products of columns of a
// and rows of b between the ends: [E, K, N].
char* corral_grouped_mm(at::Tensor* a, at::Tensor* b, at::Tensor* ends, at::Tensor** out) {
  return guarded([&] {
    at::AutoDispatchBelowAutograd no_autograd;
    *out = new at::Tensor(at::_grouped_mm(*a, *b, *ends));
  });
}

// a b in 8-bit floats, times the scales of both, in bfloat16 or float. a: [M, K], b: [K, N] with columns in one piece.
char* corral_scaled_mm(at::Tensor* a, at::Tensor* b, at::Tensor* scale_a, at::Tensor* scale_b, bool float32, bool fast,
                       at::Tensor** out) {
  return guarded([&] {
    at::AutoDispatchBelowAutograd no_autograd;
    *out = new at::Tensor(at::_scaled_mm(*a, *b, *scale_a, *scale_b, /*bias=*/{}, /*scale_result=*/{},
                                         float32 ? at::kFloat : at::kBFloat16, fast));
  });
}

}  // extern "C"
