// libtorch's c10d behind a small C ABI: TCPStore, ProcessGroupGloo, and the collectives of any backend (NCCL's process
// group is made by cuda_shim.cpp and is driven from here through the base class). Handles are heap-allocated intrusive
// pointers. No function here outlives its arguments: c10d itself keeps the tensors of a running collective.
#define USE_C10D_GLOO
#include "abi.h"
#include "gloo_in_place.h"
#include "guard.h"

#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <dlfcn.h>
#include <link.h>

C10_DECLARE_int(caffe2_log_level);

// Of FlightRecorder.hpp, which brings much with it.
namespace c10d {
TORCH_API std::string dump_fr_trace_json(bool includeCollectives, bool onlyActive);
}

using corral::guarded;
using std::chrono::milliseconds;
using Tensors = std::vector<at::Tensor>;

namespace {
c10d::ReduceOp reduce_op(int op) {
  switch (op) {
    case 0: return c10d::ReduceOp::SUM;
    case 1: return c10d::ReduceOp::MAX;
    case 2: return c10d::ReduceOp::MIN;
    case 3: return c10d::ReduceOp::AVG;
  }
  TORCH_CHECK(false, "unknown reduction ", op);
}

// c10d's flight recorder (its log of collectives for debugging) writes a map before it takes its lock, in every group's
// first collective (FlightRecorder::recordWithResetEnabled of libtorch 2.11): groups that begin on several threads at once
// tear the map apart. With a buffer of size 0 it returns before. Its buffer's size comes from the environment, which no thread
// reads yet here, before main. A size that the user has set stays.
bool recorder_is_off = false;

__attribute__((constructor)) void switch_recorder_off() {
  if (std::getenv("TORCH_FR_BUFFER_SIZE") || std::getenv("TORCH_NCCL_TRACE_BUFFER_SIZE")) return;
  recorder_is_off = setenv("TORCH_FR_BUFFER_SIZE", "0", 0) == 0;
}
} // namespace

extern "C" {

// Whether this library, and not the user, has set TORCH_FR_BUFFER_SIZE.
int corral_recorder_is_off() { return recorder_is_off; }

// What the flight recorder has recorded, JSON.
char* corral_recorder_trace(char** out) {
  return guarded([&] { *out = strdup(c10d::dump_fr_trace_json(true, false).c_str()); });
}

void corral_free(void* p) { std::free(p); }

// The path that libc10.so, and so libtorch, was loaded from.
char* corral_libtorch_path(char** out) {
  return guarded([&] {
    void* handle = dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD);
    link_map* map = nullptr;
    TORCH_CHECK(handle && dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0, "cannot tell where libtorch was loaded from");
    *out = strdup(map->l_name);
    dlclose(handle);
  });
}

// With `listen_fd` >= 0 this process serves the store on that bound socket (and owns it from now on).
char* corral_store_tcp(const char* host, uint16_t port, int listen_fd, int64_t timeout_ms, StorePtr** out) {
  return guarded([&] {
    // c10d warns, with a backtrace, whenever a peer closes a connection: what matters of that is in our errors.
    if (!std::getenv("TORCH_CPP_LOG_LEVEL")) FLAGS_caffe2_log_level = 2;
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = listen_fd >= 0;
    if (options.isServer) options.masterListenFd = listen_fd;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    *out = new StorePtr(c10::make_intrusive<c10d::TCPStore>(host, options));
  });
}

char* corral_store_prefix(const StorePtr* store, const char* prefix, StorePtr** out) {
  return guarded([&] { *out = new StorePtr(c10::make_intrusive<c10d::PrefixStore>(prefix, *store)); });
}

// A connection of its own to the same store: a call that blocks on one does not block the other.
char* corral_store_reconnect(const StorePtr* store, StorePtr** out) {
  return guarded([&] { *out = new StorePtr((*store)->clone()); });
}

void corral_store_free(StorePtr* store) { delete store; }

char* corral_store_set(const StorePtr* store, const char* key, const uint8_t* data, size_t size) {
  return guarded([&] { (*store)->set(key, std::vector<uint8_t>(data, data + size)); });
}

char* corral_store_get(const StorePtr* store, const char* key, int64_t timeout_ms, uint8_t** out, size_t* size) {
  return guarded([&] {
    (*store)->wait({key}, milliseconds(timeout_ms));
    std::vector<uint8_t> value = (*store)->get(key);
    *size = value.size();
    *out = static_cast<uint8_t*>(std::malloc(value.size() + 1));
    TORCH_CHECK(*out, "out of memory");
    std::memcpy(*out, value.data(), value.size());
  });
}

char* corral_store_add(const StorePtr* store, const char* key, int64_t value, int64_t* out) {
  return guarded([&] { *out = (*store)->add(key, value); });
}

char* corral_store_check(const StorePtr* store, const char* key, int* out) {
  return guarded([&] { *out = (*store)->check({key}); });
}

// Binds to `interface` where given, else to the address `host`.
char* corral_gloo(const StorePtr* store, int rank, int size, const char* name, int64_t timeout_ms,
                  const char* interface, const char* host, BackendPtr** out) {
  return guarded([&] {
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    options->group_name = name;
    options->threads = 2;
    options->devices.push_back(interface ? c10d::ProcessGroupGloo::createDeviceForInterface(interface)
                                         : c10d::ProcessGroupGloo::createDeviceForHostname(host));
    auto own = c10::make_intrusive<c10d::PrefixStore>(std::string("gloo/") + name, *store);
    *out = new BackendPtr(c10::make_intrusive<corral::GlooInPlace>(own, rank, size, options));
  });
}

void corral_backend_free(BackendPtr* backend) { delete backend; }

char* corral_all_reduce(const BackendPtr* backend, const at::Tensor* t, int op, WorkPtr** out) {
  return guarded([&] {
    Tensors tensors{*t};
    c10d::AllreduceOptions options;
    options.reduceOp = reduce_op(op);
    *out = new WorkPtr((*backend)->allreduce(tensors, options));
  });
}

char* corral_all_gather(const BackendPtr* backend, const at::Tensor* output, const at::Tensor* input, WorkPtr** out) {
  return guarded([&] {
    at::Tensor o = *output, i = *input;
    *out = new WorkPtr((*backend)->_allgather_base(o, i));
  });
}

char* corral_reduce_scatter(const BackendPtr* backend, const at::Tensor* output, const at::Tensor* input, int op,
                            WorkPtr** out) {
  return guarded([&] {
    at::Tensor o = *output, i = *input;
    c10d::ReduceScatterOptions options;
    options.reduceOp = reduce_op(op);
    *out = new WorkPtr((*backend)->_reduce_scatter_base(o, i, options));
  });
}

char* corral_broadcast(const BackendPtr* backend, const at::Tensor* t, int64_t root, WorkPtr** out) {
  return guarded([&] {
    Tensors tensors{*t};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    *out = new WorkPtr((*backend)->broadcast(tensors, options));
  });
}

// Equal splits.
char* corral_all_to_all(const BackendPtr* backend, const at::Tensor* output, const at::Tensor* input, WorkPtr** out) {
  return guarded([&] {
    at::Tensor o = *output, i = *input;
    std::vector<int64_t> equal;
    *out = new WorkPtr((*backend)->alltoall_base(o, i, equal, equal));
  });
}

// In a group of two. What is sent is received in the order of the calls.
char* corral_send(const BackendPtr* backend, const at::Tensor* t, int to, WorkPtr** out) {
  return guarded([&] {
    Tensors tensors{*t};
    auto* gloo = dynamic_cast<corral::GlooInPlace*>(backend->get());
    *out = new WorkPtr(gloo ? gloo->transfer_to(to, *t) : (*backend)->send(tensors, to, 0));
  });
}

char* corral_receive(const BackendPtr* backend, const at::Tensor* t, int from, WorkPtr** out) {
  return guarded([&] {
    Tensors tensors{*t};
    auto* gloo = dynamic_cast<corral::GlooInPlace*>(backend->get());
    *out = new WorkPtr(gloo ? gloo->transfer_from(from, *t) : (*backend)->recv(tensors, from, 0));
  });
}

// Waits on the host, at most so long; `done` stays 0 when the time is up first.
char* corral_work_wait(const WorkPtr* work, int64_t timeout_ms, int* done) {
  return guarded([&] {
    try {
      (*work)->wait(milliseconds(timeout_ms));
      *done = 1;
      return;
    } catch (...) {
      if (!(*work)->isCompleted()) return;
    }
    // It ended, perhaps between the time-out and the check: this returns at once or throws the real error.
    (*work)->wait();
    *done = 1;
  });
}

// NCCL: the current stream waits for the collective, the host does not.
char* corral_work_sync(const WorkPtr* work) {
  return guarded([&] { (*work)->wait(); });
}

char* corral_work_poll(const WorkPtr* work, int* done) {
  return guarded([&] {
    *done = (*work)->isCompleted();
    if (*done) {
      if (auto error = (*work)->exception()) std::rethrow_exception(error);
    }
  });
}

void corral_work_free(WorkPtr* work) { delete work; }

} // extern "C"
