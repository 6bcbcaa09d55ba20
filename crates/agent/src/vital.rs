//! Threads that the agent cannot do without: those of the tunnels and of the packet path.
//!
//! Invariant: no agent goes on without one of them. A fault of ours that ends one ends the process, and whoever supervises it
//! starts it again, which costs traffic less than a second; an agent that stayed would look healthy and move no packet.

use std::thread::{self, Builder, JoinHandle};

/// The status that Rust gives a process whose main thread panicked.
const PANICKED: i32 = 101;

/// Ends the process where it is dropped by a panic. Not by `abort`: a core dump would hold keys.
struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        if thread::panicking() {
            // What happened was told on standard error.
            std::process::exit(PANICKED);
        }
    }
}

/// Starts such a thread.
pub(crate) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    Builder::new().name(name.to_owned()).spawn(move || {
        let _guard = Guard;
        run();
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    /// Set for the process that is to end.
    const WITHIN: &str = "DROVEWAY_TEST_VITAL";

    #[test]
    fn a_vital_thread_that_panics_ends_the_process_and_one_that_returns_does_not() {
        match std::env::var(WITHIN).as_deref() {
            Ok("panics") => {
                let thread = super::spawn("vital", || panic!("a fault of ours")).unwrap();
                // Comes back only if the process goes on; then this test passes within, and fails without.
                assert!(thread.join().is_err());
            }
            Ok(_) => super::spawn("vital", || {}).unwrap().join().unwrap(),
            Err(_) => {
                let name =
                    "vital::tests::a_vital_thread_that_panics_ends_the_process_and_one_that_returns_does_not";
                let end = |how| {
                    let mut within = Command::new(std::env::current_exe().unwrap());
                    within.args(["--exact", name]).env(WITHIN, how).output().unwrap().status.code()
                };
                assert_eq!(end("panics"), Some(super::PANICKED));
                assert_eq!(end("returns"), Some(0));
            }
        }
    }
}
