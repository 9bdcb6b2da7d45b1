//! AdamW on the slices that a rank owns. Weight decay works on matrices only (embeddings and the LM head included), not
//! on norms' weights.

use kernels::ops;
use tch::Tensor;

use crate::distributed::sharded::Sharded;
use crate::error::Result;

/// The constants of AdamW.
#[derive(Debug, Clone, Copy)]
pub struct Hyper {
    pub betas: [f64; 2],
    pub eps: f64,
    pub weight_decay: f64,
}

/// The moments of all groups' slices, A `[slice]`, and the number of updates so far.
pub struct AdamW {
    pub hyper: Hyper,
    /// First moments, one tensor a group.
    pub exp_avg: Vec<Tensor>,
    /// Second moments, one tensor a group.
    pub exp_avg_sq: Vec<Tensor>,
    pub step: i64,
}

impl AdamW {
    pub fn new(params: &Sharded, hyper: Hyper) -> AdamW {
        let zeros = || (0..params.len()).map(|i| params.master(i).zeros_like()).collect();
        AdamW { hyper, exp_avg: zeros(), exp_avg_sq: zeros(), step: 0 }
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
            for (first, len, weight_decay) in
                [(0, decayed, self.hyper.weight_decay), (decayed, slice.len - decayed, 0.0)]
            {
                if len == 0 {
                    continue;
                }
                let part = |t: &Tensor| t.narrow(0, first, len);
                ops::adamw(
                    &part(&master),
                    &part(&grad),
                    &part(&self.exp_avg[i]),
                    &part(&self.exp_avg_sq[i]),
                    copy.as_ref().map(part).as_ref(),
                    ops::AdamW {
                        lr,
                        beta1: self.hyper.betas[0],
                        beta2: self.hyper.betas[1],
                        eps: self.hyper.eps,
                        weight_decay,
                        step: self.step,
                        grad_scale,
                    },
                )?;
            }
        }
        params.clear_gradients();
        Ok(())
    }
}
