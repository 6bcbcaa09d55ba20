//! The tree, and HTTP over real sockets.

use std::io::{Read, Write};

use axum::body::to_bytes;
use model::{Candidate, Network, Object, PublishedPort, Source};

use super::*;
use crate::names::fixtures::{endpoint, network, on_h2, view, walk};

const ROCKETCHAT: &str = "10.42.0.2";
const STRANGER: &str = "10.42.9.9";

fn walked() -> View {
    let mut endpoints = walk();
    endpoints[0].labels.insert("io.rancher.stack/name".to_owned(), "rocket-chat".to_owned());
    endpoints[0].labels.insert("tier".to_owned(), "front".to_owned());
    endpoints[0].ports = vec![PublishedPort { protocol: model::Protocol::Tcp, host_port: 80, port: 3000 }];
    endpoints.push(on_h2(endpoint(4, "lone", "", "", "10.42.64.9")));
    let mut view = view("droveway.internal", endpoints);
    for host in view.catalog.hosts.values_mut() {
        let address = [192, 0, 2, 2].into();
        host.candidates = vec![Candidate { address, port: None, mtu: 1500, source: Source::Route }];
    }
    view
}

async fn get(view: &View, asker: &str, path: &str, accept: &str) -> (u16, String) {
    let request = Request::get(path).header(ACCEPT, accept).body(()).unwrap();
    let response = respond(&request, view, &network(), asker.parse().unwrap());
    let status = response.status().as_u16();
    let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

/// The text, or `404`.
async fn plain_text(path: &str) -> String {
    let (status, text) = get(&walked(), ROCKETCHAT, path, "*/*").await;
    if status == 200 { text } else { status.to_string() }
}

#[tokio::test]
async fn a_container_learns_of_itself_by_its_address() {
    for (path, expected) in [
        ("/latest/self/container/name", "rocketchat"),
        ("/latest/self/container/primary_ip", "10.42.0.2"),
        ("/latest/self/container/ips/0", "10.42.0.2"),
        ("/latest/self/container/stack_name", "rocket-chat"),
        ("/latest/self/container/service_name", "rocketchat"),
        ("/latest/self/container/host", "H1"),
        ("/latest/self/container/labels/tier", "front"),
        ("/latest/self/container/labels/io.rancher.stack%2Fname", "rocket-chat"),
        ("/latest/self/container/ports/0", "80:3000/tcp"),
        ("/latest/self/container/health_state", "healthy"),
        ("/latest/self/host/name", "H1"),
        ("/latest/self/stack/name", "rocket-chat"),
        ("/latest/self/service/containers/rocketchat/primary_ip", "10.42.0.2"),
        ("/latest/self/network/name", "managed"),
        ("//latest//self/network/gateway/", "10.42.0.1"),
    ] {
        assert_eq!(plain_text(path).await, expected, "{path}");
    }
    let id = plain_text("/latest/self/container/uuid").await;
    assert!(id.parse::<model::EndpointId>().is_ok(), "{id}");
}

#[tokio::test]
async fn neighbours_are_found_by_name_and_by_index() {
    for (path, expected) in [
        ("/latest/containers/hubot/primary_ip", "10.42.64.3"),
        ("/latest/containers/hubot/host", "h2"),
        ("/latest/containers/0/name", "hubot"),
        ("/latest/services/mongo/containers/0/name", "rc-mongo-1"),
        ("/latest/services/mongo/scale", "1"),
        ("/latest/stacks/rocket-chat/services/hubot/containers/hubot/primary_ip", "10.42.64.3"),
        ("/latest/hosts/h2/agent_ip", "192.0.2.2"),
        ("/latest/networks/managed/cidrs/0", "10.42.0.0/16"),
    ] {
        assert_eq!(plain_text(path).await, expected, "{path}");
    }
}

#[tokio::test]
async fn a_folder_lists_what_is_in_it() {
    for (path, expected) in [
        ("/", "latest/\n"),
        ("/latest", "containers/\nhosts/\nnetworks/\nself/\nservices/\nstacks/\n"),
        ("/latest/containers", "0=hubot\n1=lone\n2=rc-mongo-1\n3=rocketchat\n"),
        ("/latest/self/container/labels", "io.rancher.stack/name\ntier\n"),
        ("/latest/self/container/ips", "0\n"),
        ("/latest/hosts", "0=H1\n1=h2\n"),
        ("/latest/stacks", "0=rocket-chat\n"),
        ("/latest/self/stack", "name\nservices/\n"),
    ] {
        assert_eq!(plain_text(path).await, expected, "{path}");
    }
}

#[tokio::test]
async fn what_is_not_there_is_404() {
    for path in [
        "/v1",
        "/latest/nothing",
        "/latest/containers/nobody",
        "/latest/containers/4",
        "/latest/containers/-1",
        "/latest/self/container/name/further",
        "/latest/self/container/labels/%zz",
        "/latest/self/container/labels/%f",
        "/latest/self/container/labels/%ff",
    ] {
        assert_eq!(plain_text(path).await, "404", "{path}");
    }
}

#[tokio::test]
async fn json_is_given_to_who_accepts_it() {
    let (status, body) =
        get(&walked(), ROCKETCHAT, "/latest/self/container", "text/html, application/json;q=0.9").await;
    let value: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(status, 200);
    assert_eq!(value["name"], "rocketchat");
    assert_eq!(value["ips"], json!(["10.42.0.2"]));
    let (_, body) = get(&walked(), ROCKETCHAT, "/latest/self/container/name", "application/json").await;
    assert_eq!(body, "\"rocketchat\"");
    let (_, body) = get(&walked(), ROCKETCHAT, "/latest", "application/json").await;
    let whole: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(whole["self"]["service"]["containers"][0]["name"], "rocketchat");
    assert_eq!(whole["stacks"][0]["services"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn a_container_without_a_stack_has_none_and_a_stranger_is_no_container() {
    let view = walked();
    let lone = get(&view, "10.42.64.9", "/latest/self", "*/*").await;
    assert_eq!(lone.1, "container/\nhost/\nnetwork/\n");
    assert_eq!(get(&view, "10.42.64.9", "/latest/self/host/name", "*/*").await.1, "h2");
    let stranger = get(&view, STRANGER, "/latest/self", "*/*").await;
    assert_eq!(stranger.1, "host/\nnetwork/\n");
}

#[tokio::test]
async fn nothing_of_another_network_shows() {
    let mut view = walked();
    let mut secret = on_h2(endpoint(9, "secret", "vault", "secret", "10.42.0.99"));
    secret.network = NetworkId::from_random([8; 8]);
    let other = Network {
        id: secret.network.clone(),
        name: "secret-net".parse().unwrap(),
        ..view.catalog.networks[&network()].clone()
    };
    let mut far = view.catalog.hosts.values().next().unwrap().clone();
    far.id = HostId::from_random([3; 8]);
    far.name = "secret-host".parse().unwrap();
    secret.host = far.id.clone();
    view.catalog.put(Object::Endpoint(secret));
    view.catalog.put(Object::Network(other));
    view.catalog.put(Object::Host(far));
    let (_, body) = get(&view, ROCKETCHAT, "/", "application/json").await;
    assert!(body.contains("rocketchat") && !body.contains("secret") && !body.contains("vault"), "{body}");
    assert_eq!(get(&view, "10.42.0.99", "/latest/self/container", "*/*").await.0, 404);
}

#[tokio::test]
async fn only_reading_is_possible() {
    let request = Request::post("/latest").body(()).unwrap();
    let response = respond(&request, &walked(), &network(), ROCKETCHAT.parse().unwrap());
    assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(response.headers()[ALLOW], "GET, HEAD");
}

#[tokio::test(flavor = "multi_thread")]
async fn http_on_a_socket_keeps_its_connection_follows_the_view_and_is_bounded() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut first = walked();
    first.local.values_mut().for_each(|endpoint| Arc::make_mut(endpoint).addresses = vec![address.ip()]);
    let mut second = first.clone();
    second
        .local
        .values_mut()
        .for_each(|endpoint| Arc::make_mut(endpoint).name = Some("renamed".parse().unwrap()));
    let (views, receiver) = watch::channel(Arc::new(first));
    let task = tokio::spawn(serve(listener, network(), receiver));
    let client = move |swap: &dyn Fn()| {
        let ask = |stream: &mut std::net::TcpStream| {
            stream.write_all(b"GET /latest/self/container/name HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            let mut answer = String::new();
            while !answer.ends_with("rocketchat") && !answer.ends_with("renamed") {
                let mut buffer = [0; 1024];
                let length = stream.read(&mut buffer).unwrap();
                assert!(length > 0, "closed after {answer}");
                answer.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
            }
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            answer
        };
        let connect = || {
            let stream = std::net::TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            stream
        };
        let mut stream = connect();
        assert!(ask(&mut stream).ends_with("rocketchat"));
        swap();
        assert!(ask(&mut stream).ends_with("renamed"));

        let mut endless = connect();
        let _ = endless.write_all(format!("GET /{} HTTP/1.1\r\n", "x".repeat(2 * HEAD_MAX)).as_bytes());
        let mut answer = Vec::new();
        let _ = endless.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "a head without end is refused");

        let mut held: Vec<_> = (0..CONNECTIONS.1 - 1).map(|_| connect()).collect();
        for stream in &mut held {
            ask(stream);
        }
        assert!(matches!(connect().read(&mut [0]), Ok(0) | Err(_)), "one too many");
    };
    tokio::task::spawn_blocking(move || client(&|| drop(views.send_replace(Arc::new(second.clone())))))
        .await
        .unwrap();
    task.abort();
}
