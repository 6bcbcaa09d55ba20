use model::{Block, Host, NetworkSpec, Object as Thing, Protocol, Revision, Source};

use super::*;
use crate::{Scope, Step, diff};

const H1: [u8; 8] = [1; 8];
const H2: [u8; 8] = [2; 8];

fn host(seed: [u8; 8], name: &str, address: &str, mtu: u32) -> Host {
    Host {
        id: HostId::from_random(seed),
        name: name.parse().unwrap(),
        candidates: vec![Candidate {
            address: address.parse().unwrap(),
            port: None,
            mtu,
            source: Source::Interface,
        }],
        labels: BTreeMap::new(),
        key: String::new(),
        joined: 0,
    }
}

fn block(network: &NetworkId, cidr: &str, seed: [u8; 8], leased: u64) -> Thing {
    Thing::Block(Block {
        network: network.clone(),
        cidr: cidr.parse().unwrap(),
        host: HostId::from_random(seed),
        leased: Revision(leased),
    })
}

/// Two hosts, one network, one endpoint on h1.
fn scene(internal: bool) -> (Catalog, Local, EndpointId) {
    let spec = NetworkSpec {
        internal,
        driver: Some("vxlan".to_owned()),
        ..NetworkSpec::new("managed".parse().unwrap(), "10.42.0.0/16".parse().unwrap())
    };
    let network = spec.validate(NetworkId::from_random([9; 8]), 7, 0).unwrap();
    let id = network.id.clone();
    let h1 = host(H1, "h1", "10.0.0.5", 1500);
    let underlay = h1.candidates.first().cloned();
    let catalog = Catalog::from_objects([
        Thing::Host(h1),
        Thing::Host(host(H2, "h2", "10.0.0.6", 1500)),
        Thing::Network(network),
        block(&id, "10.42.64.64/26", H1, 5),
        block(&id, "10.42.128.0/26", H2, 6),
        block(&id, "10.42.200.0/26", H2, 7),
    ]);
    let endpoint = EndpointId::from_random([3; 8]);
    let attachment = Attachment {
        network: id.clone(),
        addresses: vec!["10.42.64.98".parse().unwrap()],
        mac: Mac([2, 0, 0, 0, 0, 9]),
        end: End::Handed,
        ports: vec![PublishedPort { protocol: Protocol::Tcp, host_port: 8080, port: 80 }],
        bridge: Bridge::ROOT,
    };
    let local = Local {
        host: HostId::from_random(H1),
        underlay,
        routers: BTreeMap::from([(id, 0)]),
        shortcut: true,
        attachments: BTreeMap::from([(endpoint.clone(), attachment)]),
        spare: BTreeSet::new(),
    };
    (catalog, local, endpoint)
}

fn route<'a>(state: &'a State, cidr: &str) -> Option<&'a Route> {
    let (_, object) = state.iter().find(|((place, key), _)| {
        *place != Place::Host && *key == Key::Route(TABLE_MAIN, cidr.parse().unwrap())
    })?;
    match object {
        Object::Route(route) => Some(route),
        _ => None,
    }
}

#[test]
fn each_remote_block_has_a_route_by_its_hosts_router_and_the_pool_itself_is_unreachable() {
    let (catalog, local, _) = scene(false);
    let state = desired(&catalog, &local);
    for cidr in ["10.42.128.0/26", "10.42.200.0/26"] {
        let route = route(&state, cidr).unwrap();
        assert_eq!(route.via, Some("10.42.128.1".parse().unwrap()));
        assert_eq!(route.src, Some("10.42.64.65".parse().unwrap()));
        assert_eq!(route.dev, Some(Ifname::new("vxlan0")));
    }
    assert_eq!(route(&state, "10.42.64.64/26").unwrap().dev, Some(Ifname::new("br0")));
    assert_eq!(route(&state, "10.42.0.0/16").unwrap().kind, RouteKind::Unreachable);
    assert_eq!(route(&state, "0.0.0.0/0").unwrap().dev, Some(Ifname::new("up0")));
}

#[test]
fn both_hosts_agree_on_each_others_overlay_mac_and_on_the_gateways() {
    let (catalog, local, _) = scene(false);
    let mut other = local.clone();
    other.host = HostId::from_random(H2);
    other.underlay = catalog.hosts[&other.host].candidates.first().cloned();
    other.attachments.clear();
    let (a, b) = (desired(&catalog, &local), desired(&catalog, &other));
    let network = local.routers.keys().next().unwrap();
    let router = Place::Router(network.clone());
    let key = Key::Link(Ifname::new("vxlan0"));
    let Object::Link(vxlan_b) = &b[&(router.clone(), key)] else { panic!("a link") };
    let fdb = Key::Fdb(Ifname::new("vxlan0"), vxlan_b.mac.unwrap());
    assert_eq!(a[&(router.clone(), fdb)], Object::Fdb("10.0.0.6".parse().unwrap()));
    let bridge = (router, Key::Link(Ifname::new("br0")));
    let (Object::Link(bridge_a), Object::Link(bridge_b)) = (&a[&bridge], &b[&bridge]) else {
        panic!("links")
    };
    assert_eq!(bridge_a.mac, bridge_b.mac);
}

#[test]
fn an_internal_network_has_no_way_out_and_publishes_nothing() {
    let (catalog, local, _) = scene(true);
    let state = desired(&catalog, &local);
    assert_eq!(route(&state, "0.0.0.0/0"), None);
    assert!(!state.keys().any(|(_, key)| *key == Key::Link(Ifname::new("up0"))));
    assert!(!state.keys().any(|(_, key)| matches!(key, Key::Element(Set::Publish, _))));
}

#[test]
fn one_attachment_alone_is_what_it_is_among_all() {
    let (catalog, local, endpoint) = scene(false);
    let all = desired(&catalog, &local);
    let one = desired_attachment(&catalog, &local, &endpoint);
    assert_eq!(one.len(), 5, "a port, two guard entries, two published ports");
    for (name, object) in &one {
        assert_eq!(all.get(name), Some(object));
    }
}

#[test]
fn the_smallest_underlay_of_those_who_take_part_sets_the_mtu() {
    let (mut catalog, local, _) = scene(false);
    let network = catalog.networks.values().next().unwrap().clone();
    assert_eq!(network_mtu(&catalog, &local, &network), 1450);
    catalog.put(Thing::Host(host(H2, "h2", "10.0.0.6", 1400)));
    assert_eq!(network_mtu(&catalog, &local, &network), 1350);
    catalog.put(Thing::Host(host([7; 8], "bystander", "10.0.0.9", 1000)));
    assert_eq!(network_mtu(&catalog, &local, &network), 1350, "a host without a block does not count");
    // IPv6 takes 20 bytes more, of as large an underlay too.
    catalog.put(Thing::Host(host(H2, "h2", "fd00::6", 1500)));
    assert_eq!(network_mtu(&catalog, &local, &network), 1430);
}

#[test]
fn every_device_takes_packets_of_the_same_size_to_cut_up() {
    let (catalog, local, _) = scene(false);
    let state = desired(&catalog, &local);
    let links: Vec<_> = state
        .iter()
        .filter_map(|((_, key), object)| match object {
            Object::Link(link) => Some((key, link)),
            _ => None,
        })
        .collect();
    assert_eq!(links.len(), 5, "br0, vxlan0, up0 and dwN, and an endpoint's port: {links:?}");
    for (key, link) in links {
        assert_eq!(link.gso_max_size, Some(65_536), "{key:?}");
        match &link.peer {
            Some(Peer::Host { gso_max_size, .. }) => assert_eq!(*gso_max_size, Some(65_536), "{key:?}"),
            Some(Peer::Container(end)) => assert_eq!(end.gso_max_size, Some(65_536), "{key:?}"),
            Some(Peer::Here { gso_max_size, .. }) => assert_eq!(*gso_max_size, Some(65_536), "{key:?}"),
            None => {}
        }
    }
}

#[test]
fn a_leaf_is_there_with_the_first_port_that_it_has_and_is_no_part_of_an_attachment() {
    let (catalog, mut local, endpoint) = scene(false);
    let plain = desired(&catalog, &local);
    assert!(desired_bridge(&catalog, &local, &endpoint).is_empty(), "br0 is the router's");

    let leaf = Bridge(3);
    local.attachments.get_mut(&endpoint).unwrap().bridge = leaf;
    let all = desired(&catalog, &local);
    let links: Vec<_> = all
        .iter()
        .filter_map(|(name, object)| Some((name, object)).filter(|_| !plain.contains_key(name)))
        .map(|((_, key), object)| match (key, object) {
            (Key::Link(name), Object::Link(link)) => {
                format!("{name} of {:?}", link.master.as_ref().map(Ifname::as_str))
            }
            (key, object) => format!("{key:?} {object:?}"),
        })
        .collect();
    assert_eq!(
        links,
        [
            "leaf3 of None",
            r#"leaf3-down of Some("br0")"#,
            r#"leaf3-up of Some("leaf3")"#,
            r#"Sysctl("ipv4/conf/leaf3/arp_ignore") Sysctl("8")"#,
            r#"Sysctl("ipv4/conf/leaf3/forwarding") Sysctl("0")"#,
            r#"Sysctl("ipv4/conf/leaf3/rp_filter") Sysctl("0")"#,
        ]
    );
    let port = |state: &State| match &state
        [&(Place::Router(local.attachments[&endpoint].network.clone()), Key::Link(port_name(&endpoint)))]
    {
        Object::Link(link) => link.master.clone(),
        _ => None,
    };
    assert_eq!((port(&plain), port(&all)), (Some(Bridge::ROOT.name()), Some(leaf.name())));

    let own = desired_attachment(&catalog, &local, &endpoint);
    let bridge = desired_bridge(&catalog, &local, &endpoint);
    assert_eq!((own.len(), bridge.len()), (5, 6));
    assert!(
        own.keys().all(|name| !bridge.contains_key(name)),
        "a detach leaves the bridge to its other ports"
    );
    for (name, object) in own.iter().chain(&bridge) {
        assert_eq!(all.get(name), Some(object));
    }
}

#[test]
fn making_goes_from_namespace_to_routes_and_removing_names_only_the_namespace() {
    let (catalog, local, _) = scene(false);
    let want = desired(&catalog, &local);
    let steps = diff(&State::new(), &want, &Scope::Everything);
    let Step::Add(_, Key::Netns, _) = &steps[0] else { panic!("{:?}", steps[0]) };
    let position = |wanted: &Key| {
        steps
            .iter()
            .position(|step| matches!(step, Step::Add(Place::Router(_), key, _) if key == wanted))
            .unwrap()
    };
    let port = Key::Link(port_name(local.attachments.keys().next().unwrap()));
    assert!(position(&Key::Table(Family::Bridge)) < position(&port), "the guard is there before the port");
    assert!(
        position(&Key::Link(Ifname::new("br0"))) < position(&port),
        "the bridge is there before its port"
    );

    let gone = diff(&want, &State::new(), &Scope::Everything);
    let router: Vec<_> =
        gone.iter().filter(|step| matches!(step, Step::Remove(Place::Router(_), _))).collect();
    assert_eq!(router.len(), 1, "{router:?}");
    assert_eq!(diff(&want, &want, &Scope::Everything), []);
}

#[test]
fn a_scope_touches_nothing_outside_it() {
    let (catalog, local, endpoint) = scene(false);
    let want = desired(&catalog, &local);
    let names = desired_attachment(&catalog, &local, &endpoint).into_keys().collect();
    let steps = diff(&State::new(), &want, &Scope::Only(names));
    assert_eq!(steps.len(), 5);
}

#[test]
fn an_encrypted_network_sends_remote_blocks_to_its_device_and_the_kernel_knows_no_peer() {
    let (mut catalog, local, _) = scene(false);
    catalog.networks.values_mut().for_each(|network| network.driver = model::Driver::Ipsec);
    let state = desired(&catalog, &local);
    for cidr in ["10.42.128.0/26", "10.42.200.0/26"] {
        let route = route(&state, cidr).unwrap();
        assert_eq!((route.dev.clone(), route.via), (Some(Ifname::new("tun0")), None));
        assert_eq!(route.src, Some("10.42.64.65".parse().unwrap()));
    }
    assert!(!state.keys().any(|(_, key)| matches!(key, Key::Fdb(..) | Key::Neighbour(..))));
    let network = catalog.networks.values().next().unwrap();
    assert_eq!(network_mtu(&catalog, &local, network), 1438);
}
