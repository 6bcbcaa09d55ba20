//! How a verb ends: the exit codes, in one place, and the error that a person reads.

use std::fmt::Write as _;

use model::api::{ApiError, ErrorCode};

use super::text::printable;
use crate::client::{self, FileKind};

/// What the exit code says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It is done.
    Ok = 0,
    /// A fault of ours, or of the machine.
    Internal = 1,
    /// What was asked cannot be.
    Usage = 2,
    /// No such thing.
    NotFound = 3,
    /// It clashes with what is there.
    Conflict = 4,
    /// No credentials, or not for this.
    Denied = 5,
    /// Nobody answers.
    Unreachable = 6,
    /// Nothing free is left.
    Exhausted = 7,
    /// Something is not as it should be.
    Unwell = 8,
}

impl Exit {
    /// Every code, in order.
    pub const ALL: [Self; 9] = [
        Self::Ok,
        Self::Internal,
        Self::Usage,
        Self::NotFound,
        Self::Conflict,
        Self::Denied,
        Self::Unreachable,
        Self::Exhausted,
        Self::Unwell,
    ];

    /// What it means, for the help.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Ok => "done",
            Self::Internal => "a fault of Droveway or of the machine",
            Self::Usage => "the request is wrong: an option, a value, a combination",
            Self::NotFound => "no such network, host, endpoint, peer, tunnel, token, key or lab",
            Self::Conflict => "it exists already, overlaps, or is in use",
            Self::Denied => "no valid key or certificate, or not allowed",
            Self::Unreachable => "the server or the agent does not answer",
            Self::Exhausted => "no address or block is free",
            Self::Unwell => "`doctor` or `ipam check` found something",
        }
    }

    /// The code for a refusal of the API.
    pub fn of(code: ErrorCode) -> Self {
        match code {
            ErrorCode::Invalid | ErrorCode::TooLarge => Self::Usage,
            ErrorCode::TooSlow | ErrorCode::TooMany => Self::Unreachable,
            ErrorCode::Unauthenticated | ErrorCode::Forbidden => Self::Denied,
            ErrorCode::NotFound => Self::NotFound,
            ErrorCode::Conflict | ErrorCode::InUse | ErrorCode::Unreported | ErrorCode::Copied => {
                Self::Conflict
            }
            ErrorCode::Exhausted => Self::Exhausted,
            ErrorCode::Unavailable => Self::Unreachable,
            ErrorCode::Compacted | ErrorCode::Full | ErrorCode::Internal => Self::Internal,
        }
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// The part of the help that lists the codes.
pub(super) fn help() -> String {
    let mut text = String::from("Exit codes:\n");
    for exit in Exit::ALL {
        let _ = writeln!(text, "  {}  {}", exit as u8, exit.meaning());
    }
    text
}

/// Why a verb did not do what was asked: what happened, to what, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What happened, to what.
    pub message: String,
    /// What to do about it, where the message does not say it already.
    pub remedy: Option<String>,
    /// The request's id, which the server's log has, too.
    pub request: Option<String>,
}

impl Failure {
    /// A failure whose message says all.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), remedy: None, request: None }
    }

    /// The same with a remedy.
    #[must_use]
    pub fn remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }

    /// The lines for stderr.
    pub fn render(&self) -> String {
        let mut text = format!("error: {}\n", printable(&self.message));
        if let Some(remedy) = &self.remedy {
            let _ = writeln!(text, "  try: {}", printable(remedy));
        }
        if let Some(request) = &self.request {
            let _ = writeln!(text, "  request: {}", printable(request));
        }
        text
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        let failure = Self { request: error.request, ..Self::new(Exit::of(error.code), error.message) };
        match error.code {
            ErrorCode::Unauthenticated => failure.remedy(
                "--key-file (or DROVEWAY_KEY_FILE) must name a key of this server; admin.key in the server's --data-dir is one",
            ),
            ErrorCode::Unavailable => failure.remedy("again in a moment"),
            ErrorCode::Internal => failure.remedy("look at the server's log; this is a defect worth reporting"),
            ErrorCode::Invalid
            | ErrorCode::Forbidden
            | ErrorCode::NotFound
            | ErrorCode::Conflict
            | ErrorCode::InUse
            | ErrorCode::TooLarge
            | ErrorCode::TooSlow
            | ErrorCode::TooMany
            | ErrorCode::Exhausted
            | ErrorCode::Full
            | ErrorCode::Unreported
            | ErrorCode::Copied
            | ErrorCode::Compacted => failure,
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        let error = match error.downcast::<Self>() {
            Ok(failure) => return failure,
            Err(error) => error,
        };
        match error.downcast::<client::Error>() {
            Ok(error) => error.into(),
            Err(error) => Self::new(Exit::Internal, format!("{error:#}")),
        }
    }
}

impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Self {
        let message = error.to_string();
        match error {
            client::Error::Refused(refusal) => refusal.into(),
            client::Error::NoAgent { .. } => Self::new(Exit::Unreachable, message)
                .remedy("start the agent on this machine (`droveway agent --help`), or name its socket with --socket"),
            client::Error::Unreachable { .. } => Self::new(Exit::Unreachable, message).remedy(
                "check that `droveway server` runs there and that no firewall is between; another place is given by --server or DROVEWAY_SERVER",
            ),
            client::Error::Untrusted { source, .. } => Self::new(Exit::Denied, message).remedy(if source.other_ca {
                "if the server is the one you mean, copy ca.pem and admin.key anew from its --data-dir (--ca-file, --key-file)"
            } else {
                "check --server, and the clocks of both machines"
            }),
            client::Error::File { what, source, .. } => {
                let denied = source.kind() == std::io::ErrorKind::PermissionDenied;
                Self::new(Exit::Denied, message).remedy(match (what, denied) {
                    (FileKind::Socket, _) => "as root: the agent's socket is root's alone",
                    (FileKind::Key | FileKind::Ca, true) => {
                        "as root, or point DROVEWAY_KEY_FILE at a copy of admin.key that you may read, with ca.pem beside it"
                    }
                    (FileKind::Key, false) => {
                        "the server makes admin.key in its --data-dir at first start; on another machine, point DROVEWAY_KEY_FILE (or --key-file) at a copy, with ca.pem beside it"
                    }
                    (FileKind::Ca, false) => {
                        "the server makes ca.pem in its --data-dir at first start; put a copy beside the key file, or point DROVEWAY_CA_FILE (or --ca-file) at one"
                    }
                })
            }
            client::Error::Malformed { .. } => {
                Self::new(Exit::Usage, message).remedy("copy it anew from the server's --data-dir")
            }
            client::Error::Foreign { .. } => {
                Self::new(Exit::Internal, message).remedy("check that both ends are Droveway, and of the same version")
            }
            client::Error::Setup(_) => Self::new(Exit::Internal, message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_refusal_has_its_documented_exit_code() {
        let expected = [
            (ErrorCode::Invalid, 2),
            (ErrorCode::Unauthenticated, 5),
            (ErrorCode::Forbidden, 5),
            (ErrorCode::NotFound, 3),
            (ErrorCode::Conflict, 4),
            (ErrorCode::InUse, 4),
            (ErrorCode::TooLarge, 2),
            (ErrorCode::TooSlow, 6),
            (ErrorCode::TooMany, 6),
            (ErrorCode::Exhausted, 7),
            (ErrorCode::Full, 1),
            (ErrorCode::Unreported, 4),
            (ErrorCode::Copied, 4),
            (ErrorCode::Compacted, 1),
            (ErrorCode::Internal, 1),
            (ErrorCode::Unavailable, 6),
        ];
        for (code, exit) in expected {
            assert_eq!(Failure::from(ApiError::new(code, "x")).exit as u8, exit, "{code:?}");
        }
    }

    #[test]
    fn a_full_disk_is_no_defect_worth_reporting() {
        let refusal = ApiError::new(ErrorCode::Full, "the disk is full; make room");
        assert_eq!(Failure::from(refusal).render(), "error: the disk is full; make room\n");
    }

    #[test]
    fn a_refusal_keeps_its_exit_code_below_what_the_lab_says_of_it() {
        let refused = client::Error::Refused(ApiError::new(ErrorCode::NotFound, "no network"));
        let error = anyhow::Error::new(refused).context("h1/web");
        assert_eq!(Failure::from(error).exit, Exit::NotFound);
        assert_eq!(Failure::from(anyhow::anyhow!("no space left")).exit, Exit::Internal);
    }

    #[test]
    fn the_help_lists_the_codes_0_to_7_in_order() {
        let help = help();
        let codes: Vec<&str> =
            help.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(codes, ["0", "1", "2", "3", "4", "5", "6", "7", "8"]);
    }

    #[test]
    fn a_failure_is_an_error_line_and_a_line_that_says_what_to_do() {
        let failure =
            client::Error::Unreachable { at: "https://h:7443".into(), why: "Connection refused".into() };
        let text = Failure::from(failure).render();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "error: nothing answers at https://h:7443: Connection refused");
        assert!(lines[1].starts_with("  try: ") && lines[1].contains("DROVEWAY_SERVER"), "{text}");
        assert_eq!(lines.len(), 2);
    }

    #[test]
    fn a_refusal_names_the_request_that_the_log_of_the_server_has() {
        let refusal =
            ApiError { request: Some("ab12".into()), ..ApiError::new(ErrorCode::Conflict, "in use") };
        assert_eq!(Failure::from(refusal).render(), "error: in use\n  request: ab12\n");
    }

    #[test]
    fn a_message_cannot_drive_the_terminal() {
        let text = Failure::new(Exit::Conflict, "in use by \x1b[31mevil").render();
        assert!(!text.contains('\x1b'), "{text:?}");
    }
}
