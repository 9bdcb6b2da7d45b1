// What the CPU operations ask of tensors, and which instruction set they run with.
#pragma once
#include <ATen/core/Tensor.h>

#include "cpu_types.h"

namespace corral {

// The table of kernels for the best instruction set of this processor.
template <class Kernels>
const Kernels& best_of(const Kernels& v2, const Kernels& v3, const Kernels& v4) {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return v4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return v3;
  return v2;
}

inline Type type_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::Float;
    case at::kDouble: return Type::Double;
    case at::kBFloat16: return Type::BFloat16;
    default: TORCH_CHECK(false, "no CPU kernel for dtype ", t.scalar_type());
  }
}

inline at::ScalarType acc_of(const at::Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline void need(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.device().is_cpu() && t.is_contiguous(), name, " must be a contiguous CPU tensor");
}

// The kernels take plain pointers: what they read or write must have this dtype and size.
inline void same(const at::Tensor& t, at::ScalarType dtype, int64_t numel, const char* name) {
  need(t, name);
  TORCH_CHECK(t.scalar_type() == dtype && t.numel() == numel, name, " must have ", numel, " elements of ", dtype,
              ", not ", t.numel(), " of ", t.scalar_type());
}

inline char* at_row(const at::Tensor& t, int64_t row, int64_t width) {
  return (char*)t.data_ptr() + row * width * t.element_size();
}

}  // namespace corral
