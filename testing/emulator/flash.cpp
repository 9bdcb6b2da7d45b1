// libtorch's flash attention for CPU tensors, which has it for CUDA alone: as its documentation and PyTorch's source
// (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp) say, computed segment by segment in float32. Dense: queries
// [B, T, H, D], statistics [B, H, T]. With cum_seq (int32 [S + 1]): [N, H, D], statistics [H, N].
#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>

namespace {

using Optional = std::optional<at::Tensor>;

// Where segments begin in the tokens of all rows, and where the last one ends.
std::vector<int64_t> segments(const at::Tensor& q, const at::Tensor& cum_seq, int64_t longest) {
  std::vector<int64_t> at;
  if (!cum_seq.defined()) {
    for (int64_t b = 0; b <= q.size(0); b++) at.push_back(b * q.size(1));
    return at;
  }
  TORCH_CHECK(cum_seq.scalar_type() == at::kInt && cum_seq.is_contiguous(), "cu_seqlens_q must have dtype int32");
  for (int64_t i = 0; i < cum_seq.numel(); i++) at.push_back(cum_seq[i].item<int>());
  TORCH_CHECK(at.front() == 0 && at.back() == q.size(0), "segments from ", at.front(), " to ", at.back());
  for (size_t i = 1; i < at.size(); i++) {
    TORCH_CHECK(at[i] >= at[i - 1] && at[i] - at[i - 1] <= longest, "a segment of ", at[i] - at[i - 1], " tokens");
  }
  return at;
}

at::Tensor flat(const at::Tensor& x) { return x.reshape({-1, x.size(-2), x.size(-1)}); }

// Minus infinity where the queries of a segment do not see a key.
at::Tensor mask(int64_t n, std::optional<int64_t> left) {
  auto i = at::arange(n).unsqueeze(1), j = at::arange(n).unsqueeze(0);
  auto unseen = j > i;
  if (left && *left >= 0) unseen = unseen.logical_or(j < i - *left);
  return at::zeros({n, n}).masked_fill(unseen, -std::numeric_limits<float>::infinity());
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal, std::optional<int64_t> right) {
  TORCH_CHECK(q.scalar_type() == at::kBFloat16 && k.scalar_type() == at::kBFloat16 && v.scalar_type() == at::kBFloat16);
  TORCH_CHECK(q.stride(-1) == 1 && k.stride(-1) == 1 && v.stride(-1) == 1 && q.size(-1) % 8 == 0);
  TORCH_CHECK(causal && right.value_or(0) == 0 && k.sizes() == v.sizes() && q.size(-2) % k.size(-2) == 0);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Optional& cum_seq_q, const Optional& cum_seq_k,
    int64_t max_q, int64_t max_k, double dropout_p, bool is_causal, bool, std::optional<double> scale,
    std::optional<int64_t> left, std::optional<int64_t> right, const Optional&, const Optional&) {
  check(q, k, v, is_causal, right);
  auto at = segments(q, cum_seq_q.value_or(at::Tensor()), max_q);
  const int64_t heads = q.size(-2), group = heads / k.size(-2);
  auto qf = flat(q), kf = flat(k), vf = flat(v);
  auto out = at::empty(qf.sizes(), qf.options()), lse = at::empty({heads, qf.size(0)}, qf.options().dtype(at::kFloat));
  for (size_t s = 0; s + 1 < at.size(); s++) {
    const int64_t n = at[s + 1] - at[s];
    for (int64_t h = 0; h < heads; h++) {
      auto part = [&](const at::Tensor& x, int64_t head) { return x.narrow(0, at[s], n).select(1, head).to(at::kFloat); };
      auto scores = part(qf, h).mm(part(kf, h / group).t()) * *scale + mask(n, left);
      auto l = scores.logsumexp(-1);
      lse.select(0, h).narrow(0, at[s], n).copy_(l);
      out.narrow(0, at[s], n).select(1, h).copy_((scores - l.unsqueeze(1)).exp().mm(part(vf, h / group)));
    }
  }
  if (!cum_seq_q) lse = lse.view({heads, q.size(0), q.size(1)}).transpose(0, 1).contiguous();
  return {out.view(q.sizes()), lse, at::Tensor(), at::Tensor(), at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& logsumexp, const at::Tensor& cum_seq_q, const at::Tensor& cum_seq_k, int64_t max_q, int64_t max_k,
    double dropout_p, bool is_causal, const at::Tensor&, const at::Tensor&, std::optional<double> scale,
    std::optional<int64_t> left, std::optional<int64_t> right) {
  check(q, k, v, is_causal, right);
  auto at = segments(q, cum_seq_q, max_q);
  const int64_t heads = q.size(-2), group = heads / k.size(-2);
  auto qf = flat(q), kf = flat(k), vf = flat(v), of = flat(out), gf = flat(dout);
  auto lse = cum_seq_q.defined() ? logsumexp : logsumexp.transpose(0, 1).reshape({heads, -1});
  TORCH_CHECK(lse.size(0) == heads && lse.size(1) == qf.size(0) && lse.is_contiguous(), "statistics of ", logsumexp.sizes());
  auto zeros = [](const at::Tensor& x) { return at::zeros(x.sizes(), x.options().dtype(at::kFloat)); };
  auto dq = zeros(qf), dk = zeros(kf), dv = zeros(vf);
  for (size_t s = 0; s + 1 < at.size(); s++) {
    const int64_t n = at[s + 1] - at[s];
    for (int64_t h = 0; h < heads; h++) {
      auto rows = [&](const at::Tensor& x, int64_t head) { return x.narrow(0, at[s], n).select(1, head); };
      auto part = [&](const at::Tensor& x, int64_t head) { return rows(x, head).to(at::kFloat); };
      auto qh = part(qf, h), kh = part(kf, h / group), vh = part(vf, h / group), g = part(gf, h);
      auto p = (qh.mm(kh.t()) * *scale + mask(n, left) - lse.select(0, h).narrow(0, at[s], n).unsqueeze(1)).exp();
      auto ds = p * (g.mm(vh.t()) - (g * part(of, h)).sum(-1, true)) * *scale;
      rows(dq, h).add_(ds.mm(kh)), rows(dk, h / group).add_(ds.t().mm(qh)), rows(dv, h / group).add_(p.t().mm(g));
    }
  }
  auto as = [](const at::Tensor& x, const at::Tensor& like) { return x.view(like.sizes()).to(like.scalar_type()); };
  return {as(dq, q), as(dk, k), as(dv, v)};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("_flash_attention_forward", forward);
  m.impl("_flash_attention_backward", backward);
}
