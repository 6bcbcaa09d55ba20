//! What the command line knows of the machine that it runs on.

use std::net::{IpAddr, SocketAddr, UdpSocket};

/// This machine's address on its default route. Connecting a datagram socket sends nothing; it asks for the route.
pub(super) fn address() -> Option<IpAddr> {
    // TEST-NET-1 and the documentation prefix (RFC 5737, RFC 3849): nobody's, so no route but the default is meant.
    [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")].into_iter().find_map(|(own, far)| {
        let socket = UdpSocket::bind(own).ok()?;
        socket.connect(far).ok()?;
        let address = socket.local_addr().ok()?.ip();
        (!address.is_loopback() && !address.is_unspecified()).then_some(address)
    })
}

/// `https://ADDRESS:PORT`.
pub(super) fn url(address: IpAddr, port: u16) -> String {
    format!("https://{}", SocketAddr::new(address, port))
}
