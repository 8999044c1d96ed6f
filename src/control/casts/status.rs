//! What is said of a session.

use std::sync::PoisonError;
use std::time::Duration;

use super::Running;
use super::order::{CastState, CastStatus, ReceiverState, ReceiverStatus};
use crate::cast::ReceiverId;
use crate::cast::form::{Phase, Standing};
use crate::cast::sender::Listener;
use crate::clock;
use crate::export::NodeId;
use crate::fill::orders::Deadline;
use crate::multicast::send::Sent;

impl Running {
    /// What is to be said of it now.
    pub(super) fn status(&self, id: u64) -> CastStatus {
        let Sent { phase, progress, elapsed, addresses, bytes, rate, malformed, error } = self.sending.status();
        let (now, called_off) = (clock::moment(), *self.called_off.lock().unwrap_or_else(PoisonError::into_inner));
        let state = state(phase, error.is_some(), called_off);
        let missed = |deadline: Deadline| now.wall.duration_since(deadline.wall()).ok();
        let receiver = |listener: &Listener| {
            let address = addresses.iter().find(|(receiver, _)| *receiver == listener.receiver);
            receiver(listener, address.map(|(_, address)| address.to_string()).unwrap_or_default(), elapsed)
        };
        CastStatus {
            cast: id,
            session: self.session.to_string(),
            image: self.image.clone(),
            group: self.group.to_string(),
            state,
            total_bytes: self.layout.bytes(),
            sent_bytes: bytes,
            data_symbols: progress.data,
            parity_symbols: progress.parity,
            repair_symbols: progress.repairs,
            symbol_bytes: u64::from(self.symbol),
            rate,
            blocks: self.layout.blocks(),
            passed_blocks: progress.passed,
            seconds: elapsed.as_secs_f64(),
            deadline: self.deadline.and_then(|deadline| {
                let since = deadline.wall().duration_since(std::time::SystemTime::UNIX_EPOCH).ok()?;
                Some(since.as_secs_f64())
            }),
            late_by_seconds: self.deadline.and_then(missed).map(|late| late.as_secs_f64()),
            malformed,
            receivers: progress.listeners.iter().map(receiver).collect(),
            error,
        }
    }
}

/// How far a session is, in one word.
const fn state(phase: Phase, has_failed: bool, called_off: bool) -> CastState {
    match phase {
        Phase::Waiting => CastState::Waiting,
        Phase::Sending => CastState::Sending,
        Phase::Ending => CastState::Ending,
        Phase::Ended(_) if has_failed => CastState::Failed,
        Phase::Ended(false) if called_off => CastState::Cancelled,
        // Also when nobody came.
        Phase::Ended(_) => CastState::Done,
    }
}

/// What is said of one receiver of a session that has lasted so long.
fn receiver(listener: &Listener, address: String, lasted: Duration) -> ReceiverStatus {
    let ReceiverId(name) = listener.receiver;
    ReceiverStatus {
        receiver: NodeId(name).to_string(),
        address,
        state: match listener.standing {
            Some(Standing::Complete) => ReceiverState::Complete,
            _ if listener.dropped => ReceiverState::Dropped,
            Some(Standing::Leaving) => ReceiverState::Left,
            Some(Standing::Joined) => ReceiverState::Receiving,
            None => ReceiverState::Silent,
        },
        done_blocks: listener.done,
        loss: listener.loss,
        heard_seconds_ago: lasted.saturating_sub(listener.heard).as_secs_f64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_done_unless_it_failed_or_was_called_off() {
        assert_eq!(state(Phase::Ended(true), false, false), CastState::Done);
        assert_eq!(state(Phase::Ended(false), false, false), CastState::Done, "nobody came");
        assert_eq!(state(Phase::Ended(false), false, true), CastState::Cancelled);
        assert_eq!(state(Phase::Ended(true), false, true), CastState::Done, "it was over before");
        assert_eq!(state(Phase::Ended(false), true, true), CastState::Failed);
        assert_eq!(state(Phase::Sending, false, true), CastState::Sending, "it is not over yet");
    }

    #[test]
    fn a_receiver_is_what_it_said_last() {
        let of = |standing, dropped| {
            let (receiver, heard) = (ReceiverId([1; 16]), Duration::from_secs(3));
            let listener = Listener { receiver, standing, dropped, done: 7, loss: 0.5, heard };
            super::receiver(&listener, String::new(), Duration::from_secs(5))
        };
        assert_eq!(of(Some(Standing::Complete), true).state, ReceiverState::Complete);
        assert_eq!(of(Some(Standing::Joined), false).state, ReceiverState::Receiving);
        assert_eq!(of(Some(Standing::Leaving), false).state, ReceiverState::Left);
        assert_eq!(of(None, true).state, ReceiverState::Dropped);
        assert_eq!(of(None, false).state, ReceiverState::Silent);
        let status = of(None, false);
        assert_eq!((status.receiver.len(), status.heard_seconds_ago), (32, 2.0));
    }
}
