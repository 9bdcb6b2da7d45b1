// What needs CUDA's symbols, in a shared object of its own (libcorral_cuda.so): it is embedded in the binary and opened
// when a CUDA device is first asked for, so that runs on CPU load none of CUDA's libraries. All device indices are those
// that CUDA_VISIBLE_DEVICES leaves.
#define USE_C10D_NCCL
#include "abi.h"
#include "guard.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>  // graph_pool_handle alone
#include <ATen/ops/from_blob.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <array>
#include <mutex>
#include <optional>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

using corral::guarded;
using std::chrono::milliseconds;
namespace allocator = c10::cuda::CUDACachingAllocator;

namespace {
c10::cuda::CUDAStream unpack(const Stream& s) {
  return c10::cuda::CUDAStream::unpack3(s.id, static_cast<c10::DeviceIndex>(s.device), c10::DeviceType::CUDA);
}

Stream pack(const c10::cuda::CUDAStream& s) {
  return {s.id(), s.device_index()};
}

c10::DeviceIndex index(int device) {
  TORCH_CHECK(device >= 0 && device < c10::cuda::device_count(), "no CUDA device ", device, ": there are ",
              static_cast<int>(c10::cuda::device_count()));
  return static_cast<c10::DeviceIndex>(device);
}
} // namespace

extern "C" {

// Whether libtorch's CPU part knows of its CUDA part. It looks once, at the first call that asks for it (a random seed,
// say): if that was before libtorch_cuda was loaded, CUDA stays unknown to this process.
char* corral_cuda_hooks(int* known) {
  return guarded([&] {
    *known = at::detail::getCUDAHooks().hasCUDART();
    // Segments that grow leave no holes between the shapes of sampling and of training. PyTorch's own settings win.
    if (!std::getenv("PYTORCH_ALLOC_CONF") && !std::getenv("PYTORCH_CUDA_ALLOC_CONF"))
      c10::CachingAllocator::setAllocatorSettings("expandable_segments:True");
  });
}

// Throws, with the driver's reason, where there is no usable device.
char* corral_cuda_device_count(int* count) {
  return guarded([&] { *count = c10::cuda::device_count_ensure_non_zero(); });
}

// `name` has room for 256 bytes, `uuid` for 16.
char* corral_cuda_device_info(int device, char* name, uint8_t* uuid, int* major, int* minor, int* processors,
                              int64_t* memory) {
  return guarded([&] {
    const cudaDeviceProp* p = at::cuda::getDeviceProperties(index(device));
    std::strncpy(name, p->name, 255);
    name[255] = 0;
    std::memcpy(uuid, p->uuid.bytes, 16);
    *major = p->major;
    *minor = p->minor;
    *processors = p->multiProcessorCount;
    *memory = static_cast<int64_t>(p->totalGlobalMem);
  });
}

char* corral_cuda_set_device(int device) {
  return guarded([&] { c10::cuda::set_device(index(device)); });
}

char* corral_cuda_synchronize(int device) {
  return guarded([&] {
    c10::cuda::CUDAGuard guard(index(device));
    c10::cuda::device_synchronize();
  });
}

// out: allocated now, its peak, reserved now, its peak; bytes.
char* corral_cuda_memory(int device, int64_t* out) {
  return guarded([&] {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    const auto stats = allocator::getDeviceStats(index(device));
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    out[0] = stats.allocated_bytes[all].current;
    out[1] = stats.allocated_bytes[all].peak;
    out[2] = stats.reserved_bytes[all].current;
    out[3] = stats.reserved_bytes[all].peak;
  });
}

char* corral_cuda_stream_current(int device, Stream* out) {
  return guarded([&] { *out = pack(c10::cuda::getCurrentCUDAStream(index(device))); });
}

// One of libtorch's pool.
char* corral_cuda_stream_new(int device, Stream* out) {
  return guarded([&] { *out = pack(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, index(device))); });
}

// What is queued on `waits` from here on begins when what is queued on `other` now is done.
char* corral_cuda_stream_wait(Stream waits, Stream other) {
  return guarded([&] {
    at::cuda::CUDAEvent event;
    event.record(unpack(other));
    event.block(unpack(waits));
  });
}

char* corral_cuda_stream_synchronize(Stream stream) {
  return guarded([&] { unpack(stream).synchronize(); });
}

// Queues a copy, between a device and pinned memory; the caller keeps both tensors until the stream has done it.
char* corral_cuda_copy(at::Tensor* to, at::Tensor* from, Stream stream) {
  return guarded([&] {
    c10::cuda::CUDAStreamGuard guard(unpack(stream));
    at::NoGradGuard no_grad;
    to->copy_(*from, /*non_blocking=*/true);
  });
}

// Bytes of pinned memory, exactly as many: libtorch's own pinned memory is rounded up to a power of two.
char* corral_cuda_pinned(int64_t bytes, at::Tensor** out) {
  return guarded([&] {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    const size_t page = 4096, size = (static_cast<size_t>(bytes) + page - 1) / page * page + page;
    void* memory = std::aligned_alloc(page, size);
    TORCH_CHECK(memory, "no host memory for ", bytes, " bytes");
    const auto error = cudaHostRegister(memory, size, cudaHostRegisterPortable);
    if (error != cudaSuccess) {
      std::free(memory);
      C10_CUDA_CHECK(error);
    }
    auto release = [](void* memory) {
      // No copy may be under way. At the end of the process the driver may be gone already; the memory goes with it.
      (void)cudaDeviceSynchronize();
      (void)cudaHostUnregister(memory);
      std::free(memory);
    };
    *out = new at::Tensor(at::from_blob(memory, {bytes}, release, at::TensorOptions().dtype(at::kByte)));
  });
}

char* corral_cuda_empty_cache() {
  return guarded([&] { allocator::emptyCache(); });
}

} // extern "C"

namespace {

// Where a device's graphs are captured, one at a time: one stream for all, so that libraries keep one workspace, and one pool
// of memory while there are graphs, since they run one after the other and what outlives a run is not in it.
struct Capturing {
  std::optional<c10::cuda::CUDAStream> stream, before;
  c10::cuda::MempoolId_t pool{0, 0};
  int graphs = 0;  // that the pool has memory for
  std::mutex mutex;
};
Capturing& capturing(c10::DeviceIndex device) {
  static std::array<Capturing, 64> all;
  return all.at(device);
}

} // namespace

struct GraphPtr {
  c10::DeviceIndex device;
  cudaGraphExec_t exec = nullptr;

  // libtorch's own CUDAGraph is not used: where a capture fails, it leaves the allocator and the generator capturing.
  void release() {
    auto& c = capturing(device);
    if (exec) C10_CUDA_CHECK_WARN(cudaGraphExecDestroy(std::exchange(exec, nullptr)));
    allocator::releasePool(device, c.pool);
    c.graphs--;
  }
};

extern "C" {

// From here to the end what this thread queues is captured, not run: on a stream of its own, which is current meanwhile. No
// random number may be drawn.
char* corral_cuda_graph_begin(int device, GraphPtr** out) {
  return guarded([&] {
    c10::cuda::CUDAGuard guard(index(device));
    auto graph = std::make_unique<GraphPtr>(GraphPtr{index(device)});
    auto& c = capturing(graph->device);
    std::lock_guard lock(c.mutex);
    TORCH_CHECK(!c.before, "a graph is being captured already");
    if (!c.stream) c.stream = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, graph->device);
    if (c.graphs == 0) c.pool = at::cuda::graph_pool_handle();
    const auto before = c10::cuda::getCurrentCUDAStream(graph->device);
    at::cuda::CUDAEvent event;
    event.record(before);
    event.block(*c.stream);
    allocator::beginAllocateToPool(graph->device, c.pool, [own = c.stream->stream()](cudaStream_t s) { return s == own; });
    c.graphs++;
    // Other threads, NCCL's watchdog among them, may go on calling CUDA.
    const auto error = cudaStreamBeginCapture(c.stream->stream(), cudaStreamCaptureModeThreadLocal);
    if (error != cudaSuccess) {
      allocator::endAllocateToPool(graph->device, c.pool);
      graph->release();
      C10_CUDA_CHECK(error);
    }
    c.before = before;
    c10::cuda::setCurrentCUDAStream(*c.stream);
    *out = graph.release();
  });
}

// Whatever the capture came to, libtorch is as it was before; the graph is to be freed.
char* corral_cuda_graph_end(GraphPtr* graph) {
  return guarded([&] {
    c10::cuda::CUDAGuard guard(graph->device);
    auto& c = capturing(graph->device);
    std::lock_guard lock(c.mutex);
    TORCH_CHECK(c.before, "no graph is being captured");
    cudaGraph_t captured = nullptr;
    const auto error = cudaStreamEndCapture(c.stream->stream(), &captured);
    allocator::endAllocateToPool(graph->device, c.pool);
    c10::cuda::setCurrentCUDAStream(*std::exchange(c.before, std::nullopt));
    C10_CUDA_CHECK(error);
    TORCH_CHECK(captured, "nothing was captured");
    const auto instantiated = cudaGraphInstantiate(&graph->exec, captured, 0);
    C10_CUDA_CHECK_WARN(cudaGraphDestroy(captured));
    C10_CUDA_CHECK(instantiated);
  });
}

// On the current stream.
char* corral_cuda_graph_replay(GraphPtr* graph) {
  return guarded([&] {
    c10::cuda::CUDAGuard guard(graph->device);
    C10_CUDA_CHECK(cudaGraphLaunch(graph->exec, c10::cuda::getCurrentCUDAStream(graph->device).stream()));
  });
}

// Not while it runs.
char* corral_cuda_graph_free(GraphPtr* graph) {
  return guarded([&] {
    std::unique_ptr<GraphPtr> owned(graph);
    c10::cuda::CUDAGuard guard(graph->device);
    std::lock_guard lock(capturing(graph->device).mutex);
    graph->release();
  });
}

// A cubin or PTX (NUL-terminated). Loaded for all devices, when first used.
char* corral_cuda_module_load(const void* image, cudaLibrary_t* out) {
  return guarded([&] {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    C10_CUDA_CHECK(cudaLibraryLoadData(out, image, nullptr, nullptr, 0, nullptr, nullptr, 0));
  });
}

char* corral_cuda_module_unload(cudaLibrary_t module) {
  return guarded([&] { C10_CUDA_CHECK(cudaLibraryUnload(module)); });
}

char* corral_cuda_kernel(cudaLibrary_t module, const char* name, cudaKernel_t* out) {
  return guarded([&] { C10_CUDA_CHECK(cudaLibraryGetKernel(out, module, name)); });
}

// Needed above 48 KiB of dynamic shared memory.
char* corral_cuda_kernel_shared(cudaKernel_t kernel, int device, int bytes) {
  return guarded([&] {
    c10::cuda::CUDAGuard guard(index(device));
    C10_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  });
}

char* corral_cuda_launch(cudaKernel_t kernel, const uint32_t* grid, const uint32_t* block, size_t shared_bytes,
                         Stream stream, void** args) {
  return guarded([&] {
    const auto s = unpack(stream);
    c10::cuda::CUDAGuard guard(s.device_index());
    C10_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid[0], grid[1], grid[2]),
                                    dim3(block[0], block[1], block[2]), args, shared_bytes, s.stream()));
  });
}

// Connects at once, so that a wrong network setting shows here and not in the first training step.
char* corral_nccl(const StorePtr* store, int rank, int size, const char* name, int64_t timeout_ms, int device,
                  BackendPtr** out) {
  return guarded([&] {
    // c10d would end the process on an error, before ours can tell which rank is missing (kernels/src/comm/watch.rs).
    setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", /*overwrite=*/0);
    // Gathers and reductions have a communicator each: NCCL keeps their kernels in the order in which the host launched them,
    // which is the same on all ranks, so that none waits for a peer that waits for it.
    setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1", /*overwrite=*/0);
    c10::cuda::CUDAGuard guard(index(device));
    // Of high priority, so that a gather begins between the blocks of a product that waits for nothing.
    auto options = c10d::ProcessGroupNCCL::Options::create(/*is_high_priority_stream=*/true);
    options->timeout = milliseconds(timeout_ms);
    options->group_name = name;
    auto own = c10::make_intrusive<c10d::PrefixStore>(std::string("nccl/") + name, *store);
    auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(own, rank, size, options);
    backend->setGroupUid(name);
    const at::Device bound(c10::DeviceType::CUDA, index(device));
    backend->setBoundDeviceId(bound);
    backend->eagerConnectSingleDevice(bound);
    *out = new BackendPtr(std::move(backend));
  });
}

// For watching: shares the events and the communicator, and holds no tensors.
char* corral_nccl_work_clone(const WorkPtr* work, WorkPtr** out) {
  return guarded([&] {
    using WorkNCCL = c10d::ProcessGroupNCCL::WorkNCCL;
    const auto* nccl = dynamic_cast<const WorkNCCL*>(work->get());
    TORCH_CHECK(nccl, "not a collective of NCCL");
    *out = new WorkPtr(c10::make_intrusive<WorkNCCL>(*nccl));
  });
}

// Before the last reference goes: NCCL wants its communicators closed, and the watchdog's thread joined.
char* corral_nccl_shutdown(const BackendPtr* backend) {
  return guarded([&] { (*backend)->shutdown(); });
}

} // extern "C"
