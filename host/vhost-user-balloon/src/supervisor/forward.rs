// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Forwards the messages of the front end to the worker, and the worker's answers to the front end.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use log::{error, info, warn};
use sd_notify::NotifyState;

use super::Supervisor;
use super::connection::Connection;
use super::journal::{Journal, has_reply, is_answered, is_refusal, name, signal, takes_away};
use super::memory::{adds_memory, is_private};
use super::setup::Verdict;
use super::snapshot::notify;
use super::vmm::Vmm;
use crate::vhost_user::message::{Head, Message, request};

/// How long a process may take to end after its file descriptors are closed.
const END_OF_PROCESS: Duration = Duration::from_millis(500);

/// How long to wait when the system has no file descriptor for another front end.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

impl Supervisor {
    pub(super) fn on_worker(&mut self) {
        let Some(worker) = &mut self.worker else {
            return;
        };
        let events = worker.read();
        if events.ready && !self.is_ready {
            self.is_ready = true;
            notify(&[NotifyState::Ready]);
        }
        let Some(vmm) = self.vmm.as_mut().filter(|_| events.config_changed) else {
            return;
        };
        vmm.config_changed();
        if vmm.journal.started() {
            self.save();
        }
    }

    pub(super) fn on_answer(&mut self) {
        let (Some(backend), Some(vmm)) = (&self.backend, &mut self.vmm) else {
            return;
        };
        let Ok(mut answer) = Message::receive(backend) else {
            return self.on_backend_closed();
        };
        let Some(head) = vmm.take_answered() else {
            return;
        };
        if is_refusal(&head.message, &answer) {
            // The library closes its end.
            self.disconnect();
            return self.refuse(head);
        }
        Journal::prepare_answer(&mut answer);
        if has_reply(&head.message) && vmm.keep_answer(&answer) {
            self.save();
        }
        self.complete(head, true, &answer);
    }

    /// Removes a handled message from the socket, and answers it if the front end waits for an
    /// answer.
    fn complete(&mut self, head: Head, recorded: bool, answer: &Message) {
        let Some(vmm) = &mut self.vmm else {
            return;
        };
        let wanted = has_reply(&head.message);
        let Head { message, queued } = head;
        if recorded && vmm.journal.record(message) {
            self.save();
        }
        let Some(vmm) = &self.vmm else {
            return;
        };
        let answer = wanted.then_some(answer);
        if vmm.connection.take(queued, answer).is_err() {
            self.drop_vmm();
        }
    }

    /// The worker's connection has ended, because the worker has, or because the vhost-user library does not
    /// accept a message.
    pub(super) fn on_backend_closed(&mut self) {
        self.disconnect();
        let ended = self
            .worker
            .as_mut()
            .is_none_or(|worker| worker.ends_within(END_OF_PROCESS));
        // The signal may not have been read.
        self.child_ended |= ended;
        let answered = self
            .vmm
            .as_mut()
            .filter(|_| !ended)
            .and_then(Vmm::take_answered);
        match answered {
            Some(head) => self.refuse(head),
            None if ended => {}
            None => {
                warn!("the worker has closed its connection");
                self.kill();
            }
        }
    }

    /// Skips a message that the worker does not accept.
    pub(super) fn refuse(&mut self, head: Head) {
        if let Some(vmm) = &mut self.vmm {
            vmm.log_refusal(&head.message);
        }
        self.leave_out(head);
    }

    /// Answers a message of the front end that is not forwarded.
    fn leave_out(&mut self, head: Head) {
        let Some(vmm) = &mut self.vmm else {
            return;
        };
        vmm.setup.left_out(&head.message);
        let message = &head.message;
        let answer = vmm.own_answer(message);
        let recorded = takes_away(message);
        match answer {
            Some(answer) => self.complete(head, recorded, &answer),
            None => {
                error!("disconnecting the VMM, which waits for an answer that does not exist");
                self.drop_vmm();
            }
        }
    }

    pub(super) fn on_frontend(&mut self, reads: bool) {
        let Some(vmm) = &self.vmm else {
            return;
        };
        if !reads {
            if vmm.is_gone() {
                self.drop_vmm();
            }
            return;
        }
        match vmm.connection.peek() {
            Ok(head) => self.handle(head),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.drop_vmm(),
        }
    }

    fn drop_vmm(&mut self) {
        if self.vmm.take().is_some() {
            info!("the VMM is gone");
        }
        self.disconnect();
        if self.arguments != self.new_arguments {
            self.stop_worker();
            self.arguments.clone_from(&self.new_arguments);
        }
        self.save();
    }

    /// Handles a message of the front end.
    fn handle(&mut self, mut head: Head) {
        let Some(vmm) = &mut self.vmm else {
            return;
        };
        if vmm.journal.has_recorded(&head.message) {
            let answer = head.message.answer(&[]);
            return self.complete(head, false, &answer);
        }
        if head.message.is_truncated() {
            vmm.setup.no_descriptors(&name(&head.message));
            return self.leave_out(head);
        }
        if adds_memory(&head.message)
            && is_private(vmm.connection.socket(), &head.message).unwrap_or_default()
        {
            vmm.setup.private_memory();
            return self.leave_out(head);
        }
        match vmm.setup.check(&head.message, &vmm.journal) {
            Verdict::Forward => {}
            Verdict::LeaveOut => return self.leave_out(head),
            Verdict::Disconnect => return self.drop_vmm(),
        }
        vmm.journal.prepare(&mut head.message);
        let Some(backend) = &self.backend else {
            return self.answer_without_worker(head);
        };
        if let (request::SET_VRING_KICK, [event]) =
            (head.message.request(), head.message.descriptors())
        {
            signal(event);
        }
        let sent = head.message.send(backend);
        if is_answered(&head.message) {
            vmm.expect_answer(Some(head));
        } else if sent.is_ok() {
            let answer = head.message.answer(&[]);
            self.complete(head, true, &answer);
        }
        if sent.is_err() {
            self.on_backend_closed();
        }
    }

    /// Handles a message without a worker, as far as possible, since QEMU's main loop waits.
    fn answer_without_worker(&mut self, head: Head) {
        let Some(vmm) = &mut self.vmm else {
            return;
        };
        match vmm.own_answer(&head.message) {
            Some(answer) => self.complete(head, true, &answer),
            None => vmm.blocked = true,
        }
    }

    pub(super) fn accept(&mut self) {
        let frontend = match self.socket.listener.accept() {
            Ok((frontend, _)) => frontend,
            Err(error) => {
                let kind = error.kind();
                if ![io::ErrorKind::WouldBlock, io::ErrorKind::ConnectionAborted].contains(&kind) {
                    warn!("cannot serve a VMM now: {error}");
                    thread::sleep(EXHAUSTED_PAUSE);
                }
                return;
            }
        };
        if let Some(vmm) = &self.vmm {
            if vmm.is_silent() {
                warn!("disconnecting a client that has sent nothing");
            } else if !vmm.is_gone() {
                error!(
                    "refusing a second VMM or device on {}: each device of each VM needs a daemon with a \
                     --socket of its own",
                    self.socket.path.display()
                );
                return;
            }
            self.drop_vmm();
        }
        match Connection::new(frontend) {
            Ok(connection) => {
                info!("a VMM is connected");
                self.vmm = Some(Vmm::new(connection, Journal::default(), self.boot));
                self.absent_since = Instant::now();
                self.save();
            }
            Err(error) => warn!("cannot serve a VMM now: {error:#}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use clap::Parser;
    use nix::sys::signal::SigSet;
    use nix::sys::signalfd::SignalFd;
    use tempfile::TempDir;

    use super::super::snapshot::Store;
    use super::*;
    use crate::options::Options;
    use crate::testing::memory_file;
    use crate::vhost_user::message::tests::message;

    /// A supervisor without a worker, and its front end.
    fn connected() -> (TempDir, Supervisor, UnixStream) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let options = Options::parse_from(["program", "--socket", path.to_str().unwrap()]);
        let signals = SignalFd::new(&SigSet::empty()).unwrap();
        let mut supervisor =
            Supervisor::new(&options, None, signals, Store::default(), None).unwrap();
        let (front, socket) = UnixStream::pair().unwrap();
        front.set_nonblocking(true).unwrap();
        let connection = Connection::new(socket).unwrap();
        let vmm = Vmm::new(connection, Journal::default(), Duration::ZERO);
        supervisor.vmm = Some(vmm);
        (directory, supervisor, front)
    }

    fn journal(supervisor: &mut Supervisor) -> &mut Journal {
        &mut supervisor.vmm.as_mut().unwrap().journal
    }

    /// A region of memory with its file.
    fn memory() -> (Vec<u8>, Message) {
        let region = [0, 0, 0x2000, 0x10000, 0].map(u64::to_ne_bytes).concat();
        let file = memory_file(0x2000).try_clone().unwrap();
        let message = message(request::ADD_MEM_REG, &region, vec![file.into()]);
        (region, message)
    }

    /// The front end sends a message, which every worker refuses.
    fn refuse(supervisor: &mut Supervisor, front: &UnixStream, request: u32, body: &[u8]) {
        message(request, body, vec![]).send(front).unwrap();
        let head = supervisor.vmm.as_ref().unwrap().connection.peek().unwrap();
        supervisor.refuse(head);
    }

    #[test]
    fn a_recorded_message_is_not_repeated_when_the_supervisor_was_killed() {
        let (_directory, mut supervisor, front) = connected();
        let (region, _) = memory();
        for (request, left) in [
            (request::SET_OWNER, 1),
            (request::ADD_MEM_REG, 2),
            (request::REM_MEM_REG, 1),
            (request::ADD_MEM_REG, 2),
        ] {
            let sent = match request {
                request::SET_OWNER => message(request, &[], vec![]),
                request::ADD_MEM_REG => memory().1,
                _ => message(request, &region, vec![]),
            };
            sent.send(&front).unwrap();
            let vmm = supervisor.vmm.as_ref().unwrap();
            let head = vmm.connection.peek().unwrap();
            assert!(!vmm.journal.has_recorded(&head.message));
            journal(&mut supervisor).record(head.message);
            supervisor.on_frontend(true);
            assert_eq!(journal(&mut supervisor).messages().len(), left);
            assert!(supervisor.vmm.as_ref().unwrap().connection.peek().is_err());
        }
        assert!(journal(&mut supervisor).has_recorded(&message(request::SET_OWNER, &[], vec![])));
        // Other memory, and memory of a table.
        let other = [0, 0, 0x2000, 0x20000, 0].map(u64::to_ne_bytes).concat();
        let has = |supervisor: &mut Supervisor, request, region: &[u8]| {
            journal(supervisor).has_recorded(&message(request, region, vec![]))
        };
        assert!(!has(&mut supervisor, request::ADD_MEM_REG, &other));
        assert!(has(&mut supervisor, request::REM_MEM_REG, &other));
        let table = [&[1, 0, 0, 0, 0, 0, 0, 0], &other[8..]].concat();
        journal(&mut supervisor).record(message(request::SET_MEM_TABLE, &table, vec![]));
        assert!(!has(&mut supervisor, request::REM_MEM_REG, &other));
    }

    #[test]
    fn what_the_front_end_has_taken_away_is_gone() {
        let (_directory, mut supervisor, front) = connected();
        let queue = |number: u32| [0, number].map(u32::to_ne_bytes).concat();
        let (region, memory) = memory();
        journal(&mut supervisor).record(memory);
        for (request, number) in [
            (request::SET_VRING_NUM, 16),
            (request::SET_VRING_BASE, 7),
            (request::SET_VRING_ENABLE, 1),
        ] {
            journal(&mut supervisor).record(message(request, &queue(number), vec![]));
        }
        let mut left = |request, body: &[u8]| {
            refuse(&mut supervisor, &front, request, body);
            let messages = journal(&mut supervisor).messages().iter();
            messages.map(Message::request).collect::<Vec<_>>()
        };
        let all = [
            request::ADD_MEM_REG,
            request::SET_VRING_NUM,
            request::SET_VRING_BASE,
            request::SET_VRING_ENABLE,
        ];
        assert_eq!(left(request::SET_VRING_NUM, &queue(256)), all);
        assert_eq!(left(request::SET_VRING_ENABLE, &queue(0)), all[..3]);
        assert_eq!(
            left(request::GET_VRING_BASE, &queue(0)),
            [request::ADD_MEM_REG, request::SET_VRING_BASE]
        );
        assert_eq!(Message::receive(&front).unwrap().body(), queue(7));
        assert_eq!(
            left(request::REM_MEM_REG, &region),
            [request::SET_VRING_BASE]
        );
    }
}
