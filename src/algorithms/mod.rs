//! One file an algorithm, and the few pieces they share.

pub mod base;
pub mod completions;
pub mod dpo;
pub mod folder;
pub mod grpo;
pub mod interval;
pub mod kto;
pub mod learner;
pub mod lock;
pub mod losses;
pub mod online_dpo;
pub mod ppo;
pub mod pretrain;

pub mod recipe;
pub mod records;
pub mod reference;
pub mod reward;
pub mod rl;
pub mod rollback;
pub mod run;
pub mod scorer;
pub mod session;
pub mod sft;
pub mod step;
pub mod training;
