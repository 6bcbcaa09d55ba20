//! Programs and maps made in the kernel (`bpf(2)`, `BPF_PROG_LOAD`, `BPF_MAP_CREATE`).

use std::ffi::CStr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;

use crate::error::Error;

/// What the kernel must hear before it lends `bpf_fib_lookup`: these programs' text may be had under either licence.
const LICENCE: &CStr = c"Dual MIT/GPL";
const NAME: &[u8; 16] = b"droveway\0\0\0\0\0\0\0\0";
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_MAP_TYPE_ARRAY: u32 = 2;

/// The most that is read of what the verifier says, bytes.
const WORDS: u32 = 256 << 10;

/// What a program is for, which is what it may do (`enum bpf_prog_type`).
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// `BPF_PROG_TYPE_SOCKET_FILTER`: looks at packets.
    Look = 1,
    /// `BPF_PROG_TYPE_SCHED_CLS`: changes them, and says where they go.
    Classify = 3,
}

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

/// The part of `union bpf_attr` that `BPF_MAP_CREATE` has always known.
#[repr(C)]
struct MapAttributes {
    kind: u32,
    key: u32,
    value: u32,
    entries: u32,
}

/// A program that the kernel took, or a map that it made.
pub(super) struct Loaded(OwnedFd);

impl Loaded {
    /// Its descriptor's number, to be told to the kernel.
    pub(super) fn number(&self) -> u32 {
        self.0.as_raw_fd().cast_unsigned()
    }
}

/// Makes an array of so many values of so many bytes, all zero.
pub(super) fn array(entries: u32, value: u32) -> Result<Loaded, Error> {
    let attributes = MapAttributes { kind: BPF_MAP_TYPE_ARRAY, key: 4, value, entries };
    // SAFETY: the attributes are as long as is said and outlive the call; the descriptor is owned by nobody else.
    let made = unsafe {
        let size = size_of::<MapAttributes>();
        let fd = libc::syscall(libc::SYS_bpf, BPF_MAP_CREATE, &raw const attributes, size);
        Errno::result(fd).map(|fd| OwnedFd::from_raw_fd(fd as RawFd))
    };
    made.map(Loaded).map_err(|errno| refused("make a map", errno))
}

/// Loads a program of whole instructions (`struct bpf_insn`).
pub(super) fn load(kind: Kind, instructions: &[u64]) -> Result<Loaded, Error> {
    match call(kind, instructions, &mut []) {
        Ok(loaded) => Ok(loaded),
        Err(errno @ (Errno::EACCES | Errno::EINVAL)) => {
            let mut log = vec![0; WORDS as usize];
            let words = match call(kind, instructions, &mut log) {
                Ok(loaded) => return Ok(loaded),
                Err(_) => CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy).unwrap_or_default(),
            };
            // What it stumbled over is in the last lines, before a summary.
            let last: Vec<_> = words.lines().rev().take(4).collect();
            let said = last.into_iter().rev().map(str::trim).collect::<Vec<_>>().join("; ");
            Err(Error::kernel("load a program", errno, Some(said)))
        }
        Err(errno) => Err(refused("load a program", errno)),
    }
}

fn refused(attempted: &str, errno: Errno) -> Error {
    let error = Error::errno(attempted.to_owned(), errno);
    match errno {
        Errno::EPERM => error.with_remedy(
            "only root of the machine may, with CAP_BPF and CAP_NET_ADMIN, not that of a user namespace",
        ),
        _ => error,
    }
}

fn call(kind: Kind, instructions: &[u64], log: &mut [u8]) -> Result<Loaded, Errno> {
    let attributes = Attributes {
        kind: kind as u32,
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
