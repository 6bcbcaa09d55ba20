//! An underlay that loses, doubles and reorders datagrams: a program between two hosts, which both believe to be the
//! other.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;

use linux::udp;
use nix::poll::{PollFd, PollFlags, poll};

use crate::rig::{PORT, Pair, way};

/// Of a hundred datagrams so many are lost, so many come twice, and so many come later than those behind them.
const LOST: u64 = 1;
const DOUBLED: u64 = 1;
const LATE: u64 = 1;
/// How many others overtake a late one.
const OVERTAKE: usize = 5;

/// Runs until it is dropped.
pub struct Relay {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Stands between both hosts from now on, with new associations of that salt.
    pub fn between(pair: &Pair, salt: u8) -> Self {
        let socket = pair.b.host.run(|| udp::Socket::bind(udp::Family::V4, 0).unwrap()).unwrap();
        let at = SocketAddr::from(([192, 0, 2, 12], socket.port()));
        let ends = [[192, 0, 2, 1], [192, 0, 2, 2]].map(|ip| SocketAddr::from((ip, PORT)));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || run(&socket, at, ends, &stopped));
        pair.b.receives(&pair.a, salt);
        pair.a.receives(&pair.b, salt);
        let to_relay = |from: &str| udp::Path { remote: at, ..way(from, from) };
        pair.a.sends(&pair.b, salt, to_relay("192.0.2.1"));
        pair.b.sends(&pair.a, salt, to_relay("192.0.2.2"));
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(socket: &udp::Socket, at: SocketAddr, ends: [SocketAddr; 2], stop: &AtomicBool) {
    let (mut buffers, mut received) = (vec![vec![0; 65_536]; 8], Vec::new());
    let mut chance = Chance(0x9e37_79b9_7f4a_7c15);
    // One that waits for others to overtake it, where to, and for how many.
    let mut late: Option<(Vec<u8>, SocketAddr, usize)> = None;
    let send = |bytes: &[u8], to| {
        let path = udp::Path { local: at, remote: to };
        // What does not fit is lost: that is what this is for.
        let _ = socket.send(&[udp::Send { path, bytes, segment: bytes.len(), tos: 0 }]);
    };
    while !stop.load(Relaxed) {
        poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], 10u8).unwrap();
        socket.receive(&mut buffers, &mut received).unwrap();
        for (message, buffer) in received.iter().zip(&buffers) {
            let to = if message.path.remote == ends[0] { ends[1] } else { ends[0] };
            for datagram in buffer[..message.len].chunks(message.stride) {
                let luck = chance.of_a_hundred();
                if luck < LOST {
                    continue;
                }
                if luck < LOST + LATE && late.is_none() {
                    late = Some((datagram.to_vec(), to, OVERTAKE));
                    continue;
                }
                send(datagram, to);
                if luck >= 100 - DOUBLED {
                    send(datagram, to);
                }
                if let Some((_, _, others)) = &mut late {
                    *others -= 1;
                }
                if let Some((bytes, to, _)) = late.take_if(|(_, _, others)| *others == 0) {
                    send(&bytes, to);
                }
            }
        }
    }
}

/// The same each time.
struct Chance(u64);

impl Chance {
    fn of_a_hundred(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % 100
    }
}
