// The C ABI that counts what libtorch's CPU allocator gives to a thread: as its profiler would be told.
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "guard.h"

namespace {

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
