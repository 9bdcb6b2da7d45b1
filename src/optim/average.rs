//! Moving averages of weights.

use crate::distributed::sharded::Sharded;

/// A moving average of a model's trained weights, on the same slices.
pub struct Average {
    pub params: Sharded,
    decay: f64,
}

impl Average {
    /// Begins as the model `of` is; `params` are parameters of the same shape, on the same slices, whose trained values are set
    /// here.
    pub fn new(mut params: Sharded, of: &Sharded, decay: f64) -> Average {
        approach(&mut params, of, 1.0);
        Average { params, decay }
    }

    /// Moves by `1 - decay` of the way to the model.
    pub fn follow(&mut self, of: &Sharded) {
        approach(&mut self.params, of, 1.0 - self.decay);
    }
}

/// Moves trained weights by `rate` of the way to those of a model on the same slices.
pub fn approach(params: &mut Sharded, of: &Sharded, rate: f64) {
    for i in 0..params.len() {
        let _ = params.master(i).lerp_(&of.master(i), rate);
    }
    params.refresh();
}
