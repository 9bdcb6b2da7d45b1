//! Adapters of layers that a family's own files hold in one (Phi-3's `qkv_proj` and `gate_up_proj`), where PEFT has one adapter.
//!
//! The model has adapters B_i A_i of rank r on the n parts of such a layer. Written are A = [A_1; ...; A_n], `[n r, C]`, and
//! B = diag(B_1, ..., B_n), `[rows, n r]`, so that B A x = [B_1 A_1 x; ...; B_n A_n x]; a part without an adapter has zeros. Read
//! are these, and PEFT's own of rank r: all parts have its A, and each its rows of B.

use std::collections::{BTreeMap, BTreeSet};

use tch::{Kind, Tensor};

use super::PREFIX;
use crate::checkpoint::families;
use crate::checkpoint::safetensors::TensorEntry;
use crate::checkpoint::source::{RowOrder, TensorBlock, TensorSource, View};
use crate::config::shape::Shape;
use crate::config::trainable::{Lora, Targets};
use crate::distributed::plan::adapter_names;
use crate::error::{Error, Result};
use crate::model::layout::layouts;
use crate::model::trainable::{last_part, module};

/// PEFT's ranks and alphas of single modules, by the last parts of their names.
#[derive(Debug, Default)]
pub(super) struct Patterns {
    pub ranks: BTreeMap<String, i64>,
    pub alphas: BTreeMap<String, f64>,
}

impl Patterns {
    /// Adds those of a layer whose parts have adapters: n r, and the alpha that leaves the scale as it is.
    pub(super) fn add(&mut self, joined: &Joined, lora: &Lora) {
        let (name, n) = (last_part(&joined.module), joined.parts.len());
        self.ranks.insert(name.into(), n as i64 * lora.rank);
        let n = n as f64;
        self.alphas.insert(name.into(), lora.alpha() * if lora.rslora { n.sqrt() } else { n });
    }

    /// The adapters of a module, where it has others than `lora` says.
    fn of(&self, name: &str, lora: &Lora) -> Lora {
        Lora {
            rank: self.ranks.get(name).copied().unwrap_or(lora.rank),
            alpha: self.alphas.get(name).copied().or(lora.alpha),
            ..lora.clone()
        }
    }
}

/// A linear layer of the files that is several of the model.
pub(super) struct Joined {
    module: String,
    parts: Vec<JoinedPart>,
}

struct JoinedPart {
    module: String,
    /// Its rows in the joined layer.
    row: i64,
    rows: i64,
}

impl Joined {
    /// Those of a model.
    pub(super) fn all(shape: &Shape) -> Vec<Joined> {
        let family = families::of(shape.family);
        let mut all: Vec<Joined> = Vec::new();
        for spec in layouts(shape).into_iter().flat_map(|layout| layout.specs) {
            let (stored, row) = (family.place)(&spec.name, shape);
            if stored == spec.name {
                continue;
            }
            let part = JoinedPart { module: module(&spec.name).into(), row, rows: spec.shape[0] };
            match all.iter_mut().rev().find(|joined| joined.module == module(&stored)) {
                Some(joined) => joined.parts.push(part),
                None => all.push(Joined { module: module(&stored).into(), parts: vec![part] }),
            }
        }
        all
    }

    pub(super) fn module(&self) -> &str {
        &self.module
    }

    /// Whether a module of the model is one of its parts.
    pub(super) fn has(&self, module: &str) -> bool {
        self.parts.iter().any(|part| part.module == module)
    }

    fn rows(&self) -> i64 {
        self.parts.iter().map(|part| part.rows).sum()
    }
}

/// A tensor of an adapter's file.
pub(super) struct JoinedTensor {
    /// As the family's own files have it.
    name: String,
    shape: Vec<i64>,
    /// The model's tensors in it, with the row and column where each begins.
    parts: Vec<(String, i64, i64)>,
}

impl JoinedTensor {
    /// The tensors of a file for these of the model, whose adapters have this rank.
    pub(super) fn of(
        joined: &[Joined],
        rank: i64,
        tensors: impl Iterator<Item = (String, Vec<i64>)>,
    ) -> Vec<JoinedTensor> {
        let mut all: Vec<JoinedTensor> = Vec::new();
        for (name, shape) in tensors {
            let stored = place(joined, rank, name, shape);
            match all.iter_mut().rev().find(|other| other.name == stored.name) {
                Some(other) => other.parts.extend(stored.parts),
                None => all.push(stored),
            }
        }
        all
    }

    /// The name of the model's first tensor in it.
    pub(super) fn first(&self) -> &str {
        &self.parts[0].0
    }

    pub(super) fn entry(&self, kind: Kind) -> TensorEntry {
        TensorEntry { name: format!("{PREFIX}{}", self.name), kind, shape: self.shape.clone() }
    }

    /// The tensor, of the model's.
    pub(super) fn assemble(&self, tensor: impl Fn(&str) -> Result<Tensor>) -> Result<Tensor> {
        let first = tensor(self.first())?;
        if first.size() == self.shape {
            return Ok(first);
        }
        let whole = Tensor::f_zeros(self.shape.as_slice(), (first.kind(), first.device()))?;
        for (name, row, col) in &self.parts {
            let t = tensor(name)?;
            let place = whole.f_narrow(0, *row, t.size()[0])?.f_narrow(1, *col, t.size()[1])?;
            tch::no_grad(|| place.shallow_clone().f_copy_(&t))?;
        }
        Ok(whole)
    }
}

/// Where one tensor of the model lies.
fn place(joined: &[Joined], rank: i64, name: String, shape: Vec<i64>) -> JoinedTensor {
    let found = joined.iter().find_map(|joined| {
        let i = joined.parts.iter().position(|part| adapter_names(&part.module).contains(&name))?;
        Some((joined, i))
    });
    let Some((joined, i)) = found else {
        return JoinedTensor { parts: vec![(name.clone(), 0, 0)], name, shape };
    };
    let (all, first, part) = (joined.parts.len() as i64 * rank, i as i64 * rank, &joined.parts[i]);
    let [a, b] = adapter_names(&joined.module);
    match adapter_names(&part.module)[0] == name {
        true => JoinedTensor { name: a, shape: vec![all, shape[1]], parts: vec![(name, first, 0)] },
        false => {
            JoinedTensor { name: b, shape: vec![joined.rows(), all], parts: vec![(name, part.row, first)] }
        }
    }
}

/// Gives the adapters of joined layers the model's names, in `source` and among the targets.
///
/// # Errors
/// Of kind Data: ranks, scales or tensors of an adapter that is no sum of one for each part with the others' rank.
pub(super) fn split(
    source: &mut TensorSource,
    lora: &mut Lora,
    patterns: Patterns,
    shape: &Shape,
) -> Result<()> {
    let all = Joined::all(shape);
    let named: BTreeSet<&str> = all.iter().map(|joined| last_part(&joined.module)).collect();
    let other =
        patterns.ranks.keys().chain(patterns.alphas.keys()).find(|name| !named.contains(name.as_str()));
    if let Some(name) = other {
        return Err(Error::data(format!(
            "rank_pattern and alpha_pattern: a rank or alpha of its own for `{name}` is not built"
        )));
    }
    for name in named {
        let own = patterns.of(name, lora);
        if (own.scale() / lora.scale() - 1.0).abs() > 1e-9 {
            return Err(Error::data(format!(
                "alpha_pattern: the adapters of `{name}` are multiplied by {}, the others by {}, which is not built",
                own.scale(),
                lora.scale()
            )));
        }
    }
    let mut adapted: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for joined in &all {
        let names = adapted.entry(last_part(&joined.module)).or_default();
        for part in split_one(source, lora, &patterns, joined)? {
            names.insert(last_part(&joined.parts[part].module));
        }
    }
    if let Targets::Names(targets) = &mut lora.targets {
        let parts = |target: &String| -> Vec<String> {
            match adapted.get(last_part(target)).filter(|names| !names.is_empty()) {
                Some(names) => names.iter().map(|name| (*name).to_string()).collect(),
                None => vec![target.clone()],
            }
        };
        *targets = targets.iter().flat_map(parts).collect();
    }
    Ok(())
}

/// Splits one joined layer's adapter, if there is one; returns which parts have adapters.
fn split_one(
    source: &mut TensorSource,
    lora: &Lora,
    patterns: &Patterns,
    joined: &Joined,
) -> Result<Vec<usize>> {
    let [a, b] = adapter_names(&format!("{PREFIX}{}", joined.module));
    let (Some(view_a), Some(view_b)) = (source.views.get(&a).cloned(), source.views.get(&b).cloned()) else {
        return Ok(Vec::new());
    };
    let own = patterns.of(last_part(&joined.module), lora);
    let (rank, columns) = (own.rank, view_a.shape.last().copied().unwrap_or(0));
    for (tensor, view, size) in [(&a, &view_a, [rank, columns]), (&b, &view_b, [joined.rows(), rank])] {
        if view.shape != size {
            return Err(Error::data(format!("`{tensor}` is {:?} and should be {size:?}", view.shape)));
        }
    }
    let parts = match rank == lora.rank {
        true => (0..joined.parts.len()).collect(),
        false => stacked_parts([source.tensor(&a)?, source.tensor(&b)?], lora, joined)?,
    };
    source.views.retain(|name, _| *name != a && *name != b);
    let r = lora.rank;
    for &i in &parts {
        let part = &joined.parts[i];
        let first = if rank == r { 0 } else { i as i64 * r };
        let names = adapter_names(&format!("{PREFIX}{}", part.module));
        let views = [
            rectangle(&view_a, &a, [r, columns], first * columns),
            rectangle(&view_b, &b, [part.rows, r], part.row * rank + first),
        ];
        source.views.extend(names.into_iter().zip(views));
    }
    Ok(parts)
}

/// A matrix within a whole one of a file, from this element on.
fn rectangle(whole: &View, tensor: &str, [rows, columns]: [i64; 2], first: i64) -> View {
    let block = TensorBlock {
        file: whole.blocks[0].file,
        tensor: tensor.into(),
        rows: 0..rows,
        cols: 0..columns,
        first,
        stride: whole.shape[1],
        order: RowOrder::Same,
    };
    View { shape: vec![rows, columns], kind: whole.kind, width: columns, blocks: vec![block] }
}

/// The parts that have adapters where those of all lie one after the other; all of them if they are not named.
fn stacked_parts([a, b]: [Tensor; 2], lora: &Lora, joined: &Joined) -> Result<Vec<usize>> {
    let (r, n) = (lora.rank, joined.parts.len() as i64);
    let stacked = a.size()[0] == n * r && is_diagonal(&b, joined, r)?;
    if !stacked {
        return Err(Error::data(format!(
            "rank_pattern: `{}` has an adapter of rank {}; built are {r}, and {} where B consists of {n} blocks, one for each \
             of its parts",
            last_part(&joined.module),
            a.size()[0],
            n * r
        )));
    }
    let mut parts = Vec::new();
    for i in 0..n {
        let there = [a.f_narrow(0, i * r, r)?, b.f_narrow(1, i * r, r)?].map(|t| t.any());
        if lora.targets == Targets::AllLinear || there.iter().any(|t| t.double_value(&[]) != 0.0) {
            parts.push(i as usize);
        }
    }
    Ok(parts)
}

/// Whether B has nothing beside the blocks of its parts.
fn is_diagonal(b: &Tensor, joined: &Joined, r: i64) -> Result<bool> {
    let rest = b.f_ne(0.0)?;
    for (i, part) in joined.parts.iter().enumerate() {
        let _ = rest.f_narrow(0, part.row, part.rows)?.f_narrow(1, i as i64 * r, r)?.f_fill_(0)?;
    }
    Ok(!bool::try_from(rest.f_any()?)?)
}
