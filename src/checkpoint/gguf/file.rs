//! The tensors of GGUF files. Quantized ones are read as float32.

use std::path::Path;

use tch::Kind;

use super::quants::dequantize;
use crate::checkpoint::source::TensorFile;
use crate::error::{Error, Result};
use crate::gguf::{Dtype, Gguf, Info};

/// Blocks that are dequantized at once.
const BLOCKS: usize = 256;

/// A dtype of libtorch's that holds these numbers exactly.
fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F64 => Kind::Double,
        _ => Kind::Float,
    }
}

pub(super) struct Reader(pub Gguf);

impl Reader {
    fn tensor(&self, name: &str) -> Result<&Info> {
        self.0
            .tensors()
            .iter()
            .find(|info| info.name == name)
            .ok_or_else(|| Error::data(format!("{}: there is no tensor `{name}`", self.0.path().display())))
    }
}

impl TensorFile for Reader {
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
