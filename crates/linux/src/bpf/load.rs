//! A program loaded into the kernel (`bpf(2)`, `BPF_PROG_LOAD`).

use std::ffi::CStr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;

use crate::error::Error;

/// What the kernel must hear before it lends `bpf_fib_lookup`: these programs' text may be had under either licence.
const LICENCE: &CStr = c"Dual MIT/GPL";
const NAME: &[u8; 16] = b"droveway\0\0\0\0\0\0\0\0";
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
/// The most that is read of what the verifier says, bytes.
const WORDS: u32 = 256 << 10;

/// The part of `union bpf_attr` that `BPF_PROG_LOAD` has known since Linux 4.15.
#[repr(C)]
struct Attributes {
    kind: u32,
    instructions: u32,
    code: u64,
    licence: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// A program that the kernel took.
pub(super) struct Loaded(OwnedFd);

impl Loaded {
    /// Its descriptor's number, to be told to the kernel.
    pub(super) fn number(&self) -> u32 {
        self.0.as_raw_fd().cast_unsigned()
    }
}

/// Loads a program of whole instructions (`struct bpf_insn`).
pub(super) fn load(instructions: &[u64]) -> Result<Loaded, Error> {
    match call(instructions, &mut []) {
        Ok(loaded) => Ok(loaded),
        Err(errno @ (Errno::EACCES | Errno::EINVAL)) => {
            let mut log = vec![0; WORDS as usize];
            let words = match call(instructions, &mut log) {
                Ok(loaded) => return Ok(loaded),
                Err(_) => CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy).unwrap_or_default(),
            };
            // What it stumbled over is in the last lines, before a summary.
            let last: Vec<_> = words.lines().rev().take(4).collect();
            let said = last.into_iter().rev().map(str::trim).collect::<Vec<_>>().join("; ");
            Err(Error::kernel("load a program", errno, Some(said)))
        }
        Err(errno @ Errno::EPERM) => Err(Error::errno("load a program", errno).with_remedy(
            "only root of the machine may, with CAP_BPF and CAP_NET_ADMIN, not that of a user namespace",
        )),
        Err(errno) => Err(Error::errno("load a program", errno)),
    }
}

fn call(instructions: &[u64], log: &mut [u8]) -> Result<Loaded, Errno> {
    let attributes = Attributes {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        instructions: u32::try_from(instructions.len()).map_err(|_| Errno::E2BIG)?,
        code: instructions.as_ptr() as u64,
        licence: LICENCE.as_ptr() as u64,
        log_level: u32::from(!log.is_empty()),
        log_size: log.len() as u32,
        log: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
        kernel_version: 0,
        flags: 0,
        name: *NAME,
    };
    // SAFETY: the attributes are as long as is said, and what they point at outlives the call: so many instructions, a
    // string with its NUL, and so many bytes to write to. The descriptor that is returned is owned by nobody else.
    unsafe {
        let size = size_of::<Attributes>();
        let fd = libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attributes, size);
        let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
        Ok(Loaded(OwnedFd::from_raw_fd(fd)))
    }
}
