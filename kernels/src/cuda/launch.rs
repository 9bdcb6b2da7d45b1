//! Launches of the kernels in `cuda/`. A source is compiled when first used, once for an architecture; kernels run on the
//! current stream of their tensors' device.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, OnceLock};

use tch::{Device, Kind, Tensor};

use super::emulator;
use super::modules::{Arg, Kernel, Module};
use super::nvrtc;
use super::shim::{Cuda, load};
use super::sources::{
    DECODE_BF16, DECODE_FLOAT, FLOAT8, OPTIM, QUANT_BF16, QUANT_FLOAT, ROWS_BF16, ROWS_FLOAT, SAMPLE_BF16,
    SAMPLE_FLOAT, SOURCES,
};
use crate::abi::Stream;
use crate::error::{Error, Result};
use crate::tensors::AdamW;

type Kernels = HashMap<&'static str, Kernel<'static>>;

fn index(x: &Tensor) -> Result<usize> {
    match x.device() {
        Device::Cuda(index) => Ok(index),
        other => Err(Error::new(format!("a tensor on {other:?} where CUDA is needed"))),
    }
}

/// The compute capability of the tensor's device; asked for once.
pub(crate) fn capability(x: &Tensor) -> Result<(i32, i32)> {
    if x.device() == Device::Cpu && emulator::is_installed() {
        return Ok((9, 0));
    }
    const MOST: usize = 64;
    static KNOWN: [OnceLock<(i32, i32)>; MOST] = [const { OnceLock::new() }; MOST];
    let device = index(x)?;
    let cell = KNOWN.get(device).ok_or_else(|| Error::new(format!("cuda:{device}: too many devices")))?;
    if let Some(known) = cell.get() {
        return Ok(*known);
    }
    let found = load()?.device_info(device)?.capability;
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
    let module =
        Box::leak(Box::new(Module::load(cuda, &nvrtc::compiled(s.name, s.text, &arch, s.options)?)?));
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

/// What launches kernels of one source.
pub(crate) enum Launcher {
    /// On the current stream of a device.
    Gpu { stream: Stream, device: usize, kernels: &'static Kernels },
    /// In the tests' emulator: the source's place in [`SOURCES`].
    Emulator(usize),
}

impl Launcher {
    /// The row kernels for tensors of this dtype and device.
    pub(crate) fn rows(x: &Tensor) -> Result<Launcher> {
        Launcher::new(x, by_kind(x, ROWS_FLOAT, ROWS_BF16)?)
    }

    pub(crate) fn quant(x: &Tensor) -> Result<Launcher> {
        Launcher::new(x, by_kind(x, QUANT_FLOAT, QUANT_BF16)?)
    }

    pub(crate) fn decode(x: &Tensor) -> Result<Launcher> {
        Launcher::new(x, by_kind(x, DECODE_FLOAT, DECODE_BF16)?)
    }

    pub(crate) fn sample(x: &Tensor) -> Result<Launcher> {
        Launcher::new(x, by_kind(x, SAMPLE_FLOAT, SAMPLE_BF16)?)
    }

    /// For bfloat16, and for bytes.
    pub(crate) fn float8(x: &Tensor) -> Result<Launcher> {
        match x.kind() {
            Kind::BFloat16 | Kind::Uint8 => Launcher::new(x, FLOAT8),
            other => Err(Error::new(format!("no 8-bit floats of dtype {other:?}"))),
        }
    }

    pub(crate) fn optim(x: &Tensor) -> Result<Launcher> {
        Launcher::new(x, OPTIM)
    }

    fn new(x: &Tensor, source: usize) -> Result<Launcher> {
        if x.device() == Device::Cpu && emulator::is_installed() {
            return Ok(Launcher::Emulator(source));
        }
        let (cuda, device) = (load()?, index(x)?);
        let capability = capability(x)?;
        Ok(Launcher::Gpu {
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
        let (stream, device, kernels) = match *self {
            Launcher::Gpu { stream, device, kernels } => (stream, device, kernels),
            Launcher::Emulator(source) => {
                // SAFETY: the caller's promise.
                return unsafe { emulator::launch(source, name, grid as u32, block, shared_bytes, args) };
            }
        };
        let kernel =
            kernels.get(name).ok_or_else(|| Error::new(format!("there is no CUDA kernel {name}")))?;
        if shared_bytes > 48 << 10 {
            kernel.allow_shared(device, shared_bytes)?;
        }
        // SAFETY: the caller's promise.
        unsafe { kernel.launch([grid as u32, 1, 1], [block[0], block[1], 1], shared_bytes, stream, args) }
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
pub(crate) fn blocks(n: i64, pack: i64) -> i64 {
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

/// The numbers of a step as both kernels of AdamW take them, rounded once.
pub(crate) fn adamw_numbers(o: AdamW) -> [Arg<'static>; 9] {
    let [correction1, correction2] = o.corrections();
    [
        1.0 - o.lr * o.weight_decay,
        o.beta1,
        1.0 - o.beta1,
        o.beta2,
        1.0 - o.beta2,
        o.eps,
        o.lr / correction1,
        correction2.sqrt(),
        o.grad_scale,
    ]
    .map(|number| Arg::F32(number as f32))
}
