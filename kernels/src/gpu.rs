//! The operations of [`crate::ops`] on CUDA: launches of the kernels in `cuda/`, in float32 and bfloat16. The kernels are
//! compiled when first used, once for an architecture, and run on the current stream.

use crate::abi::Stream;
use crate::abi::{corral_flash_attention, corral_flash_attention_backward, corral_grad_weight};
use crate::cuda::Arg::{self, F32, I32, I64, Tensor as T, U64};
use crate::cuda::{self, Cuda, Kernel};
use crate::error::{Error, Result, check};
use crate::nvrtc;
use crate::ops::{AdamW, Heads, own, raw};
use std::collections::{BTreeMap, HashMap};
use std::ptr::null_mut;
use std::sync::{Mutex, OnceLock};
use tch::{Device, Kind, Tensor};

/// CUDA C++ that is compiled as one: its file, options, and kernels.
pub struct Source {
    pub name: &'static str,
    pub text: &'static str,
    pub options: &'static [&'static str],
    pub kernels: &'static [&'static str],
}

const ROWS: &str = include_str!("../cuda/rows.cu");
const ROW_KERNELS: &[&str] = &[
    "rms_norm",
    "rms_apply",
    "rms_backward",
    "add_columns",
    "rope",
    "swiglu",
    "swiglu_backward",
    "log_softmax",
    "dropout",
    "accumulate",
    "embedding_backward",
];

const QUANT: &str = include_str!("../cuda/quant.cu");
const QUANT_KERNELS: &[&str] = &["nf4_quantize", "nf4_dequantize", "int8_quantize", "int8_dequantize"];

/// All there is to compile.
pub const SOURCES: [Source; 5] = [
    Source { name: "rows.cu", text: ROWS, options: &["-DDTYPE=float"], kernels: ROW_KERNELS },
    Source { name: "rows.cu", text: ROWS, options: &["-DDTYPE=bf16"], kernels: ROW_KERNELS },
    Source {
        name: "optim.cu",
        text: include_str!("../cuda/optim.cu"),
        options: &[],
        kernels: &["adamw", "adamw8", "sum_squares", "add_doubles"],
    },
    Source { name: "quant.cu", text: QUANT, options: &["-DDTYPE=float"], kernels: QUANT_KERNELS },
    Source { name: "quant.cu", text: QUANT, options: &["-DDTYPE=bf16"], kernels: QUANT_KERNELS },
];
const FLOAT: usize = 0;
const BF16: usize = 1;
const OPTIM: usize = 2;
const QUANT_FLOAT: usize = 3;
const QUANT_BF16: usize = 4;

type Kernels = HashMap<&'static str, Kernel<'static>>;

fn index(x: &Tensor) -> Result<usize> {
    match x.device() {
        Device::Cuda(index) => Ok(index),
        other => Err(Error::new(format!("a tensor on {other:?} where CUDA is needed"))),
    }
}

/// The compute capability of the tensor's device; asked for once.
fn capability(x: &Tensor) -> Result<(i32, i32)> {
    const MOST: usize = 64;
    static KNOWN: [OnceLock<(i32, i32)>; MOST] = [const { OnceLock::new() }; MOST];
    let device = index(x)?;
    let cell = KNOWN.get(device).ok_or_else(|| Error::new(format!("cuda:{device}: too many devices")))?;
    if let Some(known) = cell.get() {
        return Ok(*known);
    }
    let found = cuda::load()?.device_info(device)?.capability;
    Ok(*cell.get_or_init(|| found))
}

/// Kernels of a source for one architecture (compute capability); they live as long as the process.
fn compiled(cuda: &'static Cuda, source: usize, capability: (i32, i32)) -> Result<&'static Kernels> {
    type Cache = BTreeMap<(usize, (i32, i32)), &'static Kernels>;
    static CACHE: Mutex<Cache> = Mutex::new(BTreeMap::new());
    let mut cache = CACHE.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(kernels) = cache.get(&(source, capability)) {
        return Ok(kernels);
    }
    let s = &SOURCES[source];
    let arch = format!("sm_{}{}", capability.0, capability.1);
    let module = Box::leak(Box::new(cuda.load_module(&nvrtc::compile(s.name, s.text, &arch, s.options)?)?));
    let kernels: Result<Kernels> = s.kernels.iter().map(|name| Ok((*name, module.kernel(name)?))).collect();
    let kernels: &'static Kernels = Box::leak(Box::new(kernels?));
    cache.insert((source, capability), kernels);
    Ok(kernels)
}

fn by_kind(x: &Tensor, float: usize, bf16: usize) -> Result<usize> {
    match x.kind() {
        Kind::Float => Ok(float),
        Kind::BFloat16 => Ok(bf16),
        other => Err(Error::new(format!("no CUDA kernel for dtype {other:?}"))),
    }
}

/// Where a kernel runs: the current stream of a device, and the kernels of one source for it.
pub(crate) struct Place {
    stream: Stream,
    device: usize,
    kernels: &'static Kernels,
}

impl Place {
    /// The place for tensors of this dtype and device.
    fn rows(x: &Tensor) -> Result<Place> {
        Place::new(x, by_kind(x, FLOAT, BF16)?)
    }

    pub(crate) fn quant(x: &Tensor) -> Result<Place> {
        Place::new(x, by_kind(x, QUANT_FLOAT, QUANT_BF16)?)
    }

    pub(crate) fn optim(x: &Tensor) -> Result<Place> {
        Place::new(x, OPTIM)
    }

    fn new(x: &Tensor, source: usize) -> Result<Place> {
        let (cuda, device) = (cuda::load()?, index(x)?);
        let capability = capability(x)?;
        Ok(Place {
            stream: cuda.current_stream(device)?,
            device,
            kernels: compiled(cuda, source, capability)?,
        })
    }

    /// # Safety
    /// As [`Kernel::launch`].
    pub(crate) unsafe fn launch(
        &self,
        name: &str,
        grid: i64,
        block: [u32; 2],
        shared_bytes: usize,
        args: &[Arg],
    ) -> Result<()> {
        if grid == 0 {
            return Ok(());
        }
        let grid = i32::try_from(grid).map_err(|_| Error::new(format!("{name}: too many rows: {grid}")))?;
        let kernel =
            self.kernels.get(name).ok_or_else(|| Error::new(format!("there is no CUDA kernel {name}")))?;
        if shared_bytes > 48 << 10 {
            kernel.allow_shared(self.device, shared_bytes)?;
        }
        // SAFETY: the caller's.
        unsafe {
            kernel.launch([grid as u32, 1, 1], [block[0], block[1], 1], shared_bytes, self.stream, args)
        }
        .map_err(|e| e.context(format!("CUDA kernel {name}")))
    }
}

/// Elements of a pack of the row kernels: 16 bytes.
pub(crate) fn pack(x: &Tensor) -> i64 {
    if x.kind() == Kind::BFloat16 { 8 } else { 4 }
}

/// Threads of a block that takes `columns` elements in packs: whole warps, at most 512.
pub(crate) fn threads(columns: i64, pack: i64) -> [u32; 2] {
    let packs = (columns + pack - 1) / pack;
    [((packs + 31) / 32 * 32).clamp(32, 512) as u32, 1]
}

/// Whether packs can be loaded at once: rows of `columns` elements, and tensors that begin at 16 bytes.
pub(crate) fn wide(columns: i64, pack: i64, tensors: &[&Tensor]) -> Arg<'static> {
    let aligned = tensors.iter().all(|t| (t.data_ptr() as usize).is_multiple_of(16));
    Arg::I32((aligned && columns % pack == 0) as i32)
}

/// Blocks of 256 threads for packs of a flat tensor.
fn blocks(n: i64, pack: i64) -> i64 {
    (n + 256 * pack - 1) / (256 * pack)
}

/// Tensors must lie on the device of the first, contiguous, with this dtype and as many elements as said.
pub(crate) fn need(op: &str, tensors: &[(&str, &Tensor, Kind, i64)]) -> Result<()> {
    let device = tensors.first().map(|t| t.1.device());
    for (name, t, kind, numel) in tensors {
        if t.kind() != *kind || t.numel() as i64 != *numel || Some(t.device()) != device || !t.is_contiguous()
        {
            return Err(Error::new(format!(
                "{op}: {name} must be {kind:?}, contiguous, of {numel} elements on {device:?}; it is {:?} {:?} on {:?}",
                t.kind(),
                t.size(),
                t.device()
            )));
        }
    }
    Ok(())
}

pub(crate) fn matrix(op: &str, x: &Tensor) -> Result<(i64, i64)> {
    match x.size()[..] {
        [rows, columns] if columns <= i32::MAX as i64 => Ok((rows, columns)),
        _ => Err(Error::new(format!("{op}: {:?} is not a matrix", x.size()))),
    }
}

pub(crate) fn opt(t: Option<&Tensor>) -> Arg<'_> {
    t.map_or(Arg::Null, Arg::Tensor)
}

// SAFETY (all launches): arguments are in the order and of the types of the kernel's parameters; dtypes, devices, sizes and
// contiguity were checked; the kernels stay within rows and columns; tensors that are written are the caller's to give.

pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let (rows, c) = matrix("rms_norm", x)?;
    need("rms_norm", &[("x", x, x.kind(), rows * c), ("w", w, x.kind(), c)])?;
    let (y, rstd) = (x.empty_like(), Tensor::empty([rows], (Kind::Float, x.device())));
    let args = [T(x), T(w), F32(eps as f32), T(&y), T(&rstd), I32(c as i32), wide(c, pack(x), &[x, w, &y])];
    unsafe { Place::rows(x)?.launch("rms_norm", rows, threads(c, pack(x)), 0, &args) }?;
    Ok((y, rstd))
}

pub fn rms_apply(x: &Tensor, w: &Tensor, rstd: &Tensor) -> Result<Tensor> {
    let (rows, c) = matrix("rms_apply", x)?;
    need(
        "rms_apply",
        &[("x", x, x.kind(), rows * c), ("w", w, x.kind(), c), ("rstd", rstd, Kind::Float, rows)],
    )?;
    let y = x.empty_like();
    let args = [T(x), T(w), T(rstd), T(&y), I32(c as i32), wide(c, pack(x), &[x, w, &y])];
    unsafe { Place::rows(x)?.launch("rms_apply", rows, threads(c, pack(x)), 0, &args) }?;
    Ok(y)
}

/// Columns beyond which [`rms_backward`]'s shared memory, 4 bytes a column, might not fit.
pub const RMS_BACKWARD_COLUMNS: i64 = 24 << 10;

pub fn rms_backward(
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    rstd: &Tensor,
    residual: Option<&Tensor>,
    dw: &Tensor,
) -> Result<Tensor> {
    let (rows, c) = matrix("rms_backward", x)?;
    let kind = x.kind();
    let residual_or_x = residual.unwrap_or(x);
    need(
        "rms_backward",
        &[
            ("x", x, kind, rows * c),
            ("dy", dy, kind, rows * c),
            ("w", w, kind, c),
            ("rstd", rstd, Kind::Float, rows),
            ("residual", residual_or_x, kind, rows * c),
            ("dw", dw, Kind::Float, c),
        ],
    )?;
    // The sum over rows has the same parts on every device, and so the same bits.
    let parts = rows.min(512);
    let dx = x.empty_like();
    let partial = Tensor::empty([parts, c], (Kind::Float, x.device()));
    let args = [
        T(dy),
        T(x),
        T(w),
        T(rstd),
        opt(residual),
        T(&dx),
        T(&partial),
        I64(rows),
        I32(c as i32),
        wide(c, pack(x), &[dy, x, w, residual_or_x, &dx]),
    ];
    let place = Place::rows(x)?;
    unsafe { place.launch("rms_backward", parts, threads(c, pack(x)), 4 * c as usize, &args) }?;
    let args = [T(&partial), T(dw), I32(parts as i32), I32(c as i32)];
    unsafe { place.launch("add_columns", (c + 31) / 32, [32, 8], 0, &args) }?;
    Ok(dx)
}

pub fn rope(
    x: &Tensor,
    positions: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    heads: i64,
    head_dim: i64,
    inverse: bool,
) -> Result<()> {
    let (rows, width) = matrix("rope", x)?;
    let half = head_dim / 2;
    let table = cos.numel() as i64;
    need(
        "rope",
        &[
            ("x", x, x.kind(), rows * width),
            ("positions", positions, Kind::Int64, rows),
            ("cos", cos, Kind::Float, table),
            ("sin", sin, Kind::Float, table),
        ],
    )?;
    if heads * head_dim > width || head_dim % 2 != 0 || table % half.max(1) != 0 {
        return Err(Error::new(format!("rope: {heads} heads of {head_dim} do not fit {:?}", x.size())));
    }
    let pack = pack(x);
    let together = if width % pack == 0 { half } else { width }; // rows and halves must both be whole packs
    let args = [
        T(x),
        T(positions),
        T(cos),
        T(sin),
        I32(width as i32),
        I32(heads as i32),
        I32(half as i32),
        F32(if inverse { -1.0 } else { 1.0 }),
        wide(together, pack, &[x, cos, sin]),
    ];
    let block = threads(heads * ((half + pack - 1) / pack) * pack, pack);
    unsafe { Place::rows(x)?.launch("rope", rows, block, 0, &args) }
}

pub fn swiglu(gu: &Tensor) -> Result<Tensor> {
    let (rows, f) = matrix("swiglu", gu).map(|(rows, c)| (rows, c / 2))?;
    need("swiglu", &[("gu", gu, gu.kind(), rows * 2 * f)])?;
    let a = Tensor::empty([rows, f], (gu.kind(), gu.device()));
    let args = [T(gu), T(&a), I32(f as i32), wide(f, pack(gu), &[gu, &a])];
    unsafe { Place::rows(gu)?.launch("swiglu", rows, threads(f, pack(gu)), 0, &args) }?;
    Ok(a)
}

pub fn swiglu_backward(gu: &Tensor, da: &Tensor) -> Result<()> {
    let (rows, f) = matrix("swiglu_backward", gu).map(|(rows, c)| (rows, c / 2))?;
    need("swiglu_backward", &[("gu", gu, gu.kind(), rows * 2 * f), ("da", da, gu.kind(), rows * f)])?;
    let args = [T(gu), T(da), I32(f as i32), wide(f, pack(gu), &[gu, da])];
    unsafe { Place::rows(gu)?.launch("swiglu_backward", rows, threads(f, pack(gu)), 0, &args) }
}

pub fn log_softmax(
    logits: &Tensor,
    labels: &Tensor,
    coef: Option<&Tensor>,
    logp: &Tensor,
    entropy: Option<&Tensor>,
) -> Result<()> {
    let (rows, v) = matrix("log_softmax", logits)?;
    need(
        "log_softmax",
        &[
            ("logits", logits, logits.kind(), rows * v),
            ("labels", labels, Kind::Int64, rows),
            ("logp", logp, Kind::Float, rows),
            ("coef", coef.unwrap_or(logp), Kind::Float, rows),
            ("entropy", entropy.unwrap_or(logp), Kind::Float, rows),
        ],
    )?;
    let args = [
        T(logits),
        T(labels),
        opt(coef),
        T(logp),
        opt(entropy),
        I32(v as i32),
        wide(v, pack(logits), &[logits]),
    ];
    unsafe { Place::rows(logits)?.launch("log_softmax", rows, [1024, 1], 0, &args) }
}

pub fn adamw(p: &Tensor, g: &Tensor, m: &Tensor, v: &Tensor, copy: Option<&Tensor>, o: AdamW) -> Result<()> {
    let n = p.numel() as i64;
    let float = |name, t| (name, t, Kind::Float, n);
    need("adamw", &[float("p", p), float("g", g), float("m", m), float("v", v)])?;
    if let Some(c) = copy {
        need("adamw", &[float("p", p), ("copy", c, Kind::BFloat16, n)])?;
    }
    let correction = |beta: f64| 1.0 - beta.powi(o.step as i32);
    let args = [
        T(p),
        T(g),
        T(m),
        T(v),
        opt(copy),
        I64(n),
        F32((1.0 - o.lr * o.weight_decay) as f32),
        F32(o.beta1 as f32),
        F32((1.0 - o.beta1) as f32),
        F32(o.beta2 as f32),
        F32((1.0 - o.beta2) as f32),
        F32(o.eps as f32),
        F32((o.lr / correction(o.beta1)) as f32),
        F32(correction(o.beta2).sqrt() as f32),
        F32(o.grad_scale as f32),
        wide(0, 4, &[p, g, m, v, copy.unwrap_or(p)]),
    ];
    unsafe { Place::optim(p)?.launch("adamw", blocks(n, 4), [256, 1], 0, &args) }
}

/// The sum over all tensors; the host waits once.
pub fn sum_squares(tensors: &[&Tensor]) -> Result<f64> {
    let Some(first) = tensors.first() else { return Ok(0.0) };
    // As many parts on every device, so that the sum has the same bits.
    let parts = |t: &Tensor| blocks(t.numel() as i64, 4).min(1024);
    let total: i64 = tensors.iter().map(|t| parts(t)).sum();
    let double = (Kind::Double, first.device());
    let (partial, out) = (Tensor::zeros([total], double), Tensor::zeros([1], double));
    let place = Place::optim(first)?;
    let mut slot = 0;
    for t in tensors {
        let n = t.numel() as i64;
        need("sum_squares", &[("x", first, Kind::Float, first.numel() as i64), ("x", t, Kind::Float, n)])?;
        let args = [T(t), T(&partial.narrow(0, slot, parts(t))), I64(n), wide(0, 4, &[t])];
        unsafe { place.launch("sum_squares", parts(t), [256, 1], 0, &args) }?;
        slot += parts(t);
    }
    unsafe { place.launch("add_doubles", 1, [256, 1], 0, &[T(&partial), T(&out), I32(total as i32)]) }?;
    Ok(out.f_double_value(&[0])?)
}

pub fn dropout(x: &Tensor, rows: &Tensor, key: u64, threshold: u32, scale: f64) -> Result<Tensor> {
    let (n, c) = matrix("dropout", x)?;
    need("dropout", &[("x", x, x.kind(), n * c), ("rows", rows, Kind::Int64, n)])?;
    let y = x.empty_like();
    let args = [
        T(x),
        T(rows),
        T(&y),
        U64(key),
        I32(threshold as i32),
        F32(scale as f32),
        I32(c as i32),
        wide(c, pack(x), &[x, &y]),
    ];
    unsafe { Place::rows(x)?.launch("dropout", n, threads(c, pack(x)), 0, &args) }?;
    Ok(y)
}

pub fn accumulate(dst: &Tensor, src: &Tensor, add: bool) -> Result<()> {
    let n = src.numel() as i64;
    need("accumulate", &[("src", src, src.kind(), n), ("dst", dst, Kind::Float, n)])?;
    let args = [T(dst), T(src), I64(n), I32(add as i32), wide(0, pack(src), &[dst, src])];
    unsafe { Place::rows(src)?.launch("accumulate", blocks(n, pack(src)), [256, 1], 0, &args) }
}

pub fn embedding_backward(dx: &Tensor, ids: &Tensor, dw: &Tensor) -> Result<()> {
    let (v, c) = matrix("embedding_backward", dw)?;
    let n = ids.numel() as i64;
    need(
        "embedding_backward",
        &[("dx", dx, dx.kind(), n * c), ("ids", ids, Kind::Int64, n), ("dw", dw, Kind::Float, v * c)],
    )?;
    let (sorted, order) = ids.view([-1]).f_sort_stable(true, 0, false)?;
    let args =
        [T(dx), T(&sorted), T(&order), T(dw), I64(n), I64(v), I32(c as i32), wide(c, pack(dx), &[dx, dw])];
    unsafe { Place::rows(dx)?.launch("embedding_backward", n, threads(c, pack(dx)), 0, &args) }
}

/// Whether flash attention takes this; it needs sm_80.
pub fn flash_fits(qkv: &Tensor, start: Option<&Tensor>, h: Heads) -> Result<bool> {
    Ok(matches!(qkv.device(), Device::Cuda(_))
        && matches!(qkv.kind(), Kind::BFloat16 | Kind::Half)
        && start.is_none()
        && h.head_dim % 8 == 0
        && h.head_dim <= 256
        && (qkv.data_ptr() as usize).is_multiple_of(16)
        && capability(qkv)?.0 >= 8)
}

pub fn flash_attention(qkv: &Tensor, h: Heads) -> Result<(Tensor, Tensor)> {
    let (mut out, mut lse) = (null_mut(), null_mut());
    // SAFETY: the C++ side checks shapes and contiguity; outputs are new tensors.
    check(unsafe {
        corral_flash_attention(
            raw(qkv),
            h.batch,
            h.heads,
            h.kv_heads,
            h.head_dim,
            h.scale(),
            &mut out,
            &mut lse,
        )
    })?;
    Ok((own(out), own(lse)))
}

pub fn flash_attention_backward(
    dout: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    h: Heads,
) -> Result<Tensor> {
    let mut dqkv = null_mut();
    // SAFETY: as in flash_attention.
    check(unsafe {
        corral_flash_attention_backward(
            raw(dout),
            raw(qkv),
            raw(out),
            raw(lse),
            h.batch,
            h.heads,
            h.kv_heads,
            h.head_dim,
            h.scale(),
            &mut dqkv,
        )
    })?;
    Ok(own(dqkv))
}

/// dw (float32 [O, I]) = or += dy^T x, for dy [N, O], x [N, I] in bfloat16 or float16.
pub fn grad_weight(dw: &Tensor, dy: &Tensor, x: &Tensor, add: bool) -> Result<()> {
    // SAFETY: libtorch checks shapes and dtypes; dw is the caller's to write.
    check(unsafe { corral_grad_weight(raw(dw), raw(dy), raw(x), add) })
}
