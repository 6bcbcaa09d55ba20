//! How much of the underlay's MTU is left for an inner packet. All figures are bytes.

/// Outer IPv4 (20) + UDP (8) + VXLAN (8, RFC 7348 §5) + inner Ethernet (14).
pub const VXLAN_OVERHEAD_V4: u32 = 50;
/// As [`VXLAN_OVERHEAD_V4`] with an outer IPv6 header (40).
pub const VXLAN_OVERHEAD_V6: u32 = 70;
/// The UDP port that IKE and ESP share unless an agent says otherwise (RFC 3948).
pub const TUNNEL_PORT: u16 = 4500;
/// The UDP port on which foreign peers begin IKE (RFC 7296 §2).
pub const IKE_PORT: u16 = 500;
/// UDP (8) + ESP header (8) + IV (8) + ICV (16): RFC 3948, RFC 4303 §2, RFC 4106.
const ESP_OVERHEAD: u32 = 40;
/// ESP's trailer without padding (RFC 4303 §2): inner packet and trailer together are a multiple of 4.
const ESP_TRAILER: u32 = 2;

/// The least MTU a network may have: every IPv4 link carries 576 (RFC 791 §3.2 asks hosts to accept that much).
pub const MTU_MIN: u32 = 576;

/// The inner MTU of a VXLAN over an underlay of `underlay` bytes, or `None` when nothing useful is left.
pub fn vxlan_mtu(underlay: u32, outer_v6: bool) -> Option<u32> {
    let overhead = if outer_v6 { VXLAN_OVERHEAD_V6 } else { VXLAN_OVERHEAD_V4 };
    underlay.checked_sub(overhead).filter(|inner| *inner >= MTU_MIN)
}

/// The inner MTU of ESP in UDP over an underlay of `underlay` bytes, or `None` when nothing useful is left.
pub fn esp_mtu(underlay: u32, outer_v6: bool) -> Option<u32> {
    let outer = if outer_v6 { 40 } else { 20 };
    let sealed = underlay.checked_sub(outer + ESP_OVERHEAD)? & !3;
    sealed.checked_sub(ESP_TRAILER).filter(|inner| *inner >= MTU_MIN)
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

    #[test]
    fn esp_takes_62_bytes_of_an_ipv4_underlay_and_82_of_ipv6() {
        assert_eq!(esp_mtu(1500, false), Some(1438));
        assert_eq!(esp_mtu(1500, true), Some(1418));
        assert_eq!(esp_mtu(1499, false), Some(1434), "padding to 4 bytes");
        assert_eq!(esp_mtu(600, false), None);
        assert_eq!(esp_mtu(0, true), None);
    }
}
