//! AdamW on the slices that a rank owns. Weight decay works on matrices only (embeddings and the LM head included), not
//! on norms' weights.

use kernels::moments::{self, Moment};
use kernels::ops;
use tch::Tensor;

use crate::config::sections::{MomentsIn, Optim};
use crate::distributed::sharded::Sharded;
use crate::error::Result;

/// The constants of AdamW.
#[derive(Debug, Clone, Copy)]
pub struct Hyper {
    pub betas: [f64; 2],
    pub eps: f64,
    pub weight_decay: f64,
}

/// The moments of a group's slice.
#[derive(Debug)]
pub enum Moments {
    /// A `[slice]`
    Float { exp_avg: Tensor, exp_avg_sq: Tensor },
    /// In codes, blocks of 256 of which begin with the slice, which begins at a multiple of 256 of the group's elements: so
    /// the blocks are the same at every world size.
    EightBit { exp_avg: Moment, exp_avg_sq: Moment },
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
}

/// The moments of all groups' slices, and the number of updates so far.
pub struct AdamW {
    pub hyper: Hyper,
    /// One a group.
    pub moments: Vec<Moments>,
    pub step: i64,
}

impl AdamW {
    /// With moments in float32 (float64 in float64 compute).
    pub fn new(params: &Sharded, hyper: Hyper) -> AdamW {
        let zeros = |i| params.master(i).zeros_like();
        let moments = |i| Moments::Float { exp_avg: zeros(i), exp_avg_sq: zeros(i) };
        AdamW { hyper, moments: (0..params.len()).map(moments).collect(), step: 0 }
    }

    /// As a configuration says.
    pub fn configured(params: &Sharded, c: &Optim) -> AdamW {
        let hyper = Hyper { betas: c.betas, eps: c.eps, weight_decay: c.weight_decay };
        match c.moments {
            MomentsIn::Float32 => AdamW::new(params, hyper),
            MomentsIn::EightBit => {
                let zeros = |i| Moment::zeros(params.slice(i).len, params.device());
                let moments = |i| Moments::EightBit { exp_avg: zeros(i), exp_avg_sq: zeros(i) };
                AdamW { hyper, moments: (0..params.len()).map(moments).collect(), step: 0 }
            }
        }
    }

    /// The sum of squares of the gradient over this rank's slices, in float64.
    pub fn sum_squares(params: &Sharded) -> Result<f64> {
        let grads: Vec<Tensor> = (0..params.len()).filter_map(|i| params.slice_grad(i)).collect();
        Ok(ops::sum_squares_of_all(&grads)?)
    }

    /// What to multiply gradients by so that their norm is at most `max` (0: no clipping), as PyTorch's
    /// `clip_grad_norm_` does.
    pub fn clip_scale(norm: f64, max: f64) -> f64 {
        if max > 0.0 { (max / (norm + 1e-6)).min(1.0) } else { 1.0 }
    }

    /// One update of all parameters with the gradients of the step, which are then forgotten.
    pub fn update(&mut self, params: &mut Sharded, lr: f64, grad_scale: f64) -> Result<()> {
        self.step += 1;
        for i in 0..params.len() {
            let Some(grad) = params.slice_grad(i) else { continue };
            let (slice, num_decayed) = (params.slice(i), params.layout(i).num_decayed);
            let (master, copy) = (params.master(i), params.copy(i));
            let decayed = (num_decayed - slice.start).clamp(0, slice.len);
            let step = ops::AdamW {
                lr,
                beta1: self.hyper.betas[0],
                beta2: self.hyper.betas[1],
                eps: self.hyper.eps,
                weight_decay: self.hyper.weight_decay,
                step: self.step,
                grad_scale,
            };
            match &self.moments[i] {
                Moments::Float { exp_avg, exp_avg_sq } => {
                    for (first, len, weight_decay) in
                        [(0, decayed, step.weight_decay), (decayed, slice.len - decayed, 0.0)]
                    {
                        if len == 0 {
                            continue;
                        }
                        let part = |t: &Tensor| t.narrow(0, first, len);
                        ops::adamw(
                            &part(&master),
                            &part(&grad),
                            &part(exp_avg),
                            &part(exp_avg_sq),
                            copy.as_ref().map(part).as_ref(),
                            ops::AdamW { weight_decay, ..step },
                        )?;
                    }
                }
                Moments::EightBit { exp_avg, exp_avg_sq } => {
                    moments::adamw8(&master, &grad, exp_avg, exp_avg_sq, copy.as_ref(), decayed, step)?;
                }
            }
        }
        params.clear_gradients();
        Ok(())
    }
}
