//! Products of bfloat16 tensors in 8-bit floats (Micikevicius et al. 2022): values and weights in e4m3, gradients in e5m2,
//! each scaled so that its largest magnitude is the format's largest number; sums in float32. Scales are dynamic: those of the
//! tensors at hand.

use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};

use tch::{Device, Kind, Tensor};

use super::dispatch::accumulate;
use crate::abi::corral_scaled_mm;
use crate::cuda::launch::Launcher;
use crate::cuda::modules::Arg::{I32, I64, Tensor as T};
use crate::cuda::takes_gpu_path;
use crate::error::{Error, Result, check};
use crate::tensors::{own, raw};

/// How many values share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Granularity {
    /// The whole tensor.
    Tensor,
    /// Each row of the left factor, and each column of the right one.
    Row,
}

/// Which products are taken in 8-bit floats, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Float8 {
    /// Products with a shorter side stay in bfloat16.
    pub min_size: i64,
    /// How much one scale is for.
    pub scales: Granularity,
}

/// The compute capability from which on a GPU has such products.
pub fn float8_capability(scales: Granularity) -> (i32, i32) {
    match scales {
        Granularity::Tensor => (8, 9),
        Granularity::Row => (9, 0),
    }
}

/// The multiple that all sides of a product in 8-bit floats must be.
const SIDE: i64 = 16;

static PRODUCTS: AtomicU64 = AtomicU64::new(0);

/// Products in 8-bit floats that this process has taken.
pub fn float8_products() -> u64 {
    PRODUCTS.load(Ordering::Relaxed)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    /// 4 bits of exponent and 3 of mantissa, up to 448.
    E4m3,
    /// 5 and 2, up to 57,344.
    E5m2,
}

impl Format {
    fn kind(self) -> Kind {
        match self {
            Format::E4m3 => Kind::Float8e4m3fn,
            Format::E5m2 => Kind::Float8e5m2,
        }
    }

    fn largest(self) -> f64 {
        match self {
            Format::E4m3 => 448.0,
            Format::E5m2 => 57344.0,
        }
    }

    /// What values whose largest magnitude is `largest` are multiplied by: float, of the same size.
    fn factor(self, largest: &Tensor) -> Result<Tensor> {
        // A quotient of tensors: by a number a GPU multiplies with its reciprocal, which rounds twice.
        let largest = largest.to_kind(Kind::Float).f_clamp_min(1e-12)?;
        Ok(Tensor::full_like(&largest, self.largest()) / largest)
    }

    /// x times `factor`, in this format.
    fn cast(self, x: &Tensor, factor: &Tensor) -> Result<Tensor> {
        let mut scaled = x.f_mul(factor)?; // float, by promotion
        Ok(scaled.f_clamp_(-self.largest(), self.largest())?.to_kind(self.kind()))
    }
}

/// A factor of a product: `values` [rows, inner], to be multiplied by `scale`, float `[1]` or [rows, 1].
struct Factor {
    values: Tensor,
    scale: Tensor,
    format: Format,
}

impl Factor {
    /// x, bfloat16 [rows, inner], or of a tensor [inner, rows] its transpose.
    fn of(x: &Tensor, transposed: bool, format: Format, scales: Granularity) -> Result<Factor> {
        match scales {
            Granularity::Tensor if takes_gpu_path(x.device()) => Factor::fused(x, transposed, format),
            _ => Factor::composed(x, transposed, format, scales),
        }
    }

    fn composed(x: &Tensor, transposed: bool, format: Format, scales: Granularity) -> Result<Factor> {
        let x = if transposed { x.tr() } else { x.shallow_clone() }; // [rows, inner]
        let largest = match scales {
            Granularity::Tensor => x.f_abs()?.f_max()?.view([1]),
            Granularity::Row => x.f_abs()?.f_amax([1i64].as_slice(), true)?,
        };
        let factor = format.factor(&largest)?;
        let values = format.cast(&x, &factor)?.contiguous();
        Ok(Factor { values, scale: factor.f_reciprocal()?, format })
    }

    fn fused(x: &Tensor, transposed: bool, format: Format) -> Result<Factor> {
        let x = match (x.stride(), x.data_ptr() as usize % 16) {
            (stride, 0) if stride[1] == 1 && stride[0] % 8 == 0 => x.shallow_clone(),
            _ => x.f_contiguous()?.copy(), // new memory is aligned
        };
        let (rows, columns, stride) = (x.size()[0], x.size()[1], x.stride()[0]);
        let on = |kind| (kind, x.device());
        let amax = Tensor::zeros([1], on(Kind::Int));
        let scale = Tensor::empty([1], on(Kind::Float));
        let size = if transposed { [columns, rows] } else { [rows, columns] };
        let values = Tensor::empty(size, on(format.kind()));
        let kernels = Launcher::float8(&x)?;
        let blocks = ((rows * columns / 8 + 255) / 256).min(2048);
        let args = [T(&x), T(&amax), I64(rows), I64(columns), I64(stride)];
        // SAFETY: it reads packs of 8 of the rows of x, whose columns are a multiple of 16, and changes amax.
        unsafe { kernels.launch("float8_amax", blocks, [256, 1], 0, &args) }?;
        let tiles = ((rows + 63) / 64) * ((columns + 63) / 64);
        let args = [
            T(&x),
            T(&amax),
            T(&values),
            T(&scale),
            I64(rows),
            I64(columns),
            I64(stride),
            I32(transposed as i32),
            I32((format == Format::E5m2) as i32),
        ];
        // SAFETY: a block reads and writes what lies in both its tile and the tensors.
        unsafe { kernels.launch("float8_cast", tiles, [256, 1], 0, &args) }?;
        Ok(Factor { values, scale, format })
    }
}

/// What tensors are multiplied by in e4m3, for their largest magnitudes: float, of the same size.
pub fn float8_factors(largest: &Tensor) -> Result<Tensor> {
    Format::E4m3.factor(largest)
}

/// x (bfloat16, of any size) times `factor` (float `[1]`, of [`float8_factors`]) in e4m3.
pub fn to_float8(x: &Tensor, factor: &Tensor) -> Result<Tensor> {
    Format::E4m3.cast(x, factor)
}

/// A weight that is there in 8-bit floats, with one scale. Its products equal those of [`Float8`] with the weight that it was
/// cast from; their rows may be any number, since zeros are added to them.
#[derive(Debug)]
pub struct Float8Weight {
    /// e4m3 [O, I]
    values: Tensor,
    /// float `[1]`
    scale: Tensor,
}

impl Float8Weight {
    /// Of values that [`to_float8`] gave: e4m3 [O, I], contiguous. `scale`: 1 divided by their factor, float `[1]`.
    pub fn new(values: Tensor, scale: Tensor) -> Float8Weight {
        // Tensor cores read aligned packs; in a flat buffer a matrix may begin anywhere.
        let aligned = (values.data_ptr() as usize).is_multiple_of(16);
        Float8Weight { values: if aligned { values } else { values.copy() }, scale }
    }

    /// [O, I]
    pub fn shape(&self) -> [i64; 2] {
        [self.values.size()[0], self.values.size()[1]]
    }

    /// x w^T: bfloat16 `[N, O]`, for x: bfloat16 `[N, I]`.
    ///
    /// # Errors
    /// O or I that are not multiples of 16; so for the gradient.
    pub fn linear(&self, x: &Tensor) -> Result<Tensor> {
        self.product(x, Format::E4m3, self.values.shallow_clone(), true)
    }

    /// dy w, the gradient of x: bfloat16 `[N, I]`, for dy: bfloat16 `[N, O]`.
    pub fn linear_backward(&self, dy: &Tensor) -> Result<Tensor> {
        self.product(dy, Format::E5m2, self.transposed()?, false)
    }

    /// e4m3 [I, O]
    fn transposed(&self) -> Result<Tensor> {
        let [rows, columns] = self.shape();
        let bytes = self.values.f_view_dtype(Kind::Uint8)?;
        let tiled = takes_gpu_path(bytes.device()) && rows % SIDE == 0 && columns % SIDE == 0;
        if !tiled {
            return Ok(bytes.tr().f_contiguous()?.f_view_dtype(Kind::Float8e4m3fn)?);
        }
        let out = Tensor::empty([columns, rows], (Kind::Uint8, bytes.device()));
        let blocks = ((rows + 63) / 64) * ((columns + 63) / 64);
        let args = [T(&bytes), T(&out), I64(rows), I64(columns)];
        // SAFETY: packs of 16 of an aligned tensor whose sides are multiples of 16; a block stays in its tile of both.
        unsafe { Launcher::float8(&bytes)?.launch("float8_transpose", blocks, [256, 1], 0, &args) }?;
        Ok(out.f_view_dtype(Kind::Float8e4m3fn)?)
    }

    /// x values^T
    fn product(&self, x: &Tensor, format: Format, values: Tensor, fast: bool) -> Result<Tensor> {
        let rows = x.size()[0];
        if rows == 0 {
            return Ok(Tensor::zeros([0, values.size()[0]], (x.kind(), x.device())));
        }
        let x = match rows % SIDE {
            0 => x.shallow_clone(),
            over => x.f_constant_pad_nd([0, 0, 0, SIDE - over])?,
        };
        let x = Factor::of(&x, false, format, Granularity::Tensor)?;
        let w = Factor { values, scale: self.scale.shallow_clone(), format: Format::E4m3 };
        Ok(product(&x, &w, false, fast)?.f_narrow(0, 0, rows)?)
    }
}

/// a b^T, [rows of a, rows of b], in bfloat16 or float32. `fast`: sums may be kept in fewer bits, as tensor cores do.
fn product(a: &Factor, b: &Factor, float32: bool, fast: bool) -> Result<Tensor> {
    let [m, k] = [a.values.size()[0], a.values.size()[1]];
    let [n, inner] = [b.values.size()[0], b.values.size()[1]];
    if a.format == Format::E5m2 && b.format == Format::E5m2 {
        return Err(Error::new("float8: there is no product of two factors in e5m2"));
    }
    if k != inner || [m, n, k].iter().any(|side| side % SIDE != 0) {
        return Err(Error::new(format!(
            "float8: [{m}, {k}] times [{n}, {inner}]^T: all sides must be multiples of {SIDE}"
        )));
    }
    PRODUCTS.fetch_add(1, Ordering::Relaxed);
    if a.values.device() == Device::Cpu {
        // libtorch's own product takes one scale a tensor, and on processors with AVX-512 falls to oneDNN's reference code.
        let wide = |f: &Factor| f.values.to_kind(Kind::Float) * &f.scale;
        let y = wide(a).f_mm(&wide(b).tr())?;
        return Ok(if float32 { y } else { y.to_kind(Kind::BFloat16) });
    }
    let (right, scale) =
        (b.values.tr(), if b.scale.numel() > 1 { b.scale.tr() } else { b.scale.shallow_clone() });
    let mut y = null_mut();
    // SAFETY: libtorch checks shapes, dtypes and devices; the result is a new tensor.
    check(unsafe {
        corral_scaled_mm(raw(&a.values), raw(&right), raw(&a.scale), raw(&scale), float32, fast, &mut y)
    })?;
    Ok(own(y))
}

impl Float8 {
    /// Whether products of x [N, I] or dy [N, O] with a weight [O, I] are taken in 8-bit floats.
    pub fn takes(&self, x: &Tensor, w: &Tensor) -> bool {
        x.kind() == Kind::BFloat16 && self.takes_sides([x.size()[0], w.size()[0], w.size()[1]])
    }

    /// The same of bfloat16 products with these sides: N, O and I.
    pub fn takes_sides(&self, sides: [i64; 3]) -> bool {
        sides.iter().all(|side| self.takes_side(*side))
    }

    fn takes_side(&self, side: i64) -> bool {
        side >= self.min_size.max(1) && side % SIDE == 0
    }

    /// Whether a weight [O, I] may be gathered in 8-bit floats: with one scale each, and none that depends on its rows or
    /// columns.
    pub fn gathers(&self, shape: [i64; 2]) -> bool {
        self.scales == Granularity::Tensor && shape.iter().all(|side| self.takes_side(*side))
    }

    /// x w^T: bfloat16 `[N, O]`, for x: bfloat16 `[N, I]`, w: bfloat16 `[O, I]`.
    ///
    /// # Errors
    /// Sides that are not multiples of 16; so for all products here.
    pub fn linear(&self, x: &Tensor, w: &Tensor) -> Result<Tensor> {
        let factor = |t| Factor::of(t, false, Format::E4m3, self.scales);
        product(&factor(x)?, &factor(w)?, false, true)
    }

    /// dy w, the gradient of x: bfloat16 `[N, I]`, for dy: bfloat16 `[N, O]`.
    pub fn linear_backward(&self, dy: &Tensor, w: &Tensor) -> Result<Tensor> {
        let dy = Factor::of(dy, false, Format::E5m2, self.scales)?;
        product(&dy, &Factor::of(w, true, Format::E4m3, self.scales)?, false, false)
    }

    /// dw (float32 `[O, I]`) = or += dy^T x.
    pub(super) fn grad_weight(&self, dw: &Tensor, dy: &Tensor, x: &Tensor, add: bool) -> Result<()> {
        let dy = Factor::of(dy, true, Format::E5m2, self.scales)?;
        let x = Factor::of(x, true, Format::E4m3, self.scales)?;
        // Products with a scale for each row are in bfloat16 alone.
        let float32 = self.scales == Granularity::Tensor;
        accumulate(dw, &product(&dy, &x, float32, false)?, add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tensor_cores_do_not_have_is_refused() {
        let x = Tensor::ones([32, 48], (Kind::BFloat16, Device::Cpu));
        let of = |t: &Tensor, format| Factor::of(t, false, format, Granularity::Tensor).unwrap();
        let y = product(&of(&x, Format::E5m2), &of(&x, Format::E4m3), false, false).unwrap();
        assert_eq!((y.size(), y.double_value(&[3, 5])), (vec![32, 32], 48.0));
        let e = product(&of(&x, Format::E5m2), &of(&x, Format::E5m2), false, false).unwrap_err();
        assert!(e.to_string().contains("two factors in e5m2"), "{e}");
        for (rows, columns) in [(24, 48), (32, 40)] {
            let part = x.narrow(0, 0, rows).narrow(1, 0, columns).contiguous();
            let e = product(&of(&part, Format::E4m3), &of(&part, Format::E4m3), true, false).unwrap_err();
            assert!(e.to_string().contains("multiples of 16"), "{e}");
        }
    }
}
