//! The shortcut: programs that hand on what goes between containers and other hosts, past the kernel's stack and its
//! filter. They are text in eBPF's assembly, as LLVM and the kernel's verifier write it, which `linux` assembles for the
//! devices as they are.
//!
//! Invariant: what a program hands on, the router's table ([`crate::firewall`]) would let through unchanged, and the
//! stack would send to the same next hop by the same device. Everything else it leaves to them, untouched: a program
//! only ever returns "go on" (`TC_ACT_OK`) or "send it there". docs/decisions/014 goes through the rules one by one.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::object::Program;

/// What a program at the ingress of one device of a router is made of.
pub(crate) struct Shortcut<'a> {
    /// The network's addresses.
    pub(crate) pool: Ipv4Net,
    /// The router's own addresses: nothing that says to be from them is from elsewhere.
    pub(crate) own: &'a [Ipv4Addr],
    /// Whether packets come by this device with an Ethernet header.
    pub(crate) framed: bool,
    /// The device by which they are to leave, and whether it wants one.
    pub(crate) toward: (&'a str, bool),
}

/// The program at a device's ingress.
///
/// It is asked about untagged IPv4 packets only. `r6` is the packet's context (`struct __sk_buff`), `r7` its IP header, `r9` its
/// length, or that of the longest packet that it is cut into.
pub(crate) fn program(shortcut: &Shortcut<'_>) -> Program {
    let (toward, to_framed) = shortcut.toward;
    let ethernet = if shortcut.framed { ETHERNET } else { 0 };
    let own = shortcut.own.iter().fold(String::new(), |text, address| {
        text + &format!("    if w2 == {} goto stack\n", u32::from(*address))
    });
    let (mask, pool) = (u32::from(shortcut.pool.netmask()), u32::from(shortcut.pool.network()));
    let found = if to_framed { FOUND_NEIGHBOUR } else { FOUND_ROUTE };
    let send = match (shortcut.framed, to_framed) {
        (_, false) => SEND_BARE.to_owned(),
        (true, true) => SEND_FRAMED.to_owned(),
        (false, true) => format!("{MAKE_ROOM}{SEND_FRAMED}"),
    };
    let text = format!(
        r"    r6 = r1
    r2 = *(u32 *)(r6 + 4)       ; pkt_type
    if r2 != 0 goto stack       ; not PACKET_HOST: for another's MAC
    r2 = *(u32 *)(r6 + 20)      ; vlan_present
    if r2 != 0 goto stack

    r7 = *(u32 *)(r6 + 76)      ; data
    r8 = *(u32 *)(r6 + 80)      ; data_end
    r7 += {ethernet}
    r2 = r7
    r2 += 34
    if r2 <= r8 goto headers
    r1 = r6                     ; the headers are not in one piece yet
    r2 = {pull}
    call skb_pull_data
    if r0 != 0 goto stack
    r7 = *(u32 *)(r6 + 76)
    r8 = *(u32 *)(r6 + 80)
    r7 += {ethernet}
    r2 = r7
    r2 += 34
    if r2 > r8 goto stack

headers:
    r2 = *(u8 *)(r7 + 0)
    if r2 != 0x45 goto stack    ; IPv4 without options
    r2 = *(u8 *)(r7 + 1)
    r2 &= 0x1c
    if r2 != 0 goto stack       ; the stack gives it a priority
    r9 = *(u16 *)(r7 + 2)
    r9 = be16 r9
    r2 = *(u32 *)(r6 + 0)       ; len
    r2 -= {ethernet}
    if r2 == r9 goto whole
    if r9 != 0 goto stack       ; cut short or padded
    r2 = *(u8 *)(r7 + 9)        ; too long to say so: then it is TCP
    if r2 != 6 goto stack
    r2 = *(u32 *)(r6 + 176)     ; gso_size
    if r2 == 0 goto stack
whole:
    r2 = *(u16 *)(r7 + 6)
    r2 = be16 r2
    r2 &= 0x3fff
    if r2 != 0 goto stack       ; a fragment
    r2 = *(u8 *)(r7 + 8)
    if r2 <= 1 goto stack       ; its TTL ends here
    r2 = *(u32 *)(r7 + 12)
    r2 = be32 r2
{own}    r2 &= {mask}
    if w2 != {pool} goto stack
    r2 = *(u32 *)(r7 + 16)
    r2 = be32 r2
    r2 &= {mask}
    if w2 != {pool} goto stack
    r2 = *(u16 *)(r7 + 22)
    r2 = be16 r2
    if r2 == 53 goto stack      ; a query is answered here, whoever is asked

    r3 = *(u32 *)(r6 + 176)     ; gso_size
    r2 = *(u8 *)(r7 + 9)
    if r2 == 17 goto udp
    if r2 != 6 goto stack
    r2 = *(u8 *)(r7 + 33)
    r2 &= 2
    if r2 != 0 goto stack       ; a SYN has its MSS clamped
    if r3 == 0 goto route
    r9 = *(u8 *)(r7 + 32)       ; the headers' length and that of a segment
    r9 >>= 2
    r9 &= 0x3c
    r9 += 20
    r9 += r3
    if r9 > 65535 goto stack
    goto route
udp:
    if r3 != 0 goto stack       ; maybe of a tunnel: who knows how long its packets will be

route:
    r2 = 0                      ; struct bpf_fib_lookup
    *(u64 *)(r10 - 64) = r2
    *(u64 *)(r10 - 56) = r2
    *(u64 *)(r10 - 48) = r2
    *(u64 *)(r10 - 40) = r2
    *(u64 *)(r10 - 32) = r2
    *(u64 *)(r10 - 24) = r2
    *(u64 *)(r10 - 16) = r2
    *(u64 *)(r10 - 8) = r2
    r2 = 2
    *(u8 *)(r10 - 64) = r2      ; family: AF_INET
    *(u16 *)(r10 - 58) = r9     ; tot_len: what the MTU is compared with
    r2 = *(u32 *)(r6 + 40)
    *(u32 *)(r10 - 56) = r2     ; ifindex: by which it came
    r2 = *(u32 *)(r7 + 12)
    *(u32 *)(r10 - 48) = r2     ; ipv4_src
    r2 = *(u32 *)(r7 + 16)
    *(u32 *)(r10 - 32) = r2     ; ipv4_dst
    r1 = r6
    r2 = r10
    r2 += -64
    r3 = 64
    r4 = 0
    call fib_lookup
{found}    r2 = *(u32 *)(r10 - 56)
    if r2 != index({toward}) goto stack

    r2 = *(u8 *)(r7 + 8)
    r2 -= 1
    *(u8 *)(r7 + 8) = r2        ; TTL
    r2 = *(u16 *)(r7 + 10)
    r2 = be16 r2
    r2 += 0x100
    if r2 < 0xffff goto summed
    r2 += 1
summed:
    r2 = be16 r2
    *(u16 *)(r7 + 10) = r2      ; header checksum (RFC 1624)
{send}    exit

stack:
    r0 = 0                      ; TC_ACT_OK
    exit
",
        pull = ethernet + 34
    )
    .replace("TOWARD", toward);
    let digest = format!("droveway {:016x}", crate::hash(&[&text]));
    Program { text, digest }
}

/// The length of an Ethernet header, bytes.
const ETHERNET: u32 = 14;

/// The route was found, and the next hop's MAC is known. Who is not known yet is asked for by the stack.
const FOUND_NEIGHBOUR: &str = "    if r0 != 0 goto stack
";

/// The route was found. Without Ethernet there is no MAC to know, and no neighbour need be on record
/// (`BPF_FIB_LKUP_RET_NO_NEIGH`).
const FOUND_ROUTE: &str = "    if r0 == 0 goto found
    if r0 != 7 goto stack
found:
";

/// By a device without Ethernet, the header goes.
const SEND_BARE: &str = "    r1 = index(TOWARD)
    r2 = 0
    call redirect
";

/// Room for the Ethernet header that is still to be written. Without memory for it the packet is dropped (`TC_ACT_SHOT`), as
/// the stack would.
const MAKE_ROOM: &str = "    r1 = r6
    r2 = 14
    r3 = 0
    call skb_change_head
    if r0 == 0 goto room
    r0 = 2
    exit
room:
";

/// By way of the kernel's table of neighbours, as the stack does: an entry that grows old is asked for again.
const SEND_FRAMED: &str = "    r2 = 2                      ; struct bpf_redir_neigh: AF_INET
    *(u32 *)(r10 - 88) = r2
    r2 = *(u32 *)(r10 - 32)
    *(u32 *)(r10 - 84) = r2     ; the next hop
    r2 = 0
    *(u32 *)(r10 - 80) = r2
    *(u32 *)(r10 - 76) = r2
    *(u32 *)(r10 - 72) = r2
    r1 = index(TOWARD)
    r2 = r10
    r2 += -88
    r3 = 20
    r4 = 0
    call redirect_neigh
";

#[cfg(test)]
mod tests {
    use super::*;

    fn of(own: &[Ipv4Addr], framed: bool, toward: (&str, bool)) -> Program {
        program(&Shortcut { pool: "10.42.0.0/16".parse().unwrap(), own, framed, toward })
    }

    #[test]
    fn another_program_is_another_digest() {
        let own = [Ipv4Addr::new(10, 42, 0, 1)];
        let all = [
            of(&own, true, ("vxlan0", true)),
            of(&own, true, ("tun0", false)),
            of(&own, false, ("br0", true)),
            of(&[], true, ("vxlan0", true)),
        ];
        let digests: std::collections::BTreeSet<_> = all.iter().map(|program| &program.digest).collect();
        assert_eq!(digests.len(), all.len());
    }

    #[test]
    fn the_pool_and_the_routers_own_addresses_are_asked_for_and_the_device_is_named() {
        let text = of(&[Ipv4Addr::new(10, 42, 0, 1)], true, ("vxlan0", true)).text;
        assert_eq!(text.matches(&format!("if w2 != {} goto stack", 0x0a2a_0000)).count(), 2, "{text}");
        assert!(text.contains(&format!("if w2 == {} goto stack", 0x0a2a_0001)), "{text}");
        assert_eq!(text.matches("index(vxlan0)").count(), 2, "{text}");
        assert!(!text.contains("TOWARD"));
    }
}
