use std::collections::BTreeSet;

use model::api::{ApiError, ClaimRequest, Consent, ErrorCode, GiveBack, Heard, IpamView, ReleaseClaim};
use model::{Block, Claim, EndpointId};
use serde_json::json;

use crate::harness::{Agent, DEFAULT, Server};

async fn claim(agent: &Agent, address: &str, endpoint: &EndpointId) -> Result<Claim, ApiError> {
    let request = ClaimRequest {
        network: "managed".into(),
        address: Some(address.parse().unwrap()),
        endpoint: endpoint.clone(),
        router: false,
        retain: None,
    };
    agent.client.post(&format!("{DEFAULT}/claims"), &request).await
}

async fn give_back(agent: &Agent, block: &Block) -> Result<(), ApiError> {
    let request = GiveBack { network: "managed".into(), cidr: block.cidr, leased: Some(block.leased) };
    agent.client.delete_with(&format!("{DEFAULT}/blocks"), &request).await
}

fn refused<T: std::fmt::Debug>(result: Result<T, ApiError>, code: ErrorCode, expected: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.code, code, "{error}");
    assert!(error.message.contains(expected), "{error}");
}

#[tokio::test]
async fn leases_never_overlap_however_many_ask_at_once() {
    let server = Server::start().await;
    let mut hosts = Vec::new();
    for i in 0..5 {
        hosts.push(server.host(&format!("h{i}")).await);
    }
    // Each host asks ten times for each of its first two blocks, all at once.
    let asks = hosts.iter().flat_map(|host| (0..10).map(move |i| host.lease("managed", i % 2)));
    let leased = futures_util::future::join_all(asks).await;
    let leased: Vec<Block> = leased.into_iter().map(Result::unwrap).collect();
    let mut blocks = BTreeSet::new();
    for host in &hosts {
        let own: BTreeSet<_> = leased.iter().filter(|b| b.host == host.id).map(|b| b.cidr).collect();
        assert!(own.len() <= 2, "the same request gets the same block: {own:?}");
        for cidr in own {
            assert!(blocks.insert(cidr), "{cidr} is leased twice");
        }
    }
    let all: Vec<Block> = server.admin().get(&format!("{DEFAULT}/blocks")).await.unwrap();
    assert_eq!(all.iter().map(|block| block.cidr).collect::<BTreeSet<_>>(), blocks);
    assert_eq!(all.len(), blocks.len());
    assert!(all.iter().all(|block| block.leased.0 > 0));
}

#[tokio::test]
async fn a_repeated_request_gets_the_same_block_and_a_full_pool_says_who_holds_it() {
    let server = Server::start().await;
    let spec = json!({ "name": "small", "cidrs": ["10.50.0.0/24"] });
    server.admin().make_network(spec).await.unwrap();
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    let first = one.lease("small", 0).await.unwrap();
    assert_eq!(one.lease("small", 0).await.unwrap(), first);
    let second = one.lease("small", 1).await.unwrap();
    assert!(second.leased > first.leased && second.cidr != first.cidr);
    assert_eq!(one.lease("small", 1).await.unwrap(), second);
    two.lease("small", 0).await.unwrap();
    refused(
        two.lease("small", 1).await,
        ErrorCode::Exhausted,
        "all 3 blocks of 10.50.0.0/24 are leased (h1: 2, h2: 1)",
    );
    refused(two.lease("none", 0).await, ErrorCode::NotFound, "\"none\"");
    let view: model::api::HostView = server.admin().get(&format!("{DEFAULT}/hosts/h1")).await.unwrap();
    assert_eq!(view.blocks, [first, second], "in the order of leases");
}

#[tokio::test]
async fn a_block_is_given_back_by_its_holder_when_nothing_uses_it() {
    let server = Server::start().await;
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    let block = one.lease("managed", 0).await.unwrap();
    refused(give_back(&two, &block).await, ErrorCode::Forbidden, "leased to host h1");
    let web = one.endpoint(&block, "web", 2);
    one.put(&web).await.unwrap();
    refused(give_back(&one, &block).await, ErrorCode::InUse, "in use by web");
    one.client.delete(&format!("{DEFAULT}/endpoints/{}", web.id)).await.unwrap();
    give_back(&one, &block).await.unwrap();
    give_back(&one, &block).await.expect("once more is no error");
    refused(one.put(&web).await, ErrorCode::Conflict, "lease a block or claim the address first");
}

#[tokio::test]
async fn an_address_is_claimed_once_and_only_where_no_block_is_leased() {
    let server = Server::start().await;
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    let (a, b) = (EndpointId::from_random([1; 8]), EndpointId::from_random([2; 8]));
    let held = claim(&one, "10.42.0.7", &a).await.unwrap();
    assert_eq!(claim(&one, "10.42.0.7", &a).await.unwrap(), held, "the same again is the same");
    refused(claim(&two, "10.42.0.7", &b).await, ErrorCode::Conflict, "is taken by endpoint");
    refused(claim(&one, "10.42.0.7", &b).await, ErrorCode::Conflict, "on host h1");
    let block = two.lease("managed", 0).await.unwrap();
    let inside = two.endpoint(&block, "x", 9).addresses[0].to_string();
    refused(claim(&two, &inside, &b).await, ErrorCode::Conflict, "assigns it itself");
    refused(claim(&one, "10.43.0.7", &b).await, ErrorCode::Invalid, "outside the pool 10.42.0.0/16");
    refused(claim(&one, "fd00::7", &b).await, ErrorCode::Invalid, "outside the pool");
    refused(claim(&one, "10.42.0.1", &b).await, ErrorCode::Invalid, "gateway");
    let release =
        ReleaseClaim { network: "managed".into(), address: "10.42.0.7".parse().unwrap(), endpoint: None };
    let path = format!("{DEFAULT}/claims");
    refused(two.client.delete_with(&path, &release).await, ErrorCode::Forbidden, "claimed by host h1");
    let mut endpoint = one.endpoint(&block, "web", 2);
    endpoint.id = a.clone();
    endpoint.addresses = vec!["10.42.0.7".parse().unwrap()];
    one.put(&endpoint).await.unwrap();
    refused(claim(&two, "10.42.0.7", &b).await, ErrorCode::Conflict, "taken by endpoint web on host h1");
    refused(one.client.delete_with(&path, &release).await, ErrorCode::InUse, "remove it first");
    one.client.delete(&format!("{DEFAULT}/endpoints/{a}")).await.unwrap();
    one.client.delete_with(&path, &release).await.unwrap();
    one.client.delete_with(&path, &release).await.expect("once more is no error");
    claim(&two, "10.42.0.7", &b).await.unwrap();
}

#[tokio::test]
async fn one_of_many_claims_of_an_address_wins() {
    let server = Server::start().await;
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    let ids: Vec<EndpointId> = (0..20).map(|i| EndpointId::from_random([i; 8])).collect();
    let claims =
        ids.iter().enumerate().map(|(i, id)| claim(if i % 2 == 0 { &one } else { &two }, "10.42.1.1", id));
    let claims = futures_util::future::join_all(claims).await;
    assert_eq!(claims.iter().filter(|claim| claim.is_ok()).count(), 1);
}

#[tokio::test]
async fn an_agent_keeps_its_own_endpoints_and_no_others() {
    let server = Server::start().await;
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    let block = one.lease("managed", 0).await.unwrap();
    let other = two.lease("managed", 0).await.unwrap();
    let web = one.endpoint(&block, "web", 2);
    one.put(&web).await.unwrap();
    let path = format!("{DEFAULT}/endpoints/{}", web.id);
    let seen: model::Endpoint = server.admin().get(&path).await.unwrap();
    assert_eq!(seen, web);
    refused(two.put(&web).await, ErrorCode::Forbidden, "its own only");
    let stolen = model::Endpoint { host: two.id.clone(), ..web.clone() };
    refused(two.put(&stolen).await, ErrorCode::Forbidden, "is on host h1");
    refused(two.client.delete(&path).await, ErrorCode::Forbidden, "is on host h1");
    let same = model::Endpoint { id: EndpointId::from_random([9; 8]), ..web.clone() };
    refused(one.put(&same).await, ErrorCode::Conflict, "is that of endpoint web on host h1");
    let far = model::Endpoint { addresses: two.endpoint(&other, "x", 3).addresses, ..web.clone() };
    refused(one.put(&far).await, ErrorCode::Conflict, "lease a block or claim");
    let outside = model::Endpoint { addresses: vec!["192.0.2.1".parse().unwrap()], ..web.clone() };
    refused(one.put(&outside).await, ErrorCode::Invalid, "outside the pool");
    let none = model::Endpoint { addresses: vec![], ..web.clone() };
    refused(one.put(&none).await, ErrorCode::Invalid, "needs one address");
    let moved =
        server.admin().make_network(json!({ "name": "red", "cidrs": ["10.42.0.0/16"] })).await.unwrap();
    let moved = model::Endpoint { network: moved.id, ..web.clone() };
    refused(one.put(&moved).await, ErrorCode::Conflict, "make another in red");
    let wrong = one.client.put::<()>(&format!("{DEFAULT}/endpoints/{}", same.id), &web).await;
    refused(wrong, ErrorCode::Invalid, "its own path");
    assert_eq!(server.admin().get::<model::Endpoint>(&path).await.unwrap(), web, "nothing changed");
    let named = model::Endpoint { name: Some("www".parse().unwrap()), healthy: false, ..web.clone() };
    one.put(&named).await.unwrap();
    assert_eq!(server.admin().get::<model::Endpoint>(&path).await.unwrap(), named);
    one.client.delete(&path).await.unwrap();
    one.client.delete(&path).await.expect("once more is no error");
}

async fn consent(
    agent: &Agent,
    address: &str,
    endpoint: &EndpointId,
    consents: bool,
) -> Result<(), ApiError> {
    let (network, endpoint) = ("managed".into(), endpoint.clone());
    let said = Consent { network, address: address.parse().unwrap(), endpoint, at: None, consents };
    agent.client.put(&format!("{DEFAULT}/claims"), &said).await
}

async fn heard(agent: &Agent, said: &Heard) -> Result<(), ApiError> {
    agent.client.put(&format!("{DEFAULT}/hosts/self/heard"), said).await
}

async fn shown(server: &Server) -> IpamView {
    server.admin().get(&format!("{DEFAULT}/ipam")).await.unwrap()
}

#[tokio::test]
async fn an_address_in_another_hosts_block_is_granted_when_that_host_has_let_go_of_it() {
    let server = Server::start().await;
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    let block = two.lease("managed", 0).await.unwrap();
    let web = two.endpoint(&block, "web", 9);
    two.put(&web).await.unwrap();
    let id = EndpointId::from_random([1; 8]);
    let taken = web.addresses[0].to_string();
    refused(claim(&one, &taken, &id).await, ErrorCode::Conflict, "taken by endpoint web on host h2");
    refused(
        claim(&one, &block.router_address().to_string(), &id).await,
        ErrorCode::Conflict,
        "router of host h2",
    );

    let free = two.endpoint(&block, "x", 10).addresses[0].to_string();
    let asked = async |consents| {
        let answer = async {
            while !shown(&server).await.claims.iter().any(|claim| claim.asked) {
                tokio::task::yield_now().await;
            }
            let other = EndpointId::from_random([7; 8]);
            consent(&two, &free, &other, consents).await.expect("it is asked for another one");
            // Whoever has no block there has nothing to say.
            refused(consent(&one, &free, &id, true).await, ErrorCode::Forbidden, "in no block of this host");
            consent(&two, &free, &id, consents).await.unwrap();
        };
        tokio::join!(claim(&one, &free, &id), answer).0
    };
    refused(asked(false).await, ErrorCode::Conflict, "of host h2, which uses it; choose another");
    assert_eq!(shown(&server).await.claims, [], "nothing was changed");
    let granted = asked(true).await.unwrap();
    assert_eq!(shown(&server).await.claims, [granted]);
    let stolen = two.endpoint(&block, "stolen", 10);
    refused(two.put(&stolen).await, ErrorCode::Conflict, "is claimed by host h1");
    consent(&two, &free, &id, false).await.expect("nobody asks any more");
    assert_eq!(shown(&server).await.claims.len(), 1);
}

#[tokio::test]
async fn a_block_that_was_given_back_is_leased_to_another_host_when_all_that_took_part_have_heard_of_it() {
    let server = Server::start().await;
    server.admin().make_network(json!({ "name": "small", "cidrs": ["10.50.0.0/24"] })).await.unwrap();
    let hosts = [server.host("h1").await, server.host("h2").await, server.host("h3").await];
    let [one, two, three] = &hosts;
    let block = one.lease("small", 0).await.unwrap();
    for host in [two, three] {
        host.lease("small", 0).await.unwrap();
    }
    let info: model::api::ServerInfo = server.admin().get("/v1/info").await.unwrap();
    let early = Heard { epoch: info.epoch.clone(), revision: info.revision };
    let request = GiveBack { network: "small".into(), cidr: block.cidr, leased: None };
    one.client.delete_with(&format!("{DEFAULT}/blocks"), &request).await.unwrap();
    let info: model::api::ServerInfo = server.admin().get("/v1/info").await.unwrap();
    let now = Heard { epoch: info.epoch.clone(), revision: info.revision };
    for host in &hosts {
        heard(host, &early).await.unwrap();
    }
    heard(two, &Heard { epoch: "abcdefghij".parse().unwrap(), ..now.clone() }).await.unwrap();
    refused(two.lease("small", 1).await, ErrorCode::Exhausted, "1 wait until h1, h2, h3 have heard");
    heard(one, &now).await.unwrap();
    heard(one, &now).await.expect("once more is no error");
    heard(two, &now).await.unwrap();
    refused(two.lease("small", 1).await, ErrorCode::Exhausted, "1 wait until h3 have heard");
    assert_eq!(shown(&server).await.withdrawn[0].waits_for, [three.id.clone()].into());
    assert_eq!(one.lease("small", 0).await.unwrap().cidr, block.cidr, "whoever had it may have it again");
    assert_eq!(shown(&server).await.withdrawn, []);

    // A host that is removed is not waited for; what it had waits for the others.
    one.client.delete_with(&format!("{DEFAULT}/blocks"), &request).await.unwrap();
    server.admin().delete(&format!("{DEFAULT}/hosts/h1")).await.unwrap();
    server.admin().delete(&format!("{DEFAULT}/hosts/h3")).await.unwrap();
    let info: model::api::ServerInfo = server.admin().get("/v1/info").await.unwrap();
    assert_eq!(shown(&server).await.withdrawn.len(), 2);
    heard(two, &Heard { epoch: info.epoch, revision: info.revision }).await.unwrap();
    assert_eq!(shown(&server).await.withdrawn, []);
    for held in 1..3 {
        two.lease("small", held).await.unwrap();
    }
}

#[tokio::test]
async fn where_no_block_is_free_single_addresses_are_granted_and_no_block_is_made_of_a_claim() {
    let server = Server::start().await;
    server.admin().make_network(json!({ "name": "small", "cidrs": ["10.50.0.0/24"] })).await.unwrap();
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    let single = async |agent: &Agent, seed: u8, address: Option<&str>| -> Result<Claim, ApiError> {
        let request = ClaimRequest {
            network: "small".into(),
            address: address.map(|text| text.parse().unwrap()),
            endpoint: EndpointId::from_random([seed; 8]),
            router: seed == 0,
            retain: None,
        };
        agent.client.post(&format!("{DEFAULT}/claims"), &request).await
    };
    // One in a block of nobody: it stays nobody's.
    let claimed = single(&two, 1, Some("10.50.0.130")).await.unwrap();
    for held in 0..2 {
        assert!(!one.lease("small", held).await.unwrap().cidr.contains(&claimed.address));
    }
    refused(
        one.lease("small", 2).await,
        ErrorCode::Exhausted,
        "no block of 10.50.0.0/24 is free: 2 are leased",
    );
    let router = single(&two, 0, None).await.unwrap();
    assert!(router.router);
    assert_eq!(single(&two, 0, None).await.unwrap(), router, "the same again is the same");
    let mut all = BTreeSet::from([claimed.address, router.address]);
    for seed in 2..=250 {
        match single(&two, seed, None).await {
            Ok(claim) => assert!(all.insert(claim.address), "{} is granted twice", claim.address),
            Err(error) => {
                assert_eq!(error.code, ErrorCode::Exhausted, "{error}");
                break;
            }
        }
    }
    // The claims slice without network and gateway address, and the block with the claim in it.
    assert_eq!(all.len(), 62 + 64);
    // One that is given back rests; who wants that one has it all the same.
    let given = ReleaseClaim { network: "small".into(), address: router.address, endpoint: None };
    two.client.delete_with(&format!("{DEFAULT}/claims"), &given).await.unwrap();
    let why = "1 single addresses rest for a minute after their last use; remove containers";
    refused(single(&one, 252, None).await, ErrorCode::Exhausted, why);
    let address = router.address.to_string();
    assert_eq!(single(&one, 252, Some(&address)).await.unwrap().address, router.address);
}
