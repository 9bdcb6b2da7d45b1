//! The metrics that a person reads while a run goes on, of all that metrics.jsonl has.

use super::metrics::MetricsLine;

/// A metric on the console.
struct ShownMetric {
    key: &'static str,
    label: &'static str,
    form: MetricForm,
}

enum MetricForm {
    /// With so many digits behind the point.
    Digits(usize),
    Percent,
    /// The share that is missing from 1, in percent.
    Rest,
    Exponent,
}

const fn shown(key: &'static str, label: &'static str, form: MetricForm) -> ShownMetric {
    ShownMetric { key, label, form }
}

/// Responses of a policy: their loss says nothing of how good they are.
const OF_RESPONSES: [ShownMetric; 6] = [
    shown("reward", "reward", MetricForm::Digits(3)),
    shown("kl", "KL", MetricForm::Digits(2)),
    shown("entropy", "ent", MetricForm::Digits(2)),
    shown("response_tokens", "len", MetricForm::Digits(0)),
    shown("clip_fraction", "clip", MetricForm::Percent),
    shown("eos_fraction", "cut", MetricForm::Rest),
];

/// Compared completions.
const OF_PREFERENCES: [ShownMetric; 5] = [
    shown("loss", "loss", MetricForm::Digits(4)),
    shown("accuracy", "accuracy", MetricForm::Percent),
    shown("margin", "margin", MetricForm::Digits(3)),
    shown("rewards_chosen", "chosen", MetricForm::Digits(3)),
    shown("rewards_rejected", "rejected", MetricForm::Digits(3)),
];

const OF_TEXT: [ShownMetric; 2] =
    [shown("loss", "loss", MetricForm::Digits(4)), shown("lr", "lr", MetricForm::Exponent)];

impl ShownMetric {
    fn text(&self, x: f64) -> String {
        let number = match self.form {
            MetricForm::Digits(digits) => format!("{x:.digits$}"),
            MetricForm::Percent => format!("{:.0}%", 100.0 * x),
            MetricForm::Rest => format!("{:.0}%", 100.0 * (1.0 - x)),
            MetricForm::Exponent => format!("{x:.1e}"),
        };
        format!("{} {number}", self.label)
    }
}

/// Whether a line is of responses that a policy sampled.
pub fn is_of_responses(line: &MetricsLine) -> bool {
    line.get("response_tokens").is_some()
}

/// The metrics of a line, as a person reads them: `loss 2.1934  lr 3.0e-4`. Which they are follows from what the line has.
pub fn metrics(line: &MetricsLine) -> String {
    let has = |key: &str| line.get(key).is_some();
    let list: &[ShownMetric] = match line {
        _ if is_of_responses(line) => &OF_RESPONSES,
        _ if has("accuracy") || has("margin") => &OF_PREFERENCES,
        _ => &OF_TEXT,
    };
    let parts: Vec<String> = list.iter().filter_map(|m| Some(m.text(line.get(m.key)?))).collect();
    parts.join("  ")
}

/// A sample on one line: the end of its prompt, and the beginning of its response.
pub fn sample(line: &MetricsLine) -> String {
    let words = |key: &str| line.text_of(key).split_whitespace().collect::<Vec<_>>().join(" ");
    let (prompt, response) = (words("prompt"), words("response"));
    let skipped = prompt.chars().count().saturating_sub(30);
    let (before, end): (&str, String) =
        (if skipped > 0 { "..." } else { "" }, prompt.chars().skip(skipped).collect());
    let begin: String = response.chars().take(60).collect();
    let after = if begin.len() < response.len() { "..." } else { "" };
    format!("{before}{} -> {}{after}", end.trim_start(), begin.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_one_short_line() {
        let line = MetricsLine::new("sample", 3).text("prompt", "What is\n2 + 2?").text("response", "4\n");
        assert_eq!(sample(&line), "What is 2 + 2? -> 4");
        let line = line.text("prompt", &"a ".repeat(40)).text("response", &"b ".repeat(80));
        assert!(sample(&line).starts_with("...a a") && sample(&line).ends_with("b..."), "{}", sample(&line));
    }

    #[test]
    fn each_stage_shows_its_own() {
        let line =
            MetricsLine::new("train", 1).float("loss", 2.19342).float("lr", 3e-4).float("grad_norm", 1.0);
        assert_eq!(metrics(&line), "loss 2.1934  lr 3.0e-4");
        let line =
            MetricsLine::new("train", 1).float("loss", 0.6).float("accuracy", 0.614).float("margin", 0.25);
        assert_eq!(metrics(&line), "loss 0.6000  accuracy 61%  margin 0.250");
        let line = MetricsLine::new("train", 1)
            .float("loss", 0.1)
            .float("reward", 0.5)
            .float("kl", 0.0123)
            .float("response_tokens", 56.5)
            .float("eos_fraction", 0.75);
        assert_eq!(metrics(&line), "reward 0.500  KL 0.01  len 56  cut 25%");
    }
}
