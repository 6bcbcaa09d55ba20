//! What the command line knows of the machine that it runs on.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use model::Name;

use super::exit::{Exit, Failure};

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

/// The host's name as the system has it, without a domain.
pub(super) fn hostname() -> Result<Name, Failure> {
    let full = nix::unistd::gethostname().unwrap_or_default();
    let full = full.to_string_lossy();
    let short = full.split('.').next().unwrap_or_default();
    short.parse().map_err(|_| {
        Failure::new(
            Exit::Usage,
            format!("this machine's host name {full:?} cannot be the host's name in Droveway"),
        )
        .remedy("--name NAME, with 1 to 63 of a-z A-Z 0-9 _ -")
    })
}
