//! Several ways that take turns: what each reached, medians and quartiles, ratios, and whether these are as they must be.
//!
//! Machines differ from minute to minute, so a ratio is the median of the rounds' own ratios, and within a round all ways are
//! measured one right after the other, another one first each time.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;

use crate::figures::{Bar, Report, Samples};
use crate::measure::{Ends, Measure};
use crate::plot;

/// Our way, where it is judged.
pub const OURS: &str = "Droveway";
/// The kernel's, in clear: what all are compared with.
pub const VXLAN: &str = "kernel VXLAN";

/// What a figure of ours must reach, and is hoped to.
pub struct Target {
    pub measure: &'static str,
    /// The way whose figure it is compared with; none: it is judged by itself.
    pub of: Option<&'static str>,
    pub must: f64,
    pub aim: f64,
}

/// What all ways reached in one measure.
#[derive(Debug, Serialize)]
pub struct Row {
    pub measure: &'static str,
    pub unit: &'static str,
    pub more_is_better: bool,
    pub ways: Vec<Cell>,
}

/// What one way reached, round by round.
#[derive(Debug, Serialize)]
pub struct Cell {
    pub way: String,
    pub figures: Vec<f64>,
    /// Why there are no figures.
    pub why: Option<String>,
}

impl Cell {
    pub fn samples(&self) -> Samples {
        Samples::of(self.figures.clone())
    }
}

impl Row {
    fn cell(&self, way: &str) -> Option<&Cell> {
        self.ways.iter().find(|cell| cell.way == way && cell.why.is_none())
    }

    /// The median and quartiles of the rounds' ratios of one way to another.
    pub fn ratio(&self, way: &str, of: &str) -> Option<Samples> {
        let (way, of) = (self.cell(way)?, self.cell(of)?);
        Some(Samples::of(way.figures.iter().zip(&of.figures).map(|(way, of)| way / of).collect()))
    }
}

/// Takes each measure of each way, in turns. A way that fails once is not tried again: that may have taken long.
pub fn take<'a>(
    ways: &[(String, Ends<'_>)],
    measures: impl IntoIterator<Item = &'a Measure>,
    rounds: u32,
    seconds: u32,
) -> Vec<Row> {
    let row = |measure: &'a Measure| {
        let cell = |(way, _): &(String, Ends<'_>)| Cell { way: way.clone(), figures: Vec::new(), why: None };
        let mut cells: Vec<Cell> = ways.iter().map(cell).collect();
        for round in 0..rounds as usize {
            for turn in 0..ways.len() {
                let who = (round + turn) % ways.len();
                let cell = &mut cells[who];
                if cell.why.is_some() {
                    continue;
                }
                match (measure.run)(&ways[who].1, seconds) {
                    Ok(figure) => cell.figures.push(figure),
                    Err(why) => cell.why = Some(why),
                }
            }
        }
        let Measure { name, unit, more_is_better, .. } = *measure;
        let row = Row { measure: name, unit, more_is_better, ways: cells };
        show(&row);
        row
    };
    measures.into_iter().map(row).collect()
}

/// One measure as a small table.
pub fn show(row: &Row) {
    println!("  {}, {}", row.measure, row.unit);
    for cell in &row.ways {
        let way = &cell.way;
        if let Some(why) = &cell.why {
            println!("    {way:<24} not measured: {why}");
            continue;
        }
        let mut line = format!("    {way:<24} {:<26}", spread(&cell.samples()));
        if let Some(ratio) = row.ratio(way, VXLAN).filter(|_| way != VXLAN) {
            let _ = write!(line, "  {} of VXLAN's", spread(&ratio));
        }
        if let Some(ratio) = row.ratio(OURS, way).filter(|_| way != VXLAN && way != OURS) {
            let _ = write!(line, "; ours is {:.2} of it", ratio.median());
        }
        println!("{}", line.trim_end());
    }
}

/// A median, and between which figures half of all are.
fn spread(samples: &Samples) -> String {
    let [low, median, high] = [0.25, 0.5, 0.75].map(|share| short(samples.quantile(share)));
    format!("{median} ({low} to {high})")
}

/// Three digits that count.
pub fn short(value: f64) -> String {
    match value {
        _ if value >= 99.95 => format!("{value:.0}"),
        _ if value >= 9.995 => format!("{value:.1}"),
        _ if value >= 0.095 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Judges what was taken, and keeps it as JSON and as a plot.
pub fn tell(
    name: &'static str,
    title: &str,
    rows: &[Row],
    targets: &[Target],
    report: &mut Report,
) -> Result<()> {
    for target in targets {
        let Some(row) = rows.iter().find(|row| row.measure == target.measure) else { continue };
        let own = row.cell(OURS).map(Cell::samples);
        let judged = match target.of {
            Some(of) => row.ratio(OURS, of),
            None => own.clone(),
        };
        let what = match target.of {
            Some(of) => format!("{name}: {} × {of}", row.measure),
            None => format!("{name}: {}, {}", row.measure, row.unit),
        };
        let (Some(own), Some(judged)) = (own, judged) else {
            let why =
                row.ways.iter().find_map(|cell| cell.why.clone()).unwrap_or("one of them is not here".into());
            report.failed(what, &anyhow::anyhow!(why));
            continue;
        };
        let figure = match target.of {
            Some(_) => format!("{}; median {} {}", spread(&judged), short(own.median()), row.unit),
            None => spread(&judged),
        };
        let Target { must, aim, .. } = *target;
        report.barred(what, figure, judged.median(), Bar { must, aim, more: row.more_is_better });
    }
    report.keep(name, &serde_json::json!({ "machine": crate::machine(), "rows": rows }))?;
    report.keep_text(&format!("{name}.svg"), &plot::bars(title, rows))
}
