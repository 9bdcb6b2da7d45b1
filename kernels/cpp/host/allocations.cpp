// Where libtorch's tensors on the CPU come from, and what of it a thread takes.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "abi.h"
#include "guard.h"

namespace {

// Of malloc, aligned here. glibc's aligned_alloc (before 2.38) takes more than it keeps, so that what was freed does not hold
// the next tensor of just that size: training, which frees and takes the same sizes in every step, scatters over the heap.
class MallocAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (n == 0) return {nullptr, nullptr, &release, cpu};
    void* block = n <= SIZE_MAX - kAlignment ? std::malloc(n + kAlignment) : nullptr;
    if (!block) {
      c10::profiledCPUMemoryReporter().OutOfMemory(n);
      TORCH_CHECK(false, "DefaultCPUAllocator: not enough memory: you tried to allocate ", n, " bytes.");
    }
    // malloc's blocks are aligned to 16 bytes: at least that many lie before the data, and hold where the block begins.
    void* data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block) / kAlignment + 1) * kAlignment);
    static_cast<void**>(data)[-1] = block;
    c10::profiledCPUMemoryReporter().New(data, n);
    return {data, data, &release, cpu};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }

 private:
  static constexpr size_t kAlignment = 64;

  static void release(void* data) {
    if (!data) return;
    c10::profiledCPUMemoryReporter().Delete(data);
    std::free(static_cast<void**>(data)[-1]);
  }
};

struct Count : c10::MemoryReportingInfoBase {
  void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device) override {
    live += bytes;
    peak = std::max(peak, live);
  }
  bool memoryProfilingEnabled() const override { return true; }

  int64_t live = 0, peak = 0;
};

}  // namespace

extern "C" {

// For all tensors that are made from here on.
char* corral_allocate_by_malloc() {
  return corral::guarded([] {
    static MallocAllocator allocator;
    c10::SetCPUAllocator(&allocator);
  });
}

// From here on what this thread allocates is counted, until corral_allocations_end.
char* corral_allocations_begin() {
  return corral::guarded(
      [] { c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, std::make_shared<Count>()); });
}

// The most bytes at once, and those that are still there.
char* corral_allocations_end(int64_t* peak, int64_t* live) {
  return corral::guarded([&] {
    auto info = c10::ThreadLocalDebugInfo::_pop(c10::DebugInfoKind::PROFILER_STATE);
    const auto& count = static_cast<const Count&>(*info);
    *peak = count.peak, *live = count.live;
  });
}

}  // extern "C"
