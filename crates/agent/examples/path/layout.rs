//! The plain layout: two hosts over one cable, with the packet path or the kernel's VXLAN between them. The devices are in
//! namespaces of their own, so that both lie on the same underlay; there are no containers, bridges or routes in between.

use std::path::Path;

use crate::measure::Ends;
use crate::rig::Pair;
use crate::sandbox::sh;

/// What the packet path adds at most to a packet over IPv4, and what VXLAN does.
const ADDED: (u32, u32) = (62, 50);

/// Makes the kernel's VXLAN between the routers of a pair whose files are in `dir`, beside the packet path.
pub fn vxlan(pair: &Pair, dir: &Path) {
    for host in [&pair.a, &pair.b] {
        let (side, other) = (host.side, 3 - host.side);
        let router = dir.join(format!("router{side}"));
        let script = format!(
            "ip link add vxlan0 type vxlan id 7 remote 192.0.2.{other} dstport 4789 dev und{side}; \
             ip link set vxlan0 netns {}",
            router.display()
        );
        host.host.run(|| sh(&script)).unwrap();
        host.sh(&format!("ip link set vxlan0 mtu 1450 up; ip addr add 10.43.{side}.1/16 dev vxlan0"));
    }
}

/// By the packet path, from the first router to the second.
pub fn by_path(pair: &Pair) -> Ends<'_> {
    ends(pair, "10.42.2.1")
}

/// By VXLAN.
pub fn by_vxlan(pair: &Pair) -> Ends<'_> {
    ends(pair, "10.43.2.1")
}

fn ends<'a>(pair: &'a Pair, to: &str) -> Ends<'a> {
    let ends = Ends::new(&pair.a.router, &pair.b.router, to).unwrap();
    ends.with_underlay(|mtu| {
        for host in [&pair.a, &pair.b] {
            host.host.run(|| sh(&format!("ip link set und{} mtu {mtu}", host.side))).unwrap();
            let (path, vxlan) = (mtu - ADDED.0, mtu - ADDED.1);
            host.sh(&format!(
                "ip link set tun0 mtu {path}; ip link set vxlan0 mtu {vxlan} 2>/dev/null || true"
            ));
        }
    })
}
