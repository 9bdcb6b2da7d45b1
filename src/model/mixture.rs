//! A mixture of experts (Jiang et al. 2024): every token goes to the k experts that its router prefers, whose outputs are
//! added with the router's probabilities, scaled to a sum of 1, as weights.
//!
//! ```text
//! p = softmax(router(x))          over all E experts
//! y = sum over the k largest p_e of  p_e / (sum of the k)  expert_e(x)
//! ```
//!
//! Pairs of a token and one of its experts are sorted by expert, so that each expert sees its tokens in one piece; the
//! outputs are put back in the tokens' order before they are added, so that the same input gives the same bits.

use kernels::comm::{Group, ReduceOp};
use kernels::ops::{self, GroupedWeights, WeightGrad};
use tch::{Kind, Tensor};

use crate::config::shape::Activation;
use crate::distributed::mesh::Axis;
use crate::error::{Error, Result};
use crate::model::linear::{Linear, LinearGrad};
use crate::model::mlp::{Dense, gated, gated_backward};

pub struct Mixture<L> {
    /// [E, C]
    pub router: L,
    pub experts: Vec<Dense<L>>,
    /// k: experts that a token goes to
    pub per_token: i64,
    /// Ranks that share every expert: each has some of its F.
    pub tensor: Axis,
}

/// Where the tokens of a forward went, and what the backward needs besides.
pub(super) struct Routed {
    /// The router's output T [N, E]
    pub(super) logits: Tensor,
    /// The chosen experts, best first, int64 [N, k]
    pub(super) experts: Tensor,
    /// Pairs (numbered token by token) in the order of their experts, and the place of each pair in there, int64 `[N k]`
    order: Tensor,
    place: Tensor,
    division: Division,
    /// The products of gate and up, T [pairs, 2F], of each expert or of all together; none where they are computed again
    pub(super) gate_up: Option<Vec<Tensor>>,
}

/// How the sorted pairs are divided among the experts.
enum Division {
    /// Pairs of each expert, which the host knows: products go expert by expert.
    Counts(Vec<i64>),
    /// Where each expert's pairs end, int32 `[E]`, which only the device knows: products are grouped, and the host does not wait.
    Ends(Tensor),
}

impl Routed {
    /// The tokens of the sorted pairs, int64 `[N k]`.
    fn tokens(&self) -> Tensor {
        self.order.divide_scalar_mode(self.experts.size()[1], "floor")
    }

    pub(super) fn probabilities(&self) -> Tensor {
        self.logits.softmax(-1, ops::accumulator(self.logits.kind()))
    }

    /// The weights of the chosen experts, A [N, k], and the sums that they were divided by, A [N, 1].
    fn weights(&self, probabilities: &Tensor) -> (Tensor, Tensor) {
        let chosen = probabilities.gather(1, &self.experts, false); // [N, k]
        let sum = chosen.sum_dim_intlist([1i64].as_slice(), true, None); // [N, 1]
        (chosen / &sum, sum)
    }

    /// Puts rows of sorted pairs (T [N k, C]) into the tokens' order and adds those of a token, with `weights`
    /// (A [N, k]) or without, to `start` (T [N, C]). Summed in A.
    fn add_pairs(&self, pairs: &Tensor, weights: Option<&Tensor>, start: Option<&Tensor>) -> Tensor {
        let (kind, a) = (pairs.kind(), ops::accumulator(pairs.kind()));
        let k = self.experts.size()[1];
        let pairs = pairs.index_select(0, &self.place).view([-1, k, pairs.size()[1]]).to_kind(a); // [N, k, C]
        let pairs = match weights {
            Some(w) => pairs * w.unsqueeze(-1),
            None => pairs,
        };
        let sum = pairs.sum_dim_intlist([1i64].as_slice(), false, None); // [N, C]
        match start {
            Some(start) => (sum + start).to_kind(kind),
            None => sum.to_kind(kind),
        }
    }
}

/// (expert, its first pair, its number of pairs)
fn pieces(counts: &[i64]) -> impl Iterator<Item = (usize, i64, i64)> {
    let first = |e: usize| counts[..e].iter().sum();
    counts.iter().enumerate().map(move |(e, n)| (e, first(e), *n))
}

/// All experts' weights, T [E, 2F, C] and [E, C, F].
struct GroupedExperts {
    gate_up: GroupedWeights,
    down: GroupedWeights,
    activation: Activation,
}

impl Mixture<Linear> {
    /// Routes x (T [N, C]), to `experts` (int64 [N, k]) where they are known from an earlier forward of it.
    pub(super) fn begin(&self, x: &Tensor, experts: Option<Tensor>) -> Result<Routed> {
        let logits = self.router.forward(x)?; // [N, E]
        let experts = match experts {
            Some(experts) => experts,
            None => logits.f_topk(self.per_token, -1, true, true)?.1,
        }; // [N, k]
        let flat = experts.view([-1]); // [N k]
        let order = flat.argsort_stable(true, 0, false); // [N k]
        let pairs = Tensor::arange(flat.size()[0], (Kind::Int64, flat.device())); // [N k]
        let place = order.empty_like().scatter(0, &order, &pairs); // [N k], the inverse of `order`
        let division = match self.grouped() {
            Some(_) => {
                let numbers = Tensor::arange(self.experts.len() as i64, (Kind::Int64, flat.device())); // [E]
                let sorted = flat.index_select(0, &order); // [N k]
                Division::Ends(numbers.f_searchsorted(&sorted, true, true, "right", None::<Tensor>)?)
            }
            None => {
                let counts = flat.bincount::<Tensor>(None, self.experts.len() as i64); // [E]
                Division::Counts(Vec::try_from(counts)?) // host sync
            }
        };
        let mut routed = Routed { logits, experts, order, place, division, gate_up: None };
        routed.gate_up = Some(self.gate_up(&x.index_select(0, &routed.tokens()), &routed)?);
        Ok(routed)
    }

    /// The experts' weights together, where their products can be grouped.
    fn grouped(&self) -> Option<GroupedExperts> {
        let all = |of: fn(&Dense<Linear>) -> &Linear| {
            let weights: Option<Vec<&Tensor>> = self.experts.iter().map(|e| of(e).plain_weight()).collect();
            GroupedWeights::of(&weights?)
        };
        let activation = self.experts.first()?.activation;
        Some(GroupedExperts { gate_up: all(|e| &e.gate_up)?, down: all(|e| &e.down)?, activation })
    }

    /// The experts' products of gate and up, T [pairs, 2F] each, or all in one, for the sorted pairs, T [N k, C].
    fn gate_up(&self, pairs: &Tensor, routed: &Routed) -> Result<Vec<Tensor>> {
        let product =
            |(e, first, n): (usize, i64, i64)| self.experts[e].gate_up.forward(&pairs.narrow(0, first, n));
        match (&routed.division, self.grouped()) {
            (Division::Counts(counts), _) => pieces(counts).map(product).collect(),
            (Division::Ends(ends), Some(all)) => Ok(vec![all.gate_up.linear(pairs, ends)?]),
            (Division::Ends(_), None) => Err(Error::failed("experts' weights lie apart now")),
        }
    }

    /// The output, T [N, C], plus a residual.
    pub(super) fn finish(&self, routed: &Routed, residual: Option<&Tensor>) -> Result<Tensor> {
        let gate_up = routed.gate_up.as_ref().expect("begin() made it");
        let mut outputs = Vec::with_capacity(gate_up.len());
        if let (Division::Ends(ends), Some(all)) = (&routed.division, self.grouped()) {
            outputs.push(all.down.linear(&gated(&gate_up[0], all.activation)?, ends)?); // [N k, C]
        } else {
            for (expert, gate_up) in self.experts.iter().zip(gate_up) {
                if gate_up.size()[0] > 0 {
                    outputs.push(expert.down.forward(&gated(gate_up, expert.activation)?)?); // [pairs, C]
                }
            }
        }
        let (weights, _) = routed.weights(&routed.probabilities()); // [N, k]
        Ok(routed.add_pairs(&Tensor::cat(&outputs, 0), Some(&weights), residual))
    }

    /// See [`crate::model::mlp::Mlp::backward`]. For a token's experts i of probabilities p_i, s their sum:
    ///
    /// ```text
    /// y = sum_i w_i e_i,  w_i = p_i / s      de_i = w_i dy,  dw_i = dy . e_i = (dy Wd_i) . a_i,  for e_i = a_i Wd_i^T
    /// p = softmax(logits)                    dp_i = (dw_i - sum_j dw_j w_j) / s, 0 of the other experts
    ///                                        dlogits = p (dp - sum_e dp_e p_e)
    /// ```
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        mut routed: Routed,
        grad: &Mixture<LinearGrad>,
        balance: Option<&Tensor>,
    ) -> Result<Tensor> {
        let kind = dy.kind();
        let probabilities = routed.probabilities(); // [N, E]
        let (weights, sums) = routed.weights(&probabilities); // [N, k], [N, 1]
        let tokens = routed.tokens(); // [N k]
        let (x_pairs, dy_pairs) = (x.index_select(0, &tokens), dy.index_select(0, &tokens)); // [N k, C]
        let w_pairs = weights.view([-1]).index_select(0, &routed.order).unsqueeze(-1); // [N k, 1]
        let gate_up = match routed.gate_up.take() {
            Some(gate_up) => gate_up,
            None => self.gate_up(&x_pairs, &routed)?,
        }; // [n, 2F] for each expert's n pairs

        let sorted = SortedPairs { x: x_pairs, dy: dy_pairs, w: w_pairs };
        let (dweights, dx_pairs) = match (&routed.division, self.grouped()) {
            (Division::Ends(ends), Some(all)) => all.backward(&sorted, gate_up, ends, grad)?,
            (Division::Counts(counts), _) => self.experts_backward(&sorted, gate_up, counts, grad)?,
            (Division::Ends(_), None) => return Err(Error::failed("experts' weights lie apart now")),
        };
        let dx = routed.add_pairs(&dx_pairs, None, None); // [N, C]
        // Each rank has seen a part of what every expert gives.
        self.tensor.group.all_reduce(&dweights, ReduceOp::Sum)?.wait()?; // collective; [N k]

        // Through the router: w_i = p_i / sum of the chosen p, and the softmax.
        let dweights = dweights.index_select(0, &routed.place).view_as(&weights); // [N, k]
        let total = |t: Tensor| t.sum_dim_intlist([1i64].as_slice(), true, None); // [N, 1]
        let dchosen = (&dweights - total(&dweights * &weights)) / sums; // [N, k]
        let mut dp = probabilities.zeros_like().scatter(1, &routed.experts, &dchosen); // [N, E]
        if let Some(balance) = balance {
            dp += balance;
        }
        let dlogits = &probabilities * (&dp - total(&dp * &probabilities)); // [N, E]
        let drouter = self.router.backward(&dlogits.to_kind(kind), x, &grad.router)?; // [N, C]
        // Parts of a sum: the router is whole on every rank.
        Ok(if self.tensor.rank == 0 { dx + drouter } else { dx })
    }

    /// Through the experts, one by one: the gradients of the weights that their outputs are added with, A `[N k]`, and of the pairs'
    /// inputs, T [N k, C].
    fn experts_backward(
        &self,
        pairs: &SortedPairs,
        gate_up: Vec<Tensor>,
        counts: &[i64],
        grad: &Mixture<LinearGrad>,
    ) -> Result<(Tensor, Tensor)> {
        let (kind, a) = (pairs.dy.kind(), ops::accumulator(pairs.dy.kind()));
        let mut dweights = Vec::new();
        let mut dx_pairs = Vec::new();
        for ((e, first, n), gate_up) in pieces(counts).zip(gate_up) {
            let (expert, grad) = (&self.experts[e], &grad.experts[e]);
            let part = |t: &Tensor| t.narrow(0, first, n);
            let (x, dy, w) = (part(&pairs.x), part(&pairs.dy), part(&pairs.w)); // [n, C], [n, C], [n, 1]
            let weighted = (&dy * &w).to_kind(kind); // [n, C]
            if n == 0 {
                // No token came here: the gradients are zero, and may not have begun.
                expert.gate_up.backward_weight(&gate_up, &x, &grad.gate_up)?;
                expert.down.backward_weight(&weighted, &gate_up, &grad.down)?;
                continue;
            }
            let da = expert.down.backward_input(&dy)?; // [n, F], without the weight
            let product = da.to_kind(a) * gated(&gate_up, expert.activation)?; // [n, F]
            dweights.push(product.sum_dim_intlist([1i64].as_slice(), false, None)); // [n]
            let da = (da * w).to_kind(kind); // [n, F]
            gated_backward(&gate_up, &da, expert.activation)?;
            let (dgate_up, a) = (gate_up, da); // [n, 2F], [n, F], in the same memory
            expert.down.backward_weight(&weighted, &a, &grad.down)?;
            dx_pairs.push(expert.gate_up.backward(&dgate_up, &x, &grad.gate_up)?);
        }
        Ok((Tensor::cat(&dweights, 0), Tensor::cat(&dx_pairs, 0)))
    }
}

/// In the order of their experts: inputs and output gradients, T [N k, C], and the weights that outputs are added with, A [N k, 1].
struct SortedPairs {
    x: Tensor,
    dy: Tensor,
    w: Tensor,
}

impl GroupedExperts {
    /// [`Mixture::experts_backward`], of all experts together.
    fn backward(
        &self,
        pairs: &SortedPairs,
        gate_up: Vec<Tensor>,
        ends: &Tensor,
        grad: &Mixture<LinearGrad>,
    ) -> Result<(Tensor, Tensor)> {
        let (kind, a) = (pairs.dy.kind(), ops::accumulator(pairs.dy.kind()));
        let gate_up = &gate_up[0]; // [N k, 2F]
        let weighted = (&pairs.dy * &pairs.w).to_kind(kind); // [N k, C]
        let da = self.down.linear_backward(&pairs.dy, ends)?; // [N k, F], without the weight
        let product = da.to_kind(a) * gated(gate_up, self.activation)?; // [N k, F]
        let dweights = product.sum_dim_intlist([1i64].as_slice(), false, None); // [N k]
        let da = (da * &pairs.w).to_kind(kind); // [N k, F]
        gated_backward(gate_up, &da, self.activation)?;
        let (dgate_up, a) = (gate_up, da); // [N k, 2F], [N k, F], in the same memory
        let sums = |of: fn(&Dense<LinearGrad>) -> &LinearGrad| {
            grad.experts.iter().map(|e| of(e).plain_weight()).collect::<Option<Vec<&WeightGrad>>>()
        };
        if let Some(sums) = sums(|e| &e.down) {
            ops::add_grouped_products(&sums, &weighted, &a, ends)?;
        }
        if let Some(sums) = sums(|e| &e.gate_up) {
            ops::add_grouped_products(&sums, dgate_up, &pairs.x, ends)?;
        }
        Ok((dweights, self.gate_up.linear_backward(dgate_up, ends)?))
    }
}

/// The load-balancing loss of Switch Transformers (Fedus et al. 2022, eq. 4 to 6) over all blocks together, as
/// transformers' `load_balancing_loss_func` has it:
///
/// loss = E sum_e f_e P_e
///
/// f_e is the number of tokens that expert e got, P_e the sum of its probabilities, both over all blocks, divided by the
/// tokens of all blocks. Padding does not count.
pub(super) struct Balance {
    /// A `[E]`, sums over the blocks so far
    assigned: Tensor,
    probability: Tensor,
    /// Tokens of a block, and of all blocks so far
    tokens: f64,
    rows: f64,
    /// A [N, 1], 1 = real, 0 = padding; none: all real
    mask: Option<Tensor>,
    /// What each router's probabilities get in the backward: A `[E]` for a real token
    gradient: Option<Tensor>,
    sharing: Group,
}

impl Balance {
    /// Over no block yet, of tokens `ids` (`[N]`) and activations in T, `kind`. `mask`: int64 `[N]`, 1 = real; none: all are.
    /// `sharing`: the ranks that have the other tokens of the same rows.
    pub(super) fn new(
        num_experts: i64,
        ids: &Tensor,
        kind: Kind,
        mask: Option<&Tensor>,
        sharing: Group,
    ) -> Balance {
        let (a, device) = (ops::accumulator(kind), ids.device());
        let zeros = || Tensor::zeros([num_experts], (a, device));
        let tokens = match mask {
            Some(mask) => mask.sum(Kind::Int64).int64_value(&[]), // host sync, if it lies on a GPU
            None => ids.size()[0],
        } as f64;
        let mask = mask.map(|m| m.to_device(device).to_kind(a).view([-1, 1]));
        Balance { assigned: zeros(), probability: zeros(), tokens, rows: 0.0, mask, gradient: None, sharing }
    }

    /// Counts a block.
    pub(super) fn add(&mut self, routed: &Routed) {
        let masked = |t: Tensor| match &self.mask {
            Some(mask) => t * mask,
            None => t,
        };
        let probabilities = routed.probabilities(); // [N, E]
        let chosen = probabilities.zeros_like().scatter_value(1, &routed.experts, 1.0); // [N, E]
        let sum = |t: Tensor| masked(t).sum_dim_intlist([0i64].as_slice(), false, None); // [E]
        let (assigned, probability) = (sum(chosen), sum(probabilities));
        self.rows += self.tokens;
        // New tensors: the sums before may be on their way to another stage.
        self.assigned = &self.assigned + assigned;
        self.probability = &self.probability + probability;
    }

    /// The sums over the blocks so far, A [2 E]: what the next stage of a pipeline goes on with.
    pub(super) fn sums(&self) -> Result<Tensor> {
        Ok(Tensor::f_cat(&[&self.assigned, &self.probability], 0)?)
    }

    /// Goes on with the sums of the stages before, over so many blocks.
    pub(super) fn continue_from(&mut self, sums: &Tensor, blocks: usize) {
        self.set_sums(sums);
        self.rows = self.tokens * blocks as f64;
    }

    fn set_sums(&mut self, sums: &Tensor) {
        let experts = self.assigned.size()[0];
        (self.assigned, self.probability) = (sums.narrow(0, 0, experts), sums.narrow(0, experts, experts));
    }

    /// The loss over the blocks that were counted. From here on the backward differentiates `weight` times it, too; the
    /// numbers of tokens are constants there: d loss / dp = E f_e / (tokens of all blocks) for every real token.
    /// Collective over the ranks that share the sequences.
    pub(super) fn loss(&mut self, weight: f64) -> Result<Tensor> {
        if self.sharing.size() > 1 {
            let rows = Tensor::full([1], self.rows, (self.assigned.kind(), self.assigned.device()));
            let all = Tensor::f_cat(&[self.sums()?, rows], 0)?; // [2 E + 1]
            self.sharing.all_reduce(&all, ReduceOp::Sum)?.wait()?; // collective
            self.set_sums(&all);
            self.rows = all.double_value(&[2 * self.assigned.size()[0]]); // host sync
        }
        let experts = self.assigned.size()[0] as f64;
        let scale = experts / (self.rows * self.rows).max(1.0);
        self.gradient = Some(&self.assigned * (weight * scale)); // [E]
        Ok((&self.assigned * &self.probability).sum(Kind::Double) * scale)
    }

    /// What each router's probabilities get in the backward, A `[E]`: of all stages the last one knows it.
    pub(super) fn router_gradient(&self) -> Option<&Tensor> {
        self.gradient.as_ref()
    }

    /// Sets [`Balance::router_gradient`] to what the next stage has said.
    pub(super) fn set_router_gradient(&mut self, gradient: Tensor) {
        self.gradient = Some(gradient);
    }

    /// The gradient of the probabilities of one block's router, A [N, E] or broadcast to it.
    pub(super) fn gradient(&self) -> Option<Tensor> {
        let gradient = self.gradient.as_ref()?.unsqueeze(0); // [1, E]
        Some(match &self.mask {
            Some(mask) => mask * gradient,
            None => gradient,
        })
    }
}
