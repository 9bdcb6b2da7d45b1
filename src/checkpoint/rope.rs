//! Rotary positions as `config.json` describes them: in `rope_parameters` (transformers 5), or in `rope_theta` and
//! `rope_scaling` (before). Where both are there, `rope_scaling` counts, as in transformers'
//! `RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`.

use serde_json::{Map, Value};

use super::families::{Only, refused};
use crate::config::shape::Llama3RopeScaling;
use crate::error::{Error, Result};

/// Base of the angles, their scaling, and what is to be told of keys that do not count.
pub(super) struct Rope {
    pub theta: f64,
    pub scaling: Option<Llama3RopeScaling>,
    /// What positions are divided by, of type `linear`.
    pub linear: Option<f64>,
    /// They are those of blocks without a window: those with one have others.
    pub by_type: bool,
    pub warnings: Vec<String>,
}

/// The rotary positions of a configuration; `default` is the family's base.
pub(super) fn read(config: &Map<String, Value>, default: f64) -> Result<Rope> {
    let (scaling, parameters) = (section(config, "rope_scaling")?, section(config, "rope_parameters")?);
    let beside = number(config, "rope_theta", "")?;
    let mut warnings = Vec::new();
    let Some((key, counts)) = scaling.or(parameters) else {
        let theta = beside.unwrap_or(default);
        return Ok(Rope { theta, scaling: None, linear: None, by_type: false, warnings });
    };
    let own = number(counts, "rope_theta", key)?;
    let theta = own.or(beside).unwrap_or(default);
    if let (Some(own), Some(beside)) = (own, beside)
        && own != beside
    {
        warnings.push(format!(
            "rope_theta is {beside} and {key}.rope_theta {own}: {key} takes precedence, as in transformers"
        ));
    }
    if let (Some(_), Some((_, other))) = (scaling, parameters)
        && other != counts
    {
        let lost = match number(other, "rope_theta", "rope_parameters")? {
            Some(other) if other != theta => format!("; rope_theta is {theta}, not {other}"),
            _ => String::new(),
        };
        warnings.push(format!(
            "rope_scaling and rope_parameters are both there and differ: rope_scaling counts, as in transformers{lost}"
        ));
    }
    let (scaling, linear) = scaling_of(key, counts)?;
    let by_type = is_by_type(config.get(key));
    Ok(Rope { theta, scaling, linear, by_type, warnings })
}

/// A key that holds an object, with its name; none where it is missing, null or empty.
fn section<'a>(
    config: &'a Map<String, Value>,
    key: &'static str,
) -> Result<Option<(&'static str, &'a Map<String, Value>)>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        // Of Gemma 3 by type of block: those with a window have another base, and no scaling.
        Some(Value::Object(object)) => Ok(match object.get("full_attention") {
            Some(Value::Object(full)) if is_by_type(config.get(key)) => Some((key, full)),
            _ => Some((key, object)).filter(|(_, o)| !o.is_empty()),
        }),
        Some(other) => Err(Error::data(format!("{key} is {other}; it must be an object"))),
    }
}

fn is_by_type(parameters: Option<&Value>) -> bool {
    let has = |name| parameters.and_then(|p| p.get(name)).is_some_and(Value::is_object);
    has("full_attention") && has("sliding_attention")
}

/// A number in the object under the key `within` (none: at the top).
fn number(from: &Map<String, Value>, key: &str, within: &str) -> Result<Option<f64>> {
    let dot = if within.is_empty() { "" } else { "." };
    match from.get(key).filter(|v| !v.is_null()) {
        Some(v) => v
            .as_f64()
            .map(Some)
            .ok_or_else(|| Error::data(format!("{within}{dot}{key} is {v}; it must be a number"))),
        None => Ok(None),
    }
}

/// The scaling that the object under `key` describes, or the factor of type `linear`; none of type `default`.
fn scaling_of(
    key: &str,
    parameters: &Map<String, Value>,
) -> Result<(Option<Llama3RopeScaling>, Option<f64>)> {
    // Before transformers 4.43 the type was called `type`.
    let types = ["rope_type", "type"].map(|name| parameters.get(name).filter(|v| !v.is_null()));
    if let [Some(a), Some(b)] = types
        && a != b
    {
        return Err(Error::data(format!(
            "{key}.rope_type is {a}, and {key}.type is {b}: remove one of them"
        )));
    }
    let kind = types.into_iter().flatten().next();
    let known: &[&str] = match kind.map(|k| k.as_str()) {
        None | Some(Some("default")) => &[],
        Some(Some("linear")) => &["factor"],
        Some(Some("llama3")) => {
            &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        }
        Some(_) => {
            let kind = kind.unwrap_or(&Value::Null);
            return Err(refused(&format!("{key}.rope_type"), kind, "\"default\", \"linear\" and \"llama3\""));
        }
    };
    for (name, value) in parameters {
        let neutral = name == "partial_rotary_factor" && Only::Number(1.0).is(value);
        if !(known.contains(&name.as_str())
            || neutral
            || value.is_null()
            || ["rope_type", "type", "rope_theta"].contains(&name.as_str()))
        {
            return Err(refused(&format!("{key}.{name}"), value, "its absence"));
        }
    }
    if known.is_empty() {
        return Ok((None, None));
    }
    let required = |name: &str| {
        number(parameters, name, key)?.ok_or_else(|| Error::data(format!("{key}.{name} is missing")))
    };
    if known.len() == 1 {
        let factor = required("factor")?;
        return match factor >= 1.0 {
            true => Ok((None, Some(factor))),
            false => Err(Error::data(format!("{key}.factor is {factor}; it must be at least 1"))),
        };
    }
    let original = required("original_max_position_embeddings")?;
    if original.fract() != 0.0 || original < 1.0 {
        return Err(Error::data(format!(
            "{key}.original_max_position_embeddings is {original}; it must be a positive integer"
        )));
    }
    let scaling = Llama3RopeScaling {
        factor: required("factor")?,
        low_freq_factor: required("low_freq_factor")?,
        high_freq_factor: required("high_freq_factor")?,
        original_max_position_embeddings: original as i64,
    };
    Ok((Some(scaling), None))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Right values are those of transformers 5.24's `LlamaConfig(...).rope_parameters`.
    #[test]
    fn the_keys_count_as_in_transformers() {
        let llama3 = json!({
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32
        });
        let of = |config: Value| read(config.as_object().unwrap(), 10000.0);
        for (config, theta, scaled, warned) in [
            (json!({}), 10000.0, false, 0),
            (json!({"rope_theta": 5e5, "rope_scaling": null, "rope_parameters": null}), 5e5, false, 0),
            (json!({"rope_parameters": {"rope_theta": 5e5}}), 5e5, false, 0),
            (json!({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5}), 5e5, false, 0),
            (json!({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e6}), 5e5, false, 1),
            (json!({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {}}), 5e5, false, 0),
            (
                json!({"rope_parameters": {"rope_theta": 5e5, "type": "default"}, "rope_scaling": llama3}),
                1e4,
                true,
                1,
            ),
            (json!({"rope_parameters": llama3, "rope_scaling": llama3, "rope_theta": 5e5}), 5e5, true, 0),
            (json!({"rope_parameters": llama3, "rope_scaling": {"rope_type": "default"}}), 1e4, false, 1),
        ] {
            let rope = of(config.clone()).unwrap();
            assert_eq!(
                (rope.theta, rope.scaling.is_some(), rope.warnings.len()),
                (theta, scaled, warned),
                "{config}"
            );
        }
        let lost = of(json!({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": llama3})).unwrap();
        assert!(lost.warnings[0].contains("rope_theta is 10000, not 500000"), "{:?}", lost.warnings);
        for (config, part) in [
            (
                json!({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}}),
                "rope_scaling.rope_type",
            ),
            (json!({"rope_scaling": {"type": "linear", "rope_type": "default"}}), "rope_scaling.type"),
            (json!({"rope_scaling": {"factor": 2.0}}), "rope_scaling.factor"),
            (json!({"rope_scaling": "llama3"}), "rope_scaling is \"llama3\""),
            (
                json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
                "rope_parameters.full_attention",
            ),
            (json!({"rope_parameters": {"rope_theta": "1e4"}}), "rope_parameters.rope_theta is \"1e4\""),
        ] {
            let e = of(config.clone()).err().unwrap();
            assert!(e.message.contains(part) && e.exit_code() == 3, "{config}: {e}");
        }
    }
}
