// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The front end's connection. Another supervisor can continue it at any point.
//!
//! A front end waits for its answer. It would take a second answer as that to its next message. So each answer must be
//! sent exactly once, even if this process is killed at that moment. A message stays in the socket until its answer is
//! in a pipe. The kernel then moves the answer from the pipe into the socket in one step. The pipe outlives the
//! process, as the socket does. An answer in the pipe was not sent.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::Result;
use rustix::io::{ioctl_fionread, retry_on_intr};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};

use super::worker::ANSWER_TIMEOUT;
use crate::vhost_user::message::{Head, Message, Queued};

/// The connection, with the pending answer.
#[derive(Debug)]
pub(super) struct Connection {
    socket: UnixStream,
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Connection {
    /// The connection of a new front end.
    ///
    /// # Errors
    ///
    /// The process has too many file descriptors.
    pub(super) fn new(socket: UnixStream) -> Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // Messages arrive whole. A front end that sends half of a message, or does not read, must not block
        // the supervisor.
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Self {
            socket,
            reader,
            writer,
        })
    }

    /// The connection of an earlier supervisor, with both ends of its pipe.
    pub(super) fn of_another(socket: UnixStream, reader: OwnedFd, writer: OwnedFd) -> Self {
        Self {
            socket,
            reader,
            writer,
        }
    }

    /// Sends the pending answer of an earlier supervisor, if there is one.
    ///
    /// # Errors
    ///
    /// The front end has closed the connection, or does not read.
    pub(super) fn resume(&self) -> io::Result<()> {
        let unsent = self.unsent()?;
        if unsent == 0 {
            return Ok(());
        }
        // A front end that waits for its answer has sent nothing else.
        if let Ok(answered) = self.peek() {
            answered.queued.take(&self.socket)?;
        }
        self.send(unsent)
    }

    /// The socket.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Both ends of the pipe.
    pub(super) fn pipe(&self) -> [BorrowedFd<'_>; 2] {
        [self.reader.as_fd(), self.writer.as_fd()]
    }

    /// Reads the next message, and leaves it in the socket.
    ///
    /// # Errors
    ///
    /// As for [`Head::peek`].
    pub(super) fn peek(&self) -> io::Result<Head> {
        Head::peek(&self.socket)
    }

    /// Removes a message from the socket, and answers it if the front end waits for an answer.
    ///
    /// # Errors
    ///
    /// The front end has closed the connection, or does not read.
    pub(super) fn take(&self, message: Queued, answer: Option<&Message>) -> io::Result<()> {
        let Some(answer) = answer else {
            return message.take(&self.socket);
        };
        self.prepare(answer)?;
        message.take(&self.socket)?;
        self.send(answer.bytes().len())
    }

    /// Puts an answer into the pipe.
    fn prepare(&self, answer: &Message) -> io::Result<()> {
        let written = retry_on_intr(|| rustix::io::write(&self.writer, answer.bytes()))?;
        match written == answer.bytes().len() {
            true => Ok(()),
            false => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Sends the content of the pipe, so many bytes.
    fn send(&self, mut left: usize) -> io::Result<()> {
        while left > 0 {
            let (reader, socket) = (&self.reader, &self.socket);
            let flags = SpliceFlags::empty();
            let sent = retry_on_intr(|| splice(reader, None, socket, None, left, flags))?;
            left = left.saturating_sub(sent);
        }
        Ok(())
    }

    /// How many bytes are in the pipe.
    fn unsent(&self) -> io::Result<usize> {
        let bytes = ioctl_fionread(&self.reader)?;
        usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidData.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::message::request;
    use crate::vhost_user::message::tests::message;

    /// A front end that has sent a question, and the connection with it.
    fn asked() -> (UnixStream, Connection, Message) {
        let (front, socket) = UnixStream::pair().unwrap();
        front.set_nonblocking(true).unwrap();
        let question = message(request::GET_CONFIG, b"what?", vec![]);
        question.send(&front).unwrap();
        let answer = question.answer(b"that");
        (front, Connection::new(socket).unwrap(), answer)
    }

    /// The state of the next supervisor when this one is killed.
    fn killed(connection: Connection) -> io::Result<Connection> {
        connection.resume()?;
        Ok(connection)
    }

    /// Whether the front end has one answer, and the connection no message.
    fn is_answered_once(front: &UnixStream, connection: &Connection) -> bool {
        let answer = Message::receive(front).unwrap();
        answer.body() == b"that" && Message::receive(front).is_err() && connection.peek().is_err()
    }

    #[test]
    fn a_message_is_answered_once_whenever_the_supervisor_is_killed() {
        // Before there is an answer.
        let (front, connection, answer) = asked();
        let connection = killed(connection).unwrap();
        let head = connection.peek().unwrap();
        connection.take(head.queued, Some(&answer)).unwrap();
        assert!(is_answered_once(&front, &connection));

        // Before the message is taken.
        let (front, connection, answer) = asked();
        connection.prepare(&answer).unwrap();
        assert!(is_answered_once(&front, &killed(connection).unwrap()));

        // Before the answer is sent.
        let (front, connection, answer) = asked();
        connection.prepare(&answer).unwrap();
        let head = connection.peek().unwrap();
        head.queued.take(&connection.socket).unwrap();
        assert!(is_answered_once(&front, &killed(connection).unwrap()));

        // After that.
        let (front, connection, answer) = asked();
        let head = connection.peek().unwrap();
        connection.take(head.queued, Some(&answer)).unwrap();
        assert!(is_answered_once(&front, &killed(connection).unwrap()));
    }

    #[test]
    fn the_longest_answer_fits() {
        let (front, connection, _) = asked();
        front.set_nonblocking(false).unwrap();
        let head = connection.peek().unwrap();
        let answer = head.message.answer(&[7; 4096]);
        connection.take(head.queued, Some(&answer)).unwrap();
        assert_eq!(Message::receive(&front).unwrap().body(), [7; 4096]);
    }

    #[test]
    fn a_front_end_that_is_gone_is_an_error() {
        let (front, connection, answer) = asked();
        let head = connection.peek().unwrap();
        drop(front);
        assert!(connection.take(head.queued, Some(&answer)).is_err());
        assert!(killed(connection).is_err());
    }
}
