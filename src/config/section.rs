//! `section!` and `choice!`: a section of keys, or a choice of words, with all that is known of it in one place.

use serde_json::{Map, Value as Json};

use super::keys::Limits;
use super::problems::Problems;
use super::setting::{At, Setting};
use super::yaml::{YamlEntry, YamlValue};

/// Defines a section of keys: the struct, its defaults (where every key has one), how it is read and written, and the
/// description of its keys.
///
/// ```text
/// section! {
///     /// AdamW.
///     pub struct Optim {
///         /// Peak learning rate.
///         lr: f64 = 3e-4, POSITIVE => Mathematics;
///     }
/// }
/// ```
///
/// A key has its type, a default (without one it must be given), the [`Limits`] of its numbers, and the
/// [`Class`](super::keys::Class) of a change, which a key that is a section leaves to the keys in it. After the struct
/// `check PATH` may name a function `fn(&mut Self) -> Result<(), String>`, which fills in what follows or refuses the section.
macro_rules! section {
    ($(#[doc = $about:literal])* pub struct $name:ident {$(
        $(#[doc = $doc:literal])* $key:ident: $type:ty = $default:expr $(, $limits:ident)? $(=> $class:ident)?;
    )*} $(check $check:path)?) => {
        $crate::config::section::section! {@define $name [$($about)*] [$($check)?] $(
            [$($doc)*] $key [$type] [$default] [$($limits)?] [$($class)?]
        )*}

        impl Default for $name {
            fn default() -> Self {
                $name { $($key: $default,)* }
            }
        }
    };
    ($(#[doc = $about:literal])* pub struct $name:ident {$(
        $(#[doc = $doc:literal])* $key:ident: $type:ty $(= $default:expr)? $(, $limits:ident)? $(=> $class:ident)?;
    )*} $(check $check:path)?) => {
        $crate::config::section::section! {@define $name [$($about)*] [$($check)?] $(
            [$($doc)*] $key [$type] [$($default)?] [$($limits)?] [$($class)?]
        )*}
    };
    (@define $name:ident [$($about:literal)*] [$($check:path)?] $(
        [$($doc:literal)*] $key:ident [$type:ty] [$($default:expr)?] [$($limits:ident)?] [$($class:ident)?]
    )*) => {
        $(#[doc = $about])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name {
            $($(#[doc = $doc])* pub $key: $type,)*
        }

        impl $crate::config::setting::Setting for $name {
            #[allow(unused_mut)]
            fn read(
                at: &$crate::config::setting::At<'_>,
                problems: &mut $crate::config::problems::Problems,
            ) -> Option<Self> {
                let entries = $crate::config::section::Entries::open(at, &[$(stringify!($key)),*], problems)?;
                $(let $key = entries.read(
                    stringify!($key),
                    $crate::config::section::section!(@default $type, $($default)?),
                    $crate::config::section::section!(@limits $($limits)?),
                    problems,
                );)*
                let mut read = $name { $($key: $key?,)* };
                $(if let Err(why) = $check(&mut read) {
                    return at.refuse(why, problems);
                })?
                Some(read)
            }

            fn write(&self) -> serde_json::Value {
                let mut entries = serde_json::Map::new();
                $($crate::config::section::put(
                    &mut entries,
                    stringify!($key),
                    &self.$key,
                    $crate::config::section::section!(@default $type, $($default)?),
                );)*
                entries.into()
            }

            fn kind() -> $crate::config::keys::KeyKind {
                $crate::config::keys::KeyKind::Section($crate::config::keys::Section {
                    about: $crate::config::section::text(&[$($about),*]),
                    keys: vec![$($crate::config::keys::Key {
                        name: stringify!($key),
                        about: $crate::config::section::text(&[$($doc),*]),
                        kind: <$type as $crate::config::setting::Setting>::kind(),
                        default: $crate::config::section::section!(@default $type, $($default)?)
                            .map(|default| $crate::config::setting::Setting::write(&default())),
                        limits: $crate::config::section::section!(@limits $($limits)?),
                        class: $crate::config::section::section!(@class $($class)?),
                    },)*],
                })
            }
        }
    };
    (@default $type:ty,) => { None::<fn() -> $type> };
    (@default $type:ty, $default:expr) => { Some((|| $default) as fn() -> $type) };
    (@limits) => { $crate::config::keys::Limits::NONE };
    (@limits $limits:ident) => { $crate::config::keys::Limits::$limits };
    (@class) => { None };
    (@class $class:ident) => { Some($crate::config::keys::Class::$class) };
}
pub(super) use section;

/// Defines a choice of words: the enum, its words, and what each means; the first is its default. `refused` are words that are known and not built, each
/// with what is said of it.
macro_rules! choice {
    ($(#[doc = $about:literal])* pub enum $name:ident {$(
        $(#[doc = $doc:literal])* $variant:ident = $word:literal,
    )*} $(refused {$($other:literal: $why:literal,)*})?) => {
        $(#[doc = $about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {
            $($(#[doc = $doc])* $variant,)*
        }

        impl $name {
            /// The words, as configurations write them, each with its meaning.
            const WORDS: &[($name, &str, &[&str])] = &[$(($name::$variant, $word, &[$($doc),*])),*];

            /// As configurations write it.
            pub fn name(self) -> &'static str {
                match self {
                    $($name::$variant => $word,)*
                }
            }

            /// The choice of a word.
            fn of(word: &str) -> Option<Self> {
                Self::WORDS.iter().find(|(_, name, _)| *name == word).map(|(choice, ..)| *choice)
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::WORDS[0].0
            }
        }

        impl $crate::config::setting::Setting for $name {
            fn read(
                at: &$crate::config::setting::At<'_>,
                problems: &mut $crate::config::problems::Problems,
            ) -> Option<Self> {
                const KNOWN: &[&str] = &[$($word),*];
                const REFUSED: &[(&str, &str)] = &[$($(($other, $why),)*)?];
                let word = $crate::config::section::word(at, KNOWN, REFUSED, problems)?;
                Self::of(word)
            }

            fn write(&self) -> serde_json::Value {
                self.name().into()
            }

            fn kind() -> $crate::config::keys::KeyKind {
                let word = |(_, word, about): &(_, &'static str, &[&str])| (*word, $crate::config::section::text(about));
                $crate::config::keys::KeyKind::Choice(Self::WORDS.iter().map(word).collect())
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(self.name())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let word = <String as serde::Deserialize>::deserialize(d)?;
                Self::of(&word).ok_or_else(|| serde::de::Error::unknown_variant(&word, &[$($word),*]))
            }
        }

        impl clap::ValueEnum for $name {
            fn value_variants<'a>() -> &'a [Self] {
                &[$($name::$variant),*]
            }

            fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
                let (_, word, about) = Self::WORDS.iter().find(|(choice, ..)| choice == self)?;
                let about = $crate::config::section::text(about);
                Some(clap::builder::PossibleValue::new(*word).help(about.trim_end_matches('.').to_string()))
            }
        }
    };
}
pub(super) use choice;

/// The entries of a section that is being read.
pub struct Entries<'a, 'p> {
    at: &'p At<'a>,
    entries: &'a [YamlEntry],
}

impl<'a, 'p> Entries<'a, 'p> {
    /// The entries at `at`; those of no known key are problems. A section whose keys are all left out (`optim:` and nothing
    /// below) is an empty one.
    pub fn open(at: &'p At<'a>, known: &[&str], problems: &mut Problems) -> Option<Self> {
        let entries: &[YamlEntry] = match &at.node.value {
            YamlValue::Section(entries) => entries,
            YamlValue::Null => &[],
            _ => return at.expected("a section of keys", problems),
        };
        for entry in entries.iter().filter(|e| !known.contains(&e.key.as_str())) {
            problems.unknown_key(&entry.place, &at.key, &entry.key, known);
        }
        Some(Entries { at, entries })
    }

    /// The value of a key. Where it does not fit, what is wrong is among the problems, and the default is taken, so that the
    /// rest can be looked at too.
    pub fn read<T: Setting>(
        &self,
        key: &str,
        default: Option<fn() -> T>,
        limits: Limits,
        problems: &mut Problems,
    ) -> Option<T> {
        match (self.entries.iter().find(|e| e.key == key), default) {
            (Some(entry), default) => {
                T::read(&self.at.below(key, &entry.node, limits), problems).or_else(|| Some(default?()))
            }
            (None, Some(default)) => Some(default()),
            (None, None) => {
                problems.missing_key(&self.at.node.place, &self.at.key, key);
                None
            }
        }
    }
}

/// Writes a key, but for one that says nothing: a default that is null or an empty list.
pub fn put<T: Setting>(entries: &mut Map<String, Json>, key: &str, value: &T, default: Option<fn() -> T>) {
    let value = value.write();
    let says_nothing = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
    if !says_nothing || default.is_none_or(|default| default().write() != value) {
        entries.insert(key.into(), value);
    }
}

/// One of the known words.
pub fn word<'a>(
    at: &At<'a>,
    known: &[&str],
    refused: &[(&str, &str)],
    problems: &mut Problems,
) -> Option<&'a str> {
    let YamlValue::Text(word) = &at.node.value else {
        return at.expected(&format!("one of {}", known.join(", ")), problems);
    };
    if let Some((_, why)) = refused.iter().find(|(other, _)| other == word) {
        return at.refuse(*why, problems);
    }
    if !known.contains(&word.as_str()) {
        problems.unknown_choice(&at.node.place, &at.key, word, known);
        return None;
    }
    Some(word)
}

/// A documentation comment as one text.
pub fn text(lines: &[&str]) -> String {
    lines.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ").trim().to_string()
}
