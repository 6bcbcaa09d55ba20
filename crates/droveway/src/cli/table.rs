//! Tables that fit.
//!
//! Invariant: no line is wider than the width given, whatever is in it; with no width, nothing is cut.

use std::fmt::Write as _;

use super::text::printable;

const GAP: usize = 2;
/// A column is not cut below this while another is wider; a firm one not below the second.
const LEAST: (usize, usize) = (3, 5);

/// Rows under a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    header: Vec<&'static str>,
    firm: &'static [&'static str],
    rows: Vec<Row>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    cells: Vec<String>,
    /// Said below the row, in lines of its own.
    notes: Vec<String>,
}

impl Table {
    /// A table of these columns. Those that are `firm` are cut only when the others have given all they can.
    pub(crate) fn new<const N: usize>(header: [&'static str; N], firm: &'static [&'static str]) -> Self {
        debug_assert!(
            firm.iter().all(|column| header.contains(column)),
            "{firm:?} must be columns of {header:?}"
        );
        Self { header: header.to_vec(), firm, rows: Vec::new() }
    }

    /// Adds a row. An empty cell shows as `-`.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.header.len());
        let cell =
            |text: String| if text.is_empty() { "-".to_owned() } else { printable(&text).replace('\n', " ") };
        self.rows.push(Row { cells: cells.map(cell).into(), notes: Vec::new() });
    }

    /// Says something below the last row, wrapped where it does not fit.
    pub(super) fn note(&mut self, text: &str) {
        if let Some(row) = self.rows.last_mut() {
            row.notes.push(printable(text).replace('\n', " "));
        }
    }

    /// The table as text, each line at most `width` characters.
    pub(super) fn render(&self, width: Option<usize>) -> String {
        let mut widths: Vec<usize> = self.header.iter().map(|text| length(text)).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(&row.cells) {
                *width = (*width).max(length(cell));
            }
        }
        if let Some(width) = width {
            let firm: Vec<bool> = self.header.iter().map(|column| self.firm.contains(column)).collect();
            shrink(&mut widths, &firm, width);
        }
        let header = self.header.iter().map(|text| (*text).to_owned()).collect();
        let header = Row { cells: header, notes: Vec::new() };
        let mut text = String::new();
        for row in std::iter::once(&header).chain(&self.rows) {
            let mut line = String::new();
            for (cell, width) in row.cells.iter().zip(&widths) {
                let cell = cut(cell, *width);
                line.push_str(&cell);
                line.extend(std::iter::repeat_n(' ', width + GAP - length(&cell)));
            }
            let line = line.trim_end();
            text.push_str(&width.map_or_else(|| line.to_owned(), |width| cut(line, width)));
            text.push('\n');
            for line in row.notes.iter().flat_map(|note| wrap(note, width)) {
                text.push_str(&line);
                text.push('\n');
            }
        }
        text
    }
}

/// Takes from the widest column, one by one, until the line fits or nothing useful can be taken: first from those that
/// are not firm.
fn shrink(widths: &mut [usize], firm: &[bool], width: usize) {
    let gaps = GAP * widths.len().saturating_sub(1);
    for (which, least) in [(false, LEAST.0), (true, LEAST.1)] {
        while widths.iter().sum::<usize>() + gaps > width {
            let candidates = widths.iter_mut().zip(firm).filter(|(_, firm)| **firm == which);
            match candidates.map(|(width, _)| width).max() {
                Some(widest) if *widest > least => *widest -= 1,
                Some(_) | None => break,
            }
        }
    }
}

/// Lines of words, indented; a word that is wider than a line is cut.
fn wrap(text: &str, width: Option<usize>) -> Vec<String> {
    const INDENT: &str = "  ";
    let mut lines = vec![INDENT.to_owned()];
    for word in text.split_whitespace() {
        let Some(line) = lines.last_mut() else { break };
        let begun = line != INDENT;
        let more = length(word) + usize::from(begun);
        if begun && width.is_some_and(|width| length(line) + more > width) {
            lines.push(format!("{INDENT}{word}"));
        } else {
            line.push_str(if begun { " " } else { "" });
            line.push_str(word);
        }
    }
    match width {
        Some(width) => lines.iter().map(|line| cut(line, width)).collect(),
        None => lines,
    }
}

fn cut(text: &str, width: usize) -> String {
    if length(text) <= width {
        text.to_owned()
    } else if width == 0 {
        String::new()
    } else {
        text.chars().take(width - 1).chain(['…']).collect()
    }
}

fn length(text: &str) -> usize {
    text.chars().count()
}

/// One object, a line for each of its properties: `Label:  value`; a value of several lines stays in its column.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Details(Vec<(&'static str, String)>);

impl Details {
    /// Adds a property; one without a value is left out.
    pub(super) fn add(&mut self, label: &'static str, value: impl Into<String>) -> &mut Self {
        let value = value.into();
        if !value.is_empty() {
            self.0.push((label, printable(&value)));
        }
        self
    }

    pub(super) fn render(&self) -> String {
        let column = self.0.iter().map(|(label, _)| length(label)).max().unwrap_or_default() + 1 + GAP;
        let mut text = String::new();
        for (label, value) in &self.0 {
            for (index, line) in value.lines().enumerate() {
                let label = if index == 0 { format!("{label}:") } else { String::new() };
                let _ = writeln!(text, "{label:column$}{line}");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(["NAME", "SUBNET", "LABELS"], &["NAME"]);
        table.row(["managed".into(), "10.42.0.0/16".into(), "zone=north-of-the-river,rack=seventeen".into()]);
        table.row(["red".into(), String::new(), "x=\x1b[31my".into()]);
        table
    }

    #[test]
    fn without_a_width_nothing_is_cut() {
        let text = table().render(None);
        let expected = "NAME     SUBNET        LABELS\n\
                        managed  10.42.0.0/16  zone=north-of-the-river,rack=seventeen\n\
                        red      -             x=\u{fffd}[31my\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn the_widest_column_gives_way_first_and_a_firm_one_last() {
        let line = |width| table().render(Some(width)).lines().nth(1).unwrap().to_owned();
        assert_eq!(line(40), "managed  10.42.0.0/16  zone=north-of-th…");
        assert_eq!(length(&line(40)), 40);
        assert_eq!(line(21), "managed  10.4…  zone…");
        assert_eq!(line(16), "manag…  10…  zo…");
    }

    #[test]
    fn no_line_is_wider_than_any_width_given() {
        for width in 1..120 {
            let text = table().render(Some(width));
            assert_eq!(text.lines().count(), 3, "no row is wrapped or lost");
            assert!(text.lines().all(|line| length(line) <= width), "{width}:\n{text}");
        }
    }

    #[test]
    fn a_note_stands_below_its_row_in_lines_that_fit() {
        let mut table = table();
        table.note("a note of some words that do not fit into one line, and averyveryverylongword");
        assert_eq!(table.render(None).lines().count(), 4);
        let text = table.render(Some(24));
        let notes: Vec<&str> = text.lines().skip(3).collect();
        assert_eq!(notes[0], "  a note of some words");
        assert_eq!(notes.last(), Some(&"  averyveryverylongword"));
        for width in 1..60 {
            assert!(table.render(Some(width)).lines().all(|line| length(line) <= width), "{width}");
        }
    }

    #[test]
    fn details_line_up_and_empty_ones_are_left_out() {
        let mut details = Details::default();
        details.add("Name", "red").add("MTU", "").add("Blocks", "10.0.0.0/26\n10.0.0.64/26");
        assert_eq!(details.render(), "Name:    red\nBlocks:  10.0.0.0/26\n         10.0.0.64/26\n");
    }
}
