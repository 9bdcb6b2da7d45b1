//! The C ABI of `cpp/`: every function that this package calls there, as `cpp/abi.h` declares it. `tests/abi.rs` compares
//! the two, and the C++ compiler the header with the definitions.
//!
//! A function that returns `*mut c_char` gives null, or a malloc'ed message: see [`crate::error::check`]. Tensors are
//! borrowed during the call; those that come back through a `*mut Raw` are the caller's.

use std::ffi::{c_char, c_int, c_void};

use libloading::os::unix::Library;
use torch_sys::C_tensor;

/// `at::Tensor*`; null for an optional tensor that is left out.
pub(crate) type Raw = *mut C_tensor;

/// c10d's store (an intrusive pointer to it).
#[repr(C)]
pub(crate) struct StorePtr([u8; 0]);

/// c10d's process group of a backend.
#[repr(C)]
pub(crate) struct BackendPtr([u8; 0]);

/// A collective under way.
#[repr(C)]
pub(crate) struct WorkPtr([u8; 0]);

/// A captured CUDA graph.
#[repr(C)]
pub(crate) struct GraphPtr([u8; 0]);

/// Compiled kernels that CUDA has loaded (`*mut CUlib_st` is a `cudaLibrary_t`).
#[repr(C)]
#[allow(non_camel_case_types)]
pub(crate) struct CUlib_st([u8; 0]);

/// One of their kernels (`*mut CUkern_st` is a `cudaKernel_t`).
#[repr(C)]
#[allow(non_camel_case_types)]
pub(crate) struct CUkern_st([u8; 0]);

/// A CUDA stream of libtorch's pool; they live as long as the process.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stream {
    pub(crate) id: i64,
    pub(crate) device: i64,
}

// The process.
unsafe extern "C" {
    pub(crate) fn corral_free(p: *mut c_void);
    pub(crate) fn corral_recorder_is_off() -> c_int;
    pub(crate) fn corral_names_are_numbers() -> c_int;
    pub(crate) fn corral_recorder_trace(out: *mut *mut c_char) -> *mut c_char;
    pub(crate) fn corral_libtorch_path(out: *mut *mut c_char) -> *mut c_char;
    pub(crate) fn corral_allocate_by_malloc() -> *mut c_char;
    pub(crate) fn corral_allocations_begin() -> *mut c_char;
    pub(crate) fn corral_allocations_end(peak: *mut i64, live: *mut i64) -> *mut c_char;
    pub(crate) fn corral_set_float32_onednn(on: bool) -> *mut c_char;
}

// Row operations on the CPU.
unsafe extern "C" {
    pub(crate) fn corral_fill_normal(out: Raw, key: u64, first: u64, std: f64) -> *mut c_char;
    pub(crate) fn corral_rms_norm(
        x: Raw,
        w: Raw,
        offset: f64,
        eps: f64,
        y: *mut Raw,
        rstd: *mut Raw,
    ) -> *mut c_char;
    pub(crate) fn corral_rms_apply(x: Raw, w: Raw, offset: f64, rstd: Raw, y: *mut Raw) -> *mut c_char;
    pub(crate) fn corral_rms_backward(
        dy: Raw,
        x: Raw,
        w: Raw,
        offset: f64,
        rstd: Raw,
        residual: Raw,
        dw: Raw,
        dx: *mut Raw,
    ) -> *mut c_char;
    pub(crate) fn corral_rope(
        x: Raw,
        positions: Raw,
        cos: Raw,
        sin: Raw,
        heads: i64,
        d: i64,
        inverse: bool,
    ) -> *mut c_char;
    pub(crate) fn corral_attention(
        qkv: Raw,
        start: Raw,
        batch: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        scale: f64,
        out: *mut Raw,
        lse: *mut Raw,
    ) -> *mut c_char;
    pub(crate) fn corral_attention_backward(
        dout: Raw,
        qkv: Raw,
        out: Raw,
        lse: Raw,
        start: Raw,
        batch: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        scale: f64,
        dqkv: *mut Raw,
    ) -> *mut c_char;
    pub(crate) fn corral_decode_attention(
        qkv: Raw,
        keys: Raw,
        values: Raw,
        slot: Raw,
        position: Raw,
        first: Raw,
        heads: i64,
        scale: f64,
        out: *mut Raw,
    ) -> *mut c_char;
    pub(crate) fn corral_few_rows(x: Raw, w: Raw, add: Raw, y: *mut Raw) -> *mut c_char;
    pub(crate) fn corral_swiglu(gu: Raw, a: *mut Raw) -> *mut c_char;
    pub(crate) fn corral_swiglu_backward(gu: Raw, da: Raw) -> *mut c_char;
    pub(crate) fn corral_log_softmax(
        logits: Raw,
        labels: Raw,
        coef: Raw,
        logp: Raw,
        entropy: Raw,
    ) -> *mut c_char;
    pub(crate) fn corral_adamw(
        p: Raw,
        g: Raw,
        m: Raw,
        v: Raw,
        copy: Raw,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        decay: f64,
        correction1: f64,
        correction2: f64,
        grad_scale: f64,
    ) -> *mut c_char;
    pub(crate) fn corral_sum_squares(x: Raw, out: *mut f64) -> *mut c_char;
    pub(crate) fn corral_dropout(
        x: Raw,
        rows: Raw,
        key: u64,
        threshold: u32,
        scale: f64,
        first: u32,
        y: *mut Raw,
    ) -> *mut c_char;
    pub(crate) fn corral_accumulate(dst: Raw, src: Raw, add: bool) -> *mut c_char;
    pub(crate) fn corral_embedding_backward(dx: Raw, ids: Raw, dw: Raw) -> *mut c_char;
}

// libtorch's operations on CUDA.
unsafe extern "C" {
    pub(crate) fn corral_flash_attention(
        qkv: Raw,
        cum_seq: Raw,
        longest: i64,
        window: i64,
        batch: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        scale: f64,
        out: *mut Raw,
        lse: *mut Raw,
    ) -> *mut c_char;
    pub(crate) fn corral_flash_attention_backward(
        dout: Raw,
        qkv: Raw,
        out: Raw,
        lse: Raw,
        cum_seq: Raw,
        longest: i64,
        window: i64,
        batch: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        scale: f64,
        deterministic: bool,
        dqkv: *mut Raw,
    ) -> *mut c_char;
    pub(crate) fn corral_pin(t: Raw, out: *mut Raw) -> *mut c_char;
    pub(crate) fn corral_grad_weight(dw: Raw, dy: Raw, x: Raw, add: bool) -> *mut c_char;
    pub(crate) fn corral_grouped_mm(a: Raw, b: Raw, ends: Raw, out: *mut Raw) -> *mut c_char;
    pub(crate) fn corral_scaled_mm(
        a: Raw,
        b: Raw,
        scale_a: Raw,
        scale_b: Raw,
        float32: bool,
        fast: bool,
        out: *mut Raw,
    ) -> *mut c_char;
}

// Quantization on the CPU.
unsafe extern "C" {
    pub(crate) fn corral_nf4_quantize(x: Raw, packed: Raw, absmax: Raw) -> *mut c_char;
    pub(crate) fn corral_nf4_dequantize(
        packed: Raw,
        absmax: Raw,
        codes: Raw,
        map: Raw,
        offset: Raw,
        height: i64,
        width: i64,
        row: i64,
        column: i64,
        out: Raw,
    ) -> *mut c_char;
    pub(crate) fn corral_int8_quantize(x: Raw, q: Raw, absmax: Raw) -> *mut c_char;
    pub(crate) fn corral_int8_dequantize(
        q: Raw,
        absmax: Raw,
        height: i64,
        width: i64,
        row: i64,
        column: i64,
        out: Raw,
    ) -> *mut c_char;
    pub(crate) fn corral_adamw8(
        p: Raw,
        g: Raw,
        m_codes: Raw,
        m_absmax: Raw,
        m_map: Raw,
        m_midpoints: Raw,
        v_codes: Raw,
        v_absmax: Raw,
        v_map: Raw,
        v_midpoints: Raw,
        copy: Raw,
        decayed: i64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        decay: f64,
        correction1: f64,
        correction2: f64,
        grad_scale: f64,
    ) -> *mut c_char;
}

// Communication.
unsafe extern "C" {
    pub(crate) fn corral_store_tcp(
        host: *const c_char,
        port: u16,
        listen_fd: c_int,
        timeout_ms: i64,
        out: *mut *mut StorePtr,
    ) -> *mut c_char;
    pub(crate) fn corral_store_prefix(
        store: *const StorePtr,
        prefix: *const c_char,
        out: *mut *mut StorePtr,
    ) -> *mut c_char;
    pub(crate) fn corral_store_reconnect(store: *const StorePtr, out: *mut *mut StorePtr) -> *mut c_char;
    pub(crate) fn corral_store_free(store: *mut StorePtr);
    pub(crate) fn corral_store_set(
        store: *const StorePtr,
        key: *const c_char,
        data: *const u8,
        size: usize,
    ) -> *mut c_char;
    pub(crate) fn corral_store_get(
        store: *const StorePtr,
        key: *const c_char,
        timeout_ms: i64,
        out: *mut *mut u8,
        size: *mut usize,
    ) -> *mut c_char;
    pub(crate) fn corral_store_add(
        store: *const StorePtr,
        key: *const c_char,
        value: i64,
        out: *mut i64,
    ) -> *mut c_char;
    pub(crate) fn corral_store_check(
        store: *const StorePtr,
        key: *const c_char,
        out: *mut c_int,
    ) -> *mut c_char;
    pub(crate) fn corral_gloo(
        store: *const StorePtr,
        rank: c_int,
        size: c_int,
        name: *const c_char,
        timeout_ms: i64,
        interface: *const c_char,
        host: *const c_char,
        out: *mut *mut BackendPtr,
    ) -> *mut c_char;
    pub(crate) fn corral_backend_free(backend: *mut BackendPtr);
    pub(crate) fn corral_all_reduce(
        backend: *const BackendPtr,
        t: *const C_tensor,
        op: c_int,
        out: *mut *mut WorkPtr,
    ) -> *mut c_char;
    pub(crate) fn corral_all_gather(
        backend: *const BackendPtr,
        output: *const C_tensor,
        input: *const C_tensor,
        out: *mut *mut WorkPtr,
    ) -> *mut c_char;
    pub(crate) fn corral_reduce_scatter(
        backend: *const BackendPtr,
        output: *const C_tensor,
        input: *const C_tensor,
        op: c_int,
        out: *mut *mut WorkPtr,
    ) -> *mut c_char;
    pub(crate) fn corral_broadcast(
        backend: *const BackendPtr,
        t: *const C_tensor,
        root: i64,
        out: *mut *mut WorkPtr,
    ) -> *mut c_char;
    pub(crate) fn corral_all_to_all(
        backend: *const BackendPtr,
        output: *const C_tensor,
        input: *const C_tensor,
        out: *mut *mut WorkPtr,
    ) -> *mut c_char;
    pub(crate) fn corral_send(
        backend: *const BackendPtr,
        t: *const C_tensor,
        to: c_int,
        out: *mut *mut WorkPtr,
    ) -> *mut c_char;
    pub(crate) fn corral_receive(
        backend: *const BackendPtr,
        t: *const C_tensor,
        from: c_int,
        out: *mut *mut WorkPtr,
    ) -> *mut c_char;
    pub(crate) fn corral_work_wait(work: *const WorkPtr, timeout_ms: i64, done: *mut c_int) -> *mut c_char;
    pub(crate) fn corral_work_sync(work: *const WorkPtr) -> *mut c_char;
    pub(crate) fn corral_work_poll(work: *const WorkPtr, done: *mut c_int) -> *mut c_char;
    pub(crate) fn corral_work_free(work: *mut WorkPtr);
}

macro_rules! shim {
    ($(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> *mut c_char;)*) => {
        /// The functions of `libcorral_cuda.so`, found by name.
        pub(crate) struct Shim { $(pub(crate) $name: unsafe extern "C" fn($($arg: $ty),*) -> *mut c_char,)* }

        impl Shim {
            /// # Safety
            /// `library` must be built from `cpp/abi.h`, and stay loaded.
            pub(crate) unsafe fn find(library: &Library) -> Result<Shim, libloading::Error> {
                // SAFETY: the caller's library has these functions with the types that the header declares.
                $(let $name = unsafe { library.get(concat!(stringify!($name), "\0").as_bytes())? };)*
                Ok(Shim { $($name: *$name,)* })
            }
        }
    };
}

// What needs CUDA's symbols.
shim! {
    fn corral_cuda_hooks(known: *mut c_int) -> *mut c_char;
    fn corral_cuda_device_count(count: *mut c_int) -> *mut c_char;
    fn corral_cuda_device_info(
        device: c_int,
        name: *mut c_char,
        uuid: *mut u8,
        major: *mut c_int,
        minor: *mut c_int,
        processors: *mut c_int,
        memory: *mut i64,
    ) -> *mut c_char;
    fn corral_cuda_set_device(device: c_int) -> *mut c_char;
    fn corral_cuda_synchronize(device: c_int) -> *mut c_char;
    fn corral_cuda_memory(device: c_int, out: *mut i64) -> *mut c_char;
    fn corral_cuda_stream_current(device: c_int, out: *mut Stream) -> *mut c_char;
    fn corral_cuda_stream_new(device: c_int, out: *mut Stream) -> *mut c_char;
    fn corral_cuda_stream_wait(waits: Stream, other: Stream) -> *mut c_char;
    fn corral_cuda_stream_synchronize(stream: Stream) -> *mut c_char;
    fn corral_cuda_copy(to: Raw, from: Raw, stream: Stream) -> *mut c_char;
    fn corral_cuda_pinned(bytes: i64, out: *mut Raw) -> *mut c_char;
    fn corral_cuda_empty_cache() -> *mut c_char;
    fn corral_cuda_graph_begin(device: c_int, out: *mut *mut GraphPtr) -> *mut c_char;
    fn corral_cuda_graph_end(graph: *mut GraphPtr) -> *mut c_char;
    fn corral_cuda_graph_replay(graph: *mut GraphPtr) -> *mut c_char;
    fn corral_cuda_graph_free(graph: *mut GraphPtr) -> *mut c_char;
    fn corral_cuda_module_load(image: *const c_void, out: *mut *mut CUlib_st) -> *mut c_char;
    fn corral_cuda_module_unload(module: *mut CUlib_st) -> *mut c_char;
    fn corral_cuda_kernel(module: *mut CUlib_st, name: *const c_char, out: *mut *mut CUkern_st) -> *mut c_char;
    fn corral_cuda_kernel_shared(kernel: *mut CUkern_st, device: c_int, bytes: c_int) -> *mut c_char;
    fn corral_cuda_launch(
        kernel: *mut CUkern_st,
        grid: *const u32,
        block: *const u32,
        shared_bytes: usize,
        stream: Stream,
        args: *mut *mut c_void,
    ) -> *mut c_char;
    fn corral_nccl(
        store: *const StorePtr,
        rank: c_int,
        size: c_int,
        name: *const c_char,
        timeout_ms: i64,
        device: c_int,
        out: *mut *mut BackendPtr,
    ) -> *mut c_char;
    fn corral_nccl_work_clone(work: *const WorkPtr, out: *mut *mut WorkPtr) -> *mut c_char;
    fn corral_nccl_shutdown(backend: *const BackendPtr) -> *mut c_char;
}
