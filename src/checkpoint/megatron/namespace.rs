//! The arguments of a training, as Megatron's loaders ask for them.

use tch::Kind;

use super::WRITTEN_ITERATION;
use super::write::MegatronPlan;
use crate::checkpoint::pickle::Pickled;
use crate::config::shape::QkNorm;

/// The `args` of a model, an `argparse.Namespace`: what Megatron's converters, its loaders and a training that goes on from the
/// checkpoint read.
pub(super) fn namespace(plan: &MegatronPlan) -> Pickled {
    let fields = [sizes(plan), mathematics(plan), mixture(plan), training(plan)].concat();
    Pickled::Object("argparse", "Namespace", Box::new(Pickled::dict(fields)))
}

type NamespaceFields = Vec<(&'static str, Pickled)>;

fn sizes(plan: &MegatronPlan) -> NamespaceFields {
    use Pickled::Integer;
    let (s, form) = (&plan.shape, plan.form);
    // Without padding, a number that gives the same rows.
    let multiple = form.vocab_multiple.unwrap_or(s.vocab_size / form.tensor);
    vec![
        ("num_layers", Integer(s.num_hidden_layers)),
        ("encoder_num_layers", Integer(s.num_hidden_layers)),
        ("hidden_size", Integer(s.hidden_size)),
        ("ffn_hidden_size", Integer(s.intermediate_size)),
        ("num_attention_heads", Integer(s.num_attention_heads)),
        ("group_query_attention", Pickled::Truth(s.num_key_value_heads != s.num_attention_heads)),
        ("num_query_groups", Integer(s.num_key_value_heads)),
        ("kv_channels", Integer(s.head_dim)),
        ("seq_length", Integer(s.max_position_embeddings)),
        ("encoder_seq_length", Integer(s.max_position_embeddings)),
        ("max_position_embeddings", Integer(s.max_position_embeddings)),
        ("vocab_size", Integer(s.vocab_size)),
        ("padded_vocab_size", Integer(plan.padded_rows)),
        ("make_vocab_size_divisible_by", Integer(multiple)),
        ("tensor_model_parallel_size", Integer(form.tensor)),
        ("pipeline_model_parallel_size", Integer(form.pipeline)),
        ("virtual_pipeline_model_parallel_size", Pickled::None),
        ("num_layers_per_virtual_pipeline_stage", Pickled::None),
        ("context_parallel_size", Integer(1)),
        ("expert_model_parallel_size", Integer(1)),
        ("expert_tensor_parallel_size", Integer(form.tensor)),
        ("world_size", Integer(form.tensor * form.pipeline)),
        ("data_parallel_size", Integer(1)),
    ]
}

fn mathematics(plan: &MegatronPlan) -> NamespaceFields {
    use Pickled::{Number, Truth};
    let s = &plan.shape;
    let mut fields = vec![
        ("position_embedding_type", Pickled::text("rope")),
        ("use_rotary_position_embeddings", Truth(true)),
        ("add_position_embedding", Truth(false)),
        ("rotary_percent", Number(1.0)),
        ("rotary_base", integer_or_number(s.rope_theta)),
        ("rotary_interleaved", Truth(false)),
        ("rotary_seq_len_interpolation_factor", Pickled::None),
        ("use_rope_scaling", Truth(s.rope_scaling.is_some())),
        ("rope_scaling_factor", Number(s.rope_scaling.as_ref().map_or(8.0, |scaling| scaling.factor))),
        ("swiglu", Truth(true)),
        ("normalization", Pickled::text("RMSNorm")),
        ("norm_epsilon", Number(s.rms_norm_eps)),
        ("apply_layernorm_1p", Truth(false)),
        ("add_bias_linear", Truth(false)),
        ("add_qkv_bias", Truth(s.features.attention_bias)),
        ("qk_layernorm", Truth(s.features.qk_norm == QkNorm::Head)),
        ("untie_embeddings_and_output_weights", Truth(!s.tie_word_embeddings)),
        ("multi_latent_attention", Truth(false)),
        ("apply_query_key_layer_scaling", Truth(false)),
        ("attention_dropout", Number(0.0)),
        ("hidden_dropout", Number(0.0)),
        ("init_method_std", Number(s.initializer_range)),
    ];
    let window = s.sliding_window.map_or(Pickled::None, |window| Pickled::integers(&[window - 1, 0]));
    fields.push(("window_size", window));
    fields
}

fn mixture(plan: &MegatronPlan) -> NamespaceFields {
    use Pickled::{Integer, Truth};
    let s = &plan.shape;
    let Some(experts) = &s.experts else {
        return vec![("num_experts", Pickled::None)];
    };
    vec![
        ("num_experts", Integer(experts.num_local_experts)),
        ("moe_router_topk", Integer(experts.num_experts_per_tok)),
        ("moe_ffn_hidden_size", Integer(s.intermediate_size)),
        ("moe_aux_loss_coeff", Pickled::Number(experts.router_aux_loss_coef)),
        ("moe_router_load_balancing_type", Pickled::text("aux_loss")),
        ("moe_router_pre_softmax", Truth(false)),
        ("moe_router_score_function", Pickled::text("softmax")),
        ("moe_router_topk_scaling_factor", Pickled::None),
        ("moe_router_enable_expert_bias", Truth(false)),
        ("moe_shared_expert_intermediate_size", Pickled::None),
        ("moe_layer_freq", Integer(1)),
        // An expert's matrices have names of their own with Transformer Engine's layers alone.
        ("moe_grouped_gemm", Truth(plan.form.engine)),
        ("moe_token_dispatcher_type", Pickled::text("allgather")),
    ]
}

fn training(plan: &MegatronPlan) -> NamespaceFields {
    use Pickled::{Integer, Truth};
    let kind = plan.kind();
    let dtype = match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        Kind::Double => "float64",
        _ => "float32",
    };
    vec![
        ("params_dtype", Pickled::Name("torch", dtype)),
        ("bf16", Truth(kind == Kind::BFloat16)),
        ("fp16", Truth(kind == Kind::Half)),
        ("sequence_parallel", Truth(false)),
        ("tokenizer_type", Pickled::text("HuggingFaceTokenizer")),
        ("tokenizer_model", Pickled::None),
        ("bert_binary_head", Truth(false)),
        ("iteration", Integer(WRITTEN_ITERATION)),
        ("consumed_train_samples", Integer(0)),
        ("consumed_valid_samples", Integer(0)),
        ("transformer_impl", Pickled::text(if plan.form.engine { "transformer_engine" } else { "local" })),
        ("use_mcore_models", Truth(true)),
        ("use_legacy_models", Truth(false)),
        ("ckpt_format", Pickled::text(if plan.form.shared { "torch_dist" } else { "torch" })),
        ("use_distributed_optimizer", Truth(false)),
    ]
}

/// An integer where it is one: Megatron's argument is.
fn integer_or_number(x: f64) -> Pickled {
    match x.fract() == 0.0 && x.abs() < 2f64.powi(53) {
        true => Pickled::Integer(x as i64),
        false => Pickled::Number(x),
    }
}
