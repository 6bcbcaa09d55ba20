//! Another life of the ledger begins at each start, and the server is told before anything is asked of it.
//!
//! A machine that was copied with its state directory has the same identity. The server takes a life only from the holder
//! of the one before ([`model::Lineage`]): of two that have the same ledger one goes on. The other is told so, writes it
//! down, and asks for nothing any more: its containers reach each other, and nobody else.
//!
//! Invariant: nothing is asked of the server by a life that it has not taken.

use model::Step;
use model::api::{ApiError, ErrorCode};

use crate::Control;
use crate::server::Server;

/// Tells the server of this start, if it does not know of it. A refusal as a copy is written down.
pub(crate) async fn announce(server: &Server, control: &Control) -> Result<(), ApiError> {
    // It may have been said before this start.
    control.counts().await?;
    while server.incarnation().is_none() {
        let (step, ours) = match control.begin().await? {
            Ok(beginning) => beginning,
            Err(last) => {
                server.set_incarnation(last);
                return Ok(());
            }
        };
        match server.step(&step).await {
            Ok(()) => control.begun(&step.to).await?,
            Err(error) if error.code == ErrorCode::Copied => {
                if let Err(unwritten) = control.copied(error.message.clone()).await {
                    tracing::error!("{}", unwritten.message);
                }
                return Err(error);
            }
            Err(error) => return Err(error),
        }
        if ours {
            server.set_incarnation(Some(step.to));
        }
    }
    Ok(())
}

/// Shows the server that this agent lives: another came with its incarnation. It steps on, so that the other never can.
pub(crate) async fn prove(server: &Server, control: &Control, challenge: &str) -> Result<(), ApiError> {
    let proof = Some(challenge.to_owned());
    let Some(current) = server.incarnation() else { return Ok(()) };
    let step = match control.begin().await? {
        Ok((step, _)) => Step { proof, ..step },
        Err(_) => Step { from: Some(current.clone()), to: current, proof },
    };
    server.step(&step).await?;
    if step.from.as_ref() != Some(&step.to) {
        control.begun(&step.to).await?;
    }
    server.set_incarnation(Some(step.to));
    tracing::warn!(
        "another agent came to the server with this host's state directory, and is refused: look for a machine that was \
         copied from this one (droveway host inspect says from where it came)"
    );
    Ok(())
}
