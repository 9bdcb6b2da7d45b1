//! What was meant by a command line that cannot be read: one line that says what to type.

use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::commands::recipes::RECIPES;
use crate::config::foreign;

/// Words that other programs, or people, have for subcommands, and what to type.
const SUBCOMMANDS: &[(&str, &str)] = &[
    ("finetune", "corral sft"),
    ("fine-tune", "corral sft"),
    ("fine_tune", "corral sft"),
    ("finetuning", "corral sft"),
    ("instruct", "corral sft"),
    ("lora", "corral sft with a section `lora` (lora={rank: 16})"),
    ("qlora", "corral sft with a section `lora` (lora={rank: 16, base: nf4})"),
    ("train", "corral pretrain, corral sft, reward, dpo, kto, online-dpo, grpo or ppo"),
    ("pretraining", "corral pretrain"),
    ("pt", "corral pretrain"),
    ("rm", "corral reward"),
    ("reward-model", "corral reward"),
    ("reward_model", "corral reward"),
    ("reward-modeling", "corral reward"),
    ("rlhf", "corral reward, then corral ppo"),
    ("rl", "corral grpo or corral ppo"),
    ("online_dpo", "corral online-dpo"),
    ("onlinedpo", "corral online-dpo"),
    ("infer", "corral generate"),
    ("inference", "corral generate"),
    ("predict", "corral generate"),
    ("sample", "corral generate"),
    ("run", "corral chat, or corral generate"),
    ("evaluate", "corral eval"),
    ("test", "corral eval"),
    ("tokenise", "corral tokenize"),
    ("preprocess", "corral tokenize"),
    ("prepare", "corral tokenize"),
    ("download", "corral get"),
    ("pull", "corral get"),
    ("export", "corral convert"),
    ("quantize", "corral convert --format gguf --dtype q8_0"),
    ("merge-lora", "corral merge"),
    ("merge_lora", "corral merge"),
    ("merge-adapter", "corral merge"),
    ("benchmark", "corral bench"),
    ("validate", "corral check"),
    ("memory", "corral plan"),
    ("estimate", "corral plan"),
    ("info", "corral inspect"),
    ("show", "corral inspect"),
    ("launch", "launch, a program of its own: launch --nproc N SUBCOMMAND"),
];

/// Options of `launch`.
const OF_LAUNCH: [&str; 8] = [
    "--nproc",
    "--nnodes",
    "--node-rank",
    "--rdzv",
    "--max-restarts",
    "--backend",
    "--rank-filter",
    "--log-dir",
];

/// The line that says what to type; none where nothing better is known than what clap says. `words` is the command line without
/// the program, `program` its description.
pub fn advice(e: &clap::Error, words: &[String], program: &clap::Command) -> Option<String> {
    let context = |kind| match e.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    match e.kind() {
        ErrorKind::InvalidSubcommand => {
            let word = context(ContextKind::InvalidSubcommand)?;
            let (_, meant) = SUBCOMMANDS.iter().find(|(other, _)| *other == word.to_lowercase())?;
            Some(format!("there is no subcommand '{word}': type {meant}"))
        }
        ErrorKind::UnknownArgument => unknown_argument(&context(ContextKind::InvalidArg)?, words, program),
        _ => None,
    }
}

fn unknown_argument(argument: &str, words: &[String], program: &clap::Command) -> Option<String> {
    let subcommand = words.iter().find(|word| program.find_subcommand(word).is_some());
    if OF_LAUNCH.contains(&argument) {
        let subcommand = subcommand.map_or("SUBCOMMAND", String::as_str);
        return Some(format!(
            "{argument} is an option of launch: put it before the subcommand: launch {argument} ... {subcommand}"
        ));
    }
    let recipe = RECIPES.iter().find(|recipe| subcommand.is_some_and(|name| name == recipe.name()));
    let Some(name) = argument.strip_prefix("--") else {
        return path_alone(argument, words, program);
    };
    let recipe = recipe?;
    let name = name.replace('-', "_");
    let keys: Vec<String> = recipe.keys().all().into_iter().map(|(key, _)| key).collect();
    let has = |key: &str| keys.iter().any(|known| known == key);
    let ends = |key: &&String| key.rsplit('.').next() == Some(&name);
    let value = value_behind(argument, words).unwrap_or_else(|| "VALUE".into());
    let key = if has(&name) {
        name.clone()
    } else if let Some(foreign) = foreign::key_named(&name) {
        match foreign.here.iter().find(|key| has(key)) {
            Some(key) => (*key).to_string(),
            None => return Some(format!("there is no {argument}: {}", foreign.advice(|_| true)?)),
        }
    } else {
        keys.iter().filter(ends).min_by_key(|key| key.matches('.').count())?.clone()
    };
    Some(format!("keys have no dashes: instead of {argument} type {key}={value}"))
}

/// The value that was given to an option.
fn value_behind(argument: &str, words: &[String]) -> Option<String> {
    let glued = words.iter().find_map(|word| word.strip_prefix(argument)?.strip_prefix('='));
    let next = || {
        let at = words.iter().position(|word| word == argument)?;
        words.get(at + 1).filter(|word| !word.starts_with('-')).map(String::as_str)
    };
    glued.or_else(next).map(str::to_string)
}

/// A path that was given without the option that takes it.
fn path_alone(argument: &str, words: &[String], program: &clap::Command) -> Option<String> {
    let (mut command, mut names) = (program, vec!["corral"]);
    for word in words {
        if let Some(below) = command.find_subcommand(word) {
            (command, _) = (below, names.push(word));
        }
    }
    let options = ["adapter", "model", "from", "config", "input"];
    let option = options.iter().find(|id| command.get_arguments().any(|a| a.get_id() == **id))?;
    Some(format!("say what {argument} is: {} --{option} {argument}", names.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_subcommands_are_none_of_ours() {
        for (word, meant) in SUBCOMMANDS {
            assert!(!RECIPES.iter().any(|recipe| recipe.name() == *word), "{word}");
            assert!(meant.starts_with("corral ") || meant.starts_with("launch"), "{meant}");
        }
    }

    #[test]
    fn values_are_found_behind_options() {
        let words = |text: &str| text.split(' ').map(str::to_string).collect::<Vec<_>>();
        assert_eq!(value_behind("--optim.lr", &words("sft --optim.lr 1e-4")).unwrap(), "1e-4");
        assert_eq!(value_behind("--optim.lr", &words("sft --optim.lr=1e-4")).unwrap(), "1e-4");
        assert_eq!(value_behind("--optim.lr", &words("sft --optim.lr --x")), None);
    }
}
