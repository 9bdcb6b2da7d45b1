//! What the algorithms share that learn from a model's own responses: prompts and samples, the models beside the policy, and
//! where each of them is.

pub(crate) mod checks;
pub mod experience;
pub(crate) mod memory;
pub(crate) mod place;
pub(crate) mod policy;
pub(crate) mod reward_model;
pub(crate) mod sampling;
