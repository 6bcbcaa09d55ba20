//! Figures: samples with their spread, rows of the final table, and the raw results on disk.

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
    measure: &'static str,
    figure: String,
    target: &'static str,
    verdict: Verdict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
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
        self.rows.push(Row {
            measure,
            figure,
            target,
            verdict: if ok { Verdict::Ok } else { Verdict::Miss },
        });
    }

    /// A figure for which no target was set.
    pub fn told(&mut self, measure: &'static str, figure: String) {
        self.rows.push(Row { measure, figure, target: "-", verdict: Verdict::Told });
    }

    /// A measure that could not be taken.
    pub fn failed(&mut self, measure: &'static str, why: &anyhow::Error) {
        eprintln!("bench: {measure}: {why:#}");
        self.rows.push(Row {
            measure,
            figure: "not measured".to_owned(),
            target: "",
            verdict: Verdict::NotMeasured,
        });
    }

    /// Keeps raw results as `NAME.json`.
    pub fn keep(&self, name: &str, raw: &impl Serialize) -> Result<()> {
        let path = self.dir.join(format!("{name}.json"));
        fs::write(&path, serde_json::to_vec_pretty(raw)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// The table, on standard output and as `summary.json`.
    pub fn print(&self) -> Result<()> {
        self.keep("summary", &self.rows)?;
        let row = |cells: [&str; 4]| {
            let [measure, figure, target, verdict] = cells;
            println!("{measure:<44} {figure:<40} {target:<12} {verdict}");
        };
        println!();
        row(["measure", "figure", "target", "verdict"]);
        for Row { measure, figure, target, verdict } in &self.rows {
            let verdict = match verdict {
                Verdict::Ok => "ok",
                Verdict::Miss => "MISS",
                Verdict::NotMeasured => "NOT MEASURED",
                Verdict::Told => "",
            };
            row([measure, figure, target, verdict]);
        }
        let judged = self.rows.iter().filter(|row| row.verdict != Verdict::Told);
        let (all, met) = (judged.clone().count(), judged.filter(|row| row.verdict == Verdict::Ok).count());
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
