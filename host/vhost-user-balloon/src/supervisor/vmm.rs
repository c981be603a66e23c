// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The connected front end.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use log::{error, warn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{MsgFlags, getsockopt, send};
use vhost::vhost_user::message::BackendReq;

use super::connection::Connection;
use super::journal::{Journal, has_reply, name, queue};
use super::optional::refusal;
use super::setup::Setup;
use super::worker::ANSWER_TIMEOUT;
use crate::vhost_user::message::{Head, Message, request};

/// How many workers may crash at a message before it is skipped.
const MAX_CRASHES: u32 = 3;

/// How long a client may send nothing before another client may replace it.
const SILENCE: Duration = Duration::from_secs(1);

/// How long a worker may send nothing before the supervisor checks that it responds.
const PROBE_INTERVAL: Duration = Duration::from_secs(10);

/// A message that the worker has not answered yet.
#[derive(Debug)]
pub(super) struct Pending {
    /// The front end's message. None is the supervisor's own check.
    pub(super) head: Option<Head>,
    since: Instant,
}

/// The connected front end.
#[derive(Debug)]
pub(super) struct Vmm {
    pub(super) connection: Connection,
    pub(super) journal: Journal,
    pub(super) setup: Setup,
    since: Instant,
    /// Its process id, or 0.
    pub(super) pid: i32,
    pub(super) pending: Option<Pending>,
    /// When the worker last answered.
    answered: Instant,
    /// Whether the next message needs a worker, and there is none.
    pub(super) blocked: bool,
    /// How many workers have crashed at the next message.
    crashes: u32,
    /// The worker's last answer to a read of the configuration space.
    read: Option<Message>,
    /// How many messages the worker has not accepted.
    refused: u32,
}

impl Vmm {
    pub(super) fn new(connection: Connection, journal: Journal, boot: Duration) -> Self {
        // It is 0 if the process is in another namespace.
        let pid = getsockopt(connection.socket(), PeerCredentials).map_or(0, |peer| peer.pid());
        let now = Instant::now();
        Self {
            connection,
            setup: Setup::new(&journal, boot),
            journal,
            since: now,
            pid,
            pending: None,
            answered: now,
            blocked: false,
            crashes: 0,
            read: None,
            refused: 0,
        }
    }

    /// Whether it has closed the connection.
    pub(super) fn is_gone(&self) -> bool {
        let mut events = [PollFd::new(
            self.connection.socket().as_fd(),
            PollFlags::empty(),
        )];
        poll(&mut events, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Whether it has sent nothing for a while since it has connected.
    pub(super) fn is_silent(&self) -> bool {
        let has_sent = !self.journal.messages().is_empty() || self.pending.is_some();
        !has_sent && self.since.elapsed() >= SILENCE
    }

    /// Records a message that the worker must answer.
    pub(super) fn expect_answer(&mut self, head: Option<Head>) {
        self.pending = Some(Pending {
            head,
            since: Instant::now(),
        });
    }

    /// Records an answer of the worker, and returns the answered message.
    pub(super) fn take_answered(&mut self) -> Option<Head> {
        self.answered = Instant::now();
        self.crashes = 0;
        self.pending.take()?.head
    }

    /// Whether the worker should have answered by now.
    pub(super) fn is_overdue(&self) -> bool {
        let pending = self.pending.as_ref();
        pending.is_some_and(|pending| pending.since.elapsed() >= ANSWER_TIMEOUT)
    }

    /// The check of a worker that has sent nothing for a while: the front end's last read of the configuration
    /// space.
    pub(super) fn probe(&self) -> Option<Message> {
        let is_due = self.pending.is_none() && self.answered.elapsed() >= PROBE_INTERVAL;
        let read = self.read.as_ref().filter(|_| is_due)?;
        Some(Message::new(request::GET_CONFIG, read.body(), Vec::new()))
    }

    /// Handles a crash or a hang of a worker. Returns the message that it had to answer if that has happened
    /// often. Otherwise the next worker gets the message.
    pub(super) fn crashed(&mut self) -> Option<Head> {
        let head = self.pending.take()?.head?;
        self.crashes += 1;
        if self.crashes < MAX_CRASHES {
            return None;
        }
        self.crashes = 0;
        Some(head)
    }

    /// Stores an answer for times without a worker. Returns whether that changes the journal.
    pub(super) fn keep_answer(&mut self, answer: &Message) -> bool {
        let copy = || Message::new(answer.request(), answer.body(), Vec::new());
        self.setup.answered(answer);
        if answer.request() == request::GET_CONFIG {
            self.read = Some(copy());
        }
        self.journal.record_answer(copy())
    }

    /// The answer to a message without a worker, if that is possible: the index of a queue from its ring, a part of the
    /// configuration space, or an earlier answer of a worker. A queue that stops gets the interrupt that a killed worker
    /// may owe.
    pub(super) fn own_answer(&self, message: &Message) -> Option<Message> {
        if let Some(refusal) = refusal(message) {
            return Some(refusal);
        }
        match message.request() {
            request::GET_VRING_BASE => {
                let queue = queue(message);
                self.journal.interrupt(queue);
                let index = self.journal.index_of(queue).unwrap_or_default();
                let body = [queue, index.into()].map(u32::to_ne_bytes);
                Some(message.answer(body.as_flattened()))
            }
            request::GET_CONFIG => Some(self.journal.configuration().answer(message)),
            request if has_reply(message) => {
                let mut answers = self.journal.answers().iter();
                let before = answers.find(|answer| answer.request() == request)?;
                Some(message.answer(before.body()))
            }
            _ => Some(message.answer(&[])),
        }
    }

    /// Logs that the worker does not accept a message.
    pub(super) fn log_refusal(&mut self, message: &Message) {
        self.refused += 1;
        // A guest can have its VMM send any number of them.
        if self.refused.is_power_of_two() {
            error!(
                "the worker does not accept {} from the VMM, and the VM runs without its balloon",
                name(message)
            );
        }
    }

    /// Notifies it of a change of the configuration space, if there is a driver. QEMU does not expect the
    /// message otherwise.
    pub(super) fn config_changed(&self) {
        let Some(channel) = self.journal.channel().filter(|_| self.journal.has_rings(0)) else {
            return;
        };
        let message = Message::new(BackendReq::CONFIG_CHANGE_MSG as u32, &[], Vec::new());
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(channel.as_raw_fd(), message.bytes(), flags) {
            // A full socket already has such messages.
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(error) => warn!("cannot notify the VMM of a configuration change: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;
    use crate::vhost_user::message::tests::message;

    fn connected() -> (Vmm, UnixStream) {
        let (frontend, vmm) = UnixStream::pair().unwrap();
        let connection = Connection::new(frontend).unwrap();
        let connected = Vmm::new(connection, Journal::default(), Duration::ZERO);
        (connected, vmm)
    }

    #[test]
    fn a_message_at_which_every_worker_crashes_is_left_out() {
        let (mut vmm, frontend) = connected();
        for crashes in 1..=MAX_CRASHES {
            message(request::SET_CONFIG, b"\0", vec![])
                .send(&frontend)
                .unwrap();
            let head = vmm.connection.peek().unwrap();
            vmm.expect_answer(Some(head));
            assert_eq!(vmm.crashed().is_some(), crashes == MAX_CRASHES);
        }
        // The next message is another one.
        vmm.expect_answer(Some(vmm.connection.peek().unwrap()));
        assert!(vmm.crashed().is_none());
    }

    #[test]
    fn the_supervisor_answers_as_a_worker_has() {
        let (mut vmm, _front) = connected();
        let question = |size| {
            let words = [0_u32, size, 0].map(u32::to_ne_bytes);
            message(request::GET_CONFIG, words.as_flattened(), vec![])
        };
        let features = message(request::GET_FEATURES, b"", vec![]);
        // The VM waits for this one, also before a worker has answered.
        assert!(vmm.own_answer(&question(16)).is_some());
        assert!(vmm.own_answer(&features).is_none());
        vmm.keep_answer(&features.answer(b"features"));
        assert_eq!(vmm.own_answer(&features).unwrap().body(), b"features");
        // A queue that a worker has not started.
        let base = message(request::GET_VRING_BASE, &[3, 0, 0, 0, 0, 0, 0, 0], vec![]);
        let answer = vmm.own_answer(&base).unwrap();
        assert_eq!(answer.body(), [3, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_queue_that_stops_without_a_worker_interrupts_the_guest() {
        let (mut vmm, _front) = connected();
        let call = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let event = call.as_fd().try_clone_to_owned().unwrap();
        let queue = [1, 0, 0, 0, 0, 0, 0, 0];
        vmm.journal
            .record(message(request::SET_VRING_CALL, &queue, vec![event]));
        let base = message(request::GET_VRING_BASE, &queue, vec![]);
        vmm.own_answer(&base).unwrap();
        assert_eq!(call.read(), Ok(1));
    }
}
