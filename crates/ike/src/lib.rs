//! IKEv2 (RFC 7296) in both roles: state in, bytes out.
