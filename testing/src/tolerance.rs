//! How far a value may be from its reference: one table, by what is compared and dtype.
//!
//! A row has a constant `floor`. Where some values are ill-conditioned it also has a factor on the reference's own error, the
//! distance of the reference's float32 result from its float64 result: what float32 loses there, any program loses. The
//! allowed difference is `max(floor, slack + factor * own)`, and never above the row's `bound`.

use tch::Kind;

/// What is compared. Distances are relative to the largest value or norm unless a row says otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Quantity {
    /// An operation against its composition in float64.
    Operation,
    /// The gradient of flash attention on a GPU.
    FlashBackward,
    /// A product with a quantized weight against one with the dequantized weight.
    QuantizedProduct,
    /// A backward against libtorch's autograd.
    Autograd,
    /// A gradient against differences of the loss along a direction.
    FiniteDifference,
    /// A sum over many tensors against the sum of their sums.
    Reduction,
    /// An update of a fused optimizer against its composition, absolute.
    FusedUpdate,
    /// The same on a GPU.
    FusedUpdateOnGpu,
    /// Logits, log-probabilities, entropies and hidden states of a model, absolute in float32.
    Logits,
    /// A model's loss.
    Loss,
    /// A model's gradient, in 2-norms.
    Gradient,
    /// Values of which the reference has float32 only.
    SingleReference,
    /// Gradients of an adapter of which the reference has float32 only.
    SingleGradient,
    /// Gradients of a scalar head and the trunk below it of which the reference has float32 only.
    SingleHeadGradient,
    /// Log-probabilities of tokens that a program prints, absolute.
    Scores,
    /// A loss function of given log-probabilities, its statistics and its gradient.
    LossFunction,
    /// Losses of KTO, which are not summed over tokens.
    UnpairedLoss,
    /// Gradients of KTO through a model.
    UnpairedGradient,
    /// KTO's estimate of the KL divergence, absolute.
    KlEstimate,
    /// Losses of a training with products in 8-bit floats against those in bfloat16.
    Float8Loss,
    /// Losses of single pairs, absolute.
    PairLosses,
    /// A formula with a few terms against its result by hand or by another order, absolute.
    Formula,
    /// A value that is computed in two ways which differ in the order of their terms.
    TwoWays,
    /// A model's values and gradients with rows, ranks, caches or adapters divided otherwise.
    SameModel,
    /// Steps of AdamW against PyTorch's.
    AdamW,
    /// A learning rate, absolute.
    LearningRate,
    /// Losses of a training on ranks and micro-batches divided otherwise.
    SameLosses,
    /// The loss before the first update, of matrices, rows or blocks divided otherwise.
    MeshFirstLoss,
    /// Losses and norms after updates.
    MeshLosses,
    /// Norms of its gradients.
    SameNorms,
    /// Its parameters.
    SameParameters,
    /// Metrics and parameters of preference and reinforcement learning on ranks and micro-batches divided otherwise.
    SameMetrics,
    /// Log-probabilities of a sampler and of a training, absolute.
    Sampler,
    /// Rewards or log-probabilities of one model in other batches or files, absolute.
    SameRewards,
    /// Rewards of a model that was merged with rounding or hardly trained, absolute.
    NearRewards,
    /// Perplexity of one model in other files.
    Perplexity,
    /// A weight with its adapter merged, absolute.
    Merged,
    /// A mean of rows of weights, absolute.
    RoundedMean,
    /// A weight with the product of a large adapter merged, absolute.
    MergedProduct,
    /// Norms that a file stores with 1 added.
    StoredNorms,
    /// Logits of a model whose norms a file stores with 1 added.
    RoundedNorms,
    /// Weights that another file or section begins with.
    Converted,
    /// A number that went through float32 or through a text of that precision.
    Printed,
}

use Quantity::*;

/// A row of the table.
pub struct Tolerance {
    pub quantity: Quantity,
    pub kind: Kind,
    /// Allowed whatever the reference's own error is.
    pub floor: f64,
    /// On the reference's own error; 0 where that does not count.
    pub factor: f64,
    /// Added to it.
    pub slack: f64,
    /// Never more than this.
    pub bound: f64,
    pub reason: &'static str,
}

const fn fixed(quantity: Quantity, kind: Kind, allowed: f64, reason: &'static str) -> Tolerance {
    Tolerance { quantity, kind, floor: allowed, factor: 0.0, slack: 0.0, bound: allowed, reason }
}

/// Twice the reference's own float32 error: both programs are that far from float64, in any direction.
const fn beside_float32(quantity: Quantity, bound: f64, reason: &'static str) -> Tolerance {
    Tolerance { quantity, kind: Kind::Float, floor: 1e-6, factor: 2.0, slack: 1e-6, bound, reason }
}

/// Bits of a significand: 24 in float32, 8 in bfloat16.
const FLOAT32_TO_BFLOAT16: f64 = 65_536.0;

const D: Kind = Kind::Double;
const F: Kind = Kind::Float;
const B: Kind = Kind::BFloat16;

pub const TABLE: [Tolerance; 75] = [
    fixed(Operation, D, 1e-13, "some hundred roundings of 1e-16"),
    fixed(Operation, F, 1e-5, "logits of 25 are rounded by 1e-6, and so are their exponentials"),
    fixed(Operation, B, 8e-3, "one rounding"),
    fixed(FlashBackward, D, 1e-13, "as any operation"),
    fixed(FlashBackward, F, 1e-5, "as any operation"),
    fixed(FlashBackward, B, 2e-2, "flash attention also rounds the probabilities and their gradients"),
    fixed(QuantizedProduct, D, 1e-14, "the same weights, other panels"),
    fixed(QuantizedProduct, F, 1e-6, "the same weights, other panels"),
    fixed(QuantizedProduct, B, 1e-2, "one rounding, of sums taken in another order"),
    fixed(Autograd, D, 1e-12, "a few operations, each within 1e-13"),
    fixed(FiniteDifference, D, 1e-6, "steps of 1e-6, whose squares the difference leaves out"),
    fixed(Reduction, D, 1e-12, "another order of a million terms, added in float64"),
    fixed(Reduction, F, 1e-6, "squares of float32 values, added in float64"),
    fixed(FusedUpdate, F, 1e-6, "libtorch's square root is not always the nearest"),
    fixed(FusedUpdateOnGpu, F, 1e-5, "products are contracted there; compared where all codes agree"),
    fixed(Logits, D, 1e-10, "two to three blocks, relative to the largest value or 1"),
    beside_float32(Logits, 5e-4, "own errors are 4e-6 to 3e-5 at logits up to 18"),
    fixed(Loss, D, 1e-10, "as logits"),
    beside_float32(Loss, 5e-5, "own errors are up to 1e-6 at losses about 10"),
    fixed(Loss, B, 1e-2, "a mean of tokens, whose errors cancel: 1e-3 in the reference's own bfloat16"),
    fixed(Gradient, D, 1e-10, "as logits"),
    beside_float32(Gradient, 1e-4, "own errors are 1e-6, 7e-6 for the bias of k"),
    Tolerance {
        quantity: Gradient,
        kind: B,
        floor: 0.1,
        factor: FLOAT32_TO_BFLOAT16,
        slack: 0.0,
        bound: 0.25,
        reason: "a few per cent in gradients of three blocks. A bias of k is ill-conditioned: softmax does not see what all \
                 keys share, so that its gradient is what is left of terms that cancel. Of 60 random models the reference's \
                 own bfloat16 was at most 0.11 off, and 0.93 of its float32 error times 2^16",
    },
    fixed(SingleReference, D, 2e-5, "the error of the reference"),
    fixed(SingleReference, F, 2e-5, "two errors of float32"),
    fixed(SingleGradient, D, 1e-5, "the error of the reference"),
    fixed(SingleGradient, F, 1e-5, "two errors of float32"),
    fixed(SingleHeadGradient, D, 2e-5, "the error of the reference"),
    fixed(SingleHeadGradient, F, 2e-5, "two errors of float32"),
    fixed(Scores, D, 1e-9, "log-probabilities of about 10, printed with all digits"),
    fixed(Scores, F, 5e-5, "twice the reference's own error of logits, up to 2.4e-5"),
    fixed(LossFunction, D, 1e-10, "the same formulas with other orders of operations"),
    fixed(LossFunction, F, 1e-5, "sums of some ten tokens of float32"),
    fixed(UnpairedLoss, D, 1e-12, "a few operations"),
    fixed(UnpairedLoss, F, 1e-5, "differences of sums of log-probabilities, rounded in float32"),
    fixed(UnpairedGradient, D, 2e-10, "twice the losses', through all blocks"),
    fixed(UnpairedGradient, F, 2e-5, "the same in float32"),
    fixed(KlEstimate, D, 1e-8, "a difference of sums of log-probabilities over rows"),
    fixed(KlEstimate, F, 1e-3, "the same in float32"),
    fixed(Float8Loss, B, 1e-2, "factors with 3 bits of mantissa, gradients with 2; sums cancel most of it"),
    fixed(PairLosses, D, 1e-9, "ten times their mean's"),
    fixed(PairLosses, F, 1e-4, "the same in float32"),
    fixed(Formula, D, 1e-14, "a few roundings of 1e-16"),
    fixed(TwoWays, D, 1e-12, "thousands of roundings of 1e-16"),
    fixed(SameModel, D, 1e-10, "products of other shapes through all blocks"),
    fixed(SameModel, B, 5e-2, "attention in another order of sums, rounded in every block"),
    fixed(AdamW, D, 1e-12, "ten steps"),
    fixed(AdamW, F, 1e-6, "ten steps, each rounded once or twice"),
    fixed(LearningRate, D, 1e-15, "a cosine and a product"),
    fixed(SameLosses, D, 1e-12, "sums of gradients in another order, through 20 updates"),
    fixed(SameLosses, F, 1e-5, "the same in float32"),
    fixed(MeshFirstLoss, D, 1e-12, "sums in another order"),
    fixed(MeshFirstLoss, F, 1e-6, "the same in float32"),
    fixed(MeshLosses, D, 1e-12, "as those of ranks"),
    fixed(MeshLosses, F, 1e-4, "AdamW follows the sign of gradients that are nearly nothing"),
    fixed(SameNorms, D, 1e-11, "ten times the losses'"),
    fixed(SameNorms, F, 1e-4, "ten times the losses'"),
    fixed(SameParameters, D, 1e-12, "as the losses"),
    fixed(SameParameters, F, 1e-4, "AdamW divides by square roots of small second moments"),
    fixed(
        SameMetrics,
        D,
        1e-9,
        "ratios, standard deviations and routes of experts, which magnify sums in another order",
    ),
    fixed(SameMetrics, F, 1e-4, "the same in float32, or with moments in 8 bits"),
    fixed(Sampler, D, 1e-9, "a token at a time with a cache against a batch"),
    fixed(Sampler, F, 1e-4, "the same in float32"),
    fixed(SameRewards, F, 1e-4, "rows in other batches, adapters merged or not"),
    fixed(
        NearRewards,
        F,
        1e-3,
        "weights rounded by a merge with a base in 8 bits, or moved by steps of 1e-9",
    ),
    fixed(Perplexity, F, 1e-5, "an adapter merged or not, in float32"),
    fixed(Merged, D, 1e-9, "the KL divergence from the adapter's model of a merge without rounding"),
    fixed(Merged, F, 1e-6, "weights of about 1 with a product added"),
    fixed(RoundedMean, F, 1e-8, "one rounding of weights of about 0.02"),
    fixed(MergedProduct, F, 1e-5, "products some ten times the weights"),
    fixed(StoredNorms, F, 1e-4, "a weight near 0 loses digits where 1 is added"),
    fixed(RoundedNorms, F, 1e-5, "a norm's weight plus 1 is rounded to 2^-24 of its size"),
    fixed(Converted, F, 1e-6, "one rounding, of a mean or a product"),
    fixed(Printed, D, 1e-9, "sums of values that are printed with all digits"),
    fixed(Printed, F, 1e-6, "7 digits"),
];

fn row(quantity: Quantity, kind: Kind) -> &'static Tolerance {
    let row = TABLE.iter().find(|row| row.quantity == quantity && row.kind == kind);
    row.unwrap_or_else(|| panic!("the table of tolerances has no {quantity:?} in {kind:?}"))
}

/// The allowed difference, of values whose tolerance does not follow the reference's own error.
#[track_caller]
pub fn allowed(quantity: Quantity, kind: Kind) -> f64 {
    let row = row(quantity, kind);
    assert!(
        row.factor == 0.0,
        "{quantity:?} in {kind:?} is relative to the reference's own error: use allowed_beside"
    );
    row.floor
}

/// The allowed difference where the reference's float32 result is `own` from its float64 result.
pub fn allowed_beside(quantity: Quantity, kind: Kind, own: f64) -> f64 {
    row(quantity, kind).at(own)
}

impl Tolerance {
    /// The allowed difference where the reference's own error is `own`.
    pub fn at(&self, own: f64) -> f64 {
        // A reference that is not finite bounds nothing, and gives no room either.
        let relative = if own.is_finite() { self.slack + self.factor * own } else { 0.0 };
        self.floor.max(relative).min(self.bound)
    }
}
