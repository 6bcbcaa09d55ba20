//! Which bridge of a router an endpoint is a port of.

use crate::object::{Ifname, LEAF_PREFIX};

/// A bridge of a router. What the kernel does to add a port grows with the ports that are there, and 1,023 is the most: when
/// `br0` has its share, others take the next ones, each joined to `br0` by a pair of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Bridge(pub u16);

impl Bridge {
    /// The one with the router's addresses.
    pub const ROOT: Self = Self(0);
    /// How many endpoints a bridge is given.
    pub const PORTS: usize = 128;

    /// All, in the order in which they are filled.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..=u16::MAX).map(Self)
    }

    /// What it is called.
    pub fn name(self) -> Ifname {
        match self {
            Self::ROOT => Ifname::new("br0"),
            Self(leaf) => Ifname::new(&format!("{LEAF_PREFIX}{leaf}")),
        }
    }

    /// The pair that joins a leaf to `br0`: the leaf's end, and `br0`'s.
    pub(crate) fn joint(self) -> (Ifname, Ifname) {
        let end = |way| Ifname::new(&format!("{LEAF_PREFIX}{}-{way}", self.0));
        (end("up"), end("down"))
    }
}
