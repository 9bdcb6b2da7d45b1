//! Moving averages of weights.

use crate::distributed::sharded::Sharded;

/// A moving average of a model's trained weights, on the same slices.
pub struct Average {
    /// The averaged weights, as slices like those of the model.
    pub params: Sharded,
    decay: f64,
}

impl Average {
    /// Begins as the model `of` is; `params` are parameters of the same shape, on the same slices, whose trained values are set
    /// here.
    pub fn new(params: Sharded, of: &Sharded, decay: f64) -> Average {
        lerp(&params, of, 1.0);
        Average { params, decay }
    }

    /// Moves by `1 - decay` of the way to the model.
    pub fn follow(&mut self, of: &Sharded) {
        lerp(&self.params, of, 1.0 - self.decay);
    }
}

/// Moves the trained weights of a model that is run by `rate` of the way to those of another on the same slices.
pub fn approach(params: &mut Sharded, of: &Sharded, rate: f64) {
    lerp(params, of, rate);
    params.refresh();
}

/// Of the master values alone.
fn lerp(params: &Sharded, of: &Sharded, rate: f64) {
    for i in 0..params.len() {
        let _ = params.master(i).lerp_(&of.master(i), rate);
    }
}
