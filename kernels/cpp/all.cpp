// One translation unit: most of the time of each is spent on reading libtorch's headers.
#include "allocations.cpp"
#include "c10d.cpp"
#include "gpu_ops.cpp"
#include "ops.cpp"
#include "quant_ops.cpp"
