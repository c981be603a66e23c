// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's side of the socket.

mod changes;
mod connections;
mod requests;

use std::io::{self, BufReader};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::warn;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::socket::{Access, BindError, SocketFile, listen};

pub use changes::Changes;
use connections::{Connection, Connections, PATIENCE, Patience, Place, turn_away};
pub use requests::{Handler, serve};

/// How long to wait when the system has no file descriptor for another client.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Answers the clients of a socket until this is dropped. The drop disconnects all clients, and waits for
/// requests that are being handled. It leaves the socket open: another process may listen on it as well.
#[derive(Debug)]
pub struct Server {
    /// The thread ends when the other end of its stream is closed.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    /// The socket, if this server created it.
    file: Option<SocketFile>,
}

impl Server {
    /// Listens on the socket `path`, which only its owner may use, and answers with `handler`. The socket
    /// is removed when the server is dropped.
    ///
    /// # Errors
    ///
    /// See [`listen`].
    pub fn bind(path: &Path, handler: Arc<dyn Handler>) -> Result<Self, BindError> {
        let (listener, file) = listen(path, Access::default())?;
        let mut server = Self::start(listener, handler).map_err(|source| BindError::Io {
            path: path.to_owned(),
            source,
        })?;
        server.file = Some(file);
        Ok(server)
    }

    /// Answers the clients of a socket with `handler`.
    ///
    /// # Errors
    ///
    /// The system has no thread or no file descriptors.
    pub fn start(listener: UnixListener, handler: Arc<dyn Handler>) -> io::Result<Self> {
        Self::with_patience(listener, handler, PATIENCE)
    }

    fn with_patience(
        listener: UnixListener,
        handler: Arc<dyn Handler>,
        patience: Patience,
    ) -> io::Result<Self> {
        // Another process may accept the client first.
        listener.set_nonblocking(true)?;
        let (stop, stopped) = UnixStream::pair()?;
        let thread = thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accept(&listener, &stopped, &*handler, patience))?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
            file: None,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            file.remove();
        }
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A thread that panics has already printed that.
            let _ = thread.join();
        }
    }
}

/// Waits for a client, or until the server is stopped.
fn wait(listener: &UnixListener, stopped: &UnixStream) -> Option<io::Result<UnixStream>> {
    loop {
        let event = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut events = [event(listener.as_fd()), event(stopped.as_fd())];
        match poll(&mut events, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            Err(errno) => return Some(Err(errno.into())),
            Ok(_) => {}
        }
        if events[1].any().unwrap_or(true) {
            return None;
        }
        match listener.accept() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return Some(other.map(|(stream, _)| stream)),
        }
    }
}

/// Accepts clients until the server is stopped, and disconnects them then.
fn accept(
    listener: &UnixListener,
    stopped: &UnixStream,
    handler: &dyn Handler,
    patience: Patience,
) {
    let connections = Connections::default();
    thread::scope(|scope| {
        for id in 0.. {
            let Some(accepted) = wait(listener, stopped) else {
                break;
            };
            let Ok(stream) = accepted else {
                thread::sleep(EXHAUSTED_PAUSE);
                continue;
            };
            // A client that does not read must not occupy a connection.
            let ready = stream
                .set_nonblocking(false)
                .and_then(|()| stream.set_write_timeout(Some(patience.read)))
                .and_then(|()| stream.try_clone());
            let Some(other_end) = ready.ok().filter(|_| connections.make_room(patience.idle))
            else {
                turn_away(&stream);
                continue;
            };
            let connection = Connection {
                stream: other_end,
                idle_since: Some(Instant::now()),
            };
            connections.lock().insert(id, connection);
            let place = Place {
                connections: &connections,
                id,
                handler,
            };
            // Without a thread the connection and the stream are dropped with the closure.
            let _ = thread::Builder::new()
                .name("control-client".to_owned())
                .spawn_scoped(scope, move || {
                    match serve(BufReader::new(&stream), &stream, &place) {
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => warn!(
                            "a client of the control socket is disconnected: it has read nothing for {:?}",
                            patience.read
                        ),
                        // A client that disconnects early is no error of the daemon.
                        _ => {}
                    }
                });
        }
        for connection in connections.lock().values() {
            // Fails for clients that have disconnected already.
            let _ = connection.stream.shutdown(Shutdown::Both);
        }
        // Subscribers notice the end with the next event.
        handler.changes().info();
    });
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, Read, Write};
    use std::path::PathBuf;
    use std::sync::mpsc;

    use proptest::collection::vec;
    use proptest::prelude::{
        Just, ProptestConfig, Strategy, any, prop_assert_eq, prop_oneof, proptest,
    };
    use serde_json::Value;
    use tempfile::TempDir;

    use super::connections::MAX_CONNECTIONS;
    use super::requests::MAX_LINE;
    use super::*;
    use crate::protocol::{ControlError, Event, Info, Request, Response, Stats};

    /// A state that takes much of a socket's buffer.
    fn state() -> Info {
        Info {
            withheld: vec!["x".repeat(1 << 16)],
            ..Info::default()
        }
    }

    /// Accepts all requests, and returns the bytes of `set` as a sample's number.
    #[derive(Default)]
    struct Echo {
        changes: Changes,
    }

    impl Handler for Echo {
        fn changes(&self) -> &Changes {
            &self.changes
        }

        fn handle(&self, request: Request) -> Result<Response, ControlError> {
            Ok(match request {
                Request::Subscribe { .. } => Response::Subscribed {},
                Request::Info {} => Response::Info(state()),
                Request::Set { bytes, .. } => Response::Stats(Stats {
                    sequence: bytes,
                    ..Stats::default()
                }),
                _ => Response::Done {},
            })
        }
    }

    /// A directory with a path for a socket in it.
    fn place() -> (TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("balloon.sock");
        (directory, path)
    }

    fn bind(path: &Path) -> Result<Server, BindError> {
        Server::bind(path, Arc::<Echo>::default())
    }

    /// Sends bytes and the end of the stream, and returns the lines that come back.
    fn talk(path: &Path, bytes: &[u8]) -> Vec<Value> {
        let stream = UnixStream::connect(path).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                (&stream).write_all(bytes).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
            BufReader::new(&stream)
                .lines()
                .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
                .collect()
        })
    }

    const METRICS: &[u8] = b"{\"command\":\"metrics\"}\n";

    /// Whether the server answers a request of another client. It may close the connection of a client that it turns
    /// away before that has sent its request.
    fn is_served(path: &Path) -> bool {
        let stream = UnixStream::connect(path).unwrap();
        let mut answer = String::new();
        let _ = (&stream).write_all(METRICS);
        let _ = BufReader::new(&stream).read_line(&mut answer);
        answer == "{\"ok\":{}}\n"
    }

    /// Waits until one of the places is free.
    fn wait_served(path: &Path) {
        let start = Instant::now();
        while !is_served(path) {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "no place is free"
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn is_bad_request(answer: &Value) -> bool {
        answer["error"]["kind"] == "bad-request"
    }

    #[test]
    fn answers_come_in_order_and_errors_do_not_end_it() {
        let (_directory, path) = place();
        let _server = bind(&path).unwrap();
        let answers = talk(
            &path,
            b"{\"command\":\"set\",\"bytes\":1}\nnonsense\n\n{\"command\":\"set\",\"bytes\":2}",
        );
        assert_eq!(answers.len(), 4);
        assert_eq!(answers[0]["ok"]["sequence"], 1);
        assert!(is_bad_request(&answers[1]));
        assert!(is_bad_request(&answers[2]));
        assert_eq!(answers[3]["ok"]["sequence"], 2);
    }

    #[test]
    fn a_line_that_is_too_long_is_refused() {
        let (_directory, path) = place();
        let _server = bind(&path).unwrap();
        let request = b"{\"command\":\"metrics\"}";
        let mut bytes = vec![b' '; MAX_LINE - request.len()];
        bytes.extend_from_slice(request);
        bytes.push(b'\n');
        let answers = talk(&path, &bytes);
        assert_eq!(answers, [serde_json::json!({"ok": {}})]);

        bytes.insert(0, b' ');
        bytes.extend_from_slice(request);
        let answers = talk(&path, &bytes);
        assert_eq!(answers.len(), 2);
        assert!(is_bad_request(&answers[0]));
        assert!(answers[1]["ok"].is_object());
    }

    #[test]
    fn too_many_clients_are_turned_away() {
        let (_directory, path) = place();
        let _server = bind(&path).unwrap();
        let mut clients: Vec<_> = (0..MAX_CONNECTIONS)
            .map(|_| UnixStream::connect(&path).unwrap())
            .collect();
        let mut answer = String::new();
        UnixStream::connect(&path)
            .unwrap()
            .read_to_string(&mut answer)
            .unwrap();
        assert!(answer.contains("\"failed\""), "{answer}");

        // One disconnects, and its connection is free as soon as its thread has seen that.
        let mut last = clients.pop().unwrap();
        last.shutdown(Shutdown::Write).unwrap();
        assert_eq!(last.read(&mut [0]).unwrap(), 0);
        assert!(is_served(&path));
    }

    const SHORT: Patience = Patience {
        read: Duration::from_millis(20),
        idle: Duration::from_millis(20),
    };

    #[test]
    fn idle_clients_make_room() {
        let (_directory, path) = place();
        let (listener, _) = listen(&path, Access::default()).unwrap();
        let _server = Server::with_patience(listener, Arc::<Echo>::default(), SHORT).unwrap();
        let mut clients: Vec<_> = (0..MAX_CONNECTIONS)
            .map(|_| UnixStream::connect(&path).unwrap())
            .collect();
        for client in &mut clients[1..] {
            client.write_all(b"{}\n").unwrap();
            client.read_exact(&mut [0; 20]).unwrap();
        }
        wait_served(&path);
        assert_eq!(clients[0].read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn clients_that_do_not_read_lose_their_places() {
        let (_directory, path) = place();
        let (listener, _) = listen(&path, Access::default()).unwrap();
        let patience = Patience {
            idle: Duration::MAX,
            ..SHORT
        };
        let _server = Server::with_patience(listener, Arc::<Echo>::default(), patience).unwrap();
        let clients: Vec<_> = (0..MAX_CONNECTIONS)
            .map(|_| {
                let mut client = UnixStream::connect(&path).unwrap();
                client.set_nonblocking(true).unwrap();
                // Until both socket buffers are full.
                while client.write(&b"{}\n".repeat(1000)).is_ok() {}
                client
            })
            .collect();
        wait_served(&path);
        drop(clients);
    }

    /// The lines of a subscription, after the response.
    fn subscribe(path: &Path) -> impl Iterator<Item = io::Result<String>> {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(b"{\"command\":\"subscribe\"}\n").unwrap();
        let mut lines = BufReader::new(stream).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "{\"ok\":{}}");
        lines
    }

    #[test]
    fn subscribers_get_events_and_the_end() {
        let (_directory, path) = place();
        let echo = Arc::<Echo>::default();
        let server = Server::bind(&path, echo).unwrap();
        let mut subscribers: Vec<_> = (0..3).map(|_| subscribe(&path)).collect();
        for lines in &mut subscribers {
            // The first events are the present state.
            let event: Event = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
            assert_eq!(event, Event::Info(state()));
        }
        drop(server);
        for lines in subscribers {
            // There may be more of them.
            lines.map_while(Result::ok).for_each(drop);
        }
    }

    #[test]
    fn a_subscriber_that_does_not_read_is_disconnected_and_delays_nothing() {
        let (_directory, path) = place();
        let (listener, _) = listen(&path, Access::default()).unwrap();
        let echo = Arc::<Echo>::default();
        let _server = Server::with_patience(listener, Arc::clone(&echo) as _, SHORT).unwrap();
        let silent = subscribe(&path);
        let mut reading = subscribe(&path);
        let event = serde_json::to_string(&Event::Info(state())).unwrap();
        // More than the buffers of a socket hold.
        for _ in 0..30 {
            echo.changes.info();
            // On a busy machine a second may pass without a change.
            let mut lines = reading.by_ref().map(Result::unwrap);
            assert!(lines.any(|line| line == event));
        }
        // What it has not read is still there, and then comes the end.
        let rest = silent.map_while(Result::ok).count();
        assert!(rest < 30, "{rest} events");
    }

    #[test]
    fn another_process_goes_on_with_the_socket() {
        let (_directory, path) = place();
        let (listener, _file) = listen(&path, Access::default()).unwrap();
        let first = Server::start(listener.try_clone().unwrap(), Arc::<Echo>::default()).unwrap();
        assert!(is_served(&path));
        drop(first);
        let mut early = UnixStream::connect(&path).unwrap();
        early.write_all(METRICS).unwrap();
        let _second = Server::start(listener, Arc::<Echo>::default()).unwrap();
        let mut answer = String::new();
        BufReader::new(early).read_line(&mut answer).unwrap();
        assert_eq!(answer, "{\"ok\":{}}\n");
    }

    #[test]
    fn the_end_waits_for_a_request_and_disconnects_clients() {
        struct Slow(mpsc::SyncSender<()>, Changes);
        impl Handler for Slow {
            fn changes(&self) -> &Changes {
                &self.1
            }

            fn handle(&self, _: Request) -> Result<Response, ControlError> {
                self.0.send(()).unwrap();
                thread::sleep(Duration::from_millis(50));
                self.0.send(()).unwrap();
                Ok(Response::Done {})
            }
        }
        let (_directory, path) = place();
        let (sender, events) = mpsc::sync_channel(2);
        let server = Server::bind(&path, Arc::new(Slow(sender, Changes::default()))).unwrap();
        let mut idle = UnixStream::connect(&path).unwrap();
        let mut busy = UnixStream::connect(&path).unwrap();
        busy.write_all(b"{\"command\":\"info\"}\n").unwrap();
        events.recv().unwrap();
        drop(server);
        assert_eq!(events.try_recv(), Ok(()));
        assert_eq!(idle.read(&mut [0]).unwrap(), 0);
    }

    /// Bytes that are often a request, or similar to one.
    fn input() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            vec(any::<u8>(), 0..40),
            Just(b"\n".to_vec()),
            Just(b"{\"command\":\"info\"}\n".to_vec()),
            any::<i64>()
                .prop_map(|n| format!("{{\"command\":\"set\",\"bytes\":{n}}}\n").into_bytes()),
            Just(vec![b'['; MAX_LINE / 2 + 1]),
        ];
        vec(piece, 0..12).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn every_line_gets_exactly_one_answer(input in input()) {
            let (_directory, path) = place();
            let _server = bind(&path).unwrap();
            let mut lines = input.split(|&byte| byte == b'\n').count();
            if input.last().is_none_or(|&byte| byte == b'\n') {
                lines -= 1;
            }
            let answers = talk(&path, &input);
            prop_assert_eq!(answers.len(), lines);
            for answer in answers {
                let answer = answer.as_object().unwrap();
                prop_assert_eq!(answer.len(), 1);
                proptest::prop_assert!(answer.contains_key("ok") || answer.contains_key("error"));
            }
        }
    }
}
