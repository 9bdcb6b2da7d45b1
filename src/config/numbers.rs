//! Numbers with a range, for `#[serde(deserialize_with = ...)]`: an error there gets the place of the value.

use serde::Deserialize;
use serde::de::{Deserializer, Error};

/// A number for which `fits` holds; `what` says which those are.
fn number<'de, D: Deserializer<'de>>(d: D, what: &str, fits: fn(f64) -> bool) -> Result<f64, D::Error> {
    let x = f64::deserialize(d)?;
    if fits(x) { Ok(x) } else { Err(Error::custom(format!("expected a number {what}, found {x}"))) }
}

pub fn positive<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    number(d, "above 0", |x| x > 0.0)
}

pub fn some_positive<'de, D: Deserializer<'de>>(d: D) -> Result<Option<f64>, D::Error> {
    #[derive(Deserialize)]
    struct Positive(#[serde(deserialize_with = "positive")] f64);
    Ok(Option::<Positive>::deserialize(d)?.map(|Positive(x)| x))
}

pub fn not_negative<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    number(d, "of at least 0", |x| x >= 0.0)
}

pub fn some_not_negative<'de, D: Deserializer<'de>>(d: D) -> Result<Option<f64>, D::Error> {
    #[derive(Deserialize)]
    struct NotNegative(#[serde(deserialize_with = "not_negative")] f64);
    Ok(Option::<NotNegative>::deserialize(d)?.map(|NotNegative(x)| x))
}

pub fn ratio<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    number(d, "of 0 to 1", |x| (0.0..=1.0).contains(&x))
}

pub fn some_ratio<'de, D: Deserializer<'de>>(d: D) -> Result<Option<f64>, D::Error> {
    #[derive(Deserialize)]
    struct Ratio(#[serde(deserialize_with = "ratio")] f64);
    Ok(Option::<Ratio>::deserialize(d)?.map(|Ratio(x)| x))
}

pub fn betas<'de, D: Deserializer<'de>>(d: D) -> Result<[f64; 2], D::Error> {
    let betas = <[f64; 2]>::deserialize(d)?;
    match betas.iter().find(|b| !(0.0..1.0).contains(*b)) {
        None => Ok(betas),
        Some(b) => Err(Error::custom(format!("expected numbers of at least 0 and below 1, found {b}"))),
    }
}

/// The largest number of anything: what fits products of two such numbers into 64 bits.
const MOST: i64 = 1 << 31;

pub fn count<'de, D: Deserializer<'de>>(d: D) -> Result<i64, D::Error> {
    let n = i64::deserialize(d)?;
    if (1..=MOST).contains(&n) {
        Ok(n)
    } else {
        Err(Error::custom(format!("expected a whole number of 1 to {MOST}, found {n}")))
    }
}

pub fn some_count<'de, D: Deserializer<'de>>(d: D) -> Result<Option<i64>, D::Error> {
    #[derive(Deserialize)]
    struct Count(#[serde(deserialize_with = "count")] i64);
    Ok(Option::<Count>::deserialize(d)?.map(|Count(n)| n))
}
