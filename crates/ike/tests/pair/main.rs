//! Two endpoints in one test, with virtual time.
#![allow(clippy::unwrap_used, reason = "these are tests: clippy takes only functions marked so for tests")]
#![allow(clippy::disallowed_methods, reason = "an Instant can only be had from the clock")]

mod collisions;
mod harness;
mod scenarios;
mod storm;

use std::time::Duration;

use harness::Pair;

#[test]
fn two_hosts_that_know_each_other_bring_up_one_ike_sa_and_the_child() {
    let mut pair = Pair::new(1);
    pair.run(Duration::from_secs(1));
    pair.expect_settled(&[1]);
    assert_eq!(pair.hosts[0].datagrams, 2, "IKE_SA_INIT and IKE_AUTH, no more");
    assert_eq!(pair.hosts[1].datagrams, 2);
}
