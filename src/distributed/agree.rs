//! Ranks that go on together, or fail together with the same message.

use kernels::comm::{Group, ReduceOp};

use crate::distributed::sharded::Sharded;
use crate::error::{Error, ErrorClass, Result};

/// Bytes of a message that travel between ranks; longer ones are cut.
const MESSAGE: usize = 2048;

/// Fails on all ranks of `group` if `mine` is an error on any of them: with the rank's own error where it has one, else
/// with that of the first rank that failed. A collective call.
pub fn agree<T>(group: &Group, mine: Result<T>) -> Result<T> {
    if group.size() == 1 {
        return mine;
    }
    let rank = group.rank();
    let failed = if mine.is_err() { rank } else { group.size() };
    let first = match (group.combine(&[failed as f64], ReduceOp::Min), &mine) {
        (Ok(first), _) => first[0] as i64,
        (Err(_), Err(own)) => return Err(own.clone()),
        (Err(lost), Ok(_)) => return Err(lost.into()),
    };
    if first == group.size() {
        return mine;
    }
    // Numbers are what travels on every backend: the first failed rank contributes its message, the others zeros.
    let mut packed = vec![0.0; MESSAGE + 1];
    if let (true, Err(e)) = (first == rank, &mine) {
        packed[0] = f64::from(e.exit_code());
        packed.iter_mut().skip(1).zip(e.to_string().bytes()).for_each(|(to, byte)| *to = f64::from(byte));
    }
    let packed = group.combine(&packed, ReduceOp::Sum);
    let theirs = match (mine, packed) {
        (Err(own), _) => return Err(own),
        (Ok(_), packed) => packed?,
    };
    let bytes: Vec<u8> = theirs[1..].iter().map(|b| *b as u8).take_while(|b| *b != 0).collect();
    let kind = match theirs[0] as i32 {
        2 => ErrorClass::Config,
        3 => ErrorClass::Data,
        code if code > 128 => ErrorClass::Stopped(code - 128),
        _ => ErrorClass::Failed,
    };
    let message = String::from_utf8_lossy(&bytes);
    let named =
        message.strip_prefix("rank ").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    Err(match named {
        // That of a third rank, passed on.
        true => Error { kind, message: message.into(), key: None },
        false => {
            Error { kind, message: format!("rank {}: {message}", group.ranks()[first as usize]), key: None }
        }
    })
}

/// [`agree`] among all ranks that hold these parameters.
pub fn agree_over<T>(params: &Sharded, mine: Result<T>) -> Result<T> {
    // Every group of one kind has a member in each group of the kinds before, so that the last round reaches all ranks.
    let mine = agree(params.shard_group(), mine);
    let mine = agree(params.replica_group(), mine);
    let mine = agree(&params.sharding().tensor.group, mine);
    agree(&params.sharding().pipeline.axis.group, mine)
}
