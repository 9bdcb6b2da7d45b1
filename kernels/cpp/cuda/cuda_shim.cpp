// What needs CUDA's symbols, in a shared object of its own (libcorral_cuda.so): it is embedded in the binary and opened
// when a CUDA device is first asked for, so that runs on CPU load none of CUDA's libraries. All device indices are those
// that CUDA_VISIBLE_DEVICES leaves.
#define USE_C10D_NCCL
#include "abi.h"
#include "guard.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/from_blob.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
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
      // At the end of the process the driver may be gone already; the memory goes with it.
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

// A graph, and the stream that was current before it was captured.
struct GraphPtr {
  at::cuda::CUDAGraph graph;
  c10::cuda::CUDAStream before;
};

extern "C" {

// From here to the end what this thread queues is captured, not run: on a stream of its own, which is current meanwhile.
char* corral_cuda_graph_begin(int device, GraphPtr** out) {
  return guarded([&] {
    const auto before = c10::cuda::getCurrentCUDAStream(index(device));
    const auto own = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, before.device_index());
    at::cuda::CUDAEvent event;
    event.record(before);
    event.block(own);
    auto graph = std::unique_ptr<GraphPtr>(new GraphPtr{{}, before});
    c10::cuda::setCurrentCUDAStream(own);
    try {
      // One pool for all: graphs run one after the other, and what outlives one is not in it. Other threads, NCCL's watchdog among
      // them, may go on calling CUDA.
      static const auto pool = at::cuda::graph_pool_handle();
      graph->graph.capture_begin(pool, cudaStreamCaptureModeThreadLocal);
    } catch (...) {
      c10::cuda::setCurrentCUDAStream(before);
      throw;
    }
    *out = graph.release();
  });
}

char* corral_cuda_graph_end(GraphPtr* graph) {
  return guarded([&] {
    const auto before = graph->before;
    try {
      graph->graph.capture_end();
    } catch (...) {
      c10::cuda::setCurrentCUDAStream(before);
      throw;
    }
    c10::cuda::setCurrentCUDAStream(before);
  });
}

// On the current stream.
char* corral_cuda_graph_replay(GraphPtr* graph) {
  return guarded([&] { graph->graph.replay(); });
}

char* corral_cuda_graph_free(GraphPtr* graph) {
  return guarded([&] { delete graph; });
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
    // Gathers and reductions have a communicator each: NCCL keeps their kernels in the order in which the host launched them, which is
    // the same on all ranks, so that none waits for a peer that waits for it.
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
