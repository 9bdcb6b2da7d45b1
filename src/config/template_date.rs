//! The date that chat templates are told.

use std::str::FromStr;

use chrono::{Local, NaiveDate};
use serde::de::{Deserializer, Error};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value as Json;

use super::keys::KeyKind;
use super::problems::Problems;
use super::setting::{At, Setting};

/// `data.template_date`: the date that a chat template asks for, `YYYY-MM-DD`. Default: the day on which the run begins; a
/// resumed run keeps its date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TemplateDate {
    pub date: NaiveDate,
    /// Whether the user gave it.
    pub given: bool,
}

impl Default for TemplateDate {
    fn default() -> Self {
        TemplateDate { date: Local::now().date_naive(), given: false }
    }
}

impl FromStr for TemplateDate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let date = NaiveDate::parse_from_str(text, "%Y-%m-%d").ok().filter(|date| date.to_string() == text);
        let date =
            date.ok_or_else(|| format!("`{text}` is no date; write it as YYYY-MM-DD, such as 2026-01-31"))?;
        Ok(TemplateDate { date, given: true })
    }
}

impl Setting for TemplateDate {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        match at.text(problems)?.parse() {
            Ok(date) => Some(date),
            Err(why) => at.refuse(why, problems),
        }
    }

    /// Nothing, where the configuration says nothing.
    fn write(&self) -> Json {
        if self.given { self.date.to_string().into() } else { Json::Null }
    }

    fn kind() -> KeyKind {
        KeyKind::Form("YYYY-MM-DD")
    }
}

impl Serialize for TemplateDate {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&self.date)
    }
}

impl<'de> Deserialize<'de> for TemplateDate {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}
