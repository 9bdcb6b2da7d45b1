// One translation unit: most of the time of each is spent on reading libtorch's headers.
#include "comm/c10d.cpp"
#include "host/allocations.cpp"
#include "host/names.cpp"
#include "ops/gpu_ops.cpp"
#include "ops/ops.cpp"
#include "quant/quant_ops.cpp"
