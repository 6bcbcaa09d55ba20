//! Bars, as SVG 1.1 by hand: a panel for each measure, a bar for each way, its median in figures and its quartiles as a line.

use std::fmt::Write;

use crate::turns::{OURS, Row, VXLAN, short};

const WIDTH: u32 = 960;
const PANEL: u32 = WIDTH / 2;
const LABEL: u32 = 132;
const LINE: u32 = 20;
/// Above the bars of a panel, and below.
const HEAD: u32 = 34;
const FOOT: u32 = 14;
/// The longest bar, with room for its figure.
const LONGEST: f64 = (PANEL - LABEL - 110) as f64;

/// A plot of all rows under a title.
pub fn bars(title: &str, rows: &[Row]) -> String {
    let panel = HEAD + LINE * rows.iter().map(|row| row.ways.len() as u32).max().unwrap_or(0) + FOOT;
    let height = 56 + panel * (rows.len() as u32).div_ceil(2) + 24;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"Helvetica, Arial, sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"16\" y=\"30\" font-size=\"17\" font-weight=\"bold\">{}</text>\n",
        escaped(title)
    );
    for (row, n) in rows.iter().zip(0..) {
        let _ = writeln!(svg, "<g transform=\"translate({},{})\">", n % 2 * PANEL, 56 + n / 2 * panel);
        draw(&mut svg, row);
        svg.push_str("</g>\n");
    }
    let note = "Medians; lines from the first to the third quartile.";
    let _ = writeln!(svg, "<text x=\"16\" y=\"{}\" fill=\"#666\">{note}</text>\n</svg>", height - 12);
    svg
}

fn draw(svg: &mut String, row: &Row) {
    let better = if row.more_is_better { "more is better" } else { "less is better" };
    let _ = writeln!(
        svg,
        "<text x=\"16\" y=\"20\"><tspan font-weight=\"bold\">{}</tspan><tspan fill=\"#666\">, {}; {better}</tspan></text>",
        escaped(row.measure),
        escaped(row.unit)
    );
    let measured = row.ways.iter().filter(|cell| cell.why.is_none());
    let most = measured.map(|cell| cell.samples().quantile(0.75)).fold(f64::MIN_POSITIVE, f64::max);
    for (cell, n) in row.ways.iter().zip(0..) {
        let (top, middle) = (HEAD + n * LINE, HEAD + n * LINE + LINE / 2);
        let base = middle + 4;
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{base}\" text-anchor=\"end\">{}</text>",
            LABEL - 6,
            escaped(&cell.way)
        );
        if cell.why.is_some() {
            let _ = writeln!(svg, "<text x=\"{LABEL}\" y=\"{base}\" fill=\"#999\">not measured</text>");
            continue;
        }
        let samples = cell.samples();
        let [low, median, high] = [0.25, 0.5, 0.75].map(|share| samples.quantile(share) / most * LONGEST);
        let colour = match cell.way.as_str() {
            OURS => "#1f6f8b",
            VXLAN => "#8a8a8a",
            way if way.starts_with(OURS) => "#6fb1c6",
            _ => "#d9a15b",
        };
        let left = f64::from(LABEL);
        let _ = writeln!(
            svg,
            "<rect x=\"{LABEL}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"{colour}\"/>\n\
             <path d=\"M{:.1} {middle}H{:.1}\" stroke=\"#222\"/>\n\
             <text x=\"{:.1}\" y=\"{base}\">{}</text>",
            top + 3,
            median.max(0.5),
            LINE - 6,
            left + low,
            left + high,
            left + high.max(median) + 6.0,
            short(samples.median())
        );
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
