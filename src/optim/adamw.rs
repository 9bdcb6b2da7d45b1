//! AdamW on the slices that a rank owns. Weight decay works on matrices only (embeddings and the LM head included), not
//! on norms' weights.
//!
//! Moments may lie in host memory (offload): an update then takes them to the device in parts and back, and computes what it
//! would compute without.

use std::cell::RefCell;

use kernels::cuda::{CopyStream, Pinned};
use kernels::moments::{self, Moment};
use kernels::ops;
use kernels::quant::CODE_BLOCK;
use kernels::trace;
use tch::{Device, Kind, Tensor};

use crate::config::sections::{MomentsIn, Optim};
use crate::distributed::sharded::Sharded;
use crate::error::{Error, Result};

/// The constants of AdamW.
#[derive(Debug, Clone, Copy)]
pub struct Hyper {
    /// Decay of the first and the second moment.
    pub betas: [f64; 2],
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled: a share of lr times the value, for matrices only.
    pub weight_decay: f64,
}

/// The moments of a group's slice.
#[derive(Debug)]
pub enum Moments {
    /// A `[slice]`
    Float {
        /// Mean of the gradients.
        exp_avg: Tensor,
        /// Mean of their squares.
        exp_avg_sq: Tensor,
    },
    /// In codes, blocks of 256 of which begin with the slice, which begins at a multiple of 256 of the group's elements: so
    /// the blocks are the same at every world size.
    EightBit {
        /// Mean of the gradients.
        exp_avg: Moment,
        /// Mean of their squares.
        exp_avg_sq: Moment,
    },
}

impl Moments {
    /// The tensors that they consist of, by the names that they have in a checkpoint.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Moments::Float { exp_avg, exp_avg_sq } => vec![("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)],
            Moments::EightBit { exp_avg, exp_avg_sq } => vec![
                ("exp_avg.codes", &exp_avg.codes),
                ("exp_avg.absmax", &exp_avg.absmax),
                ("exp_avg_sq.codes", &exp_avg_sq.codes),
                ("exp_avg_sq.absmax", &exp_avg_sq.absmax),
            ],
        }
    }

    /// Of n values, 0.
    fn zeros(n: i64, kind: Kind, kept: MomentsIn, device: Device) -> Moments {
        match kept {
            MomentsIn::Float32 => {
                let zeros = || Tensor::zeros([n], (kind, device));
                Moments::Float { exp_avg: zeros(), exp_avg_sq: zeros() }
            }
            MomentsIn::EightBit => {
                let zeros = || Moment::zeros(n, device);
                Moments::EightBit { exp_avg: zeros(), exp_avg_sq: zeros() }
            }
        }
    }

    /// The same with every tensor replaced.
    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Moments> {
        let moment =
            |m: &Moment| -> Result<Moment> { Ok(Moment { codes: f(&m.codes)?, absmax: f(&m.absmax)? }) };
        Ok(match self {
            Moments::Float { exp_avg, exp_avg_sq } => {
                Moments::Float { exp_avg: f(exp_avg)?, exp_avg_sq: f(exp_avg_sq)? }
            }
            Moments::EightBit { exp_avg, exp_avg_sq } => {
                Moments::EightBit { exp_avg: moment(exp_avg)?, exp_avg_sq: moment(exp_avg_sq)? }
            }
        })
    }

    /// Those of values `first..first + len`, as views; `first` is a multiple of 256.
    fn part(&self, first: i64, len: i64) -> Moments {
        let values = |t: &Tensor| t.narrow(0, first, len);
        let moment = |m: &Moment| {
            let blocks = (len + CODE_BLOCK - 1) / CODE_BLOCK;
            Moment { codes: values(&m.codes), absmax: m.absmax.narrow(0, first / CODE_BLOCK, blocks) }
        };
        match self {
            Moments::Float { exp_avg, exp_avg_sq } => {
                Moments::Float { exp_avg: values(exp_avg), exp_avg_sq: values(exp_avg_sq) }
            }
            Moments::EightBit { exp_avg, exp_avg_sq } => {
                Moments::EightBit { exp_avg: moment(exp_avg), exp_avg_sq: moment(exp_avg_sq) }
            }
        }
    }

    /// Queues copies of the values to those of `to`, on another device.
    fn copy_to(&self, to: &Moments, stream: &CopyStream) -> Result<()> {
        let both = self.tensors().into_iter().zip(to.tensors());
        both.into_iter().try_for_each(|((_, from), (_, to))| Ok(stream.copy(to, from)?))
    }
}

/// Values whose moments are on the device at once where they lie in host memory.
const STREAMED: i64 = 16 << 20;

/// The moments of all groups' slices, and the number of updates so far.
pub struct AdamW {
    /// The constants; the learning rate is an argument of each update.
    pub hyper: Hyper,
    /// One a group.
    pub moments: Vec<Moments>,
    /// Updates so far, by which the moments' bias is corrected.
    pub step: i64,
    /// How moments in host memory are brought to the device; none: they are there.
    streaming: Option<Streaming>,
}

/// Ways of moments between host memory and the device.
struct Streaming {
    /// Values whose moments are on their way at once.
    values: i64,
    fetch: CopyStream,
    store: CopyStream,
}

/// A part of an update: values, and their moments in host memory.
struct StreamedPart {
    values: Values,
    moments: Moments,
    decayed: i64,
}

/// What moments in host memory, of so many bytes, take on the device during an update: two parts.
pub fn streamed_bytes(moments: i64, kept: MomentsIn) -> i64 {
    let each = match kept {
        MomentsIn::Float32 => 2 * 4 * STREAMED,
        MomentsIn::EightBit => 2 * Moment::bytes(STREAMED),
    };
    moments.min(2 * each)
}

impl AdamW {
    /// With moments in float32 (float64 in float64 compute), where the parameters are.
    pub fn new(params: &Sharded, hyper: Hyper) -> AdamW {
        AdamW::kept(params, hyper, MomentsIn::Float32)
    }

    fn kept(params: &Sharded, hyper: Hyper, kept: MomentsIn) -> AdamW {
        let kind = ops::accumulator(params.compute());
        let moments = |i| Moments::zeros(params.slice(i).len, kind, kept, params.device());
        AdamW { hyper, moments: (0..params.len()).map(moments).collect(), step: 0, streaming: None }
    }

    /// As a configuration says.
    ///
    /// # Errors
    /// Of kind Config: `optim.offload` where the parameters are in host memory themselves.
    pub fn configured(params: &Sharded, c: &Optim) -> Result<AdamW> {
        let hyper = Hyper { betas: c.betas, eps: c.eps, weight_decay: c.weight_decay };
        if c.moments == MomentsIn::EightBit && params.sharding().tensor.size > 1 {
            return Err(Error::key("optim.moments", "8bit and parallel.tensor above 1 do not go together"));
        }
        match (c.offload, params.device()) {
            (false, _) => Ok(AdamW::kept(params, hyper, c.moments)),
            (true, Device::Cpu) => Err(Error::key(
                "optim.offload",
                "on a CPU the optimizer's state is in host memory anyway; leave it out",
            )),
            (true, _) => AdamW::offloaded(params, hyper, c.moments, STREAMED),
        }
    }

    /// With moments in host memory; an update brings those of `values` values (a multiple of 256) to the parameters' device
    /// at a time.
    fn offloaded(params: &Sharded, hyper: Hyper, kept: MomentsIn, values: i64) -> Result<AdamW> {
        let (kind, device) = (ops::accumulator(params.compute()), params.device());
        // Group by group: the zeros of all would take the host memory twice.
        let zeros = |i| Moments::zeros(params.slice(i).len, kind, kept, Device::Cpu);
        let bytes = |t: &Tensor| (t.numel() * t.kind().elt_size_in_bytes()) as i64;
        let sizes = (0..params.len())
            .flat_map(|i| zeros(i).tensors().into_iter().map(|(_, t)| bytes(t)).collect::<Vec<_>>());
        let pinned = RefCell::new(Pinned::for_sizes(sizes, device)?);
        let placed = |t: &Tensor| {
            let mut place = pinned.borrow_mut().take(&t.size(), t.kind())?;
            place.f_copy_(t)?;
            Ok(place)
        };
        let moments = (0..params.len()).map(|i| zeros(i).map(placed)).collect::<Result<_>>()?;
        let streaming =
            Streaming { values, fetch: CopyStream::new(device)?, store: CopyStream::new(device)? };
        Ok(AdamW { hyper, moments, step: 0, streaming: Some(streaming) })
    }

    /// Waits until moments in host memory are those of the last update: they come there while the device goes on.
    pub fn synchronize(&self) -> Result<()> {
        self.streaming.as_ref().map_or(Ok(()), |s| Ok(s.store.wait()?))
    }

    /// The sum of squares of the gradient over this rank's slices, in float64: what several tensor-parallel ranks have counts
    /// on one of them.
    pub fn sum_squares(params: &Sharded) -> Result<f64> {
        Ok(ops::sum_squares_of_all(&params.counted_gradients())?) // host sync
    }

    /// What to multiply gradients by so that their norm is at most `max` (0: no clipping), as PyTorch's
    /// `clip_grad_norm_` does.
    pub fn clip_scale(norm: f64, max: f64) -> f64 {
        if max > 0.0 { (max / (norm + 1e-6)).min(1.0) } else { 1.0 }
    }

    /// One update of all parameters with the gradients of the step, which are then forgotten.
    pub fn update(&mut self, params: &mut Sharded, lr: f64, grad_scale: f64) -> Result<()> {
        let _span = trace::computing(|| "AdamW".into());
        self.step += 1;
        let step = ops::AdamW {
            lr,
            beta1: self.hyper.betas[0],
            beta2: self.hyper.betas[1],
            eps: self.hyper.eps,
            weight_decay: self.hyper.weight_decay,
            step: self.step,
            grad_scale,
        };
        let mut parts = Vec::new();
        for i in 0..params.len() {
            let Some(grad) = params.slice_grad(i) else { continue };
            let (slice, num_decayed) = (params.slice(i), params.layout(i).num_decayed);
            let values = Values { master: params.master(i), grad, copy: params.copy(i) };
            let decayed = (num_decayed - slice.start).clamp(0, slice.len);
            let Some(streaming) = &self.streaming else {
                update(&values, &self.moments[i], decayed, step)?;
                continue;
            };
            for first in (0..slice.len).step_by(streaming.values as usize) {
                let len = streaming.values.min(slice.len - first);
                let decayed = (decayed - first).clamp(0, len);
                let (values, moments) = (values.part(first, len), self.moments[i].part(first, len));
                parts.push(StreamedPart { values, moments, decayed });
            }
        }
        if let Some(streaming) = &self.streaming {
            streaming.update(&parts, params.device(), step)?;
        }
        params.clear_gradients();
        params.drop_gathered();
        Ok(())
    }
}

impl Drop for Streaming {
    /// The moments' memory must outlive the copies.
    fn drop(&mut self) {
        let _ = (self.fetch.wait(), self.store.wait());
    }
}

impl Streaming {
    /// Updates parts one after the other, in two places on the device: while one is computed, the next one's moments come and
    /// the last one's go.
    fn update(&self, parts: &[StreamedPart], device: Device, step: ops::AdamW) -> Result<()> {
        let len = |part: &StreamedPart| part.values.master.numel() as i64;
        let Some(largest) = parts.iter().max_by_key(|part| len(part)) else { return Ok(()) };
        let near = || largest.moments.map(|t| Ok(Tensor::f_empty(t.size(), (t.kind(), device))?));
        let places = [near()?, near()?];
        let place = |k: usize| places[k % 2].part(0, len(&parts[k]));
        // Their memory may be that of tensors which the device still computes with.
        self.fetch.after_computing()?;
        self.fetch.after(&self.store)?;
        parts[0].moments.copy_to(&place(0), &self.fetch)?;
        for (k, part) in parts.iter().enumerate() {
            self.fetch.before_computing()?;
            if let Some(next) = parts.get(k + 1) {
                self.fetch.after(&self.store)?; // its place is free
                next.moments.copy_to(&place(k + 1), &self.fetch)?;
            }
            update(&part.values, &place(k), part.decayed, step)?;
            self.store.after_computing()?;
            place(k).copy_to(&part.moments, &self.store)?;
        }
        // What takes the places' memory next waits for the copies.
        Ok(self.store.before_computing()?)
    }
}

/// A slice of parameters, its gradient, and its copy in the compute dtype.
struct Values {
    master: Tensor,
    grad: Tensor,
    copy: Option<Tensor>,
}

impl Values {
    fn part(&self, first: i64, len: i64) -> Values {
        let part = |t: &Tensor| t.narrow(0, first, len);
        Values { master: part(&self.master), grad: part(&self.grad), copy: self.copy.as_ref().map(part) }
    }
}

/// Updates values whose moments are on the same device; weight decay works on the first `decayed`.
fn update(values: &Values, moments: &Moments, decayed: i64, step: ops::AdamW) -> Result<()> {
    let len = values.master.numel() as i64;
    match moments {
        Moments::Float { exp_avg, exp_avg_sq } => {
            for (first, n, weight_decay) in [(0, decayed, step.weight_decay), (decayed, len - decayed, 0.0)] {
                if n == 0 {
                    continue;
                }
                let (part, v) = (|t: &Tensor| t.narrow(0, first, n), values.part(first, n));
                let step = ops::AdamW { weight_decay, ..step };
                ops::adamw(&v.master, &v.grad, &part(exp_avg), &part(exp_avg_sq), v.copy.as_ref(), step)?;
            }
        }
        Moments::EightBit { exp_avg, exp_avg_sq } => {
            let copy = values.copy.as_ref();
            moments::adamw8(&values.master, &values.grad, exp_avg, exp_avg_sq, copy, decayed, step)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::distributed::mesh::Sharding;
    use crate::distributed::sharded::Layout;

    /// Three updates with moments that are brought in parts, against the same without, bit for bit: matrices, vectors, slices
    /// that are no multiple of a part, float and 8-bit moments, with and without copies in another dtype.
    #[test]
    fn offloaded_moments_change_nothing() {
        let tensors =
            || vec![("w".to_string(), vec![37, 41]), ("v".to_string(), vec![5, 300]), ("b".into(), vec![77])];
        let hyper = Hyper { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1 };
        for compute in [Kind::Float, Kind::BFloat16, Kind::Double] {
            for kept in [MomentsIn::Float32, MomentsIn::EightBit] {
                let model = |params: &mut Sharded| {
                    let set = |_: &crate::distributed::sharded::TensorSpec, _, values: &Tensor| {
                        let n = values.numel() as i64;
                        let ramp = Tensor::arange(n, (Kind::Double, Device::Cpu)).sin();
                        Ok(values.shallow_clone().f_copy_(&ramp)?)
                    };
                    params.fill(set).unwrap();
                };
                let params = || {
                    let layouts = [Layout::new("a", tensors()), Layout::new("b", tensors())];
                    let mut params = Sharded::new(layouts, Sharding::solo(), compute, Device::Cpu);
                    model(&mut params);
                    params
                };
                let (mut a, mut b) = (params(), params());
                let mut plain = AdamW::kept(&a, hyper, kept);
                let mut offloaded = AdamW::offloaded(&b, hyper, kept, 1024).unwrap();
                for step in 0..3 {
                    for params in [&mut a, &mut b] {
                        for i in 0..params.len() {
                            let grad = params.grad(i).unwrap().flat().shallow_clone();
                            let at = Tensor::arange(grad.numel() as i64, (Kind::Double, Device::Cpu));
                            grad.shallow_clone().copy_(&(at * (0.37 + step as f64)).cos());
                        }
                    }
                    plain.update(&mut a, 1e-2, 0.7).unwrap();
                    offloaded.update(&mut b, 1e-2, 0.7).unwrap();
                }
                for i in 0..a.len() {
                    assert!(a.master(i).equal(&b.master(i)));
                    assert!(a.copy(i).is_none() || a.copy(i).unwrap().equal(&b.copy(i).unwrap()));
                    let pairs = plain.moments[i].tensors().into_iter().zip(offloaded.moments[i].tensors());
                    for ((name, x), (_, y)) in pairs {
                        assert!(x.equal(y) && x.abs().sum(Kind::Double).double_value(&[]) > 0.0, "{name}");
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_is_offloaded_from_a_cpu() {
        let layout = Layout::new("a", vec![("w".into(), vec![4, 4])]);
        let params = Sharded::new([layout], Sharding::solo(), Kind::Float, Device::Cpu);
        let refused = AdamW::configured(&params, &Optim { offload: true, ..Optim::default() });
        let e = refused.err().unwrap();
        assert!(e.exit_code() == 2 && e.to_string().contains("optim.offload"), "{e}");
    }
}
