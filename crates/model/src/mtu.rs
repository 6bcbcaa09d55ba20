//! How much of the underlay's MTU is left for an inner packet. All figures are bytes.

/// Outer IPv4 (20) + UDP (8) + VXLAN (8, RFC 7348 §5) + inner Ethernet (14).
pub const VXLAN_OVERHEAD_V4: u32 = 50;
/// As [`VXLAN_OVERHEAD_V4`] with an outer IPv6 header (40).
pub const VXLAN_OVERHEAD_V6: u32 = 70;
/// The least MTU a network may have: every IPv4 link carries 576 (RFC 791 §3.2 asks hosts to accept that much).
pub const MTU_MIN: u32 = 576;

/// The inner MTU of a VXLAN over an underlay of `underlay` bytes, or `None` when nothing useful is left.
pub fn vxlan_mtu(underlay: u32, outer_v6: bool) -> Option<u32> {
    let overhead = if outer_v6 { VXLAN_OVERHEAD_V6 } else { VXLAN_OVERHEAD_V4 };
    underlay.checked_sub(overhead).filter(|inner| *inner >= MTU_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_underlay_of_1500_leaves_1450_and_too_small_a_one_leaves_nothing() {
        assert_eq!(vxlan_mtu(1500, false), Some(1450));
        assert_eq!(vxlan_mtu(9000, true), Some(8930));
        assert_eq!(vxlan_mtu(600, false), None);
        assert_eq!(vxlan_mtu(0, false), None);
    }
}
