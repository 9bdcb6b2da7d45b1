//! All recipes, from which the command line of `corral`, `corral check` and `corral plan` is made.

use std::marker::PhantomData;
use std::path::Path;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, FromArgMatches, Subcommand};

use crate::algorithms::recipe::Recipe;
use crate::commands::{Global, check, plan, training};
use crate::config;
use crate::config::dpo::Dpo;
use crate::config::grpo::Grpo;
use crate::config::keys::Section;
use crate::config::kto::Kto;
use crate::config::online_dpo::OnlineDpo;
use crate::config::ppo::Ppo;
use crate::config::pretrain::Pretrain;
use crate::config::reward::Reward;
use crate::config::sft::Sft;
use crate::error::Result;

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

/// A [`Recipe`] as the commands use it.
pub trait AnyRecipe: Sync {
    /// The subcommand that runs it.
    fn name(&self) -> &'static str;

    /// What it does, in a line.
    fn about(&self) -> &'static str;

    /// The flags of `corral plan` that mean something for it, of those that not all have.
    fn plan_flags(&self) -> &'static [&'static str];

    /// The file in the source tree of the configuration that is compiled in.
    fn default_file(&self) -> &'static str;

    /// The keys of its configuration.
    fn keys(&self) -> Section;

    /// Loads a configuration, and refuses one that cannot run on `ranks`.
    fn validate(&self, file: &Path, ranks: i64) -> Result<()>;

    /// `corral NAME`
    fn train(&self, args: training::Args, global: &Global) -> Result<()>;

    /// `corral check NAME`
    fn check(&self, args: check::CheckArgs, global: &Global) -> Result<()>;

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

    fn default_file(&self) -> &'static str {
        R::DEFAULT.file
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
            let message = format!("--{flag} means nothing for {name}\n");
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
