// The C ABI of quantization on the CPU: tensors in, threads split, kernels called. Every function returns null, or a
// message that the caller frees.
#include <ATen/Parallel.h>

#include "abi.h"
#include "cpu_quant.h"
#include "guard.h"
#include "tensors.h"

namespace corral {

extern const QuantKernels quant_v2, quant_v3, quant_v4;

namespace {

const QuantKernels& kernels() {
  static const QuantKernels& best = best_of(quant_v2, quant_v3, quant_v4);
  return best;
}

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// Rows per task, so that a task has some 64k values.
int64_t quant_grain(int64_t width) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, width)); }

Panel panel_of(const at::Tensor& out, int64_t height, int64_t width, int64_t row, int64_t column) {
  need(out, "out");
  TORCH_CHECK(out.dim() == 2 && row >= 0 && column >= 0 && row + out.size(0) <= height &&
                  column + out.size(1) <= width,
              "rows and columns of out are not in the weight");
  return {width, row, out.size(0), column, out.size(1)};
}

// f(panel, out) for the rows of every thread
template <class F>
void by_rows(const at::Tensor& out, Panel p, F f) {
  at::parallel_for(0, p.rows, quant_grain(p.columns), [&](int64_t a, int64_t b) {
    f(Panel{p.width, p.row + a, b - a, p.column, p.columns}, at_row(out, a, p.columns));
  });
}

Moment moment_of(const at::Tensor& codes, const at::Tensor& absmax, const at::Tensor& map,
                 const at::Tensor& midpoints, int64_t n) {
  same(codes, at::kByte, n, "codes"), same(absmax, at::kFloat, blocks_of(n, kCodeBlock), "absmax");
  same(map, at::kFloat, 256, "map"), same(midpoints, at::kFloat, 255, "midpoints");
  return {codes.data_ptr<uint8_t>(), absmax.data_ptr<float>(), map.data_ptr<float>(), midpoints.data_ptr<float>()};
}

}  // namespace
}  // namespace corral

using namespace corral;

extern "C" {

char* corral_nf4_quantize(at::Tensor* x, at::Tensor* packed, at::Tensor* absmax) {
  return guarded([&] {
    int64_t n = x->numel(), blocks = blocks_of(n, kNf4Block);
    same(*x, at::kFloat, n, "x"), same(*packed, at::kByte, (n + 1) / 2, "packed");
    same(*absmax, at::kFloat, blocks, "absmax");
    at::parallel_for(0, blocks, 1024, [&](int64_t a, int64_t b) {
      int64_t first = a * kNf4Block;
      kernels().nf4(x->data_ptr<float>() + first, packed->data_ptr<uint8_t>() + first / 2, absmax->data_ptr<float>() + a,
                    std::min(b * kNf4Block, n) - first);
    });
  });
}

// out [rows, columns] = W[row .., column ..] of W [height, width]; codes, map and offset null: absmax are the scales
char* corral_nf4_dequantize(at::Tensor* packed, at::Tensor* absmax, at::Tensor* codes, at::Tensor* map, at::Tensor* offset,
                            int64_t height, int64_t width, int64_t row, int64_t column, at::Tensor* out) {
  return guarded([&] {
    int64_t n = height * width, blocks = blocks_of(n, kNf4Block);
    same(*packed, at::kByte, (n + 1) / 2, "packed");
    Nf4 w{packed->data_ptr<uint8_t>(), nullptr, nullptr, nullptr, 0};
    if (codes) {
      same(*codes, at::kByte, blocks, "codes"), same(*map, at::kFloat, 256, "map");
      same(*offset, at::kFloat, 1, "offset");
      w.offset = *offset->data_ptr<float>();
      w.codes = codes->data_ptr<uint8_t>(), w.map = map->data_ptr<float>();
    }
    same(*absmax, at::kFloat, codes ? blocks_of(blocks, kCodeBlock) : blocks, "absmax");
    w.absmax = absmax->data_ptr<float>();
    Type t = type_of(*out);
    by_rows(*out, panel_of(*out, height, width, row, column),
            [&](Panel p, void* to) { kernels().nf4_panel(t, w, p, to); });
  });
}

char* corral_int8_quantize(at::Tensor* x, at::Tensor* q, at::Tensor* absmax) {
  return guarded([&] {
    TORCH_CHECK(x->dim() == 2, "x must be a matrix");
    int64_t rows = x->size(0), width = x->size(1);
    same(*x, at::kFloat, rows * width, "x"), same(*q, at::kChar, rows * width, "q");
    same(*absmax, at::kFloat, rows, "absmax");
    at::parallel_for(0, rows, quant_grain(width), [&](int64_t a, int64_t b) {
      kernels().int8(x->data_ptr<float>() + a * width, q->data_ptr<int8_t>() + a * width, absmax->data_ptr<float>() + a,
                     b - a, width);
    });
  });
}

char* corral_int8_dequantize(at::Tensor* q, at::Tensor* absmax, int64_t height, int64_t width, int64_t row,
                             int64_t column, at::Tensor* out) {
  return guarded([&] {
    same(*q, at::kChar, height * width, "q"), same(*absmax, at::kFloat, height, "absmax");
    Type t = type_of(*out);
    by_rows(*out, panel_of(*out, height, width, row, column), [&](Panel p, void* to) {
      kernels().int8_panel(t, q->data_ptr<int8_t>(), absmax->data_ptr<float>(), p, to);
    });
  });
}

char* corral_adamw8(at::Tensor* p, at::Tensor* g, at::Tensor* m_codes, at::Tensor* m_absmax, at::Tensor* m_map,
                    at::Tensor* m_midpoints, at::Tensor* v_codes, at::Tensor* v_absmax, at::Tensor* v_map,
                    at::Tensor* v_midpoints, at::Tensor* copy, int64_t decayed, double lr, double beta1, double beta2,
                    double eps, double decay, double correction1, double correction2, double grad_scale) {
  return guarded([&] {
    int64_t n = p->numel();
    same(*p, acc_of(*p), n, "p"), same(*g, acc_of(*p), n, "g");
    if (copy) same(*copy, at::kBFloat16, n, "copy");
    AdamW8 a{p->data_ptr(), copy ? copy->data_ptr() : nullptr, g->data_ptr(),
             moment_of(*m_codes, *m_absmax, *m_map, *m_midpoints, n),
             moment_of(*v_codes, *v_absmax, *v_map, *v_midpoints, n), n, decayed, lr, beta1, beta2, eps, decay,
             correction1, correction2, grad_scale};
    Type t = type_of(*p);
    at::parallel_for(0, blocks_of(n, kCodeBlock), 128, [&](int64_t first, int64_t last) {
      kernels().adamw8(t, a, first, last);
    });
  });
}

}  // extern "C"
