//! Metrics as text, in Prometheus' format 0.0.4: what both processes answer at `/metrics`.
//!
//! Names follow Prometheus' conventions: base units (`_seconds`, `_bytes`), counters end in `_total`, ratios are from 0 to 1.
//! [`faults`] says where a text does not; the tests of both processes ask it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};

/// What such a text is called in `Content-Type`.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4";
/// Before every metric's name.
pub const PREFIX: &str = "droveway_";

/// A sample's value: counts are whole, whatever their size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// A whole number.
    Count(u64),
    /// Any other.
    Real(f64),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Real(real) => write!(f, "{real}"),
        }
    }
}

/// What kind of metric a family is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It only grows; its name ends in `_total`.
    Counter,
    /// It goes up and down.
    Gauge,
    /// Observations by size.
    Histogram,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// How long things took, in seconds.
#[derive(Debug, Clone)]
pub struct Histogram {
    /// Observations by the first bound that they are not above; the last are above all.
    counts: [u64; BOUNDS.len() + 1],
    sum: f64,
}

/// The upper bounds, seconds: from what a cache answers to what a person gives up on.
const BOUNDS: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0];

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: [0; BOUNDS.len() + 1], sum: 0.0 }
    }
}

impl Histogram {
    /// One more thing, which took that many seconds.
    pub fn observe(&mut self, seconds: f64) {
        let place = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        self.counts[place] += 1;
        self.sum += seconds;
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// A text that grows by families of samples.
#[derive(Debug, Default)]
pub struct Exposition {
    text: String,
}

impl Exposition {
    /// Begins a family; its samples follow.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {}", kind.as_str());
    }

    /// One sample of the family begun last.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: Value) {
        self.text.push_str(name);
        if !labels.is_empty() {
            let labels: Vec<String> =
                labels.iter().map(|(key, text)| format!("{key}=\"{}\"", escaped(text))).collect();
            let _ = write!(self.text, "{{{}}}", labels.join(","));
        }
        let _ = writeln!(self.text, " {value}");
    }

    /// A family of one sample without labels.
    pub fn single(&mut self, name: &str, kind: Kind, help: &str, value: Value) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    /// The samples of one histogram of the family begun last.
    pub fn histogram(&mut self, name: &str, labels: &[(&str, &str)], histogram: &Histogram) {
        let mut so_far = 0;
        let bounds = BOUNDS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (count, bound) in histogram.counts.iter().zip(bounds) {
            so_far += count;
            let labels: Vec<_> = labels.iter().copied().chain([("le", bound.as_str())]).collect();
            self.sample(&format!("{name}_bucket"), &labels, Value::Count(so_far));
        }
        self.sample(&format!("{name}_sum"), labels, Value::Real(histogram.sum));
        self.sample(&format!("{name}_count"), labels, Value::Count(so_far));
    }

    /// Adds a text that is whole itself.
    pub fn append(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// The whole text.
    pub fn finish(self) -> String {
        self.text
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Where a text breaks the format or the conventions of names; nothing for a good one.
pub fn faults(text: &str) -> Vec<String> {
    let mut kinds: BTreeMap<&str, &str> = BTreeMap::new();
    let (mut series, mut helped, mut found) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    let mut family = "";
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').unwrap_or((help, ""));
            if !helped.insert(name) {
                found.push(format!("{name} is described twice"));
            }
            if !words.ends_with('.') {
                found.push(format!("{name}: its help is no sentence"));
            }
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap_or((kind, ""));
            family = name;
            if !helped.contains(name) {
                found.push(format!("{name} has no help"));
            }
            if kinds.insert(name, kind).is_some() {
                found.push(format!("{name} begins twice"));
            }
            found.extend(name_faults(name, kind));
        } else {
            let (sample, value) = line.rsplit_once(' ').unwrap_or((line, ""));
            if !series.insert(sample) {
                found.push(format!("{sample} is there twice"));
            }
            let name = sample.split('{').next().unwrap_or_default();
            let parts = ["_bucket", "_sum", "_count"];
            let base = parts.iter().find_map(|part| name.strip_suffix(part)).filter(|base| *base == family);
            let histogram = kinds.get(family) == Some(&"histogram");
            if (if histogram { base.unwrap_or_default() } else { name }) != family {
                found.push(format!("{name} stands under {family:?}"));
            }
            if value.parse::<f64>().is_err() {
                found.push(format!("{sample}: {value:?} is no number"));
            }
        }
    }
    found
}

fn name_faults(name: &str, kind: &str) -> Vec<String> {
    let mut found = Vec::new();
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if !name.starts_with(PREFIX) || !name.bytes().all(plain) {
        found.push(format!("{name}: use {PREFIX} and a-z 0-9 _"));
    }
    if (kind == "counter") != name.ends_with("_total") {
        found.push(format!("{name}: counters, and they alone, end in _total"));
    }
    if kind == "histogram" && !name.ends_with("_seconds") {
        found.push(format!("{name}: its observations are seconds"));
    }
    let foreign = ["_ms", "_millis", "_milliseconds", "_us", "_kb", "_kib", "_mb", "_percent", "_permille"];
    if foreign.iter().any(|unit| name.trim_end_matches("_total").ends_with(unit)) {
        found.push(format!("{name}: use seconds, bytes or a ratio"));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_cannot_break_out_of_its_quotes() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }

    #[test]
    fn a_histogram_counts_all_that_are_not_above_each_bound() {
        let (mut histogram, mut text) = (Histogram::default(), Exposition::default());
        for seconds in [0.001, 0.002, 7.0, 100.0] {
            histogram.observe(seconds);
        }
        text.family("droveway_answer_seconds", Kind::Histogram, "How long answers took.");
        text.histogram("droveway_answer_seconds", &[("route", "/a")], &histogram);
        let text = text.finish();
        for line in [
            "droveway_answer_seconds_bucket{route=\"/a\",le=\"0.0005\"} 0",
            "droveway_answer_seconds_bucket{route=\"/a\",le=\"0.001\"} 1",
            "droveway_answer_seconds_bucket{route=\"/a\",le=\"5\"} 2",
            "droveway_answer_seconds_bucket{route=\"/a\",le=\"30\"} 3",
            "droveway_answer_seconds_bucket{route=\"/a\",le=\"+Inf\"} 4",
            "droveway_answer_seconds_sum{route=\"/a\"} 107.003",
            "droveway_answer_seconds_count{route=\"/a\"} 4",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} in\n{text}");
        }
        assert_eq!(faults(&text), [""; 0]);
        assert_eq!(histogram.count(), 4);
    }

    #[test]
    fn what_breaks_the_conventions_is_found() {
        let text =
            |name: &str, kind: &str| format!("# HELP {name} What it is.\n# TYPE {name} {kind}\n{name} 1\n");
        assert_eq!(faults(&text("droveway_hosts", "gauge")), [""; 0]);
        for (name, kind) in [
            ("droveway_requests", "counter"),
            ("droveway_hosts_total", "gauge"),
            ("droveway_age_ms", "gauge"),
            ("other_hosts", "gauge"),
            ("droveway_Hosts", "gauge"),
        ] {
            assert!(!faults(&text(name, kind)).is_empty(), "{name} {kind}");
        }
        let twice = text("droveway_hosts", "gauge") + "droveway_hosts 2\n";
        assert!(!faults(&twice).is_empty());
        assert!(!faults("# TYPE droveway_hosts gauge\ndroveway_hosts 1\n").is_empty(), "no help");
        assert!(!faults("droveway_hosts 1\n").is_empty(), "no type");
    }
}
