//! Experts of Megatron's `GroupedMLP`: those of a layer lie in two tensors, each expert transposed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use tch::Kind;

use super::args::Args;
use crate::checkpoint::source::TensorFile;
use crate::checkpoint::torch_file::TorchReader;
use crate::error::{Error, Result};

/// A rank's file that has such experts: they are read under the names and in the form of `TEGroupedMLP`'s, a matrix each.
pub(super) struct StackedExperts {
    file: TorchReader,
    /// By its name: where an expert lies.
    experts: BTreeMap<String, ExpertPlace>,
    /// The expert that was read last, turned around: reads come row by row.
    turned: Mutex<Option<(String, Vec<u8>)>>,
}

/// An expert's matrix in a tensor of several, which has its columns as rows.
struct ExpertPlace {
    tensor: String,
    /// Its first element there.
    first: i64,
    /// Of the matrix.
    rows: i64,
    columns: i64,
    kind: Kind,
}

impl StackedExperts {
    /// The file, with its experts as matrices where it has such.
    pub fn wrapped(file: TorchReader, args: &Args) -> Result<Box<dyn TensorFile>> {
        let mut experts = BTreeMap::new();
        for tensor in file.names() {
            let Some((layer, which)) = tensor.rsplit_once(".mlp.experts.weight") else { continue };
            let count = args.integer("num_experts", None)?;
            let (shape, kind) = file.info(&tensor)?;
            let divided = |n: i64| (count >= 1 && n % count == 0).then(|| n / count);
            // fc1 is [C, E F] there, which is read as [E, C, F]; fc2 is [E F, C].
            let size = match (which, shape.as_slice()) {
                ("1", [c, all]) => divided(*all).map(|f| (f, *c)),
                ("2", [all, c]) => divided(*all).map(|f| (*c, f)),
                _ => None,
            };
            let size = size.filter(|(rows, columns)| *rows >= 1 && *columns >= 1);
            let Some((rows, columns)) = size else {
                return Err(Error::data(format!(
                    "`{tensor}` is {shape:?}, which {count} experts do not divide"
                )));
            };
            for expert in 0..count {
                let name = format!("{layer}.mlp.experts.linear_fc{which}.weight{expert}");
                let first = expert * rows * columns;
                experts.insert(name, ExpertPlace { tensor: tensor.clone(), first, rows, columns, kind });
            }
        }
        Ok(match experts.is_empty() {
            true => Box::new(file),
            false => Box::new(StackedExperts { file, experts, turned: Mutex::new(None) }),
        })
    }

    /// The bytes of an expert's matrix, row by row.
    fn turned(&self, expert: &ExpertPlace) -> Result<Vec<u8>> {
        let element = expert.kind.elt_size_in_bytes();
        let (rows, columns) = (expert.rows as usize, expert.columns as usize);
        let mut stored = vec![0; rows * columns * element];
        self.file.read_bytes(&expert.tensor, expert.first, &mut stored)?;
        let mut turned = vec![0; stored.len()];
        for (column, of_column) in stored.chunks_exact(rows * element).enumerate() {
            for (row, value) in of_column.chunks_exact(element).enumerate() {
                let at = (row * columns + column) * element;
                turned[at..at + element].copy_from_slice(value);
            }
        }
        Ok(turned)
    }
}

impl TensorFile for StackedExperts {
    fn path(&self) -> &Path {
        self.file.path()
    }

    fn names(&self) -> Vec<String> {
        let stacked = |name: &String| !self.experts.values().any(|expert| expert.tensor == *name);
        let names = self.file.names().into_iter().filter(stacked);
        names.chain(self.experts.keys().cloned()).collect()
    }

    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        match self.experts.get(name) {
            Some(expert) => Ok((vec![expert.rows, expert.columns], expert.kind)),
            None => self.file.info(name),
        }
    }

    fn is_one_tensor(&self, a: &str, b: &str) -> bool {
        self.file.is_one_tensor(a, b)
    }

    fn read_bytes(&self, name: &str, first: i64, to: &mut [u8]) -> Result<()> {
        let Some(expert) = self.experts.get(name) else { return self.file.read_bytes(name, first, to) };
        let mut last = self.turned.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref().is_none_or(|(read, _)| read != name) {
            // The one before is freed first.
            *last = None;
            *last = Some((name.to_string(), self.turned(expert)?));
        }
        let bytes = last.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        let from = first as usize * expert.kind.elt_size_in_bytes();
        let part = bytes.get(from..from + to.len());
        let short = || Error::failed(format!("{}: `{name}` is shorter", self.path().display()));
        to.copy_from_slice(part.ok_or_else(short)?);
        Ok(())
    }
}
