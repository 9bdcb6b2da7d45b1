//! A Llama token by token: keys and values of what was read are cached, so that a new token costs one row.
//!
//! Rows live in slots of the cache. Each has its own length and begins at position 0, so rows of any lengths go
//! together without padding, and a row's slot is free for another as soon as it is finished. Weights are gathered once
//! and stay until [`Llama::release_all`].

use kernels::ops::{self, Heads};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::model::llama::{Context, Input, Llama, block_forward, norm_heads, rotate};

/// Keys and values of what the slots' rows have read, T [slots, K, capacity, D] a block.
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
        let empty = || Tensor::empty([slots as i64, s.num_key_value_heads, 0, s.head_dim], kind);
        let blocks = (0..s.num_hidden_layers).map(|_| (empty(), empty())).collect();
        KvCache { blocks, lengths: vec![0; slots], capacity: 0 }
    }

    /// Tokens that the row in `slot` has read.
    pub fn len(&self, slot: usize) -> usize {
        self.lengths[slot] as usize
    }

    pub fn is_empty(&self) -> bool {
        self.lengths.iter().all(|n| *n == 0)
    }

    /// Frees a slot.
    pub fn clear(&mut self, slot: usize) {
        self.lengths[slot] = 0;
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
        let input = Input::new(Tensor::from_slice(&ids).view([rows, time]).to_device(device));
        let context = self.context(&input)?;
        let Heads { heads, kv_heads, head_dim, .. } = context.heads;
        let index = integers(slots.iter().map(|s| *s as i64)).to_device(device);
        cache.reserve(time);
        let mut x = self.embed_checked(&ids)?;
        let mut last =
            integers(lengths.iter().enumerate().map(|(r, n)| r as i64 * time + n - 1)).to_device(device);
        for i in 1..=self.num_blocks() {
            let w = self.block_weights(i)?;
            let (y, rest) = block_forward(&w, &x, &context, i - 1)?;
            x = y;
            let qkv = rest.qkv.view([rows, time, heads + 2 * kv_heads, head_dim]);
            let (keys, values) = &cache.blocks[i - 1];
            for (cached, first) in [(keys, heads), (values, heads + kv_heads)] {
                let new = qkv.narrow(2, first, kv_heads).transpose(1, 2);
                let _ = cached.narrow(2, 0, time).index_copy_(0, &index, &new);
            }
            if let Some(norm) = &w.final_norm {
                last = ops::rms_norm(&x.index_select(0, &last), norm, self.shape.rms_norm_eps)?.0;
            }
        }
        for (slot, length) in slots.iter().zip(lengths) {
            cache.lengths[*slot] = length;
        }
        Ok(last)
    }

    /// Reads one more token in each of `slots` (no slot twice). Returns their hidden states, T [rows, C].
    pub fn decode(&mut self, ids: &[i64], slots: &[usize], cache: &mut KvCache) -> Result<Tensor> {
        let device = self.params.device();
        let lengths = || slots.iter().map(|s| cache.lengths[*s]);
        let longest = lengths().max().unwrap_or(0) + 1;
        let position = integers(lengths()).to_device(device);
        let slot = integers(slots.iter().map(|s| *s as i64)).to_device(device);
        cache.reserve(longest);
        let (cos, sin) = self.rope_tables(longest);
        // Rows begin at position 0, so that a window's first position is never in padding.
        let first = self.shape.sliding_window.filter(|w| *w < longest);
        let first = first.map(|window| (&position - (window - 1)).clamp_min(0));
        let context = Context::decoding(self, ids.len() as i64, position, first, (cos, sin));
        let mut x = self.embed_checked(ids)?;
        for i in 1..=self.num_blocks() {
            let w = self.block_weights(i)?;
            let qkv = w.qkv.forward(&ops::rms_norm(&x, &w.norm1, context.eps)?.0)?;
            norm_heads(&w, &qkv, &context)?;
            rotate(&qkv, &context, false)?;
            let (keys, values) = &cache.blocks[i - 1];
            let first = context.start(i - 1);
            let o =
                ops::decode_attention(&qkv, keys, values, &slot, &context.positions, first, context.heads)?;
            let x2 = w.o.forward_add(&o, &x)?;
            let h2 = ops::rms_norm(&x2, &w.norm2, context.eps)?.0;
            x = w.mlp.finish(&w.mlp.begin(&h2, None)?, &x2)?;
            if let Some(norm) = &w.final_norm {
                x = ops::rms_norm(&x, norm, context.eps)?.0;
            }
        }
        for slot in slots {
            cache.lengths[*slot] += 1;
        }
        Ok(x)
    }

    /// Logits of the next token, T [rows, V], for hidden states T [rows, C]; the head's weights stay gathered.
    pub fn next_token_logits(&mut self, hidden: &Tensor) -> Result<Tensor> {
        let group = self.head_group();
        let flat = self.params.full(group)?;
        Ok(hidden.f_mm(&self.params.layout(group).specs[0].view(&flat).tr())?)
    }

    /// Drops all gathered weights: the end of a generation.
    pub fn release_all(&mut self) {
        (0..self.params.len()).for_each(|i| self.params.release(i));
    }

    fn embed_checked(&mut self, ids: &[i64]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|id| !(0..self.shape.vocab_size).contains(*id)) {
            return Err(Error::data(format!(
                "token id {id} is not in the model's vocabulary of {}; is the tokenizer the model's?",
                self.shape.vocab_size
            )));
        }
        let ids = Tensor::from_slice(ids).to_device(self.params.device());
        self.embed(&ids)
    }
}

fn integers(values: impl Iterator<Item = i64>) -> Tensor {
    Tensor::from_slice(&values.collect::<Vec<_>>()).to_kind(Kind::Int64)
}
