//! Another life of the ledger begins at each start, and the server is told before anything is asked of it.
//!
//! A machine that was copied with its state directory has the same identity. The server takes a life only from the holder
//! of the one before ([`model::Lineage`]), or from a start that it knows by its secret ([`model::StartSecret`]): of two that
//! have the same ledger one goes on, and one that has been running goes on before one that comes. The other is told so,
//! writes it down, and asks for nothing any more: its containers reach each other, and nobody else.
//!
//! Invariant: nothing is asked of the server by a life that it has not taken.

use model::api::{ApiError, ErrorCode};
use model::{Incarnation, Step};

use crate::Control;
use crate::server::Server;

/// Tells the server of this start, if it does not know of it. A refusal as a copy is written down.
pub(crate) async fn announce(server: &Server, control: &Control) -> Result<(), ApiError> {
    // It may have been said before this start.
    control.counts().await?;
    while server.incarnation().is_none() {
        match step(server, control).await {
            Ok(taken) => server.set_incarnation(taken),
            Err(error) if error.code == ErrorCode::Copied => {
                if let Err(unwritten) = control.copied(error.message.clone()).await {
                    tracing::error!("{}", unwritten.message);
                }
                return Err(error);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Shows the server that this agent lives: another came with its incarnation. It steps on, so that the other never can.
pub(crate) async fn prove(server: &Server, control: &Control) -> Result<(), ApiError> {
    let taken = loop {
        if let Some(taken) = step(server, control).await? {
            break taken;
        }
    };
    server.set_incarnation(Some(taken));
    tracing::warn!(
        "another agent came to the server with this host's state directory, and is refused: look for a machine that was \
         copied from this one (droveway host inspect says from where it came)"
    );
    Ok(())
}

/// One step of the lineage: what to go by from now on, unless what an earlier start began was settled first.
async fn step(server: &Server, control: &Control) -> Result<Option<Incarnation>, ApiError> {
    let (step, own) = match control.begin().await? {
        Ok(beginning) => beginning,
        // Nothing can be written down: this start goes by the life before, and is known by its secret all the same.
        Err(Some(last)) => (Step { from: Some(last.clone()), to: last, secret: None }, true),
        Err(None) => {
            let message =
                "the state directory takes nothing: the host's first start cannot be written down; make room";
            return Err(ApiError::new(ErrorCode::Unavailable, message));
        }
    };
    server.step(&step, own).await?;
    if step.from.as_ref() != Some(&step.to) {
        control.begun(&step.to).await?;
    }
    Ok(own.then_some(step.to))
}
