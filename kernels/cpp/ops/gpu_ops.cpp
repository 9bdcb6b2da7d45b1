// What CUDA runs through libtorch's own operations and tch does not offer: flash attention with its statistics, and
// products of bfloat16 with float32 results. They are reached through the dispatcher, so nothing of CUDA is linked here.
#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
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
struct Deterministic {
  at::Context& context = at::globalContext();
  bool on = context.deterministicAlgorithms(), warn_only = context.deterministicAlgorithmsWarnOnly(),
       fill = context.deterministicFillUninitializedMemory();
  Deterministic() {
    context.setDeterministicAlgorithms(true, false);
    context.setDeterministicFillUninitializedMemory(false);
  }
  ~Deterministic() {
    context.setDeterministicFillUninitializedMemory(fill);
    context.setDeterministicAlgorithms(on, warn_only);
  }
};

// Views of some heads of qkv [B * T, (H + 2K) * D], [B, heads, T, D].
struct Heads {
  at::Tensor q, k, v;
  int64_t batch, time;
  Heads(const at::Tensor& qkv, int64_t batch, int64_t heads, int64_t kv_heads, int64_t d) : batch(batch) {
    TORCH_CHECK(qkv.is_cuda() && qkv.is_contiguous() && qkv.dim() == 2 && batch > 0 && qkv.size(0) % batch == 0 &&
                    qkv.size(1) == (heads + 2 * kv_heads) * d && heads % kv_heads == 0,
                "attention: shapes do not fit");
    time = qkv.size(0) / batch;
    auto all = qkv.view({batch, time, heads + 2 * kv_heads, d}).transpose(1, 2);
    q = all.narrow(1, 0, heads), k = all.narrow(1, heads, kv_heads), v = all.narrow(1, heads + kv_heads, kv_heads);
  }
  // [B, heads, T, D] as [B * T, heads * D]: no copy where the heads of a position lie side by side.
  at::Tensor rows(const at::Tensor& x) const {
    return x.transpose(1, 2).reshape({batch * time, x.size(1) * x.size(3)});
  }
};

}  // namespace

extern "C" {

// Causal; out: [B * T, H * D], lse: float [B, H, T].
char* corral_flash_attention(at::Tensor* qkv, int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim,
                             double scale, at::Tensor** out, at::Tensor** lse) {
  return guarded([&] {
    at::AutoDispatchBelowAutograd no_autograd;
    Heads h(*qkv, batch, heads, kv_heads, head_dim);
    auto result = at::_scaled_dot_product_flash_attention(h.q, h.k, h.v, /*dropout_p=*/0.0, /*is_causal=*/true,
                                                          /*return_debug_mask=*/false, scale);
    auto o = h.rows(std::get<0>(result)), l = std::get<1>(result);
    TORCH_CHECK(l.numel() == batch * heads * h.time, "attention: unexpected statistics of shape ", l.sizes());
    *out = new at::Tensor(o.contiguous()), *lse = new at::Tensor(l.contiguous());
  });
}

char* corral_flash_attention_backward(at::Tensor* dout, at::Tensor* qkv, at::Tensor* out, at::Tensor* lse,
                                      int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, double scale,
                                      at::Tensor** dqkv) {
  return guarded([&] {
    at::AutoDispatchBelowAutograd no_autograd;
    Deterministic deterministic;
    Heads h(*qkv, batch, heads, kv_heads, head_dim);
    auto split = [&](const at::Tensor& x) { return x.view({batch, h.time, heads, head_dim}).transpose(1, 2); };
    at::Tensor none;  // lengths of packed sequences, state of dropout: there are none
    auto d = at::_scaled_dot_product_flash_attention_backward(split(*dout), h.q, h.k, h.v, split(*out), *lse, none, none,
                                                              h.time, h.time, /*dropout_p=*/0.0, /*is_causal=*/true, none,
                                                              none, scale);
    *dqkv = new at::Tensor(at::cat({h.rows(std::get<0>(d)), h.rows(std::get<1>(d)), h.rows(std::get<2>(d))}, 1));
  });
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

}  // extern "C"
