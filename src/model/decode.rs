//! A Llama token by token: keys and values of what was read are cached, so that a new token costs one row.
//!
//! Rows live in slots of the cache. Each has its own length and begins at position 0, so rows of any lengths go
//! together without padding, and a row's slot is free for another as soon as it is finished.
//!
//! Where the parameters are sharded and not held (see [`Sharded::hold`]), a forward gathers one group after the other:
//! all ranks must then take the same number of forwards, whatever each of them reads; one that has nothing to read takes
//! [`Llama::idle`].
//!
//! [`Sharded::hold`]: crate::distributed::sharded::Sharded::hold

use kernels::ops::{self, Heads, KeysValues};
use tch::{Kind, Tensor};

use crate::distributed::mesh::Axis;
use crate::error::{Error, Result};
use crate::model::head::capped;
use crate::model::input::ModelInput;
use crate::model::layout::BlockParts;
use crate::model::linear::Linear;
use crate::model::llama::{BlockContext, Llama};
use crate::model::shared_sequence::SharedSequence;

/// Elements of the scores that [`Llama::extend`] has in memory at once.
const SCORES: i64 = 16 << 20;

/// Keys and values of what the slots' rows have read, T [slots, K, capacity, D] a block; K: this rank's key-value heads.
pub struct KvCache {
    /// (keys, values)
    blocks: Vec<(Tensor, Tensor)>,
    /// Tokens in each slot.
    lengths: Vec<i64>,
    capacity: i64,
}

impl KvCache {
    /// An empty cache. The capacity grows as rows need it.
    pub fn new(model: &Llama, slots: usize) -> KvCache {
        let s = &model.shape;
        let kind = (model.params.compute(), model.params.device());
        let [_, kv_heads] = model.local_heads();
        let empty = || Tensor::empty([slots as i64, kv_heads, 0, s.head_dim], kind);
        let blocks = (0..s.num_hidden_layers).map(|_| (empty(), empty())).collect();
        KvCache { blocks, lengths: vec![0; slots], capacity: 0 }
    }

    /// Tokens that the row in `slot` has read.
    pub fn len(&self, slot: usize) -> usize {
        self.lengths[slot] as usize
    }

    /// Whether no slot has read a token.
    pub fn is_empty(&self) -> bool {
        self.lengths.iter().all(|n| *n == 0)
    }

    /// Forgets all that the row in `slot` has read but its first `length` tokens; 0 frees the slot.
    pub fn truncate(&mut self, slot: usize, length: usize) {
        self.lengths[slot] = self.lengths[slot].min(length as i64);
    }

    /// Makes the row in `to` begin as the one in `from`: with its first `length` tokens.
    pub fn copy(&mut self, from: usize, to: usize, length: usize) -> Result<()> {
        if length as i64 > self.lengths[from] {
            return Err(Error::failed("a row cannot begin with more tokens than the other one has read"));
        }
        for cache in self.blocks.iter().flat_map(|(keys, values)| [keys, values]) {
            let part = |slot: usize| cache.select(0, slot as i64).narrow(1, 0, length as i64);
            part(to).f_copy_(&part(from))?;
        }
        self.lengths[to] = length as i64;
        Ok(())
    }

    /// One more token in each of `slots`, whose rows are then `longest` tokens long at most.
    pub(crate) fn grow(&mut self, slots: &[usize], longest: i64) {
        self.reserve(longest);
        slots.iter().for_each(|slot| self.lengths[*slot] += 1);
    }

    /// Tokens that a slot has room for, without moving what is there.
    pub(crate) fn capacity(&self) -> i64 {
        self.capacity
    }

    /// Makes room for rows of `length` tokens; at least doubles what was there, so that growing costs little overall.
    fn reserve(&mut self, length: i64) {
        if length <= self.capacity {
            return;
        }
        let capacity = length.max(2 * self.capacity).max(64);
        for (keys, values) in &mut self.blocks {
            for cache in [keys, values] {
                let size = cache.size();
                let grown =
                    Tensor::empty([size[0], size[1], capacity, size[3]], (cache.kind(), cache.device()));
                grown.narrow(2, 0, self.capacity).copy_(cache);
                *cache = grown;
            }
        }
        self.capacity = capacity;
    }
}

impl Llama {
    /// Reads a prompt into each of `slots`, which must be empty. Returns the hidden states of the prompts' last tokens,
    /// T [rows, C]. Memory and time are those of a forward over rows x the longest prompt.
    pub fn prefill(&mut self, prompts: &[&[i64]], slots: &[usize], cache: &mut KvCache) -> Result<Tensor> {
        let lengths: Vec<i64> = prompts.iter().map(|p| p.len() as i64).collect();
        if prompts.len() != slots.len() || lengths.contains(&0) || slots.iter().any(|s| cache.lengths[*s] > 0)
        {
            return Err(Error::failed(
                "a prefill reads one prompt, of at least one token, into each of its free slots",
            ));
        }
        let (rows, time) = (lengths.len() as i64, lengths.iter().copied().max().unwrap_or(0));
        // Padding after a prompt: causal attention never looks there, and what it leaves in the cache lies beyond the
        // row's length, where the next tokens write before they read.
        let mut ids = vec![0i64; (rows * time) as usize];
        for (row, prompt) in ids.chunks_mut(time as usize).zip(prompts) {
            row[..prompt.len()].copy_from_slice(prompt);
        }
        let device = self.params.device();
        let input = ModelInput::new(Tensor::from_slice(&ids).view([rows, time]).to_device(device));
        let context = self.context(&input, false)?;
        let Heads { heads, kv_heads, head_dim, .. } = context.heads;
        let index = integers(slots.iter().map(|s| *s as i64)).to_device(device); // [rows]
        cache.reserve(time);
        let ends = lengths.iter().enumerate().map(|(r, n)| r as i64 * time + n - 1);
        let ends = integers(ends).to_device(device); // [rows]
        let x = self.embed_checked(&ids)?; // [rows T, C]
        let last = self.through_blocks(x, |i, w, x| {
            let (x, rest) = w.forward(x, &context, i - 1)?; // [rows T, C]
            let qkv = rest.attention.qkv.view([rows, time, heads + 2 * kv_heads, head_dim]); // [rows, T, H + 2K, D]
            let (keys, values) = &cache.blocks[i - 1];
            for (cached, first) in [(keys, heads), (values, heads + kv_heads)] {
                let new = qkv.narrow(2, first, kv_heads).transpose(1, 2); // [rows, K, T, D]
                let _ = cached.narrow(2, 0, time).index_copy_(0, &index, &new);
            }
            match &w.final_norm {
                Some(norm) => Ok(context.norm.forward(&x.index_select(0, &ends), norm)?.0),
                None => Ok(x),
            }
        })?;
        for (slot, length) in slots.iter().zip(lengths) {
            cache.lengths[*slot] = length;
        }
        Ok(last)
    }

    /// Reads more tokens, at least one, into a slot that may hold some. Returns the hidden state of the last, T [1, C].
    pub fn extend(&mut self, ids: &[i64], slot: usize, cache: &mut KvCache) -> Result<Tensor> {
        let past = cache.lengths[slot];
        match ids.len() {
            0 => return Err(Error::failed("a row is extended by at least one token")),
            _ if past == 0 => return self.prefill(&[ids], &[slot], cache),
            1 => return self.decode(ids, &[slot], cache),
            _ => {}
        }
        let new = ids.len() as i64;
        cache.reserve(past + new);
        let position = Tensor::arange_start(past, past + new, (Kind::Int64, self.params.device()));
        let context = self.decoding(position, past + new)?;
        let x = self.embed_checked(ids)?; // [N, C]
        let last = self.read(x, &context, |i, qkv| {
            let (keys, values) = &cache.blocks[i - 1];
            let row = |t: &Tensor| t.select(0, slot as i64).narrow(1, 0, past + new); // [K, past + N, D]
            extend_attention(qkv, &row(keys), &row(values), past, context.first(i - 1), context.heads)
        })?; // [N, C]
        cache.lengths[slot] += new;
        Ok(last.narrow(0, new - 1, 1))
    }

    /// Reads one more token in each of `slots` (no slot twice). Returns their hidden states, T [rows, C].
    pub fn decode(&mut self, ids: &[i64], slots: &[usize], cache: &mut KvCache) -> Result<Tensor> {
        let device = self.params.device();
        let lengths = || slots.iter().map(|s| cache.lengths[*s]);
        let longest = lengths().max().unwrap_or(0) + 1;
        let position = ops::upload(&integers(lengths()), device)?; // [rows]
        let slot = ops::upload(&integers(slots.iter().map(|s| *s as i64)), device)?; // [rows]
        self.check_ids(ids)?;
        let ids = ops::upload(&Tensor::from_slice(ids), device)?; // [rows]
        cache.grow(slots, longest);
        self.decode_at(&ids, position, &slot, longest, cache)
    }

    /// [`Llama::decode`] for tokens that the device knows already: `ids`, `position` and `slot` are int64 `[rows]` there, all
    /// positions below `longest`, for which the cache has room and has counted the tokens (see [`KvCache::grow`]). A row
    /// without a slot (-1) reads and writes nothing, and its hidden state is NaN.
    pub(crate) fn decode_at(
        &mut self,
        ids: &Tensor,
        position: Tensor,
        slot: &Tensor,
        longest: i64,
        cache: &KvCache,
    ) -> Result<Tensor> {
        let context = self.decoding(position, longest)?;
        let x = self.embed(ids)?; // [rows, C]
        self.read(x, &context, |i, qkv| {
            let ((keys, values), first) = (&cache.blocks[i - 1], context.first(i - 1));
            let position = &context.positions;
            let cache = KeysValues { keys, values, slot, position, first, longest };
            Ok(ops::decode_attention(qkv, cache, context.heads)?)
        })
    }

    /// A forward of a rank that has nothing to read while others read: it gathers what they gather. Returns a hidden
    /// state without meaning, T [1, C], for [`Llama::next_token_logits`].
    pub fn idle(&mut self) -> Result<Tensor> {
        let x = self.embed_checked(&[0])?;
        self.through_blocks(x, |_, _, x| Ok(x.shallow_clone()))
    }

    /// Logits of the next token, T [rows, V], for hidden states T [rows, C].
    pub fn next_token_logits(&mut self, hidden: &Tensor) -> Result<Tensor> {
        let group = self.head_group();
        let logits = ops::linear(hidden, &self.params.single(group)?, None)?; // [rows, V]; collective
        self.params.release(group);
        let logits = capped(logits, self.shape.features.logit_softcap);
        match self.vocabulary() {
            part if part.is_whole() => Ok(logits),
            part => part.join(&logits),
        }
    }

    /// For a token each at `position` (int64 `[N]`, all below `length`) of rows that begin at position 0, so that a sliding
    /// window's first position is never in padding.
    fn decoding(&mut self, position: Tensor, length: i64) -> Result<BlockContext> {
        let tables = self.rope_tables(length);
        let window = self.shape.sliding_window.filter(|w| *w < length);
        let first = window.map(|window| (&position - (window - 1)).clamp_min(0)); // [N]
        let rows = position.numel() as i64;
        let alone = SharedSequence::new(&Axis::solo(), [rows, 1])?;
        Ok(BlockContext::decoding(self, rows, position, first, tables, alone))
    }

    /// Hidden states after the final norm, T [N, C], of N embedded tokens x, T [N, C]. `attend` takes the block's number and
    /// the rotated queries, keys and values, T [N, (H + 2K) * D], and returns T [N, H * D].
    fn read(
        &mut self,
        x: Tensor,
        context: &BlockContext,
        mut attend: impl FnMut(usize, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.through_blocks(x, |i, w, x| {
            let x = w.cached(x, context, i - 1, |qkv| attend(i, qkv))?;
            match &w.final_norm {
                Some(norm) => Ok(context.norm.forward(&x, norm)?.0),
                None => Ok(x),
            }
        })
    }

    /// Embedded tokens x, T [N, C], through `block(number, weights, x)` of every block, numbers from 1. Each group is gathered
    /// for its use, while the one before computes, and dropped.
    fn through_blocks(
        &mut self,
        mut x: Tensor,
        mut block: impl FnMut(usize, &BlockParts<Linear>, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.params.prefetch(1)?; // collective
        self.params.release(0);
        let layers = self.num_blocks();
        for i in 1..=layers {
            let w = self.block_weights(i, None, None, &[])?; // waits until they are gathered
            let next = if i < layers { i + 1 } else { self.head_group() };
            self.params.prefetch(next)?; // collective, overlaps block i
            x = block(i, &w, &x)?; // [N, C]; after the last block of `prefill` [rows, C]
            drop(w);
            self.params.release(i);
        }
        Ok(x)
    }

    fn embed_checked(&mut self, ids: &[i64]) -> Result<Tensor> {
        self.check_ids(ids)?;
        let ids = ops::upload(&Tensor::from_slice(ids), self.params.device())?;
        self.embed(&ids)
    }

    fn check_ids(&self, ids: &[i64]) -> Result<()> {
        if let Some(id) = ids.iter().find(|id| !(0..self.shape.vocab_size).contains(*id)) {
            return Err(Error::data(format!(
                "token id {id} is not in the model's vocabulary of {}; is the tokenizer the model's?",
                self.shape.vocab_size
            )));
        }
        Ok(())
    }
}

/// Attention of N new tokens of one row after `past` that it has read, exact. `qkv`: T [N, (H + 2K) * D], rotated;
/// `keys`, `values`: T [K, past + N, D], where the new tokens' are written; `first`: what each of the tokens sees first,
/// int64 `[N]`, none: position 0. Returns T [N, H * D].
fn extend_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    past: i64,
    first: Option<&Tensor>,
    h: Heads,
) -> Result<Tensor> {
    let (new, kind, device) = (h.batch, ops::accumulator(qkv.kind()), qkv.device());
    let group = h.heads / h.kv_heads;
    let all = qkv.view([new, h.heads + 2 * h.kv_heads, h.head_dim]); // [N, H + 2K, D]
    for (cached, first) in [(keys, h.heads), (values, h.heads + h.kv_heads)] {
        let rows = all.narrow(1, first, h.kv_heads).transpose(0, 1); // [K, N, D]
        cached.narrow(1, past, new).f_copy_(&rows)?;
    }
    let (keys, values) = (keys.to_kind(kind), values.to_kind(kind));
    let queries = all.narrow(1, 0, h.heads).to_kind(kind) * h.scale; // [N, H, D]
    let queries = queries.view([new, h.kv_heads, group, h.head_dim]).permute([1, 2, 0, 3]); // [K, group, N, D]
    let seen = Tensor::arange(past + new, (Kind::Int64, device)).unsqueeze(0); // [1, past + N]
    let chunk = (SCORES / (h.heads * (past + new))).clamp(1, new);
    let mut parts = Vec::new();
    for begin in (0..new).step_by(chunk as usize) {
        let count = chunk.min(new - begin);
        let at = Tensor::arange_start(past + begin, past + begin + count, (Kind::Int64, device));
        let mut unseen = seen.gt_tensor(&at.unsqueeze(1)); // [count, past + N]
        if let Some(first) = first {
            unseen = unseen.logical_or(&seen.lt_tensor(&first.narrow(0, begin, count).unsqueeze(1)));
        }
        let q = queries.narrow(2, begin, count).reshape([h.kv_heads, group * count, h.head_dim]);
        let mut scores = h.cap(q.f_bmm(&keys.transpose(1, 2))?); // [K, group count, past + N]
        let scores = scores.f_masked_fill_(&unseen.repeat([group, 1]), f64::NEG_INFINITY)?;
        let out = scores.f_softmax(-1, kind)?.f_bmm(&values)?; // [K, group count, D]
        let out = out.view([h.kv_heads, group, count, h.head_dim]).permute([2, 0, 1, 3]); // [count, K, group, D]
        parts.push(out.reshape([count, h.heads * h.head_dim])); // [count, H D]
    }
    Ok(Tensor::cat(&parts, 0).to_kind(qkv.kind()))
}

fn integers(values: impl Iterator<Item = i64>) -> Tensor {
    Tensor::from_slice(&values.collect::<Vec<_>>()).to_kind(Kind::Int64)
}
