//! One file an algorithm, and the few pieces they share.

pub(crate) mod base;
pub(crate) mod completions;
pub(crate) mod dpo;
pub(crate) mod folder;
pub(crate) mod grpo;
pub(crate) mod interval;
pub(crate) mod kto;
pub(crate) mod learner;
pub(crate) mod lock;
pub mod losses;
pub(crate) mod online_dpo;
pub(crate) mod ppo;
pub(crate) mod pretrain;
mod profile;
pub(crate) mod recipe;
pub(crate) mod records;
pub(crate) mod reference;
pub(crate) mod reward;
pub mod rl;
pub(crate) mod rollback;
pub(crate) mod run;
pub(crate) mod scorer;
pub(crate) mod session;
pub(crate) mod sft;
pub mod step;
pub(crate) mod training;
