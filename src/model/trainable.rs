//! What of a model is trained, and how the rest is kept: the sections `freeze` and `lora` applied to the names of its
//! tensors.

use kernels::quant::Scheme;
use serde::{Deserialize, Serialize};

use crate::config::shape::{Head, Shape};
use crate::config::trainable::{BaseFormat, Freeze, Lora, Targets};
use crate::distributed::frozen::Storage;
use crate::distributed::plan::{AdapterPlan, GroupPlan, OnStage, Role};
use crate::distributed::sharded::{Layout, TensorSpec};
use crate::error::{Error, Result};
use crate::model::layout::{EMBEDDING, LM_HEAD, SCORE, layouts};

/// What is trained. By default all.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trainable {
    /// The section `freeze`: tensors that are not trained.
    #[serde(with = "crate::config::json")]
    pub freeze: Freeze,
    /// The section `lora`: adapters, and what becomes of the weights below them; none: no adapters.
    #[serde(with = "crate::config::json")]
    pub lora: Option<Lora>,
    /// The blocks that have adapters, by number; none: all that are not frozen.
    #[serde(default)]
    pub layers: Option<Vec<i64>>,
}

/// A block's linear layers, but for a mixture's router.
fn is_linear(spec: &TensorSpec) -> bool {
    spec.shape.len() == 2
        && spec.name.starts_with("model.layers.")
        && !spec.name.ends_with("block_sparse_moe.gate.weight")
}

/// `model.layers.0.mlp.up_proj` of `model.layers.0.mlp.up_proj.weight`.
pub fn module(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}

/// The last part of a module's name.
pub fn last_part(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

impl Lora {
    /// What B A is multiplied by.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha() / if self.rslora { rank.sqrt() } else { rank }
    }

    /// Whether a linear layer has an adapter: its name ends in one of the targets.
    fn targets(&self, module: &str) -> bool {
        match &self.targets {
            Targets::AllLinear => true,
            Targets::Attention => ["q_proj", "k_proj", "v_proj", "o_proj"].contains(&last_part(module)),
            Targets::Names(names) => names.iter().any(|name| ends_with(module, name)),
        }
    }
}

/// Whether the last parts of a dotted name are `end`.
fn ends_with(name: &str, end: &str) -> bool {
    name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Whether `pattern` occurs in a dotted name, as whole parts; `*` stands for anything.
fn occurs(pattern: &str, name: &str) -> bool {
    fn matches(pattern: &[u8], name: &[u8]) -> bool {
        match pattern.split_first() {
            None => name.is_empty() || name[0] == b'.',
            Some((b'*', rest)) => (0..=name.len()).any(|i| matches(rest, &name[i..])),
            Some((c, rest)) => name.first() == Some(c) && matches(rest, &name[1..]),
        }
    }
    let starts = std::iter::once(0).chain(name.match_indices('.').map(|(i, _)| i + 1));
    starts.into_iter().any(|i| matches(pattern.as_bytes(), &name.as_bytes()[i..]))
}

impl Trainable {
    /// As the sections say, with adapters in all blocks that they name.
    pub fn new(freeze: &Freeze, lora: Option<&Lora>) -> Trainable {
        Trainable { freeze: freeze.clone(), lora: lora.cloned(), layers: None }
    }

    /// As the sections say, of a model with this head. A scalar head is always trained: where it is new it is 0 or random,
    /// and with a head of 0 no gradient reaches what is below it.
    pub fn with_head(head: Head, freeze: &Freeze, lora: Option<&Lora>) -> Trainable {
        let mut trainable = Trainable::new(freeze, lora);
        let score = module(SCORE).to_string();
        if head == Head::Score {
            if !trainable.freeze.train_only.is_empty() {
                trainable.freeze.train_only.push(score.clone());
            }
            let saved = trainable.lora.as_mut().map(|l| &mut l.modules_to_save);
            if let Some(saved) = saved.filter(|saved| !saved.contains(&score)) {
                saved.push(score);
            }
        }
        trainable
    }

    /// Forgets targets, modules and blocks that a model of this shape does not have, as long as others are left; returns
    /// their names.
    pub fn forget_missing(&mut self, shape: &Shape) -> Vec<String> {
        let layouts = layouts(shape);
        let specs = || layouts.iter().flat_map(|l| &l.specs);
        let has = |linear: bool, name: &str| {
            specs().any(|s| (!linear || is_linear(s)) && ends_with(module(&s.name), name))
        };
        let mut forgotten = Vec::new();
        let mut forget = |names: &mut Vec<String>, there: &dyn Fn(&str) -> bool| {
            forgotten.extend(names.iter().filter(|name| !there(name)).cloned());
            names.retain(|name| there(name));
        };
        if let Some(lora) = &mut self.lora {
            if let Targets::Names(names) = &mut lora.targets
                && names.iter().any(|name| has(true, name))
            {
                forget(names, &|name| has(true, name));
            }
            // A tied head is there, under another name.
            forget(&mut lora.modules_to_save, &|name| ends_with(module(LM_HEAD), name) || has(false, name));
        }
        let there = |layer: &i64| (0..shape.num_hidden_layers).contains(layer);
        if let Some(layers) = self.layers.as_mut().filter(|layers| layers.iter().any(there)) {
            forgotten.extend(layers.iter().filter(|l| !there(l)).map(|l| format!("layer {l}")));
            layers.retain(there);
        }
        forgotten
    }

    /// How the parameters of a model are laid out for training.
    ///
    /// # Errors
    /// Of kind Config: names and numbers that the model does not have, nothing that would be trained.
    pub fn plans(&self, shape: &Shape) -> Result<Vec<GroupPlan>> {
        let layouts = layouts(shape);
        self.check(shape, &layouts)?;
        let plans: Vec<GroupPlan> =
            layouts.into_iter().map(|layout| self.plan(layout, shape, Role::Trained)).collect();
        let trained = |p: &GroupPlan| p.roles.contains(&Role::Trained) || !p.adapters.is_empty();
        match plans.iter().any(trained) {
            true => Ok(plans),
            false => Err(Error::key("freeze", "it leaves no trainable parameters")),
        }
    }

    /// How the parameters of a model are laid out where nothing is trained; its adapters act.
    pub fn plans_for_inference(&self, shape: &Shape) -> Result<Vec<GroupPlan>> {
        let layouts = layouts(shape);
        self.check(shape, &layouts)?;
        let frozen = Role::Frozen(Storage::Dense);
        Ok(layouts.into_iter().map(|layout| self.plan(layout, shape, frozen)).collect())
    }

    /// `trained` is the role of what is trained.
    fn plan(&self, layout: Layout, shape: &Shape, trained: Role) -> GroupPlan {
        let roles = layout.specs.iter().map(|spec| {
            if self.trains(spec) {
                return trained;
            }
            let base = self.lora.as_ref().map_or(BaseFormat::None, |l| l.base);
            Role::Frozen(match base {
                BaseFormat::Int8 if is_linear(spec) => Storage::Quantized(Scheme::Int8),
                BaseFormat::Nf4 if is_linear(spec) => Storage::Quantized(Scheme::Nf4Double),
                _ => Storage::Dense,
            })
        });
        let roles = roles.collect();
        let mut adapters = Vec::new();
        if let Some(lora) = &self.lora {
            for (target, spec) in layout.specs.iter().enumerate() {
                if is_linear(spec)
                    && self.adapts_block(block_of(&spec.name), shape)
                    && lora.targets(module(&spec.name))
                {
                    let (rank, scale) = (lora.rank, lora.scale());
                    adapters.push(AdapterPlan { target, rank, scale, dropout: lora.dropout, role: trained });
                }
            }
        }
        GroupPlan { layout, roles, adapters, stage: OnStage::only() }
    }

    /// Whether a tensor of the model's is trained itself.
    fn trains(&self, spec: &TensorSpec) -> bool {
        if let Some(lora) = &self.lora {
            return lora.modules_to_save.iter().any(|m| ends_with(module(&spec.name), m));
        }
        let freeze = &self.freeze;
        let frozen = (freeze.embeddings && spec.name == EMBEDDING)
            || block_of(&spec.name).is_some_and(|block| block < freeze.blocks as i64);
        !frozen && (freeze.train_only.is_empty() || freeze.train_only.iter().any(|p| occurs(p, &spec.name)))
    }

    fn adapts_block(&self, block: Option<i64>, shape: &Shape) -> bool {
        block.is_some_and(|block| match &self.layers {
            Some(layers) => layers.contains(&block),
            None => (self.freeze.blocks as i64..shape.num_hidden_layers).contains(&block),
        })
    }

    /// The blocks that have adapters, where those are not all.
    pub fn adapted_layers(&self, shape: &Shape) -> Option<Vec<i64>> {
        let all = 0..shape.num_hidden_layers;
        let adapted: Vec<i64> = all.clone().filter(|b| self.adapts_block(Some(*b), shape)).collect();
        (adapted.len() as i64 != shape.num_hidden_layers).then_some(adapted)
    }

    fn check(&self, shape: &Shape, layouts: &[Layout]) -> Result<()> {
        let specs = || layouts.iter().flat_map(|l| &l.specs);
        if self.freeze.blocks as i64 > shape.num_hidden_layers {
            return Err(Error::key(
                "freeze.blocks",
                format!(
                    "{} are more than the model's {} blocks",
                    self.freeze.blocks, shape.num_hidden_layers
                ),
            ));
        }
        for pattern in &self.freeze.train_only {
            if !specs().any(|s| occurs(pattern, &s.name)) {
                let parts = specs().map(|s| last_part(module(&s.name)));
                return Err(unknown("freeze.train_only", pattern, "tensor", parts));
            }
        }
        let Some(lora) = &self.lora else { return Ok(()) };
        let linears = || specs().filter(|s| is_linear(s)).map(|s| module(&s.name));
        if let Targets::Names(names) = &lora.targets {
            for name in names {
                if !linears().any(|module| ends_with(module, name)) {
                    return Err(unknown("lora.targets", name, "linear layer", linears().map(last_part)));
                }
            }
        }
        for name in &lora.modules_to_save {
            if shape.tie_word_embeddings && ends_with(module(LM_HEAD), name) {
                return Err(Error::key(
                    "lora.modules_to_save",
                    "the model's head is its embedding; name embed_tokens",
                ));
            }
            let saved = || specs().map(|s| module(&s.name)).filter(|m| !linears().any(|l| l == *m));
            if !saved().any(|module| ends_with(module, name)) {
                return Err(unknown("lora.modules_to_save", name, "module", saved().map(last_part)));
            }
        }
        if let Some(layer) = self.layers.iter().flatten().find(|l| !(0..shape.num_hidden_layers).contains(l))
        {
            return Err(Error::config(format!(
                "the adapter is for block {layer}, and the model has {}",
                shape.num_hidden_layers
            )));
        }
        let on_experts = linears().any(|m| m.contains(".experts.") && lora.targets(m));
        if lora.dropout > 0.0 && on_experts {
            return Err(Error::key(
                "lora.dropout",
                "adapters of experts have no dropout; set it to 0, or take targets: attention",
            ));
        }
        Ok(())
    }
}

/// The number of the block that a tensor belongs to.
fn block_of(name: &str) -> Option<i64> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// A name that is not there, with those that are.
fn unknown<'a>(key: &str, name: &str, what: &str, known: impl Iterator<Item = &'a str>) -> Error {
    let mut names: Vec<&str> = Vec::new();
    for part in known {
        if !names.contains(&part) {
            names.push(part);
        }
    }
    Error::key(key, format!("the model has no {what} '{name}'; it has {}", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_whole_parts_of_names() {
        let name = "model.layers.13.self_attn.q_proj.weight";
        for yes in
            ["q_proj", "layers.13", "self_attn", "model", "weight", "*_proj", "layers.*.q_proj", "1*", name]
        {
            assert!(occurs(yes, name), "{yes}");
        }
        for no in ["q_pro", "proj", "layers.1", "layers.3", "attn", "q_proj.bias", ""] {
            assert!(!occurs(no, name), "{no}");
        }
    }

    fn lora(targets: Targets) -> Lora {
        Lora {
            rank: 4,
            alpha: Some(8.0),
            dropout: 0.0,
            targets,
            rslora: false,
            modules_to_save: Vec::new(),
            base: BaseFormat::None,
        }
    }

    fn shape() -> Shape {
        let mut shape = Shape::preset("llama-15m").unwrap();
        shape.num_hidden_layers = 3;
        shape
    }

    #[test]
    fn roles_and_adapters_follow_the_sections() {
        let shape = shape();
        let freeze = Freeze { blocks: 1, embeddings: true, train_only: vec!["v_proj".into(), "norm".into()] };
        let plans = Trainable::new(&freeze, None).plans(&shape).unwrap();
        let trained: Vec<&str> = plans
            .iter()
            .flat_map(|p| p.layout.specs.iter().zip(&p.roles))
            .filter(|(_, role)| **role == Role::Trained)
            .map(|(spec, _)| spec.name.as_str())
            .collect();
        let v = |i| format!("model.layers.{i}.self_attn.v_proj.weight");
        assert_eq!(trained, [v(1).as_str(), v(2).as_str(), "model.norm.weight"]);

        let quantized = Lora {
            base: BaseFormat::Nf4,
            modules_to_save: vec!["embed_tokens".into()],
            ..lora(Targets::Attention)
        };
        let only_last = Freeze { blocks: 2, ..Freeze::default() };
        let t = Trainable::new(&only_last, Some(&quantized));
        let plans = t.plans(&shape).unwrap();
        assert_eq!(plans[0].roles, [Role::Trained]);
        let nf4 = Role::Frozen(Storage::Quantized(Scheme::Nf4Double));
        assert!(plans[1].adapters.is_empty() && plans[1].roles[..7].iter().all(|r| *r == nf4));
        assert_eq!(plans[1].roles[7], Role::Frozen(Storage::Dense));
        let adapted: Vec<usize> = plans[3].adapters.iter().map(|a| a.target).collect();
        assert_eq!(adapted, [0, 1, 2, 3]);
        assert_eq!(plans[3].adapters[0].scale, 2.0);
        assert_eq!(t.adapted_layers(&shape), Some(vec![2]));
        let still = t.plans_for_inference(&shape).unwrap();
        assert!(still.iter().all(|p| !p.roles.contains(&Role::Trained)));
        assert_eq!(still[3].adapters[0].role, Role::Frozen(Storage::Dense));
        let rslora = Lora { rslora: true, ..lora(Targets::AllLinear) };
        assert_eq!(rslora.scale(), 4.0);
    }

    #[test]
    fn what_a_model_does_not_have_is_forgotten() {
        let mut lora = lora(Targets::Names(["q_proj", "c_attn", "lm_head"].map(String::from).to_vec()));
        lora.modules_to_save = vec!["embed_tokens".into(), "wte".into()];
        let layers = Some(vec![0, 2, 30]);
        let mut t = Trainable { layers, ..Trainable::new(&Freeze::default(), Some(&lora)) };
        assert_eq!(t.forget_missing(&shape()), ["c_attn", "lm_head", "wte", "layer 30"]);
        let left = t.lora.as_ref().unwrap();
        assert_eq!(
            (&left.targets, &left.modules_to_save),
            (&Targets::Names(vec!["q_proj".into()]), &vec!["embed_tokens".to_string()],)
        );
        assert_eq!(t.layers, Some(vec![0, 2]));
        assert!(t.forget_missing(&shape()).is_empty());
        // Where nothing would be left, what is wrong is told.
        lora.targets = Targets::Names(vec!["c_attn".into()]);
        let mut t = Trainable::new(&Freeze::default(), Some(&lora));
        t.forget_missing(&shape());
        assert!(t.plans(&shape()).unwrap_err().message.contains("no linear layer 'c_attn'"));
    }

    #[test]
    fn a_scalar_head_is_always_trained() {
        let shape = shape().scored();
        let freeze = Freeze { blocks: 2, embeddings: true, train_only: vec!["q_proj".into()] };
        let blocks = Freeze { train_only: Vec::new(), ..freeze.clone() };
        let lora = lora(Targets::Attention);
        let saved = Lora { modules_to_save: vec!["score".into()], ..lora.clone() };
        for (freeze, lora) in
            [(&freeze, None), (&blocks, None), (&blocks, Some(&lora)), (&Freeze::default(), Some(&saved))]
        {
            let trainable = Trainable::with_head(Head::Score, freeze, lora);
            let plans = trainable.plans(&shape).unwrap();
            assert_eq!(plans.last().unwrap().roles, [Role::Trained], "{freeze:?} {lora:?}");
            let once = |names: &Vec<String>| names.iter().filter(|n| *n == "score").count() <= 1;
            assert!(trainable.lora.is_none_or(|l| once(&l.modules_to_save)));
        }
        let as_said = Trainable::with_head(Head::Lm, &freeze, Some(&lora));
        assert_eq!(as_said, Trainable::new(&freeze, Some(&lora)));
    }

    #[test]
    fn what_the_model_does_not_have_is_refused() {
        let mut shape = shape();
        let refused = |t: Trainable, why: &str| {
            let e = t.plans(&shape).unwrap_err();
            assert!(e.to_string().contains(why) && e.exit_code() == 2, "{e}");
        };
        let freeze = |blocks, train_only: &[&str]| Freeze {
            blocks,
            embeddings: true,
            train_only: train_only.iter().map(|s| s.to_string()).collect(),
        };
        refused(Trainable::new(&freeze(4, &[]), None), "4 are more than the model's 3 blocks");
        refused(
            Trainable::new(&freeze(0, &["qproj"]), None),
            "no tensor 'qproj'; it has embed_tokens, q_proj, k_proj",
        );
        refused(Trainable::new(&freeze(3, &["q_proj"]), None), "no trainable parameters");
        let names = |n: &str| Some(lora(Targets::Names(vec![n.into()])));
        refused(
            Trainable::new(&Freeze::default(), names("lm_head").as_ref()),
            "no linear layer 'lm_head'; it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        );
        let save = Lora { modules_to_save: vec!["q_proj".into()], ..lora(Targets::AllLinear) };
        refused(
            Trainable::new(&Freeze::default(), Some(&save)),
            "no module 'q_proj'; it has embed_tokens, input_layernorm",
        );
        let only = Trainable {
            layers: Some(vec![7]),
            ..Trainable::new(&Freeze::default(), names("q_proj").as_ref())
        };
        refused(only, "for block 7, and the model has 3");
        shape.tie_word_embeddings = true;
        let head = Lora { modules_to_save: vec!["lm_head".into()], ..lora(Targets::AllLinear) };
        let e = Trainable::new(&Freeze::default(), Some(&head)).plans(&shape).unwrap_err();
        assert!(e.message.contains("name embed_tokens"), "{e}");
    }
}
