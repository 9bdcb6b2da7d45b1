//! What becomes of the records of an input that cannot be used, for commands without a configuration.

use std::path::{Path, PathBuf};

use crate::config::sections::OnError;
use crate::data::fields::Unused;
use crate::data::odd::{Odd, OddRecords, OrOdd, Reason};
use crate::data::readers::Record;
use crate::distributed::world::World;
use crate::error::Result;
use crate::warn;

#[derive(Debug, Clone, Copy, clap::Args)]
pub struct OnErrorArgs {
    /// What to do with records that cannot be used: unreadable lines, no known format, messages that the template refuses
    #[arg(long, value_enum, default_value = "refuse")]
    pub on_error: OnError,
}

/// Counts the records of an input.
pub struct Intake {
    on_error: OnError,
    odd: OddRecords,
    /// Records that are too long, where they are left out in any case.
    too_long: Option<OddRecords>,
    /// What records of each file have and nothing uses.
    unused: Vec<(PathBuf, Unused)>,
}

impl Intake {
    /// Of a measurement: records that are too long are left out in any case.
    pub fn new(args: OnErrorArgs) -> Intake {
        Intake { too_long: Some(OddRecords::default()), ..Intake::of_lines(args) }
    }

    /// Of lines that are answered one by one: what is too long is refused or skipped as what else cannot be used.
    pub fn of_lines(args: OnErrorArgs) -> Intake {
        Intake { on_error: args.on_error, odd: OddRecords::default(), too_long: None, unused: Vec::new() }
    }

    /// What was made of a record, or why it cannot be used.
    pub fn read<T>(&mut self, record: Result<T, Odd>) -> Result<std::result::Result<T, String>> {
        self.odd.records += 1;
        let odd = match record {
            Ok(taken) => return Ok(Ok(taken)),
            Err(odd) => odd,
        };
        let why = odd.error.message.clone();
        match &mut self.too_long {
            Some(too_long) if odd.reason == Reason::TooLong => too_long.add(odd)?,
            _ => self.odd.add(odd)?,
        }
        Ok(Err(why))
    }

    /// Notes what a record of a file has and nothing uses.
    pub fn note<'a>(&mut self, path: &Path, unused: impl IntoIterator<Item = &'a String>) {
        match self.unused.last_mut().filter(|(last, _)| last == path) {
            Some((_, all)) => all.count(unused),
            None => {
                let mut all = Unused::default();
                all.count(unused);
                self.unused.push((path.to_path_buf(), all));
            }
        }
    }

    /// What `read` makes of a record, if it can be used.
    pub fn take<T>(
        &mut self,
        record: Result<Record>,
        read: impl FnOnce(Record) -> Result<T, Odd>,
    ) -> Result<Option<T>> {
        Ok(self.read(record.or_odd(Reason::Unreadable).and_then(read))?.ok())
    }

    /// Records that were left out as too long.
    pub fn too_long(&self) -> u64 {
        self.too_long.as_ref().map_or(0, OddRecords::total)
    }

    /// Records that were left out for other reasons.
    pub fn skipped(&self) -> u64 {
        self.odd.total()
    }

    /// Refuses the input where `--on-error` says so.
    pub fn check(&self) -> Result<()> {
        self.odd.refuse(self.on_error, "give --on-error skip")
    }

    /// Why nothing is left of an input, for an error.
    pub fn why_nothing(&self) -> String {
        let all: Vec<String> = self
            .left_out()
            .iter()
            .map(|odd| format!("{} (the first: {})", odd.reasons(), odd.example().unwrap_or_default()))
            .collect();
        let records = self.odd.records;
        match all.is_empty() {
            true => format!("{records} records were read"),
            false => format!("{records} records were read: {}", all.join(", ")),
        }
    }

    /// Warns of what is left out, and of what is not used, on rank 0.
    pub fn warn(&self, world: &World) {
        if world.is_main() {
            self.unused.iter().for_each(|(path, unused)| unused.warn(path));
            self.left_out().iter().for_each(|odd| warn!("{}", odd.skipped()));
        }
    }

    fn left_out(&self) -> Vec<OddRecords> {
        let too_long = self.too_long.iter().map(|odd| {
            let mut all = OddRecords::of(self.odd.records);
            all.merge(odd);
            all
        });
        [self.odd.clone()].into_iter().chain(too_long).filter(|odd| odd.total() > 0).collect()
    }
}
