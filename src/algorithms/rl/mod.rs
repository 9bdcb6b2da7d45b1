//! What the algorithms share that learn from a model's own responses: prompts and samples, the models beside the policy, and
//! where each of them is.

pub mod checks;
pub mod experience;
pub mod memory;
pub mod place;
pub mod policy;
pub mod reward_model;
pub mod sampling;
