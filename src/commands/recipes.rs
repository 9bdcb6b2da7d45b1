//! All recipes, from which the command line of `corral`, `corral check` and `corral plan` is made.

use std::marker::PhantomData;
use std::path::Path;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, FromArgMatches, Subcommand};
use serde_json::Value as Json;

use crate::algorithms::recipe::Recipe;
use crate::commands::{Global, check, init, plan, training};
use crate::config;
use crate::config::algorithm::BuiltInConfig;
use crate::config::dpo::Dpo;
use crate::config::grpo::Grpo;
use crate::config::keys::Section;
use crate::config::kto::Kto;
use crate::config::online_dpo::OnlineDpo;
use crate::config::ppo::Ppo;
use crate::config::pretrain::Pretrain;
use crate::config::reward::Reward;
use crate::config::sft::Sft;
use crate::error::{Error, Result};
use crate::plan::{MemoryPlan, PlanTarget};

/// All recipes, in the order of `corral --help`.
pub static RECIPES: &[&dyn AnyRecipe] = &[
    &RecipeOf::<Pretrain>::NEW,
    &RecipeOf::<Sft>::NEW,
    &RecipeOf::<Reward>::NEW,
    &RecipeOf::<Dpo>::NEW,
    &RecipeOf::<Kto>::NEW,
    &RecipeOf::<OnlineDpo>::NEW,
    &RecipeOf::<Grpo>::NEW,
    &RecipeOf::<Ppo>::NEW,
];

/// The command whose built-in recipe writes its run into a folder: `corral sft`.
pub fn maker_of(dir: &str) -> Option<String> {
    let line = format!("output_dir: {dir}");
    RECIPES.iter().find_map(|recipe| {
        let built_in = recipe.built_in().iter().find(|b| b.text.lines().any(|l| l == line))?;
        let of =
            if built_in.name == "default" { String::new() } else { format!(" --config {}", built_in.name) };
        Some(format!("corral {}{of}", recipe.name()))
    })
}

/// Adds to an error that names a missing folder of a built-in recipe the command that makes it.
pub fn with_maker(mut e: Error) -> Error {
    let dirs: Vec<&str> = RECIPES
        .iter()
        .flat_map(|recipe| recipe.built_in())
        .flat_map(|built_in| built_in.text.lines().filter_map(|line| line.strip_prefix("output_dir: ")))
        .collect();
    let words = e.message.split(|c: char| c.is_whitespace() || ",;:'`\"".contains(c));
    let missing =
        words.into_iter().find(|word| dirs.contains(word) && !Path::new(word).exists()).map(str::to_string);
    if let Some((dir, maker)) = missing.and_then(|dir| Some((dir.clone(), maker_of(&dir)?))) {
        e.message += &format!(" ({maker} makes {dir})");
    }
    e
}

/// A [`Recipe`] as the commands use it.
pub trait AnyRecipe: Sync {
    /// The subcommand that runs it.
    fn name(&self) -> &'static str;

    /// What it does, in a line.
    fn about(&self) -> &'static str;

    /// The flags of `corral plan` that mean something for it, of those that not all have.
    fn plan_flags(&self) -> &'static [&'static str];

    /// The configurations that are compiled in.
    fn built_in(&self) -> &'static [BuiltInConfig];

    /// One of the configurations that are compiled in, resolved, and what it takes where its models are known here.
    fn describe(&self, built_in: &BuiltInConfig, target: &PlanTarget) -> Result<(Json, Option<MemoryPlan>)>;

    /// The keys of its configuration.
    fn keys(&self) -> Section;

    /// Loads a configuration, and refuses one that cannot run on `ranks`.
    fn validate(&self, file: &Path, ranks: i64) -> Result<()>;

    /// `corral NAME`
    fn train(&self, args: training::Args, global: &Global) -> Result<()>;

    /// `corral check NAME`
    fn check(&self, args: check::CheckArgs, global: &Global) -> Result<()>;

    /// `corral init NAME`
    fn init(&self, args: init::InitArgs, global: &Global) -> Result<()>;

    /// `corral plan NAME`
    fn plan(&self, args: plan::PlanArgs, global: &Global) -> Result<()>;
}

struct RecipeOf<R>(PhantomData<fn() -> R>);

impl<R> RecipeOf<R> {
    const NEW: Self = RecipeOf(PhantomData);
}

impl<R: Recipe> AnyRecipe for RecipeOf<R> {
    fn name(&self) -> &'static str {
        R::SUBCOMMAND
    }

    fn about(&self) -> &'static str {
        R::ABOUT
    }

    fn plan_flags(&self) -> &'static [&'static str] {
        R::PLAN_FLAGS
    }

    fn built_in(&self) -> &'static [BuiltInConfig] {
        R::BUILT_IN
    }

    fn describe(&self, built_in: &BuiltInConfig, target: &PlanTarget) -> Result<(Json, Option<MemoryPlan>)> {
        let loaded = config::load::<R>(Some(Path::new(built_in.file)), &[])?;
        Ok((loaded.config.write(), loaded.config.plan(target).ok()))
    }

    fn keys(&self) -> Section {
        R::keys()
    }

    fn validate(&self, file: &Path, ranks: i64) -> Result<()> {
        config::load::<R>(Some(file), &[])?.validate(ranks)
    }

    fn train(&self, args: training::Args, global: &Global) -> Result<()> {
        training::run::<R>(args, global)
    }

    fn check(&self, args: check::CheckArgs, global: &Global) -> Result<()> {
        check::check::<R>(args, global)
    }

    fn init(&self, args: init::InitArgs, global: &Global) -> Result<()> {
        init::init::<R>(args, global)
    }

    fn plan(&self, args: plan::PlanArgs, global: &Global) -> Result<()> {
        plan::plan::<R>(args, global)
    }
}

/// Arguments of a command that is for all recipes.
pub trait RecipeArgs: Args {
    /// Flags, by their ids, that only some recipes have.
    const OF_SOME: &'static [&'static str] = &[];
}

/// A recipe that the command line names, and the arguments for it: a subcommand for each of [`RECIPES`].
pub struct NamedRecipe<A> {
    /// The one of [`RECIPES`] that has the subcommand's name.
    pub recipe: &'static dyn AnyRecipe,
    /// The arguments behind it.
    pub args: A,
}

impl<A: RecipeArgs> FromArgMatches for NamedRecipe<A> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let missing = || clap::Error::raw(ErrorKind::MissingSubcommand, "a subcommand is missing\n");
        let (name, matches) = matches.subcommand().ok_or_else(missing)?;
        let recipe = RECIPES.iter().find(|r| r.name() == name).ok_or_else(missing)?;
        let given = |id: &&&str| matches.value_source(id) == Some(ValueSource::CommandLine);
        if let Some(flag) = A::OF_SOME.iter().filter(given).find(|id| !recipe.plan_flags().contains(id)) {
            let flag = flag.replace('_', "-");
            let message = format!("--{flag} does not apply to {name}\n");
            return Err(clap::Error::raw(ErrorKind::ArgumentConflict, message));
        }
        Ok(NamedRecipe { recipe: *recipe, args: A::from_arg_matches(matches)? })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl<A: RecipeArgs> Subcommand for NamedRecipe<A> {
    fn augment_subcommands(command: Command) -> Command {
        let subcommand = |recipe: &&dyn AnyRecipe| {
            // Last: arguments come with a description of their own.
            let command = A::augment_args(Command::new(recipe.name())).about(recipe.about());
            let hidden = A::OF_SOME.iter().filter(|id| !recipe.plan_flags().contains(id));
            hidden.fold(command, |command, id| command.mut_arg(id, |a| a.hide(true)))
        };
        command.subcommands(RECIPES.iter().map(subcommand))
    }

    fn augment_subcommands_for_update(command: Command) -> Command {
        Self::augment_subcommands(command)
    }

    fn has_subcommand(name: &str) -> bool {
        RECIPES.iter().any(|r| r.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// Every file of `configs/STAGE/` is built in, and can be loaded.
    #[test]
    fn all_recipes_are_built_in() {
        for recipe in RECIPES {
            let folder =
                format!("{}/configs/{}", env!("CARGO_MANIFEST_DIR"), recipe.name().replace('-', "_"));
            let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
            let mut files: Vec<PathBuf> =
                files.filter(|path| path.extension().is_some_and(|e| e == "yaml")).collect();
            files.sort();
            let mut names: Vec<&str> = recipe.built_in().iter().map(|b| b.name).collect();
            assert_eq!(names[0], "default");
            names.sort_unstable();
            let there: Vec<String> =
                files.iter().map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect();
            assert_eq!(names, there, "{}", recipe.name());
            for built_in in recipe.built_in() {
                let ranks = crate::commands::library::ranks(built_in.text);
                recipe
                    .validate(Path::new(built_in.file), ranks)
                    .unwrap_or_else(|e| panic!("{}: {e}", built_in.file));
            }
        }
    }
}
