//! Chat templates that are built in, and plain ones from a configuration.

use crate::config::nearest;
use crate::data::tokenizer::{ChatTemplate, Tokenizer};
use crate::error::{Error, Result};
use crate::files::broken_link;
use std::path::Path;

struct BuiltInTemplate {
    name: &'static str,
    source: &'static str,
    /// Tokens that it writes besides BOS and EOS.
    tokens: &'static [&'static str],
    /// Whether BOS is to be put before it where the tokenizer puts one before every text.
    without_bos: bool,
}

const BUILT_IN: [BuiltInTemplate; 5] = [
    BuiltInTemplate {
        name: "llama-2",
        source: include_str!("templates/llama-2.jinja"),
        tokens: &[],
        without_bos: false,
    },
    BuiltInTemplate {
        name: "llama-3",
        source: include_str!("templates/llama-3.jinja"),
        tokens: &["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        without_bos: false,
    },
    BuiltInTemplate {
        name: "chatml",
        source: include_str!("templates/chatml.jinja"),
        tokens: &["<|im_start|>", "<|im_end|>"],
        without_bos: true,
    },
    BuiltInTemplate {
        name: "mistral",
        source: include_str!("templates/mistral.jinja"),
        tokens: &[],
        without_bos: false,
    },
    BuiltInTemplate {
        name: "human-assistant",
        source: include_str!("templates/human-assistant.jinja"),
        tokens: &[],
        without_bos: true,
    },
];

/// The names of the built-in templates, for messages.
pub fn names() -> String {
    BUILT_IN.map(|t| t.name).join(", ")
}

/// A template by the name of a built-in one, as a file, or as Jinja itself.
///
/// # Errors
/// None of these; a built-in one whose tokens the tokenizer lacks.
pub fn find(what: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    if let Some(template) = BUILT_IN.iter().find(|t| t.name == what) {
        let ends = template.source.contains("eos_token") && !has_eos(tokenizer);
        let missing: Vec<&str> = template
            .tokens
            .iter()
            .copied()
            .filter(|t| tokenizer.token_to_id(t).is_none())
            .chain(ends.then_some("an eos_token"))
            .collect();
        if !missing.is_empty() {
            return Err(Error::config(format!(
                "the chat template {what} needs {}, which the tokenizer {} does not have: use tokenizer.add_tokens",
                missing.join(", "),
                tokenizer.place()
            )));
        }
        let begin = if template.without_bos { bos(tokenizer) } else { String::new() };
        let source = format!("{begin}{}", template.source.trim_end_matches('\n'));
        return Ok(ChatTemplate { source, place: format!("the built-in chat template {what}") });
    }
    if ["{%", "{{", "{#"].iter().any(|mark| what.contains(mark)) {
        return Ok(ChatTemplate { source: what.into(), place: "tokenizer.chat_template".into() });
    }
    if let Some(why) = broken_link(Path::new(what)) {
        return Err(Error::key("tokenizer.chat_template", why));
    }
    let known: Vec<&str> = BUILT_IN.iter().map(|t| t.name).collect();
    let source = std::fs::read_to_string(what).map_err(|e| {
        Error::key(
            "tokenizer.chat_template",
            format!(
                "`{what}` is not a built-in template ({}), not Jinja, and not a readable file: {e}{}",
                names(),
                nearest(what, &known).map_or(String::new(), |near| format!("; did you mean `{near}`?"))
            ),
        )
    })?;
    Ok(ChatTemplate { source, place: what.into() })
}

/// Jinja that writes BOS where the tokenizer puts one before every text.
fn bos(tokenizer: &Tokenizer) -> String {
    let named = tokenizer.special_tokens().iter().any(|(name, _)| *name == "bos_token");
    match tokenizer.bos_id().and_then(|id| tokenizer.id_to_token(id)).filter(|_| tokenizer.adds_bos()) {
        Some(_) if named => "{{- bos_token -}}".into(),
        Some(text) => format!("{{{{- {} -}}}}", quote(&text)),
        None => String::new(),
    }
}

fn has_eos(tokenizer: &Tokenizer) -> bool {
    tokenizer.special_tokens().iter().any(|(name, _)| *name == "eos_token")
}

/// A string of Jinja's, which one of JSON is too.
fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A plain template such as `"Question: {prompt}\n\nAnswer: {completion}"` as a chat template for one message of the user
/// and one of the assistant. The answer begins where `{completion}` stands, and ends with EOS after what follows it.
/// `{{` and `}}` are braces.
///
/// # Errors
/// Of kind Config: unknown, missing, or repeated placeholders, a lone brace; a tokenizer without EOS.
pub fn plain(template: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    let bad = |what: String| Error::key("tokenizer.template", what);
    let mut parts = vec![String::new()];
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        let last = parts.len() - 1;
        parts[last] += &rest[..at];
        rest = &rest[at..];
        if rest.starts_with("{{") || rest.starts_with("}}") {
            parts[last] += &rest[..1];
            rest = &rest[2..];
            continue;
        }
        let name = rest.strip_prefix('{').and_then(|rest| rest.split_once('}'));
        let Some((name, after)) = name else {
            return Err(bad("a single brace; write `{{` or `}}` for a brace".into()));
        };
        match (name, parts.len()) {
            ("prompt", 1) | ("completion", 2) => parts.push(String::new()),
            ("prompt" | "completion", _) => {
                return Err(bad("it must have `{prompt}` and then `{completion}`, once each".into()));
            }
            _ => {
                return Err(bad(format!(
                    "`{{{name}}}` is not known; known are {{prompt}} and {{completion}}"
                )));
            }
        }
        rest = after;
    }
    if let Some(last) = parts.last_mut() {
        *last += rest;
    }
    let Ok([before, between, after]) = <[String; 3]>::try_from(parts) else {
        return Err(bad("it must have `{prompt}` and then `{completion}`, once each".into()));
    };
    if !has_eos(tokenizer) {
        return Err(Error::data(format!(
            "the tokenizer {} has no end-of-sequence token, which completions end with; add \"eos_token\" to its \
             tokenizer_config.json",
            tokenizer.place()
        )));
    }
    let refusal = "The template has places for a prompt and its completion only; the roles here are ";
    let source = format!(
        "{{%- set roles = messages | map(attribute='role') | list -%}}\
         {{%- if roles != ['user'] and roles != ['user', 'assistant'] -%}}\
         {{{{- raise_exception({} + (roles | join(', '))) -}}}}\
         {{%- endif -%}}\
         {}{{{{- {} + messages[0]['content'] + {} -}}}}\
         {{%- if messages | length == 2 -%}}\
         {{{{- messages[1]['content'] + {} + eos_token -}}}}\
         {{%- endif -%}}",
        quote(refusal),
        bos(tokenizer),
        quote(&before),
        quote(&between),
        quote(&after),
    );
    Ok(ChatTemplate { source, place: "tokenizer.template".into() })
}
