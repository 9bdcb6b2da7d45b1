//! Attention of some positions of each row with all positions before them, for ranks that share sequences (context parallelism):
//! composed of libtorch's operations, some queries at a time.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::tensors::{Heads, accumulator};

/// Scores that are in memory at once.
const SCORES_CPU: i64 = 16 << 20;
const SCORES_GPU: i64 = 256 << 20;

/// The positions of rows that a rank has, which are the same of every row.
#[derive(Debug)]
pub struct OwnPositions {
    /// Ascending.
    at: Vec<i64>,
    /// The first position of its row that each of them sees, int64 `[B, positions]`; none: 0.
    start: Option<Tensor>,
}

/// A run of neighbouring positions: the first among the rank's, how many, and the positions of the row that they see.
struct Block {
    first: i64,
    len: i64,
    seen: i64,
}

impl OwnPositions {
    /// `at`: ascending. `start`: int64 `[B * positions]` on the device, see [`Spans::new`](super::Spans::new), with a sliding
    /// window's.
    pub fn new(at: Vec<i64>, start: Option<Tensor>) -> OwnPositions {
        let start = start.map(|t| t.view([-1, at.len() as i64]));
        OwnPositions { at, start }
    }

    fn blocks(&self, h: Heads, device: Device) -> Vec<Block> {
        let most = if device == Device::Cpu { SCORES_CPU } else { SCORES_GPU };
        let mut blocks: Vec<Block> = Vec::new();
        for (i, at) in self.at.iter().enumerate() {
            let seen = at + 1;
            let longest = (most / (h.batch * h.heads * seen)).max(1);
            match blocks.last_mut() {
                Some(block) if block.seen == *at && block.len < longest => {
                    (block.len, block.seen) = (block.len + 1, seen);
                }
                _ => blocks.push(Block { first: i as i64, len: 1, seen }),
            }
        }
        blocks
    }

    /// Scores A [B, K, G, n, seen] of a block's queries, A [B, K, G n, D], with keys, A [B, K, seen, D]; minus infinity where a
    /// position is not seen.
    fn scores(&self, block: &Block, q: &Tensor, k: &Tensor, h: Heads) -> Tensor {
        let group = h.heads / h.kv_heads;
        let s = h.cap(q.matmul(&k.transpose(-2, -1)) * h.scale);
        let s = s.view([h.batch, h.kv_heads, group, block.len, block.seen]);
        let device = q.device();
        let all = Tensor::arange(block.seen, (Kind::Int64, device)); // [seen]
        let last =
            Tensor::arange_start(block.seen - block.len, block.seen, (Kind::Int64, device)).unsqueeze(1);
        let mut unseen = all.gt_tensor(&last).view([1, 1, 1, block.len, block.seen]);
        if let Some(start) = &self.start {
            let start = start.narrow(1, block.first, block.len).view([h.batch, 1, 1, block.len, 1]);
            unseen = unseen.logical_or(&all.lt_tensor(&start));
        }
        s.masked_fill(&unseen, f64::NEG_INFINITY)
    }
}

/// Rows of heads, T [B * n, heads D], some of whose n positions: A [B, K, G m, D].
fn grouped(t: &Tensor, first: i64, len: i64, h: Heads) -> Tensor {
    let (group, d) = (h.heads / h.kv_heads, h.head_dim);
    let part = t.view([h.batch, -1, h.kv_heads, group, d]).narrow(1, first, len);
    let part = part.to_kind(accumulator(t.kind())).permute([0, 2, 3, 1, 4]); // [B, K, G, m, D]
    part.reshape([h.batch, h.kv_heads, group * len, d])
}

/// The inverse of [`grouped`]: [B, m, H D].
fn rows(t: &Tensor, len: i64, h: Heads) -> Tensor {
    let t = t.view([h.batch, h.kv_heads, h.heads / h.kv_heads, len, h.head_dim]);
    t.permute([0, 3, 1, 2, 4]).reshape([h.batch, len, h.heads * h.head_dim])
}

/// Keys and values, A [B, K, S, D] each, of T [B * S, 2 K D].
fn keys_values(kv: &Tensor, h: Heads) -> [Tensor; 2] {
    let all = kv.to_kind(accumulator(kv.kind())).view([h.batch, -1, 2, h.kv_heads, h.head_dim]);
    [0, 1].map(|which| all.select(2, which).transpose(1, 2).contiguous())
}

fn check(q: &Tensor, kv: &Tensor, own: &OwnPositions, h: Heads) -> Result<()> {
    let n = own.at.len() as i64;
    let ascending = own.at.windows(2).all(|pair| pair[0] < pair[1]);
    let longest = own.at.last().map_or(0, |at| at + 1);
    let fits = q.size() == [h.batch * n, h.heads * h.head_dim]
        && kv.size().len() == 2
        && kv.size()[0] % h.batch == 0
        && kv.size()[0] / h.batch >= longest
        && kv.size()[1] == 2 * h.kv_heads * h.head_dim
        && own.start.as_ref().is_none_or(|s| s.size() == [h.batch, n]);
    match fits && ascending && h.heads % h.kv_heads == 0 {
        true => Ok(()),
        false => Err(Error::new(format!(
            "attention of {n} positions of rows: {:?} and {:?} do not fit {h:?}",
            q.size(),
            kv.size()
        ))),
    }
}

/// What each of the positions `own` sees: T [B * n, H D], and the softmax's log-sum-exp, A [B, H, n]. q: T [B * n, H D]; `kv`: keys,
/// then values, of all S positions, T [B * S, 2 K D].
pub fn attention_of(q: &Tensor, kv: &Tensor, own: &OwnPositions, h: Heads) -> Result<(Tensor, Tensor)> {
    check(q, kv, own, h)?;
    let (a, n) = (accumulator(q.kind()), own.at.len() as i64);
    let [k, v] = keys_values(kv, h);
    let out = Tensor::f_empty([h.batch, n, h.heads * h.head_dim], (q.kind(), q.device()))?;
    let lse = Tensor::f_empty([h.batch, h.heads, n], (a, q.device()))?;
    for block in own.blocks(h, q.device()) {
        let (k, v) = (k.narrow(2, 0, block.seen), v.narrow(2, 0, block.seen));
        let s = own.scores(&block, &grouped(q, block.first, block.len, h), &k, h);
        let sums = s.logsumexp([-1i64].as_slice(), true); // [B, K, G, m, 1]
        let p = (s - &sums).exp().view([h.batch, h.kv_heads, -1, block.seen]);
        out.narrow(1, block.first, block.len).f_copy_(&rows(&p.matmul(&v), block.len, h))?;
        let sums = sums.view([h.batch, h.heads, block.len]);
        lse.narrow(2, block.first, block.len).f_copy_(&sums)?;
    }
    Ok((out.view([h.batch * n, -1]), lse))
}

/// The backward of [`attention_of`], given its results and the output's gradient: that of q, T [B * n, H D], and what these
/// positions add to that of keys and values, A [B * S, 2 K D]. The formulas are those of [`Composed`](super::Composed).
pub fn attention_of_backward(
    dout: &Tensor,
    q: &Tensor,
    kv: &Tensor,
    [out, lse]: [&Tensor; 2],
    own: &OwnPositions,
    h: Heads,
) -> Result<(Tensor, Tensor)> {
    check(q, kv, own, h)?;
    let n = own.at.len() as i64;
    let [k, v] = keys_values(kv, h);
    let (dk, dv) = (k.zeros_like(), v.zeros_like()); // [B, K, S, D]
    let dq = Tensor::f_empty([h.batch, n, h.heads * h.head_dim], (q.kind(), q.device()))?;
    for block in own.blocks(h, q.device()) {
        let seen = |t: &Tensor| t.narrow(2, 0, block.seen);
        let part = |t: &Tensor| grouped(t, block.first, block.len, h); // [B, K, G m, D]
        let (qs, g, o) = (part(q), part(dout), part(out));
        let s = own.scores(&block, &qs, &seen(&k), h); // [B, K, G, m, seen]
        let sums = lse.narrow(2, block.first, block.len).contiguous();
        let p = (&s - sums.view([h.batch, h.kv_heads, -1, block.len, 1])).exp();
        let flat = [h.batch, h.kv_heads, -1, block.seen];
        let p = p.view(flat);
        let delta = (&g * o).sum_dim_intlist([-1i64].as_slice(), true, None); // [B, K, G m, 1]
        let mut ds = &p * (g.matmul(&seen(&v).transpose(-2, -1)) - delta) * h.scale;
        if let Some(c) = h.softcap {
            ds *= 1.0 - (s.clamp(-c, c) / c).square().view(flat);
        }
        let _ = seen(&dv).f_add_(&p.transpose(-2, -1).matmul(&g))?;
        let _ = seen(&dk).f_add_(&ds.transpose(-2, -1).matmul(&qs))?;
        dq.narrow(1, block.first, block.len).f_copy_(&rows(&ds.matmul(&seen(&k)), block.len, h))?;
    }
    let both = Tensor::f_stack(&[dk.transpose(1, 2), dv.transpose(1, 2)], 2)?; // [B, S, 2, K, D]
    Ok((dq.view([h.batch * n, -1]), both.view([-1, 2 * h.kv_heads * h.head_dim])))
}
