//! Which queue of a TUN device a packet waits in (`TUNSETSTEERINGEBPF`, `Documentation/networking/tuntap.rst`).
//!
//! A flow that sends little is spared from waiting behind one that sends much, as in FQ-CoDel (RFC 8290 §4.1): each worker has a
//! queue for either, and reads that of the sparse first. What a flow has sent lately is a bucket that leaks a megabyte a
//! second. A flow that fills it is bulk, until it was empty and the flow paused.
//!
//! Invariant: packets of one flow keep their order where a reader, having read one of the bulk, sends what waits in the queue
//! of the sparse before it; and one that is sparse again has paused for longer than what comes before it waits.
//! Invariant: a flow stays with one worker. Fragments, which have no ports, are a flow of their own for each two addresses.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc;

use super::assembly::assemble;
use super::load::{self, Kind};
use crate::error::Error;

/// Buckets: flows that share one are taken for one.
const BUCKETS: u32 = 512;
/// `u64` nanoseconds when it was last filled, `u32` bytes in it, `u32` whether it is bulk.
const BUCKET: u32 = 16;
/// Bytes that fill a bucket. A byte leaks each 1,024 ns.
const FULL: u32 = 32 << 10;
/// Nanoseconds that a flow must pause before it is sparse again.
const PAUSE: u32 = 100_000_000;

/// `TUNSETSTEERINGEBPF`, which libc does not know: `_IOR('T', 224, int)`.
const SET_STEERING: libc::c_ulong = 0x8004_54e0;

/// Steers flows over the queues of a device that were opened in this order: one for the bulk of each worker, one for the sparse
/// of each. It belongs to the device, and lasts.
pub(crate) fn steer(queue: BorrowedFd<'_>, workers: u32) -> Result<(), Error> {
    let attempted = "steer packets to the queues of a TUN device";
    let flows = load::array(BUCKETS, BUCKET)?;
    let instructions = assemble(&text(workers), |name| (name == "flows").then(|| flows.number()))
        .map_err(|why| Error::words(attempted, format!("the program's text is wrong: {why}")))?;
    let program = load::load(Kind::Look, &instructions)?;
    set(queue, program.number().cast_signed()).map_err(|errno| Error::errno(attempted, errno))
}

/// Steers no longer: the kernel spreads flows over queues by itself, also where a former owner's program was left.
pub(crate) fn leave(queue: BorrowedFd<'_>) {
    // Refused by who never had one.
    let _ = set(queue, -1);
}

fn set(queue: BorrowedFd<'_>, program: libc::c_int) -> Result<(), Errno> {
    // SAFETY: the kernel reads one int, which outlives the call, and keeps the program.
    Errno::result(unsafe { libc::ioctl(queue.as_raw_fd(), SET_STEERING, &raw const program) }).map(drop)
}

/// `r6` is the packet, from its IP header on; `r7` the flow's hash; `r8` its bucket; `r9` the queue.
fn text(workers: u32) -> String {
    format!(
        r"    r6 = r1
    r9 = 0
    r7 = 0
    r1 = r6
    r2 = 0
    r3 = r10
    r3 += -24
    r4 = 24                     ; an IPv4 header, and ports
    call skb_load_bytes
    if r0 != 0 goto hashed      ; nothing is so short
    r1 = *(u8 *)(r10 - 24)
    r1 >>= 4
    if r1 == 4 goto ipv4

    r7 = *(u8 *)(r10 - 18)      ; next header
    r1 = r6
    r2 = 8
    r3 = r10
    r3 += -64
    r4 = 36                     ; addresses, and ports where no other header comes before
    call skb_load_bytes
    if r0 != 0 goto hashed
    r2 = r7
    r1 = *(u64 *)(r10 - 64)
    r7 ^= r1
    r7 *= 0x61c88647
    r1 = *(u64 *)(r10 - 56)
    r7 ^= r1
    r7 *= 0x61c88647
    r1 = *(u64 *)(r10 - 48)
    r7 ^= r1
    r7 *= 0x61c88647
    r1 = *(u64 *)(r10 - 40)
    r7 ^= r1
    if r2 == 6 goto ports6
    if r2 != 17 goto hashed
ports6:
    r1 = *(u32 *)(r10 - 32)
    goto ported
ipv4:
    r7 = *(u32 *)(r10 - 12)     ; from
    r7 <<= 32
    r1 = *(u32 *)(r10 - 8)      ; to
    r7 ^= r1
    r2 = *(u8 *)(r10 - 15)      ; protocol
    r7 += r2
    if r2 == 6 goto ports
    if r2 != 17 goto hashed
ports:
    r1 = *(u8 *)(r10 - 24)
    if r1 != 0x45 goto hashed   ; options lie between
    r1 = *(u16 *)(r10 - 18)
    r1 = be16 r1
    r1 &= 0x3fff
    if r1 != 0 goto hashed      ; a fragment
    r1 = *(u32 *)(r10 - 4)
ported:
    r7 *= 0x61c88647
    r7 ^= r1
hashed:
    r7 *= 0x61c88647
    r1 = r7
    r1 >>= 32
    r7 ^= r1
    r7 *= 0x61c88647
    r7 >>= 20
    r7 &= 0x7fffffff

    r1 = r7
    r1 &= {mask}
    *(u32 *)(r10 - 28) = r1
    r1 = map(flows)
    r2 = r10
    r2 += -28
    call map_lookup_elem
    if r0 == 0 goto worker
    r8 = r0
    call ktime_get_ns
    r2 = r0
    r1 = *(u64 *)(r8 + 0)
    if r2 >= r1 goto later
    r2 = r1                     ; another processor was here since we looked at the clock
later:
    r2 -= r1                    ; since the last packet
    *(u64 *)(r8 + 0) = r0
    r3 = *(u32 *)(r8 + 8)       ; bytes
    r4 = *(u32 *)(r8 + 12)      ; bulk
    r5 = r2
    r5 >>= 10
    if r5 >= r3 goto empty
    r3 -= r5
    goto fill
empty:
    r3 = 0
    if r2 < {pause} goto fill
    r4 = 0
    *(u32 *)(r8 + 12) = r4
fill:
    r1 = *(u32 *)(r6 + 0)       ; len
    r3 += r1
    if r3 <= {full} goto filled
    r3 = {full}
    r4 = 1
    *(u32 *)(r8 + 12) = r4
filled:
    *(u32 *)(r8 + 8) = r3
    if r4 != 0 goto worker
    r9 = {workers}              ; the queues of the sparse come after
worker:
    r7 >>= 9                    ; not the bits of the bucket
    r7 %= {workers}
    r9 += r7
    r0 = r9
    exit
",
        mask = BUCKETS - 1,
        pause = PAUSE,
        full = FULL,
    )
}
