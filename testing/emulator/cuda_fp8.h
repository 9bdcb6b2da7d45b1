// In place of CUDA's header, for the emulator: the nearest 8-bit float, ties to even, by trying all.
#pragma once
#include <cmath>

enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };
typedef unsigned char __nv_fp8_storage_t;

// What a code without sign stands for; NaN where it is no number.
inline float fp8_value(int code, __nv_fp8_interpretation_t kind) {
  const int mantissa_bits = kind == __NV_E4M3 ? 3 : 2, bias = kind == __NV_E4M3 ? 7 : 15;
  const int exponent = code >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
  if (kind == __NV_E4M3 ? code == 0x7f : code > 0x7b) return NAN;
  return exponent == 0 ? std::ldexp(float(mantissa), 1 - bias - mantissa_bits)
                       : std::ldexp(float((1 << mantissa_bits) + mantissa), exponent - bias - mantissa_bits);
}

inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t, __nv_fp8_interpretation_t kind) {
  if (x != x) return 0x7f;
  const float size = std::fabs(x);
  const int last = kind == __NV_E4M3 ? 0x7e : 0x7b;
  int low = 0, high = last;  // the largest code whose value is at most `size`
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (fp8_value(middle, kind) <= size) low = middle;
    else high = middle - 1;
  }
  if (low < last) {
    const float down = size - fp8_value(low, kind), up = fp8_value(low + 1, kind) - size;
    if (up < down || (up == down && low % 2)) low++;
  }
  return __nv_fp8_storage_t(low | (std::signbit(x) ? 0x80 : 0));
}
