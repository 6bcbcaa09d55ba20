//! Every rule of the zone, without sockets.

use std::str::FromStr;

use model::{Catalog, EndpointId, EndpointKind, HostId, Mac, NetworkSpec, Object, Revision};

use super::*;

pub(crate) const H1: [u8; 8] = [1; 8];
const H2: [u8; 8] = [2; 8];

pub(crate) fn network() -> NetworkId {
    NetworkId::from_random([7; 8])
}

fn name(text: &str) -> Option<model::Name> {
    (!text.is_empty()).then(|| text.parse().unwrap())
}

/// An endpoint on h1; empty text is no name.
pub(crate) fn endpoint(id: u8, container: &str, stack: &str, service: &str, address: &str) -> Endpoint {
    Endpoint {
        id: EndpointId::from_random([id; 8]),
        network: network(),
        host: HostId::from_random(H1),
        name: name(container),
        stack: name(stack),
        service: name(service),
        aliases: Vec::new(),
        addresses: address.split(' ').filter(|a| !a.is_empty()).map(|a| a.parse().unwrap()).collect(),
        mac: Mac::from_random([id; 6]),
        kind: EndpointKind::Socket,
        container: None,
        labels: BTreeMap::new(),
        ports: Vec::new(),
        healthy: true,
        created: 0,
    }
}

pub(crate) fn on_h2(mut endpoint: Endpoint) -> Endpoint {
    endpoint.host = HostId::from_random(H2);
    endpoint
}

fn sick(mut endpoint: Endpoint) -> Endpoint {
    endpoint.healthy = false;
    endpoint
}

/// What h1 knows: its own endpoints from the ledger, those of h2 from the catalog.
pub(crate) fn view(domain: &str, endpoints: Vec<Endpoint>) -> View {
    let host = HostId::from_random(H1);
    let spec = NetworkSpec::new("managed".parse().unwrap(), "10.42.0.0/16".parse().unwrap());
    let mut network_object = spec.validate(network(), 1, 0).unwrap();
    network_object.cidrs.push("fd42:1::/64".parse().unwrap());
    let mut catalog = Catalog::from_objects([
        Object::Network(network_object),
        Object::Host(model::Host {
            id: HostId::from_random(H2),
            name: "h2".parse().unwrap(),
            candidates: Vec::new(),
            labels: BTreeMap::new(),
            key: String::new(),
            joined: 0,
        }),
    ]);
    let (local, remote): (Vec<_>, Vec<_>) = endpoints.into_iter().partition(|endpoint| endpoint.host == host);
    for endpoint in remote {
        catalog.put(Object::Endpoint(endpoint));
    }
    View {
        host,
        host_name: "H1".parse().unwrap(),
        domain: domain.to_owned(),
        epoch: None,
        revision: Revision(9),
        catalog,
        local: local.into_iter().map(|endpoint| (endpoint.id.clone(), Arc::new(endpoint))).collect(),
        routers: BTreeMap::new(),
        tunnels: std::sync::Arc::default(),
        no_shortcut: None,
        troubles: Vec::new(),
        moves: 0,
    }
}

/// The reference's application: rocketchat on h1, mongo and hubot on h2.
pub(crate) fn walk() -> Vec<Endpoint> {
    vec![
        endpoint(1, "rocketchat", "rocket-chat", "rocketchat", "10.42.0.2"),
        on_h2(endpoint(2, "rc-mongo-1", "rocket-chat", "mongo", "10.42.64.2")),
        on_h2(endpoint(3, "hubot", "rocket-chat", "hubot", "10.42.64.3")),
    ]
}

fn zone(endpoints: Vec<Endpoint>) -> Zone {
    Zone::new(&view("droveway.internal", endpoints), &network())
}

const ASKER: &str = "10.42.0.2";
const STRANGER: &str = "10.42.9.9";

fn ask(zone: &Zone, name: &str, kind: RecordType, asker: &str) -> Outcome {
    zone.answer(&Query::query(Name::from_str(name).unwrap(), kind), asker.parse().unwrap())
}

/// The answer in words: addresses and names, or `nodata`, `nxdomain`, `not ours`.
fn say(zone: &Zone, name: &str, kind: RecordType, asker: &str) -> String {
    match ask(zone, name, kind, asker) {
        Outcome::Records(records) => records.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
        Outcome::NoData { .. } => "nodata".to_owned(),
        Outcome::NxDomain { .. } => "nxdomain".to_owned(),
        Outcome::NotOurs => "not ours".to_owned(),
    }
}

fn a(zone: &Zone, name: &str) -> String {
    say(zone, name, RecordType::A, ASKER)
}

fn ptr(zone: &Zone, address: &str) -> String {
    let address: IpAddr = address.parse().unwrap();
    let name = Name::from(address);
    match zone.answer(&Query::query(name, RecordType::PTR), ASKER.parse().unwrap()) {
        Outcome::Records(records) => records[0].to_string(),
        other => format!("{other:?}"),
    }
}

#[test]
fn a_service_a_container_and_a_container_on_its_host_are_found() {
    let zone = zone(walk());
    assert_eq!(a(&zone, "mongo.rocket-chat.droveway.internal."), "10.42.64.2");
    assert_eq!(a(&zone, "rc-mongo-1.droveway.internal."), "10.42.64.2");
    assert_eq!(a(&zone, "rc-mongo-1.h2.droveway.internal."), "10.42.64.2");
    assert_eq!(a(&zone, "rocketchat.h1.droveway.internal."), "10.42.0.2");
    assert_eq!(a(&zone, "rocketchat.h2.droveway.internal."), "nxdomain");
    assert_eq!(a(&zone, "mongo.droveway.internal."), "nxdomain", "a service has no name outside its stack");
}

#[test]
fn a_container_is_found_in_its_stack_unless_a_service_is_so_called() {
    let mut endpoints = walk();
    assert_eq!(a(&zone(endpoints.clone()), "rc-mongo-1.rocket-chat.droveway.internal."), "10.42.64.2");
    endpoints.push(endpoint(4, "x", "rocket-chat", "rc-mongo-1", "10.42.0.9"));
    assert_eq!(a(&zone(endpoints), "rc-mongo-1.rocket-chat.droveway.internal."), "10.42.0.9");
}

#[test]
fn case_does_not_matter_in_questions_nor_in_names() {
    let zone = zone(vec![endpoint(1, "Web_1", "Shop", "FRONT", "10.42.0.2")]);
    assert_eq!(a(&zone, "wEB_1.DroveWay.INTERNAL."), "10.42.0.2");
    assert_eq!(a(&zone, "front.SHOP.droveway.internal."), "10.42.0.2");
    assert_eq!(a(&zone, "FRONT"), "10.42.0.2");
}

#[test]
fn a_name_that_repeats_across_hosts_answers_all_and_with_its_host_one() {
    let zone =
        zone(vec![endpoint(1, "db", "", "", "10.42.0.2"), on_h2(endpoint(2, "db", "", "", "10.42.64.2"))]);
    assert_eq!(a(&zone, "db.droveway.internal."), "10.42.0.2 10.42.64.2");
    assert_eq!(a(&zone, "db.h1.droveway.internal."), "10.42.0.2");
    assert_eq!(a(&zone, "db.h2.droveway.internal."), "10.42.64.2");
}

#[test]
fn a_service_of_many_endpoints_answers_with_all_of_them() {
    let endpoints: Vec<Endpoint> = (0..200)
        .map(|i| {
            let made = endpoint(i, &format!("web-{i}"), "shop", "web", &format!("10.42.{i}.2"));
            if i % 2 == 0 { on_h2(made) } else { made }
        })
        .collect();
    let Outcome::Records(records) =
        ask(&zone(endpoints), "web.shop.droveway.internal.", RecordType::A, ASKER)
    else {
        panic!("no records");
    };
    assert_eq!(records.len(), 200);
}

#[test]
fn only_healthy_endpoints_answer_and_all_if_none_is() {
    let one = endpoint(1, "web-1", "shop", "web", "10.42.0.2");
    let two = endpoint(2, "web-2", "shop", "web", "10.42.0.3");
    let name = "web.shop.droveway.internal.";
    assert_eq!(a(&zone(vec![one.clone(), sick(two.clone())]), name), "10.42.0.2");
    assert_eq!(a(&zone(vec![sick(one.clone()), sick(two.clone())]), name), "10.42.0.2 10.42.0.3");
    let alone = zone(vec![one, sick(two)]);
    assert_eq!(a(&alone, "web-2.droveway.internal."), "10.42.0.3", "it is all there is of that name");
}

#[test]
fn an_alias_is_a_name_like_the_containers_own() {
    let mut one = endpoint(1, "web-1", "", "", "10.42.0.2");
    one.aliases = vec!["cache".parse().unwrap(), "cache".parse().unwrap(), "web-1".parse().unwrap()];
    let mut two = on_h2(endpoint(2, "cache", "", "", "10.42.64.2"));
    two.aliases = vec!["store".parse().unwrap()];
    let zone = zone(vec![one, two]);
    assert_eq!(a(&zone, "cache.droveway.internal."), "10.42.0.2 10.42.64.2");
    assert_eq!(a(&zone, "store"), "10.42.64.2");
    assert_eq!(a(&zone, "cache.h1.droveway.internal."), "nxdomain", "an alias belongs to no host");
}

#[test]
fn another_networks_endpoints_are_not_seen() {
    let mut other = endpoint(2, "secret", "vault", "secret", "10.42.0.3");
    other.network = NetworkId::from_random([8; 8]);
    let zone = zone(vec![endpoint(1, "db", "", "", ASKER), other]);
    assert_eq!(a(&zone, "secret.droveway.internal."), "nxdomain");
    assert_eq!(a(&zone, "secret"), "not ours");
    assert_eq!(a(&zone, "secret.vault"), "not ours");
    assert!(ptr(&zone, "10.42.0.3").starts_with("NxDomain"));
}

#[test]
fn the_ledger_is_right_about_this_host_where_the_catalog_is_behind() {
    let mut view = view("droveway.internal", vec![endpoint(1, "db", "", "", "10.42.0.2")]);
    view.catalog.put(Object::Endpoint(endpoint(9, "gone", "", "", "10.42.0.9")));
    let zone = Zone::new(&view, &network());
    assert_eq!(a(&zone, "gone.droveway.internal."), "nxdomain");
    assert_eq!(a(&zone, "db.droveway.internal."), "10.42.0.2");
}

#[test]
fn the_other_family_and_other_types_are_nodata_where_the_name_exists() {
    let zone = zone(vec![
        endpoint(1, "db", "shop", "db", "10.42.0.2"),
        endpoint(2, "both", "", "", "10.42.0.3 fd42:1::3"),
    ]);
    for kind in [RecordType::AAAA, RecordType::SRV, RecordType::TXT, RecordType::MX, RecordType::HTTPS] {
        assert_eq!(say(&zone, "db.droveway.internal.", kind, ASKER), "nodata", "{kind}");
        assert_eq!(say(&zone, "db", kind, ASKER), "nodata", "{kind}");
        assert_eq!(say(&zone, "nothere.droveway.internal.", kind, ASKER), "nxdomain", "{kind}");
    }
    assert_eq!(say(&zone, "both.droveway.internal.", RecordType::AAAA, ASKER), "fd42:1::3");
    assert_eq!(a(&zone, "both.droveway.internal."), "10.42.0.3");
}

#[test]
fn any_gives_addresses() {
    let zone = zone(vec![endpoint(1, "both", "", "", "10.42.0.3 fd42:1::3")]);
    assert_eq!(say(&zone, "both.droveway.internal.", RecordType::ANY, ASKER), "10.42.0.3 fd42:1::3");
}

#[test]
fn a_parent_of_names_exists_and_has_no_data() {
    let zone = zone(walk());
    for parent in ["rocket-chat.droveway.internal.", "h2.droveway.internal.", "droveway.internal."] {
        assert_eq!(a(&zone, parent), "nodata", "{parent}");
    }
    assert!(say(&zone, "droveway.internal.", RecordType::SOA, ASKER).starts_with("droveway.internal."));
    assert_eq!(say(&zone, "h2.droveway.internal.", RecordType::SOA, ASKER), "nodata");
    assert_eq!(a(&zone, "internal."), "not ours");
    assert_eq!(a(&zone, "notdroveway.internal."), "not ours");
}

#[test]
fn a_single_label_is_completed_by_the_askers_own_search_list() {
    let mut endpoints = walk();
    endpoints.push(endpoint(4, "x", "shop", "mongo", "10.42.0.4"));
    endpoints.push(endpoint(5, "mongo", "", "", "10.42.0.5"));
    let zone = zone(endpoints);
    assert_eq!(say(&zone, "mongo", RecordType::A, "10.42.0.2"), "10.42.64.2", "of its stack");
    assert_eq!(say(&zone, "mongo", RecordType::A, "10.42.0.4"), "10.42.0.4", "of its stack");
    assert_eq!(
        say(&zone, "mongo", RecordType::A, "10.42.0.5"),
        "10.42.0.5",
        "without a stack, the container"
    );
    assert_eq!(say(&zone, "mongo.", RecordType::A, STRANGER), "10.42.0.5", "unknown askers have the domain");
    assert_eq!(say(&zone, "hubot", RecordType::A, "10.42.0.4"), "10.42.64.3", "by the domain");
    assert_eq!(say(&zone, "unknown", RecordType::A, "10.42.0.2"), "not ours");
}

#[test]
fn a_stack_or_a_host_is_no_single_label_of_ours() {
    let zone = zone(walk());
    assert_eq!(a(&zone, "rocket-chat"), "not ours");
    assert_eq!(a(&zone, "h2"), "not ours");
    assert_eq!(a(&zone, "."), "not ours");
}

#[test]
fn service_dot_stack_is_ours_where_there_is_such_a_stack_and_such_a_name() {
    let zone = zone(walk());
    assert_eq!(a(&zone, "mongo.rocket-chat"), "10.42.64.2");
    assert_eq!(say(&zone, "MONGO.Rocket-Chat.", RecordType::A, STRANGER), "10.42.64.2");
    assert_eq!(a(&zone, "nothere.rocket-chat"), "not ours");
    assert_eq!(a(&zone, "hubot.h2"), "not ours", "a host is no stack");
    assert_eq!(a(&zone, "example.com"), "not ours");
}

#[test]
fn an_address_has_the_name_that_leads_to_it_alone() {
    let zone = zone(vec![
        endpoint(1, "shop-db-1", "shop", "db", "10.42.0.2"),
        endpoint(2, "shop-web-1", "shop", "web", "10.42.0.3"),
        on_h2(endpoint(3, "shop-web-2", "shop", "web", "10.42.64.3")),
        endpoint(4, "cache", "", "", "10.42.0.4 fd42:1::4"),
        on_h2(endpoint(5, "cache", "", "", "10.42.64.4")),
        endpoint(6, "", "", "", "10.42.0.5"),
    ]);
    assert_eq!(ptr(&zone, "10.42.0.2"), "db.shop.droveway.internal.");
    assert_eq!(ptr(&zone, "10.42.0.3"), "shop-web-1.droveway.internal.");
    assert_eq!(ptr(&zone, "10.42.64.3"), "shop-web-2.droveway.internal.");
    assert_eq!(ptr(&zone, "10.42.0.4"), "cache.h1.droveway.internal.");
    assert_eq!(ptr(&zone, "fd42:1::4"), "cache.h1.droveway.internal.");
    assert_eq!(ptr(&zone, "10.42.64.4"), "cache.h2.droveway.internal.");
    assert!(ptr(&zone, "10.42.0.5").starts_with("NoData"), "it exists and has no name");
}

#[test]
fn addresses_of_the_network_are_ours_to_deny_and_others_are_not() {
    let zone = zone(walk());
    let expected = Outcome::NxDomain { apex: Name::from_str("42.10.in-addr.arpa.").unwrap() };
    assert_eq!(ask(&zone, "9.9.42.10.in-addr.arpa.", RecordType::PTR, ASKER), expected);
    assert_eq!(say(&zone, "9.42.10.in-addr.arpa.", RecordType::PTR, ASKER), "nodata");
    assert_eq!(say(&zone, "42.10.in-addr.arpa.", RecordType::SOA, ASKER), "nodata");
    assert_eq!(say(&zone, "10.in-addr.arpa.", RecordType::PTR, ASKER), "not ours");
    assert_eq!(say(&zone, "1.1.1.1.in-addr.arpa.", RecordType::PTR, ASKER), "not ours");
    assert_eq!(say(&zone, "x.9.42.10.in-addr.arpa.", RecordType::PTR, ASKER), "not ours");
    assert_eq!(say(&zone, "2.0.42.10.in-addr.arpa.", RecordType::A, ASKER), "nodata");
}

#[test]
fn a_dot_or_a_zero_inside_a_label_is_not_taken_for_the_name_it_looks_like() {
    let zone = zone(walk());
    for label in [&b"mongo.rocket-chat"[..], b"hubot\0", b"hub\\ot", b"hub ot"] {
        let inside = Name::from_labels([label, b"droveway", b"internal"]).unwrap();
        let outcome = zone.answer(&Query::query(inside, RecordType::A), ASKER.parse().unwrap());
        assert!(matches!(outcome, Outcome::NxDomain { .. }), "{outcome:?}");
        let outside = Name::from_labels([label]).unwrap();
        let outcome = zone.answer(&Query::query(outside, RecordType::A), ASKER.parse().unwrap());
        assert_eq!(outcome, Outcome::NotOurs);
    }
}

#[test]
fn names_that_dns_cannot_say_do_no_harm() {
    let long = "x".repeat(63);
    let domain = format!("{long}.{long}.{long}.internal");
    let endpoints =
        vec![endpoint(1, "a..b", "c.", "d", "10.42.0.2"), endpoint(2, &long, "", "", "10.42.0.3")];
    let zone = Zone::new(&view(&domain, endpoints), &network());
    assert!(ptr(&zone, "10.42.0.3").starts_with("NoData"), "no name can be as long");
    let plain = Zone::new(&view("", vec![endpoint(1, "db", "", "", "10.42.0.2")]), &network());
    assert_eq!(a(&plain, "example.com."), "not ours", "no domain is not the whole world");
}

#[test]
fn metadata_has_the_name_it_had_in_rancher_unless_a_container_has_it() {
    let name = "rancher-metadata";
    assert_eq!(a(&zone(walk()), name), "169.254.169.250");
    assert_eq!(a(&zone(vec![endpoint(1, name, "", "", "10.42.0.2")]), name), "10.42.0.2");
}

#[test]
fn a_zone_is_made_when_it_is_asked_for_and_of_the_newest_view() {
    let (views, receiver) = watch::channel(Arc::new(view("droveway.internal", Vec::new())));
    let zones = Zones::new(receiver, network());
    let empty = zones.newest();
    assert!(Arc::ptr_eq(&empty, &zones.newest()), "nothing is new");
    views.send_replace(Arc::new(view("droveway.internal", Vec::new())));
    views.send_replace(Arc::new(view("droveway.internal", walk())));
    assert_eq!(a(&zones.newest(), "hubot"), "10.42.64.3");
}
