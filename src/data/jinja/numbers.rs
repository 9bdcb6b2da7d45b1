//! Numbers as Python writes and reads them.

/// `repr(x)`: the shortest digits that give the number again.
pub fn repr(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf".into() } else { "-inf".into() };
    }
    if x == 0.0 {
        return if x.is_sign_negative() { "-0.0".into() } else { "0.0".into() };
    }
    let scientific = format!("{x:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..16).contains(&exponent) {
        return format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs());
    }
    let plain = x.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// `int(text, base)`
pub fn parse_int(text: &str, base: u32) -> Option<i128> {
    let text = text.trim_matches(super::text::is_space);
    let (sign, digits) = match text.strip_prefix(['-', '+']) {
        Some(rest) => (if text.starts_with('-') { "-" } else { "" }, rest),
        None => ("", text),
    };
    let lower = digits.to_ascii_lowercase();
    let (prefix, found) = match lower.get(..2) {
        Some("0x") => (2, 16),
        Some("0o") => (2, 8),
        Some("0b") => (2, 2),
        _ => (0, 10),
    };
    let (digits, base) = match base {
        0 => (&digits[prefix..], found),
        base if prefix > 0 && base == found => (&digits[prefix..], base),
        base => (digits, base),
    };
    let digits = if prefix > 0 { digits.strip_prefix('_').unwrap_or(digits) } else { digits };
    let bad = digits.is_empty()
        || digits.starts_with(['_', '+', '-'])
        || digits.ends_with('_')
        || digits.contains("__")
        || !(2..=36).contains(&base);
    if bad {
        return None;
    }
    i128::from_str_radix(&format!("{sign}{}", digits.replace('_', "")), base).ok()
}

/// `float(text)`
pub fn parse_float(text: &str) -> Option<f64> {
    let text = text.trim_matches(super::text::is_space);
    let bytes = text.as_bytes();
    let between_digits = |(i, _): (usize, &str)| {
        let digit = |at: Option<usize>| at.and_then(|at| bytes.get(at)).is_some_and(u8::is_ascii_digit);
        digit(i.checked_sub(1)) && digit(Some(i + 1))
    };
    if !text.match_indices('_').all(between_digits) {
        return None;
    }
    text.replace('_', "").parse().ok()
}

/// The whole part of a number, as `int(x)` gives it.
pub fn truncate(x: f64) -> Option<i128> {
    let whole = x.trunc();
    (whole.is_finite() && whole.abs() < 1e38).then_some(whole as i128)
}

/// `round(x, digits)`: halves go to the even side.
pub fn round(x: f64, digits: i128) -> f64 {
    let digits = digits.clamp(-400, 400) as i32;
    if !x.is_finite() {
        return x;
    }
    if digits >= 0 {
        return format!("{x:.*}", digits as usize).parse().unwrap_or(x);
    }
    let unit = 10f64.powi(-digits);
    (x / unit).round_ties_even() * unit
}

/// The same of a whole number, for digits before the point.
pub fn round_int(n: i128, digits: i128) -> i128 {
    if digits >= 0 {
        return n;
    }
    let Some(unit) = u32::try_from(-digits).ok().and_then(|d| 10i128.checked_pow(d)) else { return 0 };
    let (below, rest) = (n.div_euclid(unit), n.rem_euclid(unit));
    let up = rest * 2 > unit || rest * 2 == unit && below % 2 != 0;
    (below + i128::from(up)) * unit
}
