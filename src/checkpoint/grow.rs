//! Weights of a vocabulary that grows: rows for tokens that were added.

use std::collections::HashMap;

use tch::{Kind, Tensor};

use crate::distributed::sharded::TensorSpec;
use crate::error::Result;
use crate::model::layout::{EMBEDDING, LM_HEAD};

/// Elements that are read at once to take the mean.
const CHUNK: i64 = 1 << 20;

/// The tensor as a model with a vocabulary of `rows` stores it, if it has fewer rows than `spec`.
pub(super) fn stored(spec: &TensorSpec, rows: i64) -> Option<TensorSpec> {
    let grows = [EMBEDDING, LM_HEAD].contains(&spec.name.as_str()) && spec.shape[0] > rows;
    grows.then(|| TensorSpec { shape: vec![rows, spec.shape[1]], ..spec.clone() })
}

/// For [`crate::distributed::sharded::Sharded::fill`] with `read`, which reads tensors of a model with a vocabulary of
/// `rows` (`peek` does, too, for the means): further rows of the embedding and of the LM head are the mean of the stored ones, each computed in float64.
/// (transformers' `mean_resizing` draws them from a normal distribution with that mean and a tiny variance.)
pub(super) fn grown(
    rows: i64,
    mut read: impl FnMut(&TensorSpec, i64, &Tensor) -> Result<()>,
    mut peek: impl FnMut(&TensorSpec, i64, &Tensor) -> Result<()>,
) -> impl FnMut(&TensorSpec, i64, &Tensor) -> Result<()> {
    let mut means: HashMap<String, Tensor> = HashMap::new();
    move |spec, first, values| {
        let Some(stored) = stored(spec, rows) else { return read(spec, first, values) };
        let (known, end) = (stored.numel(), first + values.numel() as i64);
        if first < known {
            read(&stored, first, &values.narrow(0, 0, known.min(end) - first))?;
        }
        if end > known {
            let mean = match means.get(&spec.name) {
                Some(mean) => mean.shallow_clone(),
                None => mean_row(&stored, values, &mut peek)?,
            };
            let begin = first.max(known);
            let columns =
                Tensor::arange_start(begin, end, (Kind::Int64, values.device())).remainder(spec.shape[1]);
            let new = mean.index_select(0, &columns).to_kind(values.kind());
            values.narrow(0, begin - first, end - begin).copy_(&new);
            means.insert(spec.name.clone(), mean);
        }
        Ok(())
    }
}

/// The mean of all rows, float64 `[C]`, on the device of `like` and read in its dtype.
fn mean_row(
    stored: &TensorSpec,
    like: &Tensor,
    read: &mut impl FnMut(&TensorSpec, i64, &Tensor) -> Result<()>,
) -> Result<Tensor> {
    let (rows, columns) = (stored.shape[0], stored.shape[1]);
    let at_once = (CHUNK / columns).clamp(1, rows);
    let buffer = Tensor::f_zeros([at_once * columns], (like.kind(), like.device()))?;
    let mut sum = Tensor::f_zeros([columns], (Kind::Double, like.device()))?;
    let mut row = 0;
    while row < rows {
        let n = at_once.min(rows - row);
        let part = buffer.narrow(0, 0, n * columns);
        read(stored, row * columns, &part)?;
        sum += part.view([n, columns]).to_kind(Kind::Double).sum_dim_intlist(0, false, Kind::Double);
        row += n;
    }
    Ok(sum / rows as f64)
}
