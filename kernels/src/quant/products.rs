//! Products with quantized weights, of which a panel at a time is dequantized.

use tch::{Device, Tensor};

use super::dynamic::blocks;
use super::types::{NF4_BLOCK, Quantized};
use crate::error::{Error, Result};
use crate::ops;

/// Values that are dequantized at once: enough rows or columns for a product to run at its full rate. On a GPU whole matrices of
/// a 7B model, 268 MB in bfloat16.
fn panel_values(device: Device) -> i64 {
    if device == Device::Cpu { 1 << 20 } else { 1 << 27 }
}

fn panel_rows(device: Device, columns: i64) -> i64 {
    (panel_values(device) / columns.max(1)).max(1)
}

/// Values of W that exist at once in [`linear`], where the largest part has `rows`.
pub fn forward_panel(device: Device, rows: i64, columns: i64) -> i64 {
    rows.min(panel_rows(device, columns)) * columns
}

/// Values of W `[rows, columns]` that exist at once in [`linear_backward`].
pub fn backward_panel(device: Device, rows: i64, columns: i64) -> i64 {
    let step = blocks(panel_values(device) / rows.max(1), NF4_BLOCK).max(1) * NF4_BLOCK;
    rows * step.min(columns)
}

/// O and I of weights one above the other.
fn stacked(parts: &[&Quantized], x: &Tensor, dim: usize) -> Result<[i64; 2]> {
    let columns = parts.first().map_or(0, |p| p.shape[1]);
    let size = [parts.iter().map(|p| p.shape[0]).sum(), columns];
    if parts.iter().any(|p| p.shape[1] != columns) || x.dim() != 2 || x.size()[1] != size[dim] {
        let shapes: Vec<_> = parts.iter().map(|p| p.shape).collect();
        return Err(Error::new(format!("a product of {:?} with weights {shapes:?} does not fit", x.size())));
    }
    Ok(size)
}

/// y = x W^T for W `[O, I]`, the parts' rows one above the other: T `[N, O]` for x: T `[N, I]`. Of W only a panel of rows
/// exists at a time.
pub fn linear(parts: &[&Quantized], x: &Tensor) -> Result<Tensor> {
    let [rows, columns] = stacked(parts, x, 1)?;
    let options = (x.kind(), x.device());
    let y = Tensor::empty([x.size()[0], rows], options);
    let step = panel_rows(x.device(), columns);
    let most = parts.iter().map(|p| p.shape[0]).max().unwrap_or(0);
    let scratch = Tensor::empty([forward_panel(x.device(), most, columns)], options).view([-1, columns]);
    let few = x.device() == Device::Cpu && x.size()[0] <= ops::few_rows(x.kind());
    let mut at = 0;
    for part in parts {
        let mut row = 0;
        while row < part.shape[0] {
            let n = step.min(part.shape[0] - row);
            let w = scratch.narrow(0, 0, n);
            part.dequantize_into(&w, row, 0)?;
            let mut out = y.narrow(1, at, n);
            match few {
                true => out.f_copy_(&ops::linear(x, &w, None)?)?,
                false => drop(x.f_mm_out(&out, &w.tr())?),
            }
            row += n;
            at += n;
        }
    }
    Ok(y)
}

/// dx = dy W, the gradient of [`linear`]: T `[N, I]` for dy: T `[N, O]`. Of W only a panel of columns exists at a time.
pub fn linear_backward(parts: &[&Quantized], dy: &Tensor) -> Result<Tensor> {
    let [rows, columns] = stacked(parts, dy, 0)?;
    let options = (dy.kind(), dy.device());
    let dx = Tensor::empty([dy.size()[0], columns], options);
    let panel = backward_panel(dy.device(), rows, columns);
    let (step, scratch) = (panel / rows.max(1), Tensor::empty([panel], options));
    let mut column = 0;
    while column < columns {
        let n = step.min(columns - column);
        let w = scratch.narrow(0, 0, rows * n).view([rows, n]);
        let mut row = 0;
        for part in parts {
            part.dequantize_into(&w.narrow(0, row, part.shape[0]), 0, column)?;
            row += part.shape[0];
        }
        let _ = dy.f_mm_out(&dx.narrow(1, column, n), &w)?;
        column += n;
    }
    Ok(dx)
}
