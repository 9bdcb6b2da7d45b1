// What needs CUDA's symbols, in a shared object of its own (libcorral_cuda.so): it is embedded in the binary and opened
// when a CUDA device is first asked for, so that runs on CPU load none of CUDA's libraries. All device indices are those
// that CUDA_VISIBLE_DEVICES leaves.
#define USE_C10D_NCCL
#include "abi.h"
#include "guard.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
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
  return guarded([&] { *known = at::detail::getCUDAHooks().hasCUDART(); });
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
