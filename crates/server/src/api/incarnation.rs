//! Another life of a host's ledger begins, or shows that it lives: see [`crate::incarnation`].

use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use model::Step;
use model::api::{ApiError, ErrorCode};
use tokio::time::Instant;

use super::extract::{self, Claimant};
use super::{Reply, Shared, refuse};
use crate::app::{Plan, now, put};
use crate::incarnation::{Life, Verdict, judge};
use crate::keys::{Keys, Unreported};
use crate::request;
use crate::serve::Peer;
use crate::store::{Compare, Txn};

/// For how long the holder of an incarnation may be silent before another that has it is believed.
const ANSWER: Duration = Duration::from_secs(3);

/// Another life of the ledger of the agent's host begins. Where the one before may live, it is asked first, for three seconds
/// at most; a copy of the ledger, or an old one, is refused. A start that has run all the while goes on, whoever came since.
#[utoipa::path(put, path = "/v1/environments/{environment}/hosts/self/incarnation", tag = "agents",
    params(("environment" = String, Path)), request_body = Step,
    responses((status = 204), (status = "default", body = ApiError)))]
pub(super) async fn step(
    State(app): Shared,
    Claimant(agent): Claimant,
    Extension(peer): Extension<Peer>,
    extract::Json(step): extract::Json<Step>,
) -> Reply<StatusCode> {
    let last = step.from.as_ref().map_or(0, |from| from.number);
    let stays = step.from.as_ref() == Some(&step.to);
    if step.from.is_some() && !stays && step.to.number != last.saturating_add(1) {
        let message =
            format!("{} does not follow {last}; the next one is counted by one more", step.to.number);
        return Err(refuse(ErrorCode::Invalid, message).into());
    }
    let from = peer.address.ip().to_canonical();
    let (keys, deadline) = (Keys(&agent.environment), Instant::now() + ANSWER);
    let place = keys.life(&agent.host);
    let mut asked = false;
    let verdict = loop {
        let (mut revisions, mut moves) = (app.shared.subscribe(), app.presence.subscribe());
        let waits = Instant::now() < deadline;
        let (verdict, _) = app
            .change(&agent.environment, |env, _| {
                let known = env.lives.get(&agent.host);
                let may_live =
                    |life: &Life| app.presence.may_live(&agent.host, &life.current, app.shares_store);
                let restored = env.unreported.get(&agent.host).is_some_and(|it| !it.followed);
                let verdict = judge(known, &step, waits && known.is_some_and(may_live), asked, restored);
                let life = match (&verdict, known) {
                    (Verdict::Take(life) | Verdict::Back(life), _) => {
                        request::about(|| format!("start {} of the agent", life.current.number));
                        life.clone()
                    }
                    (Verdict::Contest(life), _) => life.clone(),
                    (Verdict::Copy, Some(life)) => {
                        request::about(|| format!("that a copy of host {:?} is refused", agent.name));
                        life.refused(from, now())
                    }
                    _ => return Ok(Plan::Nothing(verdict)),
                };
                let compares = match env.modified(&place) {
                    Some(modified) => Compare::Modified(place.clone(), modified),
                    None => Compare::Absent(place.clone()),
                };
                let compares = vec![compares, Compare::Present(keys.host(&agent.host))];
                let mut ops = vec![put(place.clone(), &life)?];
                if matches!(verdict, Verdict::Back(_)) && !env.unreported.contains_key(&agent.host) {
                    // Who came meanwhile may have given back what this one holds.
                    let unreported = Unreported { since: now(), followed: true };
                    ops.push(put(keys.unreported(&agent.host), &unreported)?);
                }
                Ok(Plan::Commit(Txn::new(compares, ops), verdict))
            })
            .await?;
        // This server may hear from its store later than the agent from another server.
        let lags = matches!(verdict, Verdict::Behind) && waits;
        match verdict {
            Verdict::Contest(_) | Verdict::Wait => asked = true,
            _ if lags => {}
            _ => break verdict,
        }
        // The holder answers, goes away, or is silent for too long.
        tokio::select! {
            _ = revisions.changed() => {}
            _ = moves.changed() => {}
            () = tokio::time::sleep_until(deadline) => {}
        }
    };
    if matches!(verdict, Verdict::Back(_)) {
        tracing::warn!(environment = %agent.environment, host = %agent.name, "this host's agent ran all the while that another \
            was taken for it: that one has a copy of its state directory, and is refused from now on");
    }
    match verdict {
        Verdict::Take(life) | Verdict::Back(life) => {
            // Who only shows that it lives goes on watching.
            if !stays {
                app.presence.begins(&agent.host, &life.current);
            }
        }
        Verdict::Copy => {
            request::about(|| format!("a copy of the state directory of host {:?}", agent.name));
            app.upkeep.metrics.copy_refused();
            let error = copied(&agent.name);
            tracing::warn!(environment = %agent.environment, host = %agent.name, %from, "refused: {}", error.message);
            return Err(error.into());
        }
        Verdict::Behind => {
            let error = behind(&agent.name, last);
            tracing::error!(environment = %agent.environment, revision = %app.shared.read().revision, "{}", error.message);
            return Err(ApiError { code: ErrorCode::Conflict, ..error }.into());
        }
        Verdict::Taken | Verdict::Contest(_) | Verdict::Wait => {}
    }
    Ok(StatusCode::NO_CONTENT)
}

/// That an agent's state directory is not the one that counts.
pub(super) fn copied(host: &str) -> ApiError {
    let message = format!(
        "the state directory of this agent is a copy of that of host \"{host}\", or an old backup of it: another agent has \
         gone on with it. It attaches nothing and has no tunnels. On a machine that was copied, delete the state directory \
         and join it as a host of its own (`droveway token create`, another --name). If this machine is to be \"{host}\", stop \
         the other one, `droveway host rm {host}`, and join this one anew"
    );
    refuse(ErrorCode::Copied, message)
}

/// That the store lost what an agent knows.
pub(super) fn behind(host: &str, last: u64) -> ApiError {
    let message = format!(
        "this server's store does not know of start {last} of host \"{host}\": it is behind; if that stays so, and it was put \
         back from a copy, put it back with `droveway server restore`"
    );
    refuse(ErrorCode::Unavailable, message)
}
