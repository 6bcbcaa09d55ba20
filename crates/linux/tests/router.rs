//! A whole router made, drifting, healed, found again and removed: in real namespaces.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod sandbox;

use std::time::{Duration, Instant};

use linux::{Kernel, Woken};
use plan::object::{Family, Object, TABLE_MAIN};
use plan::{Key, Place, Scope, State, Step, diff};
use sandbox::{await_drift, container, converge, desired, endpoint, in_router, name, router, sh, underlay};

#[test]
fn a_router_is_made_of_a_diff_and_diffing_again_yields_nothing() {
    sandbox::run("a_router_is_made_of_a_diff_and_diffing_again_yields_nothing", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = desired();
        let rounds = converge(&mut kernel, &desired);
        assert!(rounds <= 3, "{rounds} rounds");
        let observed = kernel.observe(&desired).unwrap().clone();
        assert_eq!(observed.len(), desired.len(), "{observed:#?}");
        kernel.resync().unwrap();
        let after = kernel.observe(&desired).unwrap();
        assert_eq!(*after, observed, "what events told is what a dump tells");
        assert_eq!(in_router(&kernel, "cat /proc/sys/net/ipv4/ip_forward").trim(), "1");
        assert!(!in_router(&kernel, "ip -6 addr").contains("fe80"), "no link-local address");
        assert!(in_router(&kernel, "ip -d link show vxlan0").contains("nolearning"));
        assert!(sh("ss -Hlun").contains(":4799"), "the underlay socket is the host's: {}", sh("ss -lun"));
    });
}

#[test]
fn a_step_done_twice_is_fine() {
    sandbox::run("a_step_done_twice_is_fine", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = desired();
        let steps = diff(kernel.observe(&desired).unwrap(), &desired, &Scope::Everything);
        for step in &steps {
            kernel.apply(step).unwrap();
            kernel.apply(step).unwrap();
        }
        converge(&mut kernel, &desired);
        let removals: Vec<_> = steps
            .iter()
            .rev()
            .filter_map(|step| match step {
                Step::Add(place, key, _) => Some(Step::Remove(place.clone(), key.clone())),
                Step::Remove(..) | Step::Change(..) => None,
            })
            .collect();
        for step in &removals {
            kernel.apply(step).unwrap();
            kernel.apply(step).unwrap();
        }
        assert_eq!(*kernel.observe(&State::new()).unwrap(), State::new());
    });
}

#[test]
fn whatever_is_changed_behind_our_back_is_seen_and_healed() {
    sandbox::run("whatever_is_changed_behind_our_back_is_seen_and_healed", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = desired();
        converge(&mut kernel, &desired);
        let route = |text: &str| Key::Route(TABLE_MAIN, text.parse().unwrap());
        let r = router;
        let cases: [(Place, &str, Key); 29] = [
            (r(), "ip route del 10.42.65.0/26", route("10.42.65.0/26")),
            (r(), "ip route del unreachable 10.42.0.0/16", route("10.42.0.0/16")),
            (r(), "ip route replace 10.42.65.0/26 dev br0", route("10.42.65.0/26")),
            (
                r(),
                "ip route add 10.42.65.0/26 dev br0 metric 7; ip route del 10.42.65.0/26 dev vxlan0",
                route("10.42.65.0/26"),
            ),
            (r(), "ip route add 10.99.0.0/16 dev br0", route("10.99.0.0/16")),
            (r(), "ip route add blackhole 10.99.0.0/16", route("10.99.0.0/16")),
            (r(), "ip route flush table 53", Key::Route(53, "0.0.0.0/0".parse().unwrap())),
            (
                r(),
                "ip addr del 10.42.0.1/16 dev br0",
                Key::Address(name("br0"), "10.42.0.1/16".parse().unwrap()),
            ),
            (r(), "ip addr flush dev br0", Key::Address(name("br0"), "10.42.64.65/16".parse().unwrap())),
            (
                r(),
                "ip addr add 10.77.0.1/24 dev br0",
                Key::Address(name("br0"), "10.77.0.1/24".parse().unwrap()),
            ),
            (r(), "ip link del br0", Key::Link(name("br0"))),
            (r(), "ip link set br0 down", Key::Link(name("br0"))),
            (r(), "ip link set br0 down; ip link set br0 up", route("10.42.64.64/26")),
            (r(), "ip link set br0 address 02:00:00:00:99:99", Key::Link(name("br0"))),
            (r(), "ip link set br0 type bridge no_linklocal_learn 0", Key::Link(name("br0"))),
            (r(), "ip link set vxlan0 mtu 1400", Key::Link(name("vxlan0"))),
            (r(), "ip link set vxlan0 down; ip link set vxlan0 name other", Key::Link(name("vxlan0"))),
            (r(), "ip link del vxlan0", Key::Link(name("vxlan0"))),
            (r(), "ip link del up0", Key::Link(name("up0"))),
            (r(), "ip rule del prio 100", Key::Rule(100)),
            (r(), "ip rule add prio 200 from 10.0.0.0/8 lookup 53", Key::Rule(200)),
            (
                r(),
                "ip neigh del 10.42.65.1 dev vxlan0",
                Key::Neighbour(name("vxlan0"), sandbox::ip("10.42.65.1")),
            ),
            (r(), "bridge fdb del 02:1f:00:00:00:09 dev vxlan0", Key::Fdb(name("vxlan0"), sandbox::mac(9))),
            (r(), "nft flush ruleset", Key::Table(Family::Bridge)),
            (r(), "nft add chain inet droveway other", Key::Table(Family::Inet)),
            (r(), "nft flush chain bridge droveway prerouting", Key::Table(Family::Bridge)),
            (r(), "nft 'chain inet droveway input { policy drop; }'", Key::Table(Family::Inet)),
            (Place::Host, "ip link del dw1", Key::Link(name("up0"))),
            (Place::Host, "nft delete table inet droveway", Key::Table(Family::Inet)),
        ];
        for (place, command, expected) in cases {
            match place {
                Place::Host => drop(sh(command)),
                Place::Router(_) => drop(in_router(&kernel, command)),
            }
            let started = Instant::now();
            let drift = await_drift(&mut kernel, &desired);
            assert!(drift.iter().any(|(_, key)| *key == expected), "{command}: {drift:?}");
            let rounds = converge(&mut kernel, &desired);
            assert!(started.elapsed() < Duration::from_secs(5), "{command}: took {:?}", started.elapsed());
            assert!(rounds <= 3, "{command}: {rounds} rounds");
            let observed = kernel.observe(&desired).unwrap().clone();
            kernel.resync().unwrap();
            let resynced = kernel.observe(&desired).unwrap();
            assert_eq!(*resynced, observed, "{command}: events and dump agree");
        }
    });
}

#[test]
fn routes_that_go_in_silence_with_the_last_address_of_their_device_are_missed() {
    sandbox::run("routes_that_go_in_silence_with_the_last_address_of_their_device_are_missed", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        let mut desired = desired();
        let name = (Place::Host, Key::Route(TABLE_MAIN, "169.254.1.2/32".parse().unwrap()));
        if let Some(Object::Route(route)) = desired.get_mut(&name) {
            route.src = None;
        }
        converge(&mut kernel, &desired);
        sh("ip addr flush dev dw1");
        let drift = await_drift(&mut kernel, &desired);
        assert!(drift.contains(&name), "{drift:?}");
        converge(&mut kernel, &desired);
        assert!(sh("ip route").contains("169.254.1.2 dev dw1"), "it is back");
    });
}

#[test]
fn a_size_changed_without_an_event_is_seen_by_a_resync_and_healed() {
    sandbox::run("a_size_changed_without_an_event_is_seen_by_a_resync_and_healed", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = desired();
        converge(&mut kernel, &desired);
        in_router(&kernel, "for dev in br0 vxlan0 up0; do ip link set $dev gso_max_size 50000; done");
        sh("ip link set dw1 gso_max_size 50000");
        kernel.resync().unwrap();
        let drift = await_drift(&mut kernel, &desired);
        assert_eq!(drift.len(), 4, "{drift:?}");
        assert_eq!(converge(&mut kernel, &desired), 1);
        let healed = in_router(&kernel, "ip -d link show br0");
        assert!(healed.contains("gso_max_size 60000"), "{healed}");
    });
}

#[test]
fn a_bridge_lets_through_what_its_ports_do_also_when_it_was_made_anew() {
    sandbox::run("a_bridge_lets_through_what_its_ports_do_also_when_it_was_made_anew", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        let mut desired = desired();
        converge(&mut kernel, &desired);
        let (_ns, path) = container(dir, "c70");
        let (key, object) = endpoint(path, "e70", 70);
        kernel.apply(&Step::Add(key.0.clone(), key.1.clone(), object.clone())).unwrap();
        desired.insert(key, object);
        for _ in 0..2 {
            let observed = Kernel::open(dir).unwrap().observe(&desired).unwrap().clone();
            let shown = |device: &str| match &observed[&(router(), Key::Link(name(device)))] {
                Object::Link(link) => link.gso_ipv4_max_size,
                other => panic!("{other:?}"),
            };
            // Before Linux 6.3 there is no such limit.
            let expected = shown("e70").map(|_| sandbox::GSO_IPV4);
            assert_eq!((shown("e70"), shown("br0")), (expected, expected));
            in_router(&kernel, "ip link del br0");
            await_drift(&mut kernel, &desired);
            converge(&mut kernel, &desired);
        }
    });
}

#[test]
fn elements_taken_or_slipped_into_a_set_are_seen() {
    sandbox::run("elements_taken_or_slipped_into_a_set_are_seen", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = desired();
        converge(&mut kernel, &desired);
        for (command, count) in [
            ("nft flush set bridge droveway port_mac", 1),
            ("nft add element inet droveway publish { udp . 53 : 10.42.0.9 . 53 }", 1),
            ("nft add element bridge droveway port_mac { x . 02:00:00:00:00:07, y . 02:00:00:00:00:08 }", 2),
            (
                "nft delete element inet droveway publish { tcp . 8080 }; \
                 nft add element inet droveway publish { tcp . 8080 : 10.42.0.9 . 81 }",
                1,
            ),
        ] {
            in_router(&kernel, command);
            let drift = await_drift(&mut kernel, &desired);
            assert_eq!(drift.len(), count, "{command}: {drift:?}");
            assert!(drift.iter().all(|(_, key)| matches!(key, Key::Element(..))), "{command}: {drift:?}");
            assert_eq!(converge(&mut kernel, &desired), 1, "{command}");
        }
        // What others do with tables of their own is no business of ours.
        in_router(
            &kernel,
            "nft add table inet other; nft add chain inet other x; nft delete table inet other",
        );
        let steps = diff(kernel.observe(&desired).unwrap(), &desired, &Scope::Everything);
        assert_eq!(steps, []);
    });
}

#[test]
fn a_router_whose_file_is_removed_is_gone_with_all_that_is_in_it() {
    sandbox::run("a_router_whose_file_is_removed_is_gone_with_all_that_is_in_it", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = desired();
        converge(&mut kernel, &desired);
        let file = dir.join("droveway-test");
        sh(&format!("umount {0}; rm {0}", file.display()));
        let drift = await_drift(&mut kernel, &desired);
        assert!(drift.contains(&(router(), Key::Netns)), "{drift:?}");
        assert!(kernel.router_netns(&sandbox::network()).is_none());
        assert!(converge(&mut kernel, &desired) <= 4);
    });
}

#[test]
fn a_router_that_goes_leaves_alone_what_has_its_name_by_now() {
    sandbox::run("a_router_that_goes_leaves_alone_what_has_its_name_by_now", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        converge(&mut kernel, &desired());
        let file = dir.join("droveway-test");
        let inode = || sh(&format!("stat -L -c %i {}", file.display()));
        let own = inode();
        sh(&format!("umount {0}; unshare --net=/proc/self/fd/9 true 9<{0}", file.display()));
        let other = inode();
        assert_ne!(own, other);
        kernel.apply(&Step::Remove(router(), Key::Netns)).unwrap();
        assert_eq!(inode(), other);
        assert!(kernel.router_netns(&sandbox::network()).is_none());
    });
}

#[test]
fn after_a_restart_the_same_state_is_found_and_half_made_routers_are_removed() {
    sandbox::run("after_a_restart_the_same_state_is_found_and_half_made_routers_are_removed", |dir| {
        underlay();
        let desired = desired();
        let mut kernel = Kernel::open(dir).unwrap();
        converge(&mut kernel, &desired);
        let before = kernel.observe(&desired).unwrap().clone();
        drop(kernel);
        drop(container(dir, "droveway-half"));
        std::fs::write(dir.join("droveway-file"), "").unwrap();
        drop(container(dir, "other"));
        let mut kernel = Kernel::open(dir).unwrap();
        assert_eq!(*kernel.observe(&desired).unwrap(), before);
        assert!(!dir.join("droveway-half").exists());
        assert!(!dir.join("droveway-file").exists());
        assert!(dir.join("other").exists(), "what is not ours is left alone");
    });
}

#[test]
fn removing_all_leaves_nothing_behind() {
    sandbox::run("removing_all_leaves_nothing_behind", |dir| {
        underlay();
        let before = sh(
            "ip -o link | sed 's/^[0-9]*: //'; ip -o addr | sed 's/^[0-9]*: //; s/ tentative//; s/ *valid.*//'; ip route; nft list ruleset",
        );
        let mut kernel = Kernel::open(dir).unwrap();
        converge(&mut kernel, &desired());
        let nothing = State::new();
        converge(&mut kernel, &nothing);
        assert_eq!(*kernel.observe(&nothing).unwrap(), nothing);
        drop(kernel);
        assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0);
        // The namespace ends some moments after its last user; the host's end of its veth goes with the pair.
        let after = sh(
            "ip -o link | sed 's/^[0-9]*: //'; ip -o addr | sed 's/^[0-9]*: //; s/ tentative//; s/ *valid.*//'; ip route; nft list ruleset",
        );
        assert_eq!(after, before);
    });
}

#[test]
fn a_container_is_set_up_and_answers_at_once() {
    sandbox::run("a_container_is_set_up_and_answers_at_once", |dir| {
        underlay();
        let mut desired = desired();
        let mut kernel = Kernel::open(dir).unwrap();
        converge(&mut kernel, &desired);
        let mut times = Vec::new();
        for host in 70..90 {
            let (ns, path) = container(dir, &format!("c{host}"));
            let (key, object) = endpoint(path, &format!("e{host}"), host);
            let step = Step::Add(key.0.clone(), key.1.clone(), object.clone());
            let started = Instant::now();
            kernel.apply(&step).unwrap();
            times.push(started.elapsed());
            desired.insert(key, object);
            // No second chance: the first packet has to be answered.
            in_router(&kernel, &format!("ping -c 1 -W 5 10.42.64.{host}"));
            if host == 70 {
                let seen = ns.run(|| sh("ip -o addr; ip -d -o link; ip route")).unwrap();
                for expected in [
                    "10.42.64.70/16",
                    "mtu 1450",
                    "gso_max_size 60000",
                    "02:1f:00:00:00:46",
                    "default via 10.42.0.1",
                    "169.254.169.250 dev eth0",
                    "10.42.0.0/16 dev eth0",
                ] {
                    assert!(seen.contains(expected), "{expected}: {seen}");
                }
                assert!(!seen.contains("fe80"), "{seen}");
                ns.run(|| sh("ping -c 1 -W 5 10.42.0.1")).unwrap();
            }
        }
        times.sort();
        println!(
            "attach of one endpoint: p50 {:?}, worst {:?}",
            times[times.len() / 2],
            times[times.len() - 1]
        );
        assert_eq!(converge(&mut kernel, &desired), 0);
        // A container that ends takes its device along: that is drift.
        drop(kernel.apply(&Step::Remove(router(), Key::Link(name("e71")))));
        let drift = await_drift(&mut kernel, &desired);
        assert_eq!(drift.into_iter().collect::<Vec<_>>(), [(router(), Key::Link(name("e71")))]);
    });
}

#[test]
fn a_container_that_cannot_be_set_up_leaves_no_device_behind() {
    sandbox::run("a_container_that_cannot_be_set_up_leaves_no_device_behind", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = desired();
        converge(&mut kernel, &desired);
        let (ns, path) = container(dir, "c70");
        ns.run(|| sh("ip link add eth0 type bridge")).unwrap();
        let ((place, key), object) = endpoint(path.clone(), "e70", 70);
        let error = kernel.apply(&Step::Add(place, key, object)).unwrap_err();
        let said = format!("{error}");
        assert!(
            said.contains("add device e70 to router n-abcdefghij") && said.contains("interface of that name"),
            "{said}"
        );

        ns.run(|| sh("ip link del eth0; ip link set lo up; ip route add default dev lo")).unwrap();
        let ((place, key), object) = endpoint(path, "e70", 70);
        let error = kernel.apply(&Step::Add(place, key, object)).unwrap_err();
        assert!(error.to_string().contains("route by 10.42.0.1"), "{error}");
        assert!(!ns.run(|| sh("ip -o link")).unwrap().contains("eth0"));

        let ((place, key), object) = endpoint(dir.join("missing"), "e70", 70);
        let error = kernel.apply(&Step::Add(place, key, object)).unwrap_err();
        assert!(error.to_string().contains("No such file"), "{error}");
        assert_eq!(converge(&mut kernel, &desired), 0, "nothing is left of any of them");
    });
}

#[test]
fn a_skeleton_that_changes_is_replaced_and_its_elements_are_put_back() {
    sandbox::run("a_skeleton_that_changes_is_replaced_and_its_elements_are_put_back", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        let mut desired = desired();
        converge(&mut kernel, &desired);
        if let Some(Object::Table(table)) = desired.get_mut(&(router(), Key::Table(Family::Bridge))) {
            table.text = table.text.replace("bbb", "ddd");
            table.digest = "ddd".to_owned();
        }
        assert!(converge(&mut kernel, &desired) <= 2);
        assert!(in_router(&kernel, "nft list set bridge droveway port_mac").contains("\"e1\""));
        let bad = Object::Table(plan::object::Table {
            text: "table inet droveway { nonsense }".to_owned(),
            digest: "x".to_owned(),
        });
        let error = kernel.apply(&Step::Add(router(), Key::Table(Family::Inet), bad)).unwrap_err();
        assert!(error.to_string().contains("nonsense"), "{error}");
        assert_eq!(converge(&mut kernel, &desired), 0, "a skeleton that does not load changes nothing");
    });
}

#[test]
fn an_overflow_of_events_leads_to_the_true_state() {
    sandbox::run("an_overflow_of_events_leads_to_the_true_state", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = desired();
        converge(&mut kernel, &desired);
        // More events than any buffer holds, and then one that counts.
        in_router(
            &kernel,
            "i=0; while [ $i -lt 60000 ]; do echo \"route add 10.99.0.0/24 dev br0\"; echo \"route del 10.99.0.0/24 dev br0\"; \
             i=$((i+1)); done | ip -batch -; ip route del 10.42.65.0/26",
        );
        let drift = await_drift(&mut kernel, &desired);
        assert!(
            drift.contains(&(router(), Key::Route(TABLE_MAIN, "10.42.65.0/26".parse().unwrap()))),
            "{drift:?}"
        );
        converge(&mut kernel, &desired);
    });
}

#[test]
fn waiting_ends_by_an_event_by_the_waker_or_by_time() {
    sandbox::run("waiting_ends_by_an_event_by_the_waker_or_by_time", |dir| {
        let mut kernel = Kernel::open(dir).unwrap();
        let nothing = State::new();
        kernel.observe(&nothing).unwrap();
        assert_eq!(kernel.wait(Some(Duration::from_millis(20))).unwrap(), Woken::Timeout);
        let waker = kernel.waker();
        let other = std::thread::spawn(move || waker.wake());
        assert_eq!(kernel.wait(Some(Duration::from_secs(5))).unwrap(), Woken::Waker);
        other.join().unwrap();
        sh("ip link add dw9 type bridge");
        assert_eq!(kernel.wait(Some(Duration::from_secs(5))).unwrap(), Woken::Kernel);
        let seen = kernel.observe(&nothing).unwrap();
        assert!(seen.contains_key(&(Place::Host, Key::Link(name("dw9")))), "{seen:?}");
    });
}

#[test]
fn changes_name_what_is_worth_diffing_again() {
    sandbox::run("changes_name_what_is_worth_diffing_again", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = desired();
        assert_eq!(kernel.take_changes(), Scope::Everything, "at first nothing is known");
        converge(&mut kernel, &desired);
        kernel.take_changes();
        kernel.observe(&desired).unwrap();
        assert_eq!(kernel.take_changes(), Scope::Only([].into()));
        let address = "169.254.169.250/32".parse().unwrap();
        in_router(
            &kernel,
            "ip addr del 169.254.169.250/32 dev br0; ip neigh add 10.42.64.99 lladdr 02:00:00:00:00:01 dev br0 nud stale",
        );
        kernel.observe(&desired).unwrap();
        let expected = [(router(), Key::Address(name("br0"), address))];
        assert_eq!(kernel.take_changes(), Scope::Only(expected.into()));
    });
}

#[test]
fn a_device_left_over_on_the_host_is_in_the_way_only_if_it_is_not_ours() {
    sandbox::run("a_device_left_over_on_the_host_is_in_the_way_only_if_it_is_not_ours", |dir| {
        underlay();
        sh("ip link add dw1 type bridge; ip link add foreign type bridge");
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = desired();
        assert!(converge(&mut kernel, &desired) <= 3);
        let key = Key::Link(name("up1"));
        let Some(Object::Link(mut link)) = desired.get(&(router(), Key::Link(name("up0")))).cloned() else {
            panic!("up0 is a device")
        };
        if let Some(plan::object::Peer::Host { name: peer, .. }) = &mut link.peer {
            *peer = name("foreign");
        }
        kernel.apply(&Step::Add(router(), key, Object::Link(link))).unwrap_err();
        assert!(sh("ip -d link show foreign").contains("bridge"), "it is still there");
    });
}
