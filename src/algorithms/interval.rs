//! Intervals of what was counted.

/// The 95 % interval of a share (Wilson 1927), which also holds near 0 and 1; none without trials.
pub fn wilson(successes: u64, trials: u64) -> Option<[f64; 2]> {
    let (n, z) = (trials as f64, 1.959964);
    let p = successes as f64 / n;
    let middle = p + z * z / (2.0 * n);
    let half = z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + z * z / n;
    (trials > 0).then(|| [((middle - half) / scale).max(0.0), ((middle + half) / scale).min(1.0)])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of the published formula, evaluated apart in Python.
    #[test]
    fn intervals_are_wilsons() {
        for (successes, trials, low, high) in
            [(0, 10, 0.0, 0.277533), (5, 10, 0.236593, 0.763407), (950, 1000, 0.934686, 0.961870)]
        {
            let [a, b] = wilson(successes, trials).unwrap();
            assert!((a - low).abs() < 2e-6 && (b - high).abs() < 2e-6, "{a} {b}");
        }
        assert_eq!(wilson(0, 0), None);
    }
}
