//! Figures: samples with their spread, rows of the final table, and the raw results on disk.

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

/// Samples of one measure, sorted.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// The smallest value that is not below `share` of all: 0.5 is the median, 1.0 the maximum.
    #[expect(clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a share of a small count")]
    pub fn quantile(&self, share: f64) -> f64 {
        let rank = (share * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub fn p99(&self) -> f64 {
        self.quantile(0.99)
    }

    pub fn min(&self) -> f64 {
        self.quantile(0.0)
    }

    pub fn max(&self) -> f64 {
        self.quantile(1.0)
    }
}

impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (min, p50, p99, max) = (self.min(), self.median(), self.p99(), self.max());
        write!(f, "min {min:.2}  p50 {p50:.2}  p99 {p99:.2}  max {max:.2}  (n={})", self.0.len())
    }
}

/// A row of the final table.
#[derive(Debug, Serialize)]
pub struct Row {
    measure: Cow<'static, str>,
    figure: String,
    target: Cow<'static, str>,
    verdict: Verdict,
}

/// What a figure must reach, and is hoped to.
#[derive(Debug, Clone, Copy)]
pub struct Bar {
    pub must: f64,
    pub aim: f64,
    /// Whether more is better.
    pub more: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Aim,
    Ok,
    Miss,
    NotMeasured,
    Told,
}

/// What was found, and where the raw results go.
#[derive(Debug)]
pub struct Report {
    dir: PathBuf,
    rows: Vec<Row>,
}

impl Report {
    pub fn new(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self { dir, rows: Vec::new() })
    }

    /// A figure that has a target.
    pub fn judged(&mut self, measure: &'static str, figure: String, target: &'static str, ok: bool) {
        let verdict = if ok { Verdict::Ok } else { Verdict::Miss };
        self.rows.push(Row { measure: measure.into(), figure, target: target.into(), verdict });
    }

    /// A figure that must reach something, and is hoped to reach more.
    pub fn barred(&mut self, measure: impl Into<Cow<'static, str>>, figure: String, value: f64, bar: Bar) {
        let Bar { must, aim, more } = bar;
        let reaches = |least: f64| if more { value >= least } else { value <= least };
        let verdict = match (reaches(must), reaches(aim)) {
            (true, true) => Verdict::Aim,
            (true, false) => Verdict::Ok,
            (false, _) => Verdict::Miss,
        };
        let sign = if more { ">=" } else { "<=" };
        let target = format!("{sign} {must}, aim {aim}").into();
        self.rows.push(Row { measure: measure.into(), figure, target, verdict });
    }

    /// A figure for which no target was set.
    pub fn told(&mut self, measure: impl Into<Cow<'static, str>>, figure: String) {
        let (measure, target) = (measure.into(), "-".into());
        self.rows.push(Row { measure, figure, target, verdict: Verdict::Told });
    }

    /// A measure that could not be taken.
    pub fn failed(&mut self, measure: impl Into<Cow<'static, str>>, why: &anyhow::Error) {
        let measure = measure.into();
        eprintln!("bench: {measure}: {why:#}");
        let (figure, target) = ("not measured".to_owned(), "".into());
        self.rows.push(Row { measure, figure, target, verdict: Verdict::NotMeasured });
    }

    /// Keeps raw results as `NAME.json`.
    pub fn keep(&self, name: &str, raw: &impl Serialize) -> Result<()> {
        self.keep_text(&format!("{name}.json"), &serde_json::to_string_pretty(raw)?)
    }

    /// Keeps a file beside them.
    pub fn keep_text(&self, name: &str, text: &str) -> Result<()> {
        let path = self.dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// The table, on standard output and as `summary.json`.
    pub fn print(&self) -> Result<()> {
        self.keep("summary", &self.rows)?;
        let row = |cells: [&str; 4]| {
            let [measure, figure, target, verdict] = cells;
            println!("{measure:<52} {figure:<50} {target:<18} {verdict}");
        };
        println!();
        row(["measure", "figure", "target", "verdict"]);
        for Row { measure, figure, target, verdict } in &self.rows {
            let verdict = match verdict {
                Verdict::Aim => "met, and the aim",
                Verdict::Ok => "met",
                Verdict::Miss => "MISSED",
                Verdict::NotMeasured => "NOT MEASURED",
                Verdict::Told => "",
            };
            row([measure, figure, target, verdict]);
        }
        let judged = self.rows.iter().filter(|row| row.verdict != Verdict::Told);
        let (all, met) = (
            judged.clone().count(),
            judged.filter(|row| matches!(row.verdict, Verdict::Aim | Verdict::Ok)).count(),
        );
        println!();
        match all - met {
            0 => println!("All {all} targets are met."),
            missed => println!("{missed} of {all} targets are NOT met on this machine in this run."),
        }
        println!("Raw results: {}", shown(&self.dir));
        Ok(())
    }
}

fn shown(dir: &Path) -> String {
    dir.canonicalize().unwrap_or_else(|_| dir.to_owned()).display().to_string()
}
