//! What the server's API has to refuse, over TLS. Runs on a node of a lab, as a probe.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent::tls::{Trust, client_config};
use model::SERVER_NAME;
use rustls::{ClientConnection, StreamOwned};

const AT: &str = "10.0.0.2:7443";

struct Api {
    ca: String,
    key: String,
}

pub fn abuse(data: &Path) {
    let read = |name: &str| std::fs::read_to_string(data.join(name)).unwrap();
    let api = Api { ca: read("ca.pem"), key: read("admin.key").trim().to_owned() };
    not_even_tls();
    // The server may wait a while for the rest of what is no request.
    std::thread::scope(|scope| {
        for bytes in [
            &b"\x00\xff\x00\xff"[..],
            &[b'A'; 200_000],
            b"GET / HTTP/9.9\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnonsense",
        ] {
            let api = &api;
            scope.spawn(move || {
                let begin = std::time::Instant::now();
                if let Some((status, body)) = api.raw(bytes) {
                    assert!((400..600).contains(&status), "{status} {body}");
                }
                assert!(begin.elapsed() < Duration::from_secs(14), "{} bytes keep a connection", bytes.len());
            });
        }
        api.requests();
    });
}

impl Api {
    fn requests(&self) {
        let networks = "/v1/environments/default/networks";
        let good = br#"{"name":"red","cidrs":["10.60.0.0/16"]}"#;
        // Strangers.
        for key in ["", "Bearer ", "Bearer nonsense", "Basic YTpi", &format!("Bearer {}x", self.key)] {
            for (method, path) in
                [("GET", networks), ("POST", networks), ("GET", "/v1/environments/default/hosts")]
            {
                self.refused(key, method, path, good, &[401]);
            }
        }
        // People are no agents.
        let own = format!("Bearer {}", self.key);
        for (method, path) in
            [("GET", "watch"), ("PUT", "hosts/self"), ("POST", "blocks"), ("POST", "claims")]
        {
            self.refused(
                &own,
                method,
                &format!("/v1/environments/default/{path}"),
                b"{}",
                &[400, 401, 403, 422],
            );
        }
        // Bodies that are none of ours.
        let nested = "[".repeat(200_000);
        let deep = format!(r#"{{"name":{nested}"#);
        for body in [
            &b""[..],
            b"{",
            b"null",
            b"[]",
            b"{}",
            b"\xff\xfe",
            br#"{"name":"red"}"#,
            br#"{"name":"red","cidrs":["10.60.0.0/16"],"surprise":1}"#,
            br#"{"name":"red","cidrs":"10.60.0.0/16"}"#,
            br#"{"name":"red","cidrs":["10.60.0.0/99"]}"#,
            br#"{"name":"red","cidrs":["10.60.0.0/16","10.61.0.0/16"]}"#,
            br#"{"name":"Bad Name","cidrs":["10.60.0.0/16"]}"#,
            br#"{"name":"../../x","cidrs":["10.60.0.0/16"]}"#,
            br#"{"name":"red","cidrs":["10.60.0.0/16"],"vni":99999999999}"#,
            br#"{"name":"red","cidrs":["10.60.0.0/16"],"mtu":-1}"#,
            deep.as_bytes(),
        ] {
            self.refused(&own, "POST", networks, body, &[400, 422]);
        }
        let join = "/v1/environments/default/join";
        for body in [&b"{}"[..], b"nonsense", br#"{"token":"x","csr":"y","name":"h7","candidates":[]}"#] {
            self.refused("", "POST", join, body, &[400, 401, 422]);
        }
        // Larger than anything may be, said before and not said.
        for path in [networks, join] {
            let large = (1 << 20) + 1;
            let head = format!(
                "POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {own}\r\nContent-Type: application/json\r\nContent-Length: {large}\r\n\r\n"
            );
            let (status, body) = self.raw(head.as_bytes()).unwrap();
            assert_eq!(status, 413, "{path}: {body}");
            assert!(body.contains("too_large"), "{path}: {body}");
        }
        let mut chunked = format!("POST {networks} HTTP/1.1\r\nHost: x\r\nAuthorization: {own}\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\n").into_bytes();
        for _ in 0..20 {
            chunked.extend(b"10000\r\n");
            chunked.extend([b' '; 0x10000]);
            chunked.extend(b"\r\n");
        }
        chunked.extend(b"0\r\n\r\n");
        if let Some((status, body)) = self.raw(&chunked) {
            assert_eq!(status, 413, "{body}");
        }
        // Nothing there.
        for path in [
            "/",
            "/v1",
            "/v1/environments/nosuch/networks",
            "/v1/environments/default/../../etc/passwd",
            "/v1/environments/default/networks/%00",
        ] {
            self.refused(&own, "GET", path, b"", &[400, 404]);
        }
        self.refused(&own, "DELETE", networks, b"", &[405]);
        assert_eq!(self.ask(&own, "GET", networks, b"").unwrap().0, 200, "it goes on");
    }
}

fn not_even_tls() {
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 70_000], b"\x16\x03\x01\xff\xff"] {
        let mut stream = TcpStream::connect(AT).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 2"), "{}", String::from_utf8_lossy(&answer));
    }
}

impl Api {
    fn refused(&self, key: &str, method: &str, path: &str, body: &[u8], among: &[u16]) {
        let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
        let (status, text) =
            self.ask(key, method, path, body).unwrap_or_else(|| panic!("{method} {path} {shown}: no answer"));
        assert!(among.contains(&status), "{method} {path} {shown}: {status} {text}");
        let error: model::api::ApiError = serde_json::from_str(&text)
            .unwrap_or_else(|_| panic!("{method} {path} {shown}: {status} {text:?}"));
        assert!(error.message.len() > 10, "{error:?}");
        assert!(!text.contains(&self.key), "no secret is said");
    }

    fn ask(&self, key: &str, method: &str, path: &str, body: &[u8]) -> Option<(u16, String)> {
        let key = if key.is_empty() { String::new() } else { format!("Authorization: {key}\r\n") };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\n{key}Connection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        self.raw(&[head.as_bytes(), body].concat())
    }

    fn raw(&self, bytes: &[u8]) -> Option<(u16, String)> {
        let mut config = client_config(Trust::ca(self.ca.as_bytes()).unwrap(), None).unwrap();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let connection = ClientConnection::new(Arc::new(config), SERVER_NAME.try_into().unwrap()).unwrap();
        let stream = TcpStream::connect(AT).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
        let mut stream = StreamOwned::new(connection, stream);
        // It may refuse before it has read all.
        let _ = stream.write_all(bytes);
        let _ = stream.flush();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer).into_owned();
        let status = text
            .strip_prefix("HTTP/1.1 ")
            .or_else(|| text.strip_prefix("HTTP/1.0 "))?
            .get(..3)?
            .parse()
            .ok()?;
        let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
        Some((status, body))
    }
}
