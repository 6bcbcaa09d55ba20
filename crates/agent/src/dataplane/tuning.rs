//! What can be set of the packet path. Defaults are right; each other value is for measurements and tests, which also
//! have techniques refused one by one, as kernels and devices do.

use std::str::FromStr;

use linux::tun;

/// How the packet path works. As text: `workers=2,spin=16,no-gso`, in any order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuning {
    /// Pairs of threads, each with a queue of every device, sockets and associations of its own; as many as
    /// [`workers_here`] if nothing is said.
    pub workers: Option<usize>,
    /// Tries after the last packet before a thread sleeps.
    pub spin: u32,
    /// Bytes that are sealed before they are given to the kernel.
    pub flush: usize,
    /// Superpackets of one device before it is another's turn.
    pub turn: usize,
    /// Messages that are received at once.
    pub receive: usize,
    /// TCP superpackets are not taken from devices.
    pub no_tso: bool,
    /// UDP superpackets are not taken from devices.
    pub no_uso: bool,
    /// Each datagram is sent on its own.
    pub no_gso: bool,
    /// Each datagram is received on its own.
    pub no_gro: bool,
    /// Each packet is written to its device on its own.
    pub no_merge: bool,
    /// Nothing longer than 64 KB is written to devices.
    pub no_long: bool,
    /// All flows wait in one queue of each worker.
    pub no_sparse: bool,
}

/// The default of `flush`, and the most: buffers are made for it. More gains nothing, less costs system calls.
pub(super) const FLUSH_MAX: usize = 200 * 1024;
/// The most of `receive`: as much as a thread has buffers of 64 KB for.
pub(super) const RECEIVE_MAX: usize = 16;
/// The most of `workers`.
pub const WORKERS_MAX: usize = 64;

/// How many workers suit this machine: one for every two processors, since each is two threads that are busy at once.
pub fn workers_here() -> usize {
    std::thread::available_parallelism().map_or(1, |count| (count.get() / 2).clamp(1, WORKERS_HERE))
}

/// The most that are started unasked: memory and associations with each peer grow with them.
const WORKERS_HERE: usize = 8;

impl Default for Tuning {
    fn default() -> Self {
        Self {
            workers: None,
            spin: 16,
            flush: FLUSH_MAX,
            turn: 8,
            receive: 8,
            no_tso: false,
            no_uso: false,
            no_gso: false,
            no_gro: false,
            no_merge: false,
            no_long: false,
            no_sparse: false,
        }
    }
}

impl Tuning {
    /// What may be taken from and given to a device that offers so much.
    pub(super) fn offloads(&self, offered: tun::Offloads) -> tun::Offloads {
        tun::Offloads {
            checksum: offered.checksum && !self.no_tso,
            tso: offered.tso && !self.no_tso,
            uso: offered.uso && !self.no_uso && !self.no_tso,
        }
    }
}

/// A word that is no setting, or a value that it cannot have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no setting of the packet path; there are workers=1 to {WORKERS_MAX}, spin=N, flush=BYTES (to {FLUSH_MAX}), turn=N, \
     receive=1 to {RECEIVE_MAX}, no-tso, no-uso, no-gso, no-gro, no-merge, no-long, no-sparse"
)]
pub struct NoSuchSetting(String);

impl FromStr for Tuning {
    type Err = NoSuchSetting;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut tuning = Self::default();
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let wrong = || NoSuchSetting(word.to_owned());
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = |most: usize| {
                value.parse().ok().filter(|number| (1..=most).contains(number)).ok_or_else(wrong)
            };
            match (name, value) {
                ("workers", _) => tuning.workers = Some(number(WORKERS_MAX)?),
                ("spin", _) => tuning.spin = value.parse().map_err(|_| wrong())?,
                ("flush", _) => tuning.flush = number(FLUSH_MAX)?,
                ("turn", _) => tuning.turn = number(1024)?,
                ("receive", _) => tuning.receive = number(RECEIVE_MAX)?,
                ("no-tso", "") => tuning.no_tso = true,
                ("no-uso", "") => tuning.no_uso = true,
                ("no-gso", "") => tuning.no_gso = true,
                ("no-gro", "") => tuning.no_gro = true,
                ("no-merge", "") => tuning.no_merge = true,
                ("no-long", "") => tuning.no_long = true,
                ("no-sparse", "") => tuning.no_sparse = true,
                _ => return Err(wrong()),
            }
        }
        Ok(tuning)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_words_and_nothing_else_is_one() {
        let tuning: Tuning = "workers=2, spin=0,no-gso".parse().unwrap();
        assert_eq!(tuning, Tuning { workers: Some(2), spin: 0, no_gso: true, ..Tuning::default() });
        assert_eq!("".parse(), Ok(Tuning::default()));
        for wrong in ["workers=0", "workers=65", "spin=", "spin=-1", "receive=17", "no-gso=1", "fast"] {
            let error = wrong.parse::<Tuning>().unwrap_err().to_string();
            assert!(error.contains(wrong) && error.contains("no-merge"), "{error}");
        }
    }
}
