//! Quantization as compositions of libtorch's operations: used where no kernel is, and as oracles.

use tch::{Device, Kind, Tensor};

use super::coding::QuantOps;
use super::dynamic::{CODE_BLOCK, Table, by_blocks, dequantize_dynamic, largest, on, per_value};
use super::types::{Moment, NF4, NF4_BLOCK, Quantized, Scales, Scheme};
use crate::error::{Error, Result};
use crate::ops::Composed;
use crate::tensors::AdamW;

/// The distance of neighbouring values in int8, by row. Divided by a tensor: on CUDA libtorch makes of a number a product with its
/// reciprocal, which is an ulp away for many rows.
fn steps_of(absmax: &Tensor) -> Tensor {
    absmax / Tensor::full([1], 127.0, (absmax.kind(), absmax.device()))
}

impl QuantOps for Composed {
    fn nf4_quantize(&self, x: &Tensor, packed: &Tensor, absmax: &Tensor) -> Result<()> {
        let blocks = by_blocks(x, NF4_BLOCK);
        let most = largest(&blocks);
        let y = (blocks * most.clamp_min(1e-38).reciprocal().unsqueeze(-1)).view([-1]);
        let table = nf4_table(x.device());
        let middles = (table.narrow(0, 0, 15) + table.narrow(0, 1, 15)) / 2.0;
        let n = x.numel() as i64;
        let q = y.narrow(0, 0, n).constant_pad_nd([0, n % 2]).bucketize(&middles, true, false).view([-1, 2]);
        let bytes = q.select(1, 0) * 16 + q.select(1, 1);
        packed.shallow_clone().f_copy_(&bytes)?;
        absmax.shallow_clone().f_copy_(&most)?;
        Ok(())
    }

    fn int8_quantize(&self, x: &Tensor, q: &Tensor, absmax: &Tensor) -> Result<()> {
        let most = largest(x);
        let scale = steps_of(&most).unsqueeze(-1);
        let scale = scale.where_self(&scale.gt(0.0), &scale.ones_like());
        q.shallow_clone().f_copy_(&(x / scale).round().clamp(-127.0, 127.0).view([-1]))?;
        absmax.shallow_clone().f_copy_(&most)?;
        Ok(())
    }

    fn dequantize(&self, w: &Quantized, out: &Tensor, row: i64, column: i64) -> Result<()> {
        let [rows, columns] = w.shape();
        let n = rows * columns;
        let values = if w.scheme() == Scheme::Int8 {
            let Scales::Absmax(absmax) = w.scales() else { unreachable!("int8 has one scale a row") };
            w.data().view([rows, columns]).to_kind(Kind::Float) * steps_of(absmax).unsqueeze(-1)
        } else {
            let scales = match w.scales() {
                Scales::Absmax(absmax) => absmax.shallow_clone(),
                Scales::Double { codes, absmax, offset } => dequantize_dynamic(codes, absmax) + offset,
            };
            let low = w.data().remainder(16);
            let high = (w.data() - &low).divide_scalar_mode(16, "trunc");
            let codes = Tensor::stack(&[high, low], 1).view([-1]).narrow(0, 0, n).to_kind(Kind::Int64);
            (nf4_table(w.device()).index_select(0, &codes) * per_value(&scales, NF4_BLOCK, n))
                .view([rows, columns])
        };
        let [r, c] = out.size()[..] else {
            return Err(Error::new("out must be a matrix"));
        };
        out.shallow_clone().f_copy_(&values.f_narrow(0, row, r)?.f_narrow(1, column, c)?)?;
        Ok(())
    }

    fn adamw8(
        &self,
        p: &Tensor,
        g: &Tensor,
        [m, v]: [&Moment; 2],
        copy: Option<&Tensor>,
        decayed: i64,
        o: AdamW,
    ) -> Result<()> {
        let kind = p.kind();
        let g = (g * o.grad_scale).to_kind(Kind::Float);
        let first = m.values(true) * o.beta1 + &g * (1.0 - o.beta1);
        let second = v.values(false) * o.beta2 + &g * &g * (1.0 - o.beta2);
        let [correction1, correction2] = o.corrections();
        let denominator = second.to_kind(kind).sqrt() / correction2.sqrt() + o.eps;
        let mut p = p.shallow_clone();
        let _ = p.narrow(0, 0, decayed.min(p.numel() as i64)).g_mul_scalar_(1.0 - o.lr * o.weight_decay);
        let _ = p.g_sub_(&(first.to_kind(kind) / denominator * (o.lr / correction1)));
        if let Some(c) = copy {
            c.shallow_clone().f_copy_(&p)?;
        }
        store_nearest(&first, m, true)?;
        store_nearest(&second, v, false)
    }
}

fn nf4_table(device: Device) -> Tensor {
    Tensor::from_slice(&NF4).to_device(device)
}

/// The nearest codes; for unsigned ones, no positive value gets the code of 0.
fn store_nearest(x: &Tensor, to: &Moment, signed: bool) -> Result<()> {
    let n = x.numel() as i64;
    let absmax = largest(&by_blocks(x, CODE_BLOCK));
    let divisor = absmax.where_self(&absmax.gt(0.0), &absmax.ones_like());
    let table = if signed { Table::SignedMidpoints } else { Table::UnsignedMidpoints };
    let mut codes = (x / per_value(&divisor, CODE_BLOCK, n)).bucketize(&on(x.device(), table), false, false);
    if !signed {
        codes = codes.maximum(&x.gt(0.0).to_kind(Kind::Int64));
    }
    to.codes.shallow_clone().f_copy_(&codes)?;
    to.absmax.shallow_clone().f_copy_(&absmax)?;
    Ok(())
}
