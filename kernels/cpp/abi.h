// The C ABI between kernels/src and kernels/cpp: every function that Rust calls, in the order of kernels/src/abi.rs.
// Every .cpp that defines one includes this, so that the compiler compares each definition with its declaration, and
// kernels/tests/abi.rs compares the declarations with Rust's.
//
// A function that returns char* returns null, or a message that the caller frees with corral_free. Tensors are borrowed;
// those that are returned (at::Tensor**) are made with new and the caller's. Null stands for an optional tensor that is
// left out. Handles (StorePtr, BackendPtr, WorkPtr, GraphPtr) are made with new and freed by their own functions.
#pragma once
#include <c10/util/intrusive_ptr.h>

#include <cstddef>
#include <cstdint>

namespace at {
class Tensor;
}
namespace c10d {
class Backend;
class Store;
class Work;
}  // namespace c10d

using StorePtr = c10::intrusive_ptr<c10d::Store>;
using BackendPtr = c10::intrusive_ptr<c10d::Backend>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

// A captured CUDA graph.
struct GraphPtr;

// What cudaLibrary_t and cudaKernel_t point to.
struct CUlib_st;
struct CUkern_st;

// A c10 stream in plain numbers. Streams come from libtorch's pool and are never destroyed.
struct Stream {
  int64_t id;
  int64_t device;
};

extern "C" {

// The process: comm/c10d.cpp, host/allocations.cpp, ops/ops.cpp.

void corral_free(void* p);
int corral_recorder_is_off();
int corral_names_are_numbers();
char* corral_recorder_trace(char** out);
char* corral_libtorch_path(char** out);
char* corral_allocate_by_malloc();
char* corral_allocations_begin();
char* corral_allocations_end(int64_t* peak, int64_t* live);
char* corral_set_float32_onednn(bool on);

// Row operations on the CPU: ops/ops.cpp.

char* corral_fill_normal(at::Tensor* out, uint64_t key, uint64_t first, double std);
char* corral_rms_norm(at::Tensor* x, at::Tensor* w, double offset, double eps, at::Tensor** y, at::Tensor** rstd);
char* corral_rms_apply(at::Tensor* x, at::Tensor* w, double offset, at::Tensor* rstd, at::Tensor** y);
char* corral_rms_backward(at::Tensor* dy, at::Tensor* x, at::Tensor* w, double offset, at::Tensor* rstd,
                          at::Tensor* residual, at::Tensor* dw, at::Tensor** dx);
char* corral_rope(at::Tensor* x, at::Tensor* positions, at::Tensor* cos, at::Tensor* sin, int64_t heads, int64_t d,
                  bool inverse);
char* corral_attention(at::Tensor* qkv, at::Tensor* start, int64_t batch, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, double scale, at::Tensor** out, at::Tensor** lse);
char* corral_attention_backward(at::Tensor* dout, at::Tensor* qkv, at::Tensor* out, at::Tensor* lse, at::Tensor* start,
                                int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, double scale,
                                at::Tensor** dqkv);
char* corral_decode_attention(at::Tensor* qkv, at::Tensor* keys, at::Tensor* values, at::Tensor* slot,
                              at::Tensor* position, at::Tensor* first, int64_t heads, double scale, at::Tensor** out);
char* corral_few_rows(at::Tensor* x, at::Tensor* w, at::Tensor* add, at::Tensor** y);
char* corral_swiglu(at::Tensor* gu, at::Tensor** a);
char* corral_swiglu_backward(at::Tensor* gu, at::Tensor* da);
char* corral_log_softmax(at::Tensor* logits, at::Tensor* labels, at::Tensor* coef, at::Tensor* logp,
                         at::Tensor* entropy);
char* corral_adamw(at::Tensor* p, at::Tensor* g, at::Tensor* m, at::Tensor* v, at::Tensor* copy, double lr,
                   double beta1, double beta2, double eps, double decay, double correction1, double correction2,
                   double grad_scale);
char* corral_sum_squares(at::Tensor* x, double* out);
char* corral_dropout(at::Tensor* x, at::Tensor* rows, uint64_t key, uint32_t threshold, double scale, uint32_t first,
                     at::Tensor** y);
char* corral_accumulate(at::Tensor* dst, at::Tensor* src, bool add);
char* corral_embedding_backward(at::Tensor* dx, at::Tensor* ids, at::Tensor* dw);

// libtorch's operations on CUDA: ops/gpu_ops.cpp.

char* corral_flash_attention(at::Tensor* qkv, at::Tensor* cum_seq, int64_t longest, int64_t window, int64_t batch,
                             int64_t heads, int64_t kv_heads, int64_t head_dim, double scale, at::Tensor** out,
                             at::Tensor** lse);
char* corral_flash_attention_backward(at::Tensor* dout, at::Tensor* qkv, at::Tensor* out, at::Tensor* lse,
                                      at::Tensor* cum_seq, int64_t longest, int64_t window, int64_t batch, int64_t heads,
                                      int64_t kv_heads, int64_t head_dim, double scale, bool deterministic,
                                      at::Tensor** dqkv);
char* corral_pin(at::Tensor* t, at::Tensor** out);
char* corral_grad_weight(at::Tensor* dw, at::Tensor* dy, at::Tensor* x, bool add);
char* corral_grouped_mm(at::Tensor* a, at::Tensor* b, at::Tensor* ends, at::Tensor** out);
char* corral_scaled_mm(at::Tensor* a, at::Tensor* b, at::Tensor* scale_a, at::Tensor* scale_b, bool float32, bool fast,
                       at::Tensor** out);

// Quantization on the CPU: quant/quant_ops.cpp.

char* corral_nf4_quantize(at::Tensor* x, at::Tensor* packed, at::Tensor* absmax);
char* corral_nf4_dequantize(at::Tensor* packed, at::Tensor* absmax, at::Tensor* codes, at::Tensor* map,
                            at::Tensor* offset, int64_t height, int64_t width, int64_t row, int64_t column,
                            at::Tensor* out);
char* corral_int8_quantize(at::Tensor* x, at::Tensor* q, at::Tensor* absmax);
char* corral_int8_dequantize(at::Tensor* q, at::Tensor* absmax, int64_t height, int64_t width, int64_t row,
                             int64_t column, at::Tensor* out);
char* corral_adamw8(at::Tensor* p, at::Tensor* g, at::Tensor* m_codes, at::Tensor* m_absmax, at::Tensor* m_map,
                    at::Tensor* m_midpoints, at::Tensor* v_codes, at::Tensor* v_absmax, at::Tensor* v_map,
                    at::Tensor* v_midpoints, at::Tensor* copy, int64_t decayed, double lr, double beta1, double beta2,
                    double eps, double decay, double correction1, double correction2, double grad_scale);

// Communication: comm/c10d.cpp.

char* corral_store_tcp(const char* host, uint16_t port, int listen_fd, int64_t timeout_ms, StorePtr** out);
char* corral_store_prefix(const StorePtr* store, const char* prefix, StorePtr** out);
char* corral_store_reconnect(const StorePtr* store, StorePtr** out);
void corral_store_free(StorePtr* store);
char* corral_store_set(const StorePtr* store, const char* key, const uint8_t* data, size_t size);
char* corral_store_get(const StorePtr* store, const char* key, int64_t timeout_ms, uint8_t** out, size_t* size);
char* corral_store_add(const StorePtr* store, const char* key, int64_t value, int64_t* out);
char* corral_store_check(const StorePtr* store, const char* key, int* out);
char* corral_gloo(const StorePtr* store, int rank, int size, const char* name, int64_t timeout_ms,
                  const char* interface, const char* host, BackendPtr** out);
void corral_backend_free(BackendPtr* backend);
char* corral_all_reduce(const BackendPtr* backend, const at::Tensor* t, int op, WorkPtr** out);
char* corral_all_gather(const BackendPtr* backend, const at::Tensor* output, const at::Tensor* input, WorkPtr** out);
char* corral_reduce_scatter(const BackendPtr* backend, const at::Tensor* output, const at::Tensor* input, int op,
                            WorkPtr** out);
char* corral_broadcast(const BackendPtr* backend, const at::Tensor* t, int64_t root, WorkPtr** out);
char* corral_all_to_all(const BackendPtr* backend, const at::Tensor* output, const at::Tensor* input, WorkPtr** out);
char* corral_send(const BackendPtr* backend, const at::Tensor* t, int to, WorkPtr** out);
char* corral_receive(const BackendPtr* backend, const at::Tensor* t, int from, WorkPtr** out);
char* corral_work_wait(const WorkPtr* work, int64_t timeout_ms, int* done);
char* corral_work_sync(const WorkPtr* work);
char* corral_work_poll(const WorkPtr* work, int* done);
void corral_work_free(WorkPtr* work);

// What needs CUDA's symbols, in a shared object of its own: cuda/cuda_shim.cpp.

char* corral_cuda_hooks(int* known);
char* corral_cuda_device_count(int* count);
char* corral_cuda_device_info(int device, char* name, uint8_t* uuid, int* major, int* minor, int* processors,
                              int64_t* memory);
char* corral_cuda_set_device(int device);
char* corral_cuda_synchronize(int device);
char* corral_cuda_memory(int device, int64_t* out);
char* corral_cuda_stream_current(int device, Stream* out);
char* corral_cuda_stream_new(int device, Stream* out);
char* corral_cuda_stream_wait(Stream waits, Stream other);
char* corral_cuda_stream_synchronize(Stream stream);
char* corral_cuda_copy(at::Tensor* to, at::Tensor* from, Stream stream);
char* corral_cuda_pinned(int64_t bytes, at::Tensor** out);
char* corral_cuda_empty_cache();
char* corral_cuda_graph_begin(int device, GraphPtr** out);
char* corral_cuda_graph_end(GraphPtr* graph);
char* corral_cuda_graph_replay(GraphPtr* graph);
char* corral_cuda_graph_free(GraphPtr* graph);
char* corral_cuda_module_load(const void* image, CUlib_st** out);
char* corral_cuda_module_unload(CUlib_st* module);
char* corral_cuda_kernel(CUlib_st* module, const char* name, CUkern_st** out);
char* corral_cuda_kernel_shared(CUkern_st* kernel, int device, int bytes);
char* corral_cuda_launch(CUkern_st* kernel, const uint32_t* grid, const uint32_t* block, size_t shared_bytes,
                         Stream stream, void** args);
char* corral_nccl(const StorePtr* store, int rank, int size, const char* name, int64_t timeout_ms, int device,
                  BackendPtr** out);
char* corral_nccl_work_clone(const WorkPtr* work, WorkPtr** out);
char* corral_nccl_shutdown(const BackendPtr* backend);

}  // extern "C"
