//! IP, UDP, TCP and ESP as views over bytes: checksums, TCP split and merge.
