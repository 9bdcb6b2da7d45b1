//! One file an algorithm, and the few pieces they share.

pub mod base;
pub mod dpo;
pub mod folder;
pub mod grpo;
pub mod interval;
pub mod lock;
pub mod online_dpo;
pub mod ppo;
pub mod pretrain;
pub mod ranking;
pub mod records;
pub mod reward;
pub mod rl;
pub mod rollback;
pub mod run;
pub mod scorer;
pub mod sft;
pub mod step;
pub mod training;
