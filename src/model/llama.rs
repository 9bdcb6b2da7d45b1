//! The trunk of a Llama: embedding, blocks, final norm. Every backward stands beside its forward.
//!
//! Shapes: B rows, T positions, N = B * T tokens, C = hidden size, H query heads, K key-value heads, D head dimension,
//! F = intermediate size, L blocks. Activations are 2-D, `[N, C]`, in the compute dtype.
//!
//! A block is in [`super::block`]: norm, attention, norm, MLP. What other families do differently is asked of the [`Shape`]'s
//! features.

use std::ops::Range;

use kernels::ops::{self, DelayedProducts, Float8, Heads, OwnPositions, Spans};
use tch::{Kind, Tensor};

use crate::config::sections::Recompute;
use crate::config::shape::Shape;
use crate::distributed::mesh::Axis;
use crate::distributed::sharded::Sharded;
use crate::distributed::sharded::gathered::Form;
use crate::error::{Error, Result};
use crate::model::block::BlockSaved;
use crate::model::input::{ModelInput, continue_from, only};
use crate::model::layout::{BlockParts, Draws, float8_runs};
use crate::model::linear::{KeptInner, Linear};
use crate::model::mixture::Balance;
use crate::model::norm::RmsNorm;
use crate::model::rotary::RopeTables;
use crate::model::shared_rows::SharedRows;
use crate::model::shared_sequence::SharedSequence;
use crate::model::vocabulary::VocabularyPart;
use crate::random::hash;

/// What a forward of the trunk keeps for the backward.
pub struct Tape {
    pub(super) context: BlockContext,
    pub(super) ids: Tensor,
    /// Of the blocks from the first that is trained on.
    blocks: Vec<BlockSaved>,
    /// Blocks before those.
    passed: usize,
    /// The final norm's input and statistics.
    last: Option<(Tensor, Tensor)>,
    /// The load of the experts, where there are several.
    pub(super) balance: Option<Balance>,
}

impl Tape {
    /// The load-balancing loss of a mixture of experts over this forward; none for other models. The backward then
    /// differentiates `weight` times it, too.
    pub fn balance_loss(&mut self, weight: f64) -> Result<Option<Tensor>> {
        self.balance.as_mut().map(|balance| balance.loss(weight)).transpose()
    }

    /// Where the tokens went in block `i` of a mixture of experts: the router's output T [N, E] and the chosen experts,
    /// best first, int64 [N, k]. None for other models, and where the block is computed again.
    pub fn routing(&self, i: usize) -> Option<(&Tensor, &Tensor)> {
        let routed = self.blocks.get(i.checked_sub(self.passed)?)?.rest.as_ref()?.mlp.routed()?;
        Some((&routed.logits, &routed.experts))
    }
}

/// The blocks of which a backward has left the gradients of matrices, with their products.
pub type WeightsLeft = Vec<(usize, DelayedProducts)>;

/// What all blocks of a forward share.
pub(super) struct BlockContext {
    pub(super) heads: Heads,
    pub(super) norm: RmsNorm,
    pub(super) rows: SharedRows,
    pub(super) sequence: SharedSequence,
    pub(super) positions: Tensor,
    /// What positions see, without and with the sliding window.
    spans: [Spans; 2],
    /// The same where ranks share the sequences.
    own: Option<[OwnPositions; 2]>,
    /// Of one more token of each row, the first position that it sees through a window, int64 `[B]`; none: all.
    first: Option<Tensor>,
    /// Of each block whether it has a window.
    windowed: Vec<bool>,
    /// Rotary tables of blocks without and with a window.
    rope: [RopeTables; 2],
    draws: Option<Draws>,
}

impl BlockContext {
    /// For one more token of `batch` rows at `positions` (int64 `[B]`), which sees from `first` on through a window.
    pub(super) fn decoding(
        model: &Llama,
        batch: i64,
        positions: Tensor,
        first: Option<Tensor>,
        rope: [RopeTables; 2],
        sequence: SharedSequence,
    ) -> BlockContext {
        BlockContext {
            heads: model.heads(batch),
            norm: RmsNorm::of(&model.shape),
            rows: SharedRows::whole(&model.params.sharding().tensor),
            sequence,
            positions,
            spans: Default::default(),
            own: None,
            first,
            windowed: model.windowed(),
            rope,
            draws: None,
        }
    }

    /// What the positions of block `i` see.
    pub(super) fn spans(&self, i: usize) -> &Spans {
        &self.spans[usize::from(self.windowed[i])]
    }

    /// What the positions that this rank has see in block `i`, where ranks share the sequences.
    pub(super) fn own(&self, i: usize) -> Option<&OwnPositions> {
        self.own.as_ref().map(|own| &own[usize::from(self.windowed[i])])
    }

    /// What one more token of each row sees first in block `i`.
    pub(super) fn first(&self, i: usize) -> Option<&Tensor> {
        self.first.as_ref().filter(|_| self.windowed[i])
    }

    /// cos and sin of block `i`.
    pub(super) fn rope(&self, i: usize) -> &RopeTables {
        &self.rope[usize::from(self.windowed[i])]
    }
}

/// The trunk of a model: embedding, blocks and final norm. Its heads are [`LmHead`](crate::model::LmHead) and
/// [`ScoreHead`](crate::model::ScoreHead).
pub struct Llama {
    /// Sizes, and what its family computes differently.
    pub shape: Shape,
    /// The parameters, this rank's slices of them; a head's, too.
    pub params: Sharded,
    /// Rotary tables of blocks without and with a window, grown as positions need.
    pub(super) rope: Option<[RopeTables; 2]>,
    /// Whether adapters act; see [`Llama::without_adapters`].
    adapters: bool,
    /// See [`Llama::set_float8`].
    float8: Option<Float8>,
    /// The groups of the blocks of this rank's stage.
    pub(super) blocks: Range<usize>,
}

impl Llama {
    /// A model of `shape` over parameters that were laid out for it (see [`layouts`](crate::model::layout::layouts)).
    pub fn new(shape: Shape, params: Sharded) -> Llama {
        let is_here = |i: &usize| params.is_here(*i);
        let all = 1..=shape.num_hidden_layers as usize;
        let first = all.clone().find(is_here).unwrap_or(1);
        let blocks = first..first + all.filter(is_here).count();
        Llama { shape, params, rope: None, adapters: true, float8: None, blocks }
    }

    /// From now on products of a forward and backward over whole rows are in 8-bit floats; none: all in the compute dtype, as
    /// those of generation always are. Ranks then send each other in 8-bit floats what products take in them.
    pub fn set_float8(&mut self, float8: Option<Float8>) -> Result<()> {
        self.float8 = float8;
        let groups = self.params.len();
        let runs = match float8 {
            Some(float8) => float8_runs(&self.shape, (0..groups).map(|i| self.params.plan(i)), float8)?,
            None => vec![Vec::new(); groups],
        };
        self.params.gather_in_float8(runs);
        Ok(())
    }

    /// What [`Llama::set_float8`] was told.
    pub fn float8(&self) -> Option<Float8> {
        self.float8
    }

    /// Starts gathering a group for a forward or backward over whole rows.
    fn prefetch(&mut self, group: usize) -> Result<()> {
        let form = if self.float8.is_some() { Form::Float8 } else { Form::Compute };
        self.params.prefetch_as(group, form)
    }

    /// Calls `f` with the model that the adapters were added to.
    pub fn without_adapters<T>(&mut self, f: impl FnOnce(&mut Llama) -> Result<T>) -> Result<T> {
        self.adapters = false;
        let result = f(self);
        self.adapters = true;
        result
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.shape.num_hidden_layers as usize
    }

    /// Whether a group is the embedding of this stage, whose tokens are embedded here: its gradient is complete after that backward.
    pub(super) fn is_input_embedding(&self, group: usize) -> bool {
        group == 0 && self.params.sharding().pipeline.is_first()
    }

    /// The group that holds the output projection: the head's own, or the embedding's where they are tied.
    pub fn head_group(&self) -> usize {
        if self.shape.tie_word_embeddings { 0 } else { self.num_blocks() + 1 }
    }

    /// What the blocks of a forward share. `divided`: ranks may divide the sequences, and the rows between attention and MLP.
    pub(super) fn context(&mut self, input: &ModelInput, divided: bool) -> Result<BlockContext> {
        let (batch, time) = (input.ids.size()[0], input.ids.size()[1]);
        let device = self.params.device();
        let length = match &input.positions {
            Some(p) => p.max().int64_value(&[]) + 1, // host sync, if they lie on a GPU
            None => time,
        };
        let rope = self.rope_tables(length);
        let sequence = match divided {
            true => self.shared_sequence([batch, time])?,
            false => SharedSequence::new(&Axis::solo(), [batch, time])?,
        };
        let positions = match &input.positions {
            Some(p) => ops::upload(&sequence.own(p), device)?,
            None => Tensor::from_slice(&sequence.at()).to_device(device).repeat([batch]),
        }; // [N]
        let starts = input.start.as_ref().map(Vec::<i64>::try_from).transpose()?; // [N]
        // A window counts places in the row, padding included.
        let spans = |window| Spans::new(starts.as_deref(), [batch, time], window, device);
        let whole = spans(None)?;
        let windowed = match self.shape.sliding_window.filter(|w| *w < time) {
            Some(window) => spans(Some(window))?,
            None => whole.clone(),
        };
        let own = |spans: &Spans| OwnPositions::new(sequence.at(), spans.start().map(|s| sequence.own(s)));
        let own = (!sequence.is_alone()).then(|| [own(&whole), own(&windowed)]);
        Ok(BlockContext {
            heads: self.heads(batch),
            norm: RmsNorm::of(&self.shape),
            rows: self.shared_rows(sequence.tokens(), divided),
            positions,
            spans: [whole, windowed],
            own,
            first: None,
            windowed: self.windowed(),
            rope,
            draws: input.dropout.map(|place| {
                // A row's number in the upper half, the position in the lower.
                let row = Tensor::arange(batch, (Kind::Int64, device)) + place.first_row as i64; // [B]
                let at = Tensor::arange(time, (Kind::Int64, device)); // [T]
                let token = row.unsqueeze(1) * (1i64 << 32) + at; // [B, T]
                let rows = sequence.own(&token.contiguous().view([-1]));
                Draws { key: hash(place.seed ^ hash(place.step)), rows }
            }),
            sequence,
        })
    }

    /// Rows [B, T] of a forward over whole rows, of which ranks may have different tokens.
    pub(super) fn shared_sequence(&self, size: [i64; 2]) -> Result<SharedSequence> {
        SharedSequence::new(&self.params.sharding().context, size)
    }

    /// Of a number for each token of rows `ids` (int64 [B, T]), `[B * T]`, those of the tokens that this rank's forward gives
    /// hidden states of: all, unless ranks share the sequences.
    pub fn own_tokens(&self, all: &Tensor, ids: &Tensor) -> Result<Tensor> {
        Ok(self.shared_sequence([ids.size()[0], ids.size()[1]])?.own(all))
    }

    fn heads(&self, batch: i64) -> Heads {
        let s = &self.shape;
        let [heads, kv_heads] = self.local_heads();
        Heads {
            scale: s.attention_scale(),
            softcap: s.features.attention_softcap,
            ..Heads::new(batch, heads, kv_heads, s.head_dim)
        }
    }

    /// Query and key-value heads that this rank computes; of the latter at least one.
    pub(crate) fn local_heads(&self) -> [i64; 2] {
        let ranks = self.params.sharding().tensor.size;
        [self.shape.num_attention_heads / ranks, (self.shape.num_key_value_heads / ranks).max(1)]
    }

    /// `rows` rows, of which tensor-parallel ranks have different ones if they are to be `divided`.
    pub(super) fn shared_rows(&self, rows: i64, divided: bool) -> SharedRows {
        let sharding = self.params.sharding();
        match divided && sharding.sequence {
            true => SharedRows::divided(&sharding.tensor, rows),
            false => SharedRows::whole(&sharding.tensor),
        }
    }

    /// What this rank has of the vocabulary.
    pub(super) fn vocabulary(&self) -> VocabularyPart {
        VocabularyPart::new(&self.params.sharding().tensor, self.shape.vocab_size)
    }

    fn windowed(&self) -> Vec<bool> {
        (0..self.shape.num_hidden_layers).map(|i| self.shape.window(i).is_some()).collect()
    }

    /// What embeddings are multiplied by, rounded to their dtype; none: nothing.
    fn embedding_scale(&self) -> Option<f64> {
        let scale = Tensor::from((self.shape.hidden_size as f64).sqrt()).to_kind(self.params.compute());
        self.shape.features.scale_embeddings.then(|| scale.double_value(&[]))
    }

    /// The weights of block group `group` (blocks are groups 1 to L), as views of its gathered buffers.
    pub(super) fn block_weights(
        &mut self,
        group: usize,
        draws: Option<&Draws>,
        float8: Option<Float8>,
        inner: &[KeptInner],
    ) -> Result<BlockParts<Linear>> {
        BlockParts::weights(&mut self.params, group, &self.shape, self.adapters, draws, float8, inner)
    }

    /// The embedding's rows for ids (int64, any shape): T [numel, C]. Collective where it is sharded.
    pub(crate) fn embed(&mut self, ids: &Tensor) -> Result<Tensor> {
        let rows = self.shared_rows(ids.numel() as i64, false);
        self.embed_rows(ids, &rows)
    }

    /// [`Llama::embed`], of this rank's rows.
    fn embed_rows(&mut self, ids: &Tensor, rows: &SharedRows) -> Result<Tensor> {
        let (weight, vocabulary, ids) = (self.params.single(0)?, self.vocabulary(), ids.view([-1]));
        let rows = match vocabulary.is_whole() {
            true => weight.index_select(0, &ids),
            false => rows.sum(vocabulary.embed(&weight, &ids)?)?,
        };
        Ok(match self.embedding_scale() {
            Some(scale) => rows * scale,
            None => rows,
        })
    }

    /// The trunk without a backward: hidden states after the final norm, T [N, C]. Of a model in one stage.
    pub fn hidden(&mut self, input: &ModelInput) -> Result<Tensor> {
        only(self.run(input, None, None)?.0)
    }

    /// The trunk for training: hidden states after the final norm, T [N, C], and the tape for [`Llama::backward`].
    /// The weights of the last block stay gathered for the backward; of blocks below the first that is trained nothing is
    /// kept. Of a model in one stage; see [`Llama::forward_stage`].
    pub fn forward(&mut self, input: &ModelInput, recompute: Recompute) -> Result<(Tensor, Tape)> {
        let (hidden, tape) = self.forward_stage(input, None, recompute)?;
        Ok((only(hidden)?, tape))
    }

    /// This stage's part of the trunk. `before`: what the stage before gives; none on the first. Returns what the next stage takes,
    /// on the last one the hidden states.
    pub(super) fn run(
        &mut self,
        input: &ModelInput,
        before: Option<Vec<Tensor>>,
        recompute: Option<Recompute>,
    ) -> Result<(Vec<Tensor>, Option<Tape>)> {
        self.prefetch(if before.is_none() { 0 } else { self.blocks.start })?; // collective, overlaps what follows
        let context = self.context(input, true)?;
        let ids = context.sequence.own(&input.ids.contiguous().view([-1])); // [N]
        let ids = ops::upload(&ids, self.params.device())?;
        let mut balance = recompute.and_then(|_| self.balance(input, &ids, &context));
        let mut x = match before {
            None => self.enter(&ids, &context)?,
            Some(before) => continue_from(before, balance.as_mut(), self.blocks.start - 1)?,
        }; // [n, C]
        let (lowest, is_last) = (self.params.first_trained(), self.params.sharding().pipeline.is_last());
        let Range { start, end } = self.blocks;
        let mut blocks = Vec::new();
        let mut last = None;
        let mut hidden = None;
        for i in start..end {
            let keeps = recompute.is_some() && i >= lowest;
            let adapters = if keeps { self.params.plan(i).adapters.len() } else { 0 };
            let inner: Vec<KeptInner> = (0..adapters).map(|_| KeptInner::default()).collect();
            let w = self.block_weights(i, context.draws.as_ref(), self.float8, &inner)?; // waits until they are gathered
            let next = if i + 1 < end { Some(i + 1) } else { is_last.then(|| self.head_group()) };
            next.map_or(Ok(()), |next| self.prefetch(next))?; // collective, overlaps block i
            let (y, rest) = w.forward(&x, &context, i - 1)?; // [n, C]
            if let Some(r) = recompute {
                if let (Some(balance), Some(routed)) = (&mut balance, rest.mlp.routed()) {
                    balance.add(routed);
                }
                if keeps {
                    blocks.push(BlockSaved::new(&x, rest, inner, r));
                }
            }
            x = y;
            if let Some(norm) = &w.final_norm {
                let (h, rstd) = context.norm.forward(&x, norm)?; // [n, C], [n]
                hidden = Some(h);
                last = Some((x.shallow_clone(), rstd));
            }
            drop(w);
            if recompute.is_none() || i + 1 < end || i < lowest {
                self.params.release(i);
            }
        }
        let after = match hidden {
            Some(hidden) => vec![context.rows.gather(hidden)?], // [N, C]
            None => {
                let sums = balance.as_ref().map(Balance::sums).transpose()?;
                std::iter::once(x).chain(sums).collect()
            }
        };
        let passed = lowest.max(start) - 1;
        let tape = recompute.map(|_| Tape { context, ids, blocks, passed, last, balance });
        Ok((after, tape))
    }

    /// The embedded tokens of `ids` (int64 `[n]`), T [n, C]; the first block is gathered meanwhile.
    fn enter(&mut self, ids: &Tensor, context: &BlockContext) -> Result<Tensor> {
        let x = self.embed_rows(ids, &context.rows)?; // [n, C]
        self.prefetch(self.blocks.start)?; // collective
        let keep = self.shape.tie_word_embeddings && self.num_blocks() <= 1;
        if !keep {
            self.params.release(0);
        }
        Ok(x)
    }

    /// What counts the load of experts in a forward for training, where there are several.
    fn balance(&self, input: &ModelInput, ids: &Tensor, context: &BlockContext) -> Option<Balance> {
        let experts = self.shape.experts.as_ref()?.num_local_experts;
        let mask = input.mask.as_ref().map(|mask| context.sequence.own(mask));
        let sharing = self.params.sharding().context.group.clone();
        Some(Balance::new(experts, ids, self.params.compute(), mask.as_ref(), sharing))
    }

    /// Given the gradient of the hidden states (T [N, C]), adds to the gradients of all trunk groups that are trained.
    /// Tied embeddings: the head's part must already be in the embedding's gradient. Below the first group that is trained
    /// nothing is computed. Ends the micro-batch (see [`Sharded::begin_step_gradients`]).
    ///
    /// ```text
    /// x_0 = E[ids],  x_i = block_i(x_i-1),  h = norm(x_L)
    /// dx_L = norm'(dh),  dx_i-1 = block_i'(dx_i),  dE[id_n] += dx_0[n] for every token n
    /// ```
    pub fn backward(&mut self, dhidden: Tensor, tape: Tape) -> Result<()> {
        self.backward_stage(vec![dhidden], tape, None).map(drop)
    }

    /// The backward of the final norm and of the blocks of this stage, given the gradient of their output: on the last stage T [N, C],
    /// of the hidden states, else T [n, C]. Returns the gradient of their input, T [n, C]; none where nothing that it depends on is
    /// trained. `later`: takes what is left to do for the gradients of matrices; none: that is done here.
    pub(super) fn backward_blocks(
        &mut self,
        dafter: Tensor,
        tape: &mut Tape,
        mut later: Option<&mut WeightsLeft>,
    ) -> Result<Option<Tensor>> {
        let lowest = self.params.first_trained();
        let Range { start, end } = self.blocks;
        let mut dx = match self.params.sharding().pipeline.is_last() {
            true => tape.context.rows.own(dafter)?,
            false => dafter,
        }; // [n, C]
        for i in (lowest.max(start)..end).rev() {
            let saved = tape.blocks.pop().ok_or_else(|| Error::failed("a tape is used once"))?;
            let draws = tape.context.draws.as_ref();
            let w = self.block_weights(i, draws, self.float8, &saved.inner)?; // waits until they are gathered
            if i > lowest.max(start) {
                self.prefetch(i - 1)?; // collective, overlaps block i
            }
            let products = later.as_ref().map(|_| DelayedProducts::default());
            let flat = self.params.grad_as(i, products.as_ref());
            let g = BlockParts::gradients(&self.params, i, flat.as_ref(), &self.shape)?;
            if let (Some(norm), Some(dnorm)) = (&w.final_norm, &g.final_norm) {
                let (x, rstd) = tape.last.take().ok_or_else(|| Error::failed("a tape is used once"))?;
                dx = tape.context.norm.backward(&dx, &x, norm, &rstd, None, dnorm)?; // [n, C]
            }
            let balance = tape.balance.as_ref().and_then(Balance::gradient); // [N, E], or broadcast to it
            // The first norm's gradient is a by-product of the input's.
            let needed = i > lowest || self.params.plan(i).trains("input_layernorm.weight");
            let d = w.backward(&g, dx, saved, &tape.context, i - 1, balance.as_ref(), needed)?; // [n, C]
            drop(w);
            self.params.release(i);
            match (flat, &mut later, products) {
                (None, ..) => {}
                (Some(_), Some(later), Some(products)) => later.push((i, products)),
                (Some(_), ..) => self.params.reduce(i)?, // collective, overlaps block i - 1
            }
            let Some(d) = d else { return Ok(None) };
            dx = d;
        }
        Ok((lowest < start).then_some(dx))
    }

    /// The backward of [`Llama::embed`]: adds dx (T [N, C]) to the rows of ids.
    pub(super) fn embed_backward(&mut self, mut dx: Tensor, ids: &Tensor) -> Result<()> {
        let Some(dweight) = self.params.single_grad(0) else { return Ok(()) };
        if let Some(scale) = self.embedding_scale() {
            dx *= scale;
        }
        match self.vocabulary() {
            part if part.is_whole() => ops::embedding_backward(&dx, ids, dweight.sum()?)?,
            part => part.embed_backward(&dx, ids, dweight.sum()?)?,
        }
        self.params.reduce(0) // collective
    }
}
