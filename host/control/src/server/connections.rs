// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Limits for the number of clients, and their timeouts.

use std::collections::HashMap;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};

use super::changes::Changes;
use super::requests::{Handler, send};
use crate::protocol::{ControlError, ErrorKind, Reply, Request, Response};

/// The maximum number of clients. Each needs a thread.
pub(super) const MAX_CONNECTIONS: usize = 32;

/// Timeouts of clients.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// To read an answer.
    pub(super) read: Duration,
    /// Between two requests, when another client needs the connection.
    pub(super) idle: Duration,
}

pub(super) const PATIENCE: Patience = Patience {
    read: Duration::from_secs(5),
    idle: Duration::from_secs(10),
};

/// A connected client.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    /// When its last request ended, unless one is being handled.
    pub(super) idle_since: Option<Instant>,
}

impl Connection {
    /// Whether the client has closed it, with no request left. On a busy machine the thread may notice that late. A
    /// client that has only ended its requests may wait for responses.
    fn has_ended(&self) -> bool {
        let mut events = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        poll(&mut events, PollTimeout::ZERO) == Ok(1)
            && matches!(
                recv(self.stream.as_raw_fd(), &mut [0], flags),
                // The error comes if the client has left events unread.
                Ok(0) | Err(Errno::ECONNRESET)
            )
    }
}

/// The connected clients.
#[derive(Debug, Default)]
pub(super) struct Connections(Mutex<HashMap<u64, Connection>>);

impl Connections {
    /// A thread that panics cannot leave it half changed.
    pub(super) fn lock(&self) -> MutexGuard<'_, HashMap<u64, Connection>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for another client, and returns whether there is room. Removes a client that has left, or disconnects
    /// the one that has been idle longest, if that was long enough.
    pub(super) fn make_room(&self, idle: Duration) -> bool {
        let mut connections = self.lock();
        if connections.len() < MAX_CONNECTIONS {
            return true;
        }
        let first = connections
            .iter()
            .filter_map(|(&id, connection)| {
                let since = connection.idle_since?;
                let is_there = !connection.has_ended();
                (!is_there || since.elapsed() >= idle).then_some((is_there, since, id))
            })
            .min();
        let Some(connection) = first.and_then(|(.., id)| connections.remove(&id)) else {
            return false;
        };
        // Its thread ends by this.
        let _ = connection.stream.shutdown(Shutdown::Both);
        true
    }

    fn set_idle(&self, id: u64, idle_since: Option<Instant>) {
        if let Some(connection) = self.lock().get_mut(&id) {
            connection.idle_since = idle_since;
        }
    }
}

/// A client's place among the connections, and the handler of its requests.
pub(super) struct Place<'a> {
    pub(super) connections: &'a Connections,
    pub(super) id: u64,
    pub(super) handler: &'a dyn Handler,
}

impl Handler for Place<'_> {
    fn changes(&self) -> &Changes {
        self.handler.changes()
    }

    fn sample_every(&self, interval: Option<Duration>) {
        self.handler.sample_every(interval);
    }

    fn handle(&self, request: Request) -> Result<Response, ControlError> {
        self.connections.set_idle(self.id, None);
        let result = self.handler.handle(request);
        self.connections.set_idle(self.id, Some(Instant::now()));
        result
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.connections.lock().remove(&self.id);
    }
}

/// Sends the error about too many clients. It fits into the socket's buffer, so this does not wait.
pub(super) fn turn_away(stream: &UnixStream) {
    let error = ControlError::new(
        ErrorKind::Failed,
        format!("the daemon serves {MAX_CONNECTIONS} clients already"),
        "close other clients, such as those that watch statistics, and try again",
    );
    // A failure is ignored: a client that is gone does not need it.
    let _ = send(stream, &Reply::<Response>::Error(error));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// As many clients as there may be, which are idle from now on.
    fn full() -> (Connections, Vec<UnixStream>) {
        let connections = Connections::default();
        let clients = (0..MAX_CONNECTIONS as u64).map(|id| {
            let (client, stream) = UnixStream::pair().unwrap();
            let idle_since = Some(Instant::now());
            let connection = Connection { stream, idle_since };
            connections.lock().insert(id, connection);
            client
        });
        let clients = clients.collect();
        (connections, clients)
    }

    #[test]
    fn clients_that_have_left_make_room() {
        let (connections, mut clients) = full();
        let has_room = || connections.make_room(Duration::MAX);
        assert!(!has_room());
        // Its request is still to be handled.
        clients.pop().unwrap().write_all(b"{}").unwrap();
        assert!(!has_room());
        drop(clients.pop());
        assert!(has_room());
        assert_eq!(connections.lock().len(), MAX_CONNECTIONS - 1);
    }

    #[test]
    fn clients_that_have_left_with_unread_events_make_room() {
        let (connections, mut clients) = full();
        for connection in connections.lock().values_mut() {
            connection.stream.write_all(b"{}").unwrap();
        }
        assert!(!connections.make_room(Duration::MAX));
        drop(clients.pop());
        assert!(connections.make_room(Duration::MAX));
    }

    #[test]
    fn clients_that_wait_for_responses_keep_their_places() {
        let (connections, clients) = full();
        clients[3].shutdown(Shutdown::Write).unwrap();
        assert!(!connections.make_room(Duration::MAX));
    }

    #[test]
    fn clients_that_have_left_make_room_before_others() {
        let (connections, mut clients) = full();
        drop(clients.pop());
        assert!(connections.make_room(Duration::ZERO));
        assert!(
            !connections
                .lock()
                .contains_key(&(MAX_CONNECTIONS as u64 - 1))
        );
    }
}
