//! The tensors of a rank's file under the names of Megatron's core, whether it has these or those from before: dictionaries within
//! `language_model`.

use std::collections::HashSet;

use crate::checkpoint::pickle::{MAX_NAME, PickleNode, TensorRef};

/// Legacy names of a layer's modules, and the core's.
const MODULES: [(&str, &str); 10] = [
    ("input_norm", "input_layernorm"),
    ("input_layernorm", "input_layernorm"),
    ("self_attention.query_key_value", "self_attention.linear_qkv"),
    ("attention.query_key_value", "self_attention.linear_qkv"),
    ("self_attention.dense", "self_attention.linear_proj"),
    ("attention.dense", "self_attention.linear_proj"),
    ("post_attention_norm", "pre_mlp_layernorm"),
    ("post_attention_layernorm", "pre_mlp_layernorm"),
    ("mlp.dense_h_to_4h", "mlp.linear_fc1"),
    ("mlp.dense_4h_to_h", "mlp.linear_fc2"),
];

/// Adds the tensors of a model to those of a file, under the core's names below `chunk`. What has no name there keeps its own.
pub(super) fn tensors(
    chunk: &str,
    model: PickleNode,
    to: &mut Vec<(String, TensorRef)>,
) -> Result<(), String> {
    let mut leaves = Vec::new();
    flatten(model, String::new(), &mut HashSet::new(), &mut leaves)?;
    to.extend(leaves.into_iter().map(|(name, tensor)| {
        let name = core_name(name.strip_prefix("language_model.").unwrap_or(&name));
        (format!("{chunk}.{name}"), tensor.clone())
    }));
    Ok(())
}

/// The tensors below a dictionary, their keys joined by dots. Other values are left out, but where a weight should be. A dictionary
/// that is met twice would make more of a file than there is in it.
fn flatten<'p>(
    node: PickleNode<'p>,
    prefix: String,
    met: &mut HashSet<u32>,
    to: &mut Vec<(String, &'p TensorRef)>,
) -> Result<(), String> {
    if node.object_id().is_some_and(|id| !met.insert(id)) {
        return Err(format!("`{prefix}` is a dictionary that is in another place, too"));
    }
    for (key, value) in node.entries() {
        // Extra states, of 8-bit products, are no weights.
        let Some(key) = key.text().filter(|key| !key.ends_with("_extra_state")) else { continue };
        let name = if prefix.is_empty() { key.to_string() } else { format!("{prefix}.{key}") };
        if name.len() > MAX_NAME {
            return Err(format!("its model has names of more than {MAX_NAME} bytes"));
        }
        match value.tensor() {
            Some(tensor) => to.push((name, tensor)),
            None if value.is_dict() => flatten(value, name, met, to)?,
            None if name.ends_with("weight") => {
                return Err(format!("`{name}` is {}, which is not read as a tensor", value.describe()));
            }
            None => {}
        }
    }
    Ok(())
}

fn core_name(name: &str) -> String {
    let body = name.strip_prefix("encoder.").or_else(|| name.strip_prefix("transformer."));
    match (name, body) {
        ("word_embeddings_for_head.weight", _) => return "output_layer.weight".into(),
        (_, Some("final_norm.weight" | "final_layernorm.weight")) => {
            return "decoder.final_layernorm.weight".into();
        }
        _ => {}
    }
    let in_layer = || {
        let (layer, name) = body?.strip_prefix("layers.")?.split_once('.')?;
        let (module, kind) = name.rsplit_once('.')?;
        let (_, module) = MODULES.iter().find(|(legacy, _)| *legacy == module)?;
        Some(format!("decoder.layers.{layer}.{module}.{kind}"))
    };
    in_layer().unwrap_or_else(|| name.to_string())
}
