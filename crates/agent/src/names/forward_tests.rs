//! The forwarder against resolvers that behave badly.

use std::io::Write;
use std::str::FromStr;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::rdata::TXT;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::net::TcpListener;

use super::*;
use crate::names::Zone;
use crate::names::fixtures::{network, view};
use crate::names::message::{Reaction, react};

/// What to send for a query: each its own datagram.
type Script = fn(usize, &Message) -> Vec<Vec<u8>>;

/// A resolver on loopback, and how often it was asked.
struct Upstream {
    address: SocketAddr,
    asked: tokio::sync::watch::Receiver<Vec<Message>>,
}

async fn upstream(script: Script) -> Upstream {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let (sender, asked) = tokio::sync::watch::channel(Vec::new());
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        for turn in 0.. {
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            let query = Message::from_vec(&buffer[..length]).unwrap();
            sender.send_modify(|asked| asked.push(query.clone()));
            for reply in script(turn, &query) {
                socket.send_to(&reply, from).await.unwrap();
            }
        }
    });
    Upstream { address, asked }
}

fn response(query: &Message, code: ResponseCode, text: &str) -> Message {
    let mut message = Message::response(query.id, query.op_code);
    message.metadata.response_code = code;
    message.add_queries(query.queries.iter().cloned());
    if !text.is_empty() {
        let data = RData::TXT(TXT::new(vec![text.to_owned()]));
        message.add_answer(Record::from_rdata(query.queries[0].name().clone(), 60, data));
    }
    message
}

fn good(_: usize, query: &Message) -> Vec<Vec<u8>> {
    vec![response(query, ResponseCode::NoError, "good").to_vec().unwrap()]
}

fn forward(transport: Transport) -> Box<Forward> {
    let mut message = Message::query();
    message.add_query(Query::query(Name::from_str("example.com.").unwrap(), RecordType::TXT));
    let zone = Zone::new(&view("droveway.internal", Vec::new()), &network());
    let bytes = message.to_vec().unwrap();
    match react(&bytes, [10, 42, 0, 2].into(), transport, &zone, 0) {
        Reaction::Forward(forward) => forward,
        other => panic!("{other:?}"),
    }
}

fn forwarder(upstreams: &[&Upstream]) -> Forwarder {
    let servers = upstreams.iter().map(|upstream| upstream.address).collect();
    Forwarder::new(Upstreams::Given(servers), Vec::new()).with_patience(Duration::from_millis(300))
}

/// The answer's text, or its code.
async fn ask(forwarder: &Forwarder, transport: Transport) -> String {
    let forward = forward(transport);
    match forwarder.ask(&forward).await {
        Ok(bytes) => {
            assert_eq!(bytes[..2], forward.query[..2], "the client's id is given back");
            let message = Message::from_vec(&bytes).unwrap();
            if message.truncation {
                return "truncated".to_owned();
            }
            message
                .answers
                .first()
                .map_or_else(|| format!("{:?}", message.response_code), |r| r.data.to_string())
        }
        Err(error) => error.to_string(),
    }
}

#[tokio::test]
async fn a_lost_packet_is_sent_again() {
    let lossy = upstream(|turn, query| if turn == 0 { Vec::new() } else { good(turn, query) }).await;
    assert_eq!(ask(&forwarder(&[&lossy]), Transport::Udp).await, "good");
    assert_eq!(lossy.asked.borrow().len(), 2);
}

#[tokio::test]
async fn a_silent_server_is_passed_over_and_the_next_query_goes_to_the_one_that_answered() {
    let (silent, lively) = (upstream(|_, _| Vec::new()).await, upstream(good).await);
    let forwarder = forwarder(&[&silent, &lively]);
    assert_eq!(ask(&forwarder, Transport::Udp).await, "good");
    assert_eq!(ask(&forwarder, Transport::Udp).await, "good");
    assert_eq!((silent.asked.borrow().len(), lively.asked.borrow().len()), (1, 2));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_passed_over_at_once() {
    let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let lively = upstream(good).await;
    let patient = Forwarder::new(Upstreams::Given(vec![gone, lively.address]), Vec::new())
        .with_patience(Duration::from_hours(1));
    assert_eq!(ask(&patient, Transport::Udp).await, "good");
}

#[tokio::test]
async fn forged_replies_are_passed_over() {
    let forger = upstream(|turn, query| {
        let mut wrong_id = response(query, ResponseCode::NoError, "forged");
        wrong_id.metadata.id ^= 1;
        let mut wrong_name = response(query, ResponseCode::NoError, "forged");
        wrong_name.queries[0].set_name(Name::from_str("example.org.").unwrap());
        let mut wrong_type = response(query, ResponseCode::NoError, "forged");
        wrong_type.queries[0].set_query_type(RecordType::A);
        let mut no_question = response(query, ResponseCode::NoError, "forged");
        no_question.queries.clear();
        let mut replies: Vec<Vec<u8>> = [wrong_id, wrong_name, wrong_type, no_question]
            .iter()
            .map(|message| message.to_vec().unwrap())
            .collect();
        replies.extend([query.to_vec().unwrap(), b"short".to_vec(), vec![0xff; 300]]);
        replies.extend(good(turn, query));
        replies
    })
    .await;
    assert_eq!(ask(&forwarder(&[&forger]), Transport::Udp).await, "good");
    assert_eq!(forger.asked.borrow().len(), 1);
}

#[tokio::test]
async fn each_query_has_an_id_of_its_own() {
    let lively = upstream(good).await;
    let forwarder = forwarder(&[&lively]);
    for _ in 0..16 {
        ask(&forwarder, Transport::Udp).await;
    }
    let ids: std::collections::BTreeSet<u16> = lively.asked.borrow().iter().map(|query| query.id).collect();
    assert!(ids.len() > 12, "{ids:?}");
}

#[tokio::test]
async fn a_server_that_cannot_help_is_passed_over_and_quoted_if_none_can() {
    let failing: Script = |_, query| vec![response(query, ResponseCode::ServFail, "").to_vec().unwrap()];
    let refusing: Script = |_, query| vec![response(query, ResponseCode::Refused, "").to_vec().unwrap()];
    let (one, two, three) = (upstream(failing).await, upstream(refusing).await, upstream(good).await);
    assert_eq!(ask(&forwarder(&[&one, &two, &three]), Transport::Udp).await, "good");
    assert_eq!(ask(&forwarder(&[&two, &one]), Transport::Udp).await, "Refused");
}

#[tokio::test]
async fn a_silent_server_is_waited_for_once_also_where_the_others_cannot_help() {
    let refusing: Script = |_, query| vec![response(query, ResponseCode::Refused, "").to_vec().unwrap()];
    let (silent, refuser) = (upstream(|_, _| Vec::new()).await, upstream(refusing).await);
    let forwarder = forwarder(&[&silent, &refuser]);
    for _ in 0..3 {
        assert_eq!(ask(&forwarder, Transport::Udp).await, "Refused");
    }
    assert_eq!((silent.asked.borrow().len(), refuser.asked.borrow().len()), (1, 3));
}

#[tokio::test]
async fn a_server_that_was_silent_is_asked_again_when_nobody_else_answers() {
    let waking = upstream(|turn, query| if turn < 2 { Vec::new() } else { good(turn, query) }).await;
    let forwarder = forwarder(&[&waking]);
    assert!(ask(&forwarder, Transport::Udp).await.starts_with("none of the resolvers"));
    assert_eq!(ask(&forwarder, Transport::Udp).await, "good");
    assert_eq!(ask(&forwarder, Transport::Udp).await, "good");
    assert_eq!(waking.asked.borrow().len(), 4);
}

#[tokio::test]
async fn that_a_name_does_not_exist_is_an_answer() {
    let denying: Script = |_, query| vec![response(query, ResponseCode::NXDomain, "").to_vec().unwrap()];
    let (one, two) = (upstream(denying).await, upstream(good).await);
    assert_eq!(ask(&forwarder(&[&one, &two]), Transport::Udp).await, "NXDomain");
}

#[tokio::test]
async fn when_all_are_silent_the_error_names_them() {
    let silent = upstream(|_, _| Vec::new()).await;
    let said = ask(&forwarder(&[&silent]), Transport::Udp).await;
    assert_eq!(said, format!("none of the resolvers [{}] answered", silent.address));
}

#[tokio::test]
async fn a_truncated_answer_is_passed_on_by_udp_and_fetched_whole_for_tcp() {
    let truncating = upstream(|_, query| {
        let mut message = response(query, ResponseCode::NoError, "");
        message.metadata.truncation = true;
        vec![message.to_vec().unwrap()]
    })
    .await;
    let listener = TcpListener::bind(truncating.address).await.unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let length = stream.read_u16().await.unwrap();
            let mut query = vec![0; usize::from(length)];
            stream.read_exact(&mut query).await.unwrap();
            let whole = good(0, &Message::from_vec(&query).unwrap()).remove(0);
            stream.write_all(&framed(&whole)).await.unwrap();
        }
    });
    let forwarder = forwarder(&[&truncating]);
    assert_eq!(ask(&forwarder, Transport::Udp).await, "truncated");
    assert_eq!(ask(&forwarder, Transport::Tcp).await, "good");
}

#[test]
fn routers_are_never_asked() {
    let given = ["169.254.169.250:53", "[::ffff:169.254.169.250]:53", "10.42.0.65:53", "192.0.2.1:53"];
    let given = given.iter().map(|server| server.parse().unwrap()).collect();
    let forwarder = Forwarder::new(Upstreams::Given(given), vec![[10, 42, 0, 65].into()]);
    assert_eq!(forwarder.servers().0.to_vec(), ["192.0.2.1:53".parse().unwrap()]);
}

#[tokio::test]
async fn with_nobody_to_ask_the_error_says_what_to_do() {
    let file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file.as_file(), "nameserver 169.254.169.250").unwrap();
    let forwarder = Forwarder::new(Upstreams::File(file.path().to_owned()), Vec::new());
    let said = ask(&forwarder, Transport::Udp).await;
    let expected =
        format!("{} names no resolver that may be asked; add a nameserver to it", file.path().display());
    assert_eq!(said, expected);
}

#[test]
fn the_hosts_file_is_read_again_when_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    let forwarder = Forwarder::new(Upstreams::File(path.clone()), Vec::new());
    let servers = || forwarder.servers().0.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(servers(), ["127.0.0.1:53"], "no file");
    fs::write(&path, "nameserver 192.0.2.1\nnameserver 2001:db8::1\n").unwrap();
    assert_eq!(servers(), ["192.0.2.1:53", "[2001:db8::1]:53"]);
    fs::write(dir.path().join("new"), "nameserver 192.0.2.2\nnameserver 2001:db8::2\n").unwrap();
    fs::rename(dir.path().join("new"), &path).unwrap();
    assert_eq!(servers(), ["192.0.2.2:53", "[2001:db8::2]:53"], "as resolvconf replaces it");
    fs::remove_file(&path).unwrap();
    assert_eq!(servers(), ["192.0.2.2:53", "[2001:db8::2]:53"], "what was known is kept");
}
