//! What a linear layer takes besides its input and output.

use std::ops::Range;

use kernels::ops::{Float8, Granularity};
use kernels::quant;
use tch::{Device, Kind};

use crate::distributed::frozen::Storage;
use crate::distributed::plan::{GroupPlan, Role};
use crate::model::layout::adapters_of;

/// Where a model computes, and the bytes of its numbers.
pub(super) struct Sizes {
    pub device: Device,
    pub compute: Kind,
    /// Bytes of a value in the compute dtype, and of statistics and gradients.
    pub t: i64,
    pub a: i64,
    /// Products in 8-bit floats; none: all in the compute dtype.
    pub float8: Option<Float8>,
    /// Whether weights are gathered in them.
    pub gathers_float8: bool,
    /// Ranks that share every matrix, and whether they divide the rows of the stream.
    pub tensor: i64,
    pub sequence: bool,
}

impl Sizes {
    /// Of `n` rows those that a rank has between attention and MLP.
    pub fn own_rows(&self, n: i64) -> i64 {
        if self.sequence { (n + self.tensor - 1) / self.tensor } else { n }
    }

    /// n rows of `width` values.
    pub fn values(&self, n: i64, width: i64) -> i64 {
        n * width * self.t
    }

    /// What a product in 8-bit floats takes besides its factors, of so many values, and its result: their 8-bit forms; where
    /// these are composed (on a CPU, and with one scale a row), also float32 copies of the larger factor.
    fn float8_product(&self, factors: [i64; 2]) -> i64 {
        let by_rows = self.float8.is_some_and(|f| f.scales == Granularity::Row);
        let copies = if self.device == Device::Cpu || by_rows { 12 } else { 0 };
        factors[0] + factors[1] + copies * factors[0].max(factors[1])
    }

    /// bfloat16 products on the CPU are rounded before they are added to a gradient.
    pub fn rounded_product(&self, rows: i64, columns: i64) -> i64 {
        let rounded = self.device == Device::Cpu && self.compute == Kind::BFloat16;
        if rounded { rows * columns * self.t } else { 0 }
    }
}

/// A linear layer's sizes.
pub(super) struct Layer {
    pub inputs: i64,
    pub outputs: i64,
    /// Products that it takes: dense tensors that lie together are one, and quantized ones.
    runs: Vec<SpanMemory>,
    /// Rows of the largest weight that has a gradient; 0: none has.
    trained_rows: i64,
    adapters: Vec<AdapterMemory>,
}

struct SpanMemory {
    quantized: bool,
    /// Of all its tensors, and of the largest.
    rows: i64,
    most_rows: i64,
}

struct AdapterMemory {
    rank: i64,
    dropout: bool,
    trained: bool,
}

impl Layer {
    pub fn new(plan: &GroupPlan, tensors: Range<usize>) -> Layer {
        let specs = &plan.layout.specs[tensors.clone()];
        let mut runs: Vec<SpanMemory> = Vec::new();
        let mut trained_rows = 0;
        let mut before = None;
        for (spec, role) in specs.iter().zip(&plan.roles[tensors.clone()]) {
            let rows = spec.shape[0];
            match runs.last_mut() {
                Some(run) if before == Some(role) => {
                    (run.rows, run.most_rows) = (run.rows + rows, run.most_rows.max(rows));
                }
                _ => {
                    let quantized = matches!(role, Role::Frozen(Storage::Quantized(_)));
                    runs.push(SpanMemory { quantized, rows, most_rows: rows });
                }
            }
            before = Some(role);
            if *role == Role::Trained {
                trained_rows = runs.last().map_or(0, |run| run.rows).max(trained_rows);
            }
        }
        let adapter = |k: usize| {
            let a = &plan.adapters[k];
            AdapterMemory { rank: a.rank, dropout: a.dropout > 0.0, trained: a.role == Role::Trained }
        };
        Layer {
            inputs: specs[0].shape[1],
            outputs: specs.iter().map(|s| s.shape[0]).sum(),
            runs,
            trained_rows,
            adapters: adapters_of(plan, &tensors).into_iter().map(|(k, _)| adapter(k)).collect(),
        }
    }

    /// Whether it is one dense weight and nothing else, as products of experts together need it.
    pub fn is_plain(&self) -> bool {
        self.adapters.is_empty() && self.runs.len() == 1 && !self.runs[0].quantized
    }

    /// Whether a weight or an adapter has a gradient.
    pub fn trains(&self) -> bool {
        self.trained_rows > 0 || self.adapters.iter().any(|a| a.trained)
    }

    /// What its adapters keep of a forward over `n` rows for their backward.
    pub fn inner(&self, m: &Sizes, n: i64) -> i64 {
        self.adapters.iter().map(|a| m.values(n, a.rank)).sum()
    }

    /// The rows of the largest dense weight that takes part in a product over `n` rows in 8-bit floats; 0: there is none.
    fn float8_rows(&self, m: &Sizes, n: i64) -> i64 {
        let dense = self.runs.iter().filter(|r| !r.quantized).map(|r| r.rows);
        let takes = |rows: &i64| m.float8.is_some_and(|f| f.takes_sides([n, *rows, self.inputs]));
        dense.filter(takes).max().unwrap_or(0)
    }

    /// The same of a product with the weight itself: one that is gathered in 8-bit floats is so whatever `n` is.
    fn float8_factor_rows(&self, m: &Sizes, n: i64) -> i64 {
        let dense = self.runs.iter().filter(|r| !r.quantized).map(|r| r.rows);
        let gathered =
            |rows: &i64| m.gathers_float8 && m.float8.is_some_and(|f| f.gathers([*rows, self.inputs]));
        dense.filter(gathered).max().unwrap_or(0).max(self.float8_rows(m, n))
    }

    /// What a forward over `n` rows takes besides input and output.
    pub fn forward(&self, m: &Sizes, n: i64) -> i64 {
        let panel = |r: &SpanMemory| m.t * quant::forward_panel(m.device, r.most_rows, self.inputs);
        let scratch = self.runs.iter().filter(|r| r.quantized).map(panel).max().unwrap_or(0);
        let joined = if self.runs.len() > 1 { n * self.outputs * m.t } else { 0 };
        let adapter = |a: &AdapterMemory| m.t * n * (2 * a.rank + if a.dropout { self.inputs } else { 0 });
        let float8 = match self.float8_factor_rows(m, n) {
            0 => 0,
            rows => m.float8_product([n * self.inputs, rows * self.inputs]),
        };
        joined.max(scratch).max(float8).max(self.adapters.iter().map(adapter).max().unwrap_or(0))
    }

    /// What the input's gradient takes besides itself and the output's.
    pub fn backward_input(&self, m: &Sizes, n: i64) -> i64 {
        let run = |(i, r): (usize, &SpanMemory)| match (r.quantized, i) {
            (false, _) => match self.float8_factor_rows(m, n) {
                0 => 0,
                rows => m.float8_product([n * rows, rows * self.inputs]),
            },
            (true, i) => {
                m.t * (quant::backward_panel(m.device, r.rows, self.inputs)
                    + i.min(1) as i64 * n * self.inputs)
            }
        };
        let adapter =
            |a: &AdapterMemory| m.t * n * (2 * a.rank + if a.dropout { 2 * self.inputs } else { 0 });
        let adapters = self.adapters.iter().map(adapter);
        self.runs.iter().enumerate().map(run).chain(adapters).max().unwrap_or(0)
    }

    /// What the weights' gradients take besides themselves.
    pub fn backward_weight(&self, m: &Sizes, n: i64) -> i64 {
        let adapter = |a: &AdapterMemory| match a.trained {
            true => m.t * n * (2 * a.rank + if a.dropout { self.inputs } else { 0 }),
            false => 0,
        };
        let weight = match self.float8_rows(m, n) {
            0 => m.rounded_product(self.trained_rows, self.inputs),
            rows => m.float8_product([n * rows, n * self.inputs]) + 4 * self.trained_rows * self.inputs,
        };
        weight.max(self.adapters.iter().map(adapter).max().unwrap_or(0))
    }
}
