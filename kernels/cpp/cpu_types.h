// What the kernels of the CPU in ops/ and quant/ share. No library headers: see ops/cpu_rows.h.
#pragma once
#include <cstdint>

namespace corral {

// Element types of activations and weights. Sums and statistics are kept in float (double for Double).
enum class Type : int { Float = 0, Double = 1, BFloat16 = 2 };

}  // namespace corral
