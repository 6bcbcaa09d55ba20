//! Where answers go: objects as table, JSON or YAML on stdout; remarks for people on stderr.
//!
//! Invariant: with `-o json` or `-o yaml`, stdout holds the API's objects and nothing else.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use super::exit::{Exit, Failure};
use super::table::{Details, Table};

/// How objects are printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people; cut to the terminal's width.
    #[default]
    Table,
    /// The API's objects, for programs.
    Json,
    /// The same as YAML.
    Yaml,
}

/// Prints.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    format: Format,
    width: Option<usize>,
}

impl Output {
    pub(crate) fn new(format: Format) -> Self {
        Self { format, width: terminal_width() }
    }

    /// How objects are printed.
    pub(super) fn format(self) -> Format {
        self.format
    }

    /// Prints a list: its objects, or a row for each. `none` says on stderr that there is none, and what would make one.
    pub(crate) fn list<T: Serialize>(
        self,
        objects: &[T],
        table: impl FnOnce(&[T]) -> Table,
        none: &str,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table => {
                write(&table(objects).render(self.width))?;
                if objects.is_empty() {
                    self.remark(none);
                }
                Ok(())
            }
            Format::Json | Format::Yaml => self.objects(&objects),
        }
    }

    /// Prints what is known of some objects: a list of them, or a paragraph for each.
    pub(super) fn inspect<T: Serialize>(
        self,
        objects: &[T],
        details: impl Fn(&T) -> Details,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table => {
                let paragraphs: Vec<String> = objects.iter().map(|object| details(object).render()).collect();
                write(&paragraphs.join("\n"))
            }
            Format::Json | Format::Yaml => self.objects(&objects),
        }
    }

    /// Prints one object: itself, or some text about it.
    pub(crate) fn object<T: Serialize>(
        self,
        object: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table => write(&text(object)),
            Format::Json | Format::Yaml => self.objects(object),
        }
    }

    /// Prints a line that tells a person that something was done.
    pub(super) fn done(self, line: &str) -> Result<(), Failure> {
        match self.format {
            Format::Table => write(&format!("{line}\n")),
            Format::Json | Format::Yaml => Ok(()),
        }
    }

    /// Says something beside the answer.
    pub(super) fn remark(self, line: &str) {
        if self.format == Format::Table {
            warn(&format!("{line}\n"));
        }
    }

    fn objects<T: Serialize + ?Sized>(self, objects: &T) -> Result<(), Failure> {
        let text = match self.format {
            Format::Yaml => serde_yaml_ng::to_string(objects).map_err(|error| error.to_string()),
            Format::Json | Format::Table => serde_json::to_string_pretty(objects)
                .map(|text| text + "\n")
                .map_err(|error| error.to_string()),
        };
        write(
            &text
                .map_err(|error| Failure::new(Exit::Internal, format!("cannot print the answer: {error}")))?,
        )
    }
}

/// Writes to stdout. A reader that has enough (`| head`) is no error.
pub(crate) fn write(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Internal, format!("cannot write to standard output: {error}")))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Writes to stderr; where that fails, there is nobody to tell.
pub(crate) fn warn(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// The width to keep to: the terminal's, else what COLUMNS says; none where stdout is no terminal.
fn terminal_width() -> Option<usize> {
    if !io::stdout().is_terminal() {
        return None;
    }
    let asked = terminal_size::terminal_size_of(io::stdout()).map(|(width, _)| usize::from(width.0));
    let told = || std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    asked.or_else(told).filter(|width| *width > 0)
}
