//! Real sockets on loopback, real clients, `dig` among them.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::str::FromStr;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::*;
use crate::View;
use crate::names::Upstreams;
use crate::names::fixtures::{endpoint, network, view, walk};

/// A router's DNS on a port of loopback, with one resolver behind it that knows `example.com.`.
struct Router {
    address: SocketAddr,
    views: watch::Sender<Arc<View>>,
    task: JoinHandle<io::Result<Infallible>>,
}

impl Drop for Router {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn of(endpoints: Vec<model::Endpoint>) -> Arc<View> {
    Arc::new(view("droveway.internal", endpoints))
}

fn zones() -> (watch::Sender<Arc<View>>, Arc<Zones>) {
    let (views, receiver) = watch::channel(of(walk()));
    (views, Arc::new(Zones::new(receiver, network())))
}

/// The same port for both transports.
fn sockets() -> (UdpSocket, TcpListener) {
    loop {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()) {
            return (udp, tcp);
        }
    }
}

fn router() -> Router {
    let upstream = UdpSocket::bind("127.0.0.1:0").unwrap();
    upstream.set_nonblocking(true).unwrap();
    let server = upstream.local_addr().unwrap();
    let upstream = tokio::net::UdpSocket::from_std(upstream).unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            let (length, from) = upstream.recv_from(&mut buffer).await.unwrap();
            let query = Message::from_vec(&buffer[..length]).unwrap();
            let name = query.queries[0].name().to_ascii();
            if name == "slow.example." {
                continue;
            }
            let known = name == "example.com.";
            let mut reply = Message::response(query.id, query.op_code);
            reply.add_queries(query.queries.iter().cloned());
            if known {
                let data = IpAddr::from([192, 0, 2, 1]).into();
                let owner = query.queries[0].name().clone();
                reply.add_answer(hickory_proto::rr::Record::from_rdata(owner, 60, data));
            } else {
                reply.metadata.response_code = ResponseCode::NXDomain;
            }
            upstream.send_to(&reply.to_vec().unwrap(), from).await.unwrap();
        }
    });
    let forwarder = Forwarder::new(Upstreams::Given(vec![server]), Vec::new());
    let (udp, tcp) = sockets();
    let address = udp.local_addr().unwrap();
    let (views, zones) = zones();
    let task = tokio::spawn(serve(udp, tcp, zones, Arc::new(forwarder)));
    Router { address, views, task }
}

fn query(id: u16, name: &str) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = id;
    message.add_query(Query::query(Name::from_str(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

/// Addresses, or the code.
fn said(bytes: &[u8]) -> String {
    let message = Message::from_vec(bytes).unwrap();
    let addresses: Vec<String> = message.answers.iter().map(|record| record.data.to_string()).collect();
    if addresses.is_empty() { format!("{:?}", message.response_code) } else { addresses.join(" ") }
}

/// What a client in another thread does; patient, so that only a hang takes as long.
async fn client<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

fn udp_client(to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket
}

fn ask(to: SocketAddr, name: &str) -> String {
    let socket = udp_client(to);
    socket.send(&query(7, name)).unwrap();
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer).unwrap();
    assert_eq!(buffer[..2], [0, 7]);
    said(&buffer[..length])
}

fn tcp_client(to: SocketAddr) -> std::net::TcpStream {
    let stream = std::net::TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn read_frame(stream: &mut std::net::TcpStream) -> Vec<u8> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message).unwrap();
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn ours_is_answered_and_the_rest_forwarded() {
    let router = router();
    let address = router.address;
    let answers = client(move || {
        [
            "hubot.",
            "mongo.rocket-chat.droveway.internal.",
            "example.com.",
            "nothere.example.",
            "x.droveway.internal.",
        ]
        .map(|name| ask(address, name))
    })
    .await;
    assert_eq!(answers, ["10.42.64.3", "10.42.64.2", "192.0.2.1", "NXDomain", "NXDomain"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn dig_understands_every_kind_of_answer() {
    let router = router();
    let port = router.address.port().to_string();
    let dig = async |arguments: &str| {
        let mut command = std::process::Command::new("dig");
        command.args(["@127.0.0.1", "-p", &port, "+tries=1", "+timeout=20", "+nosearch"]);
        command.args(arguments.split(' '));
        client(move || {
            let output = command.output().ok()?;
            Some(String::from_utf8(output.stdout).unwrap())
        })
        .await
    };
    if dig("-v").await.is_none() {
        // The other tests show the same without it.
        return;
    }
    let ask = async |arguments: &str| dig(arguments).await.unwrap();
    assert_eq!(ask("+short hubot.rocket-chat.droveway.internal").await, "10.42.64.3\n");
    assert_eq!(ask("+short +tcp hubot").await, "10.42.64.3\n");
    assert_eq!(ask("+short -x 10.42.64.3").await, "hubot.rocket-chat.droveway.internal.\n");
    assert_eq!(ask("+short example.com").await, "192.0.2.1\n");
    assert_eq!(ask("+short +tcp example.com").await, "192.0.2.1\n");
    for (arguments, expected) in [
        ("hubot AAAA", ["status: NOERROR", "AUTHORITY: 1", "SOA"]),
        ("nothere.droveway.internal", ["status: NXDOMAIN", "flags: qr aa rd ra", "SOA"]),
        ("droveway.internal SOA", ["status: NOERROR", "hostmaster.droveway.internal.", "86400 5"]),
        ("hubot ANY", ["status: NOERROR", "ANSWER: 1", "10.42.64.3"]),
        ("droveway.internal AXFR +tcp", ["; Transfer failed.", "", ""]),
        ("version.bind CH TXT", ["status: REFUSED", "", ""]),
        ("+edns=1 +noednsnegotiation hubot", ["status: BADVERS", "version: 0", ""]),
        ("+noedns hubot", ["status: NOERROR", "ADDITIONAL: 0", "10.42.64.3"]),
        ("+opcode=NOTIFY hubot", ["status: NOTIMP", "", ""]),
        ("+bufsize=4096 hubot", ["udp: 1232", "10.42.64.3", "\t5\tIN\tA"]),
    ] {
        let output = ask(arguments).await;
        for text in expected {
            assert!(output.contains(text), "dig {arguments} says {text:?}:\n{output}");
        }
        assert!(!output.contains(";; Warning"), "dig {arguments}:\n{output}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_answer_is_whole_over_tcp() {
    let router = router();
    let endpoints =
        (0..100).map(|i| endpoint(i, &format!("web-{i}"), "shop", "web", &format!("10.42.{i}.2"))).collect();
    router.views.send_replace(of(endpoints));
    let address = router.address;
    let (small, whole) = client(move || {
        let name = "web.shop.droveway.internal.";
        let socket = udp_client(address);
        socket.send(&query(1, name)).unwrap();
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).unwrap();
        let mut stream = tcp_client(address);
        stream.write_all(&framed(&query(2, name))).unwrap();
        (Message::from_vec(&buffer[..length]).unwrap(), Message::from_vec(&read_frame(&mut stream)).unwrap())
    })
    .await;
    assert!(small.truncation && small.answers.len() < 100);
    assert!(!whole.truncation);
    assert_eq!(whole.answers.len(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_carries_many_queries_and_a_slow_one_holds_up_none() {
    let router = router();
    let address = router.address;
    let answers = client(move || {
        let mut stream = tcp_client(address);
        let mut bytes = framed(&query(9999, "slow.example."));
        for id in 0..300_u16 {
            let name = if id % 3 == 0 { "example.com." } else { "hubot." };
            bytes.extend(framed(&query(id, name)));
        }
        let mut writer = stream.try_clone().unwrap();
        // One byte on its own first: frames need not arrive whole.
        writer.write_all(&bytes[..1]).unwrap();
        writer.flush().unwrap();
        let writing = std::thread::spawn(move || writer.write_all(&bytes[1..]).unwrap());
        let answers: std::collections::BTreeMap<u16, String> = (0..300)
            .map(|_| read_frame(&mut stream))
            .map(|reply| (u16::from_be_bytes([reply[0], reply[1]]), said(&reply)))
            .collect();
        writing.join().unwrap();
        answers
    })
    .await;
    assert_eq!(answers.len(), 300);
    for (id, answer) in answers {
        assert_eq!(answer, if id % 3 == 0 { "192.0.2.1" } else { "10.42.64.3" }, "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_closes_its_half_still_gets_its_answers() {
    let router = router();
    let address = router.address;
    let rest = client(move || {
        let mut stream = tcp_client(address);
        stream.write_all(&framed(&query(1, "example.com."))).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(said(&read_frame(&mut stream)), "192.0.2.1");
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        rest
    })
    .await;
    assert!(rest.is_empty(), "and then the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_asker_has_so_many_connections_and_no_more() {
    let router = router();
    let address = router.address;
    client(move || {
        let mut held: Vec<_> = (0..CONNECTIONS.1).map(|_| tcp_client(address)).collect();
        for stream in &mut held {
            stream.write_all(&framed(&query(1, "hubot."))).unwrap();
            read_frame(stream);
        }
        let mut more = tcp_client(address);
        assert!(matches!(more.read(&mut [0]), Ok(0) | Err(_)), "closed at once");
        assert_eq!(ask(address, "hubot."), "10.42.64.3", "datagrams are not affected");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_too_many_fails_at_once_and_ours_are_still_answered() {
    let router = router();
    let address = router.address;
    client(move || {
        let socket = udp_client(address);
        let mut buffer = [0; 4096];
        for id in 0..FORWARDS.1 as u16 {
            socket.send(&query(id, "slow.example.")).unwrap();
            if id % 16 == 0 {
                // In step with the server, so that its socket's buffer loses none.
                socket.send(&query(5000, "hubot.")).unwrap();
                socket.recv(&mut buffer).unwrap();
            }
        }
        socket.send(&query(999, "example.com.")).unwrap();
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..2], 999_u16.to_be_bytes());
        assert_eq!(said(&buffer[..length]), "ServFail");
        assert_eq!(ask(address, "hubot."), "10.42.64.3");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_zone_is_answered_from_without_a_socket_closing() {
    let router = router();
    let address = router.address;
    let mut stream = client(move || {
        let mut stream = tcp_client(address);
        stream.write_all(&framed(&query(1, "db."))).unwrap();
        assert_eq!(said(&read_frame(&mut stream)), "NXDomain", "the resolver outside knows none");
        stream
    })
    .await;
    router.views.send_replace(of(vec![endpoint(1, "db", "", "", "10.42.0.7")]));
    client(move || {
        stream.write_all(&framed(&query(2, "db."))).unwrap();
        assert_eq!(said(&read_frame(&mut stream)), "10.42.0.7");
        assert_eq!(ask(address, "db."), "10.42.0.7");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_both_transports_leaves_the_server_well() {
    let router = router();
    let address = router.address;
    client(move || {
        let socket = udp_client(address);
        let mut noise = 0x2545_f491_u32;
        for length in 0..300_usize {
            let bytes: Vec<u8> = (0..length)
                .map(|_| {
                    noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (noise >> 24) as u8
                })
                .collect();
            socket.send(&bytes).unwrap();
            if length % 30 == 0 {
                let _ = tcp_client(address).write_all(&bytes);
                // In step with the server, so that its socket's buffer loses none.
                assert_eq!(ask(address, "hubot."), "10.42.64.3");
            }
        }
        let mut stream = tcp_client(address);
        stream.write_all(&[0, 3, 1, 2, 3]).unwrap();
        assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)), "no header, no client");
    })
    .await;
}

#[tokio::test]
async fn dropping_it_closes_its_sockets_and_connections() {
    let router = router();
    let address = router.address;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&framed(&query(1, "slow.example."))).await.unwrap();
    stream.write_all(&framed(&query(2, "hubot."))).await.unwrap();
    assert!(stream.read_u16().await.unwrap() > 0);
    drop(router);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    let udp = UdpSocket::bind(address);
    assert!(udp.is_ok(), "{udp:?}");
}

#[tokio::test]
async fn an_idle_connection_is_closed_though_it_trickles() {
    let (mut client, desk) = pair().await;
    let started = Instant::now();
    client.write_all(&[0]).await.unwrap();
    desk.await.unwrap().unwrap();
    assert!(started.elapsed() >= Duration::from_millis(200));
}

/// A connection that is being served, without a router around it.
async fn pair() -> (TcpStream, JoinHandle<io::Result<()>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (stream, from) = listener.accept().await.unwrap();
    let (_, zones) = zones();
    let desk = Desk {
        zones,
        forwarder: Arc::new(Forwarder::new(Upstreams::Given(Vec::new()), Vec::new())),
        forwards: Budget::new(1, 1),
        turn: Arc::default(),
        idle: Duration::from_millis(200),
    };
    (client, tokio::spawn(serve_stream(stream, from.ip(), desk)))
}
