//! What can go wrong with the kernel, said so that a person knows what was tried, what the kernel said and what to do.

use std::fmt;
use std::io;

use nix::errno::Errno;
use plan::Step;
use plan::object::{Key, Place};

/// The kernel, or a program that configures it, refused.
#[derive(Debug, thiserror::Error)]
#[error("{attempted}: {said}{}", Remedy(*.remedy))]
pub struct Error {
    /// What was tried, as in `open namespace /run/netns/x`.
    pub attempted: String,
    /// What the kernel, or the program, said to it.
    pub said: String,
    /// The error number, where there is one.
    pub errno: Option<Errno>,
    /// What to do about it, where that is known.
    pub remedy: Option<&'static str>,
}

/// A step that could not be applied.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}: {source}")]
pub struct StepError {
    /// The step, as in `add route 10.42.0.64/26 of router n-abcdefghij`.
    pub step: String,
    /// Why.
    pub source: Error,
}

struct Remedy(Option<&'static str>);

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl Error {
    pub(crate) fn errno(attempted: impl Into<String>, errno: Errno) -> Self {
        Self::kernel(attempted, errno, None)
    }

    /// An error number with what the kernel added in words (`NLMSGERR_ATTR_MSG`).
    pub(crate) fn kernel(attempted: impl Into<String>, errno: Errno, words: Option<String>) -> Self {
        let said = match words {
            Some(words) if !words.is_empty() => format!("{} ({words})", errno.desc()),
            Some(_) | None => errno.desc().to_owned(),
        };
        Self { attempted: attempted.into(), said, errno: Some(errno), remedy: remedy(errno) }
    }

    pub(crate) fn io(attempted: impl Into<String>, error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(number) => Self::errno(attempted, Errno::from_raw(number)),
            None => Self::words(attempted, error.to_string()),
        }
    }

    pub(crate) fn words(attempted: impl Into<String>, said: impl Into<String>) -> Self {
        Self { attempted: attempted.into(), said: said.into(), errno: None, remedy: None }
    }

    /// Whether the same may go well another time: something was not there yet, or short.
    pub fn is_passing(&self) -> bool {
        use Errno::{EAGAIN, EBUSY, EINTR, EMFILE, ENFILE, ENOBUFS, ENODEV, ENOMEM};
        self.errno.is_some_and(|errno| {
            matches!(errno, EAGAIN | EBUSY | EINTR | EMFILE | ENFILE | ENOBUFS | ENODEV | ENOMEM)
        })
    }

    pub(crate) fn with_remedy(mut self, remedy: &'static str) -> Self {
        self.remedy = Some(remedy);
        self
    }

    pub(crate) fn is(&self, errno: Errno) -> bool {
        self.errno == Some(errno)
    }
}

fn remedy(errno: Errno) -> Option<&'static str> {
    match errno {
        Errno::EPERM | Errno::EACCES => Some("this needs root, or CAP_NET_ADMIN in this user namespace"),
        Errno::EMFILE => Some("raise the limit of open files (LimitNOFILE= in the systemd unit)"),
        Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS => {
            Some("the machine is out of memory or file handles")
        }
        _ => None,
    }
}

impl StepError {
    pub(crate) fn new(step: &Step, source: Error) -> Self {
        Self { step: describe(step), source }
    }
}

/// The step as a person would say it.
pub(crate) fn describe(step: &Step) -> String {
    match step {
        Step::Remove(place, key) => format!("remove {} of {}", Named(key), At(place)),
        Step::Add(place, key, _) => format!("add {} to {}", Named(key), At(place)),
        Step::Change(place, key, _, _) => format!("change {} of {}", Named(key), At(place)),
    }
}

/// An object's name in words.
pub fn name_of(key: &Key) -> String {
    Named(key).to_string()
}

/// A place in words.
pub(crate) struct At<'a>(pub(crate) &'a Place);

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Place::Host => f.write_str("the host"),
            Place::Router(network) => write!(f, "router {network}"),
        }
    }
}

struct Named<'a>(&'a Key);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Key::Netns => f.write_str("the namespace"),
            Key::Table(family) => write!(f, "nft table {} droveway", family.as_str()),
            Key::Link(name) => write!(f, "device {name}"),
            Key::Sysctl(path) => write!(f, "sysctl {path}"),
            Key::Address(name, address) => write!(f, "address {address} dev {name}"),
            Key::Rule(priority) => write!(f, "rule {priority}"),
            Key::Neighbour(name, address) => write!(f, "neighbour {address} dev {name}"),
            Key::Fdb(name, mac) => write!(f, "forwarding entry {mac} dev {name}"),
            Key::Route(table, destination) => write!(f, "route {destination} table {table}"),
            Key::Program(name) => write!(f, "the program at {name}"),
            Key::Element(set, key) => write!(f, "element {key:?} of nft set {}", set.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_was_tried_what_was_said_and_what_to_do() {
        let error = Error::errno("open namespace /run/netns/x", Errno::EPERM).to_string();
        assert_eq!(
            error,
            "open namespace /run/netns/x: Operation not permitted; this needs root, or CAP_NET_ADMIN in this user \
             namespace"
        );
        let words =
            Error::kernel("make vxlan0", Errno::EEXIST, Some("VNI already exists".to_owned())).to_string();
        assert_eq!(words, "make vxlan0: File exists (VNI already exists)");
    }

    #[test]
    fn a_step_is_named_by_verb_object_and_place() {
        let step = Step::Remove(Place::Host, Key::Route(254, "10.42.0.0/26".parse().unwrap()));
        assert_eq!(describe(&step), "remove route 10.42.0.0/26 table 254 of the host");
    }
}
