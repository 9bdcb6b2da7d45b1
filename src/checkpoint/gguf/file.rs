//! The tensors of GGUF files. Quantized ones are read as float32.

use std::path::Path;

use tch::{Kind, Tensor};

use super::names::is_norm;
use super::quants::dequantize;
use crate::checkpoint::source::TensorFile;
use crate::error::{Error, Result};
use crate::gguf::{Gguf, GgufDtype, Info};

/// Blocks that are dequantized at once.
const BLOCKS: usize = 256;

/// A dtype of libtorch's that holds these numbers exactly.
fn kind(dtype: GgufDtype) -> Kind {
    match dtype {
        GgufDtype::F16 => Kind::Half,
        GgufDtype::BF16 => Kind::BFloat16,
        GgufDtype::F64 => Kind::Double,
        _ => Kind::Float,
    }
}

pub(super) struct GgufReader(pub Gguf);

impl GgufReader {
    fn tensor(&self, name: &str) -> Result<&Info> {
        self.0
            .tensors()
            .iter()
            .find(|info| info.name == name)
            .ok_or_else(|| Error::data(format!("{}: there is no tensor `{name}`", self.0.path().display())))
    }
}

impl TensorFile for GgufReader {
    fn path(&self) -> &Path {
        self.0.path()
    }

    fn names(&self) -> Vec<String> {
        self.0.tensors().iter().map(|info| info.name.clone()).collect()
    }

    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        let info = self.tensor(name)?;
        Ok((info.shape.clone(), kind(info.dtype)))
    }

    fn read_bytes(&self, name: &str, first: i64, to: &mut [u8]) -> Result<()> {
        let info = self.tensor(name)?;
        let element = kind(info.dtype).elt_size_in_bytes();
        let n = to.len() / element;
        if first < 0 || first + n as i64 > info.numel() {
            return Err(Error::failed(format!("{}: `{name}` is shorter", self.0.path().display())));
        }
        if info.dtype.block_len() == 1 {
            return self.0.read_blocks(info, first as u64, to);
        }
        let (len, bytes) = (info.dtype.block_len(), info.dtype.block_bytes());
        // The first block may begin before what is wanted, and the last end after it.
        let (mut at, end) = (first as usize, first as usize + n);
        let most = (end.div_ceil(len) - at / len).min(BLOCKS);
        let (mut blocks, mut numbers) = (vec![0; bytes * most], vec![0f32; len * most]);
        let mut out = to.chunks_exact_mut(element);
        while at < end {
            let (from, skip) = (at / len, at % len);
            let count = (end.div_ceil(len) - from).min(BLOCKS);
            let (blocks, numbers) = (&mut blocks[..count * bytes], &mut numbers[..count * len]);
            self.0.read_blocks(info, from as u64, blocks)?;
            dequantize(info.dtype, blocks, numbers);
            let taken = (count * len - skip).min(end - at);
            for (x, to) in numbers[skip..skip + taken].iter().zip(&mut out) {
                to.copy_from_slice(&x.to_le_bytes());
            }
            at += taken;
        }
        Ok(())
    }
}

/// A file of a family whose norms multiply by 1 + weight, where llama.cpp keeps the sums: of norms, the numbers less 1, as
/// float32.
pub(super) struct LessOne(pub Box<dyn TensorFile>);

impl TensorFile for LessOne {
    fn path(&self) -> &Path {
        self.0.path()
    }

    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        let (shape, kind) = self.0.info(name)?;
        Ok((shape, if is_norm(name) { Kind::Float } else { kind }))
    }

    fn read_bytes(&self, name: &str, first: i64, to: &mut [u8]) -> Result<()> {
        if !is_norm(name) {
            return self.0.read_bytes(name, first, to);
        }
        let (_, kind) = self.0.info(name)?;
        let n = to.len() / size_of::<f32>();
        let mut stored = vec![0; n * kind.elt_size_in_bytes()];
        self.0.read_bytes(name, first, &mut stored)?;
        let sums = Tensor::f_from_data_size(&stored, &[n as i64], kind)?.f_to_kind(Kind::Float)?;
        Ok((sums - 1.0).f_copy_data_u8(to, n)?)
    }
}
