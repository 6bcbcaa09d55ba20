//! The agent's Unix socket, for a caller that has one thread and no runtime: HTTP/1.1 (RFC 9112), one request for each
//! connection. It is spoken to our own agent only.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use model::agent_api::{AgentStatus, AttachRequest, Attached, path};
use model::api::ApiError;
use model::{Endpoint, EndpointId};
use serde::de::DeserializeOwned;

/// An attachment may have to wait for the server's lease of a block.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The largest answer that is read, in bytes.
const ANSWER_MAX: u64 = 16 << 20;

/// How the agent is.
pub(super) fn status(socket: &Path) -> Result<AgentStatus> {
    decode(exchange(socket, "GET", path::STATUS, None)?)
}

/// What is attached on the host.
pub(super) fn endpoints(socket: &Path) -> Result<Vec<Endpoint>> {
    decode(exchange(socket, "GET", path::ENDPOINTS, None)?)
}

/// Attaches a namespace.
pub(super) fn attach(socket: &Path, request: &AttachRequest) -> Result<Attached> {
    decode(exchange(socket, "POST", path::ENDPOINTS, Some(&serde_json::to_vec(request)?))?)
}

/// Detaches an endpoint; one that is not there counts as detached.
pub(super) fn detach(socket: &Path, id: &EndpointId) -> Result<()> {
    let (code, body) = exchange(socket, "DELETE", &path::ENDPOINT.replace("{id}", id.as_str()), None)?;
    if code == 404 || (200..300).contains(&code) { Ok(()) } else { Err(refusal(code, &body)) }
}

fn decode<T: DeserializeOwned>((code, body): (u16, Vec<u8>)) -> Result<T> {
    if !(200..300).contains(&code) {
        return Err(refusal(code, &body));
    }
    serde_json::from_slice(&body).context("the agent gave an answer that this program does not understand")
}

fn refusal(code: u16, body: &[u8]) -> anyhow::Error {
    match serde_json::from_slice::<ApiError>(body) {
        Ok(error) => anyhow::Error::new(error),
        Err(_) => anyhow::anyhow!("the agent refused (HTTP {code}): {}", String::from_utf8_lossy(body)),
    }
}

fn exchange(socket: &Path, method: &str, path: &str, body: Option<&[u8]>) -> Result<(u16, Vec<u8>)> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("no agent answers at {}", socket.display()))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let length = body.unwrap_or_default().len();
    let mut request = format!(
        "{method} {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n"
    )
    .into_bytes();
    request.extend_from_slice(body.unwrap_or_default());
    stream.write_all(&request).context("the agent does not read")?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX).read_to_end(&mut answer).context("the agent does not answer")?;
    parse(&answer)
}

/// Splits an answer that is whole: the connection was closed after it.
fn parse(answer: &[u8]) -> Result<(u16, Vec<u8>)> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let end = end.context("the agent closed the connection before it answered")?;
    let head = std::str::from_utf8(&answer[..end]).context("the agent's answer is not HTTP")?;
    let body = &answer[end + 4..];
    let mut lines = head.split("\r\n");
    let code = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).and_then(|rest| rest.get(..3));
    let code = code.and_then(|code| code.parse().ok()).context("the agent's answer is not HTTP/1.1")?;
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("content-length") {
            let length: usize = value.trim().parse().context("the agent's answer has no proper length")?;
            ensure!(body.len() == length, "the agent's answer was cut short");
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            bail!("the agent's answer comes in pieces, which this client does not read");
        }
    }
    Ok((code, body.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_whole_or_refused() {
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").unwrap(), (200, b"hi".to_vec()));
        assert_eq!(parse(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap(), (204, vec![]));
        for bad in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi"[..],
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n",
            b"SSH-2.0-OpenSSH\r\n\r\n",
            b"",
        ] {
            assert!(parse(bad).is_err());
        }
    }
}
