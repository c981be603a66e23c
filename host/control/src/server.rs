// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's side of the socket.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};

use crate::framing::{Line, read_line};
use crate::protocol::{ControlError, ErrorKind, Reply, Request, Response};

/// How long a request may be, in bytes. The longest that makes sense has less than a hundred.
const MAX_LINE: usize = 64 << 10;

/// How many clients there may be at once, each of which costs a thread.
const MAX_CONNECTIONS: usize = 32;

/// How long to wait when the system has no file descriptor for another client.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// What does the work. It is called from one thread for each client.
pub trait Handler: Send + Sync {
    /// Does what a request asks for.
    ///
    /// # Errors
    ///
    /// What the client shall know when it is not done.
    fn handle(&self, request: Request) -> Result<Response, ControlError>;
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process listens there.
    #[error("another daemon listens on {0}; stop that one, or choose another socket")]
    Live(PathBuf),
    /// There is a file which is not a socket.
    #[error("{0} is not a socket; remove it, or choose another path")]
    NotASocket(PathBuf),
    /// Something else is wrong with the path.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// Where the socket was to be.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// A socket which is answered until this is dropped. Then the socket is removed, and all clients are
/// disconnected; a request that is being handled is waited for.
#[derive(Debug)]
pub struct Server {
    socket: SocketFile,
    listener: Arc<Listener>,
    thread: Option<JoinHandle<()>>,
}

/// The socket that clients connect to.
#[derive(Debug)]
struct Listener {
    socket: UnixListener,
    /// Nobody is to be accepted any more.
    stopping: AtomicBool,
}

impl Server {
    /// Listens on the socket `path`, which only its owner may use, and has `handler` answer. A socket that a
    /// dead process has left there is replaced.
    ///
    /// # Errors
    ///
    /// Another process listens there, there is something else than a socket, or no socket can be made.
    pub fn bind(path: &Path, handler: Arc<dyn Handler>) -> Result<Self, BindError> {
        let (listener, socket) = listen(path)?;
        let listener = Arc::new(Listener {
            socket: listener,
            stopping: AtomicBool::new(false),
        });
        let thread = thread::Builder::new()
            .name("control".to_owned())
            .spawn({
                let listener = Arc::clone(&listener);
                move || accept(&listener, &*handler)
            })
            .map_err(|source| io_error(path, source))?;
        Ok(Self {
            socket,
            listener,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.socket.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.socket.remove();
        self.listener.stopping.store(true, Ordering::Release);
        // This wakes the thread. It fails for no listening socket, and without it the thread could only be
        // waited for in vain.
        let woken = socket::shutdown(self.listener.socket.as_raw_fd(), socket::Shutdown::Both);
        if let (Ok(()), Some(thread)) = (woken, self.thread.take()) {
            // A thread that has panicked has said so.
            let _ = thread.join();
        }
    }
}

/// A socket in the file system, by its place and its identity.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            identity: identity(path)?,
        })
    }

    /// Removes it, unless there is another one at its place by now.
    pub fn remove(&self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // Nothing depends on it: the next daemon replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn io_error(path: &Path, source: impl Into<io::Error>) -> BindError {
    BindError::Io {
        path: path.to_owned(),
        source: source.into(),
    }
}

/// Listens on the socket `path`, which only its owner may use. A socket that a dead process has left there
/// is replaced. The caller removes the file.
///
/// # Errors
///
/// Another process listens there, there is something else than a socket, or no socket can be made.
pub fn listen(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    let failed = |source: io::Error| io_error(path, source);
    // Of two daemons that start at once only one may find the stale socket: the other one would remove
    // the socket of the first.
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = File::open(directory).map_err(failed)?;
    let _lock = Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, errno)| io_error(path, errno))?;
    remove_stale(path)?;

    let descriptor = socket::socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(|errno| io_error(path, errno))?;
    // The file gets the mode that the socket has now, so it is never open to others.
    fchmod(&descriptor, Mode::S_IRUSR | Mode::S_IWUSR)
        .and_then(|()| UnixAddr::new(path))
        .and_then(|address| socket::bind(descriptor.as_raw_fd(), &address))
        .and_then(|()| socket::listen(&descriptor, Backlog::MAXCONN))
        .map_err(|errno| io_error(path, errno))?;
    let socket = SocketFile::new(path).map_err(failed)?;
    Ok((UnixListener::from(descriptor), socket))
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|source| io_error(path, source))?,
    };
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(BindError::Live(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|source| io_error(path, source))
        }
        Err(source) => Err(io_error(path, source)),
    }
}

/// The clients that are connected, so that they can be disconnected.
#[derive(Debug, Default)]
struct Connections(Mutex<HashMap<u64, UnixStream>>);

impl Connections {
    /// No thread can leave it half changed.
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, UnixStream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's place among the connections.
struct Place<'a> {
    connections: &'a Connections,
    id: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.connections.lock().remove(&self.id);
    }
}

/// Accepts clients until the listener is stopped, and disconnects them then.
fn accept(listener: &Listener, handler: &dyn Handler) {
    let connections = Connections::default();
    thread::scope(|scope| {
        for id in 0.. {
            let accepted = listener.socket.accept();
            if listener.stopping.load(Ordering::Acquire) {
                break;
            }
            let Ok((stream, _)) = accepted else {
                thread::sleep(EXHAUSTED_PAUSE);
                continue;
            };
            if connections.lock().len() >= MAX_CONNECTIONS {
                turn_away(&stream);
                continue;
            }
            let Ok(other_end) = stream.try_clone() else {
                turn_away(&stream);
                continue;
            };
            connections.lock().insert(id, other_end);
            let place = Place {
                connections: &connections,
                id,
            };
            // Without a thread the place and the stream are dropped with the closure.
            let _ = thread::Builder::new()
                .name("control-client".to_owned())
                .spawn_scoped(scope, move || {
                    // A client that goes away in the middle is no error of the daemon.
                    let _ = serve(BufReader::new(&stream), &stream, handler);
                    drop(place);
                });
        }
        for stream in connections.lock().values() {
            // Fails for those who are gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    });
}

/// Tells a client that there are too many. It fits into the socket's buffer, so nobody is waited for.
fn turn_away(stream: &UnixStream) {
    let error = ControlError::new(
        ErrorKind::Failed,
        format!("the daemon serves {MAX_CONNECTIONS} clients already"),
        "close other clients, such as those that watch statistics, and try again",
    );
    // It is told or it is not: there is nobody else to tell.
    let _ = reply(stream, &Reply::Error(error));
}

/// Answers one client, line by line.
///
/// # Errors
///
/// The client goes away before it has all answers.
pub fn serve(
    mut reader: impl BufRead,
    mut writer: impl Write,
    handler: &dyn Handler,
) -> io::Result<()> {
    while let Some(line) = read_line(&mut reader, MAX_LINE)? {
        let answer = match parse(line).and_then(|request| handler.handle(request)) {
            Ok(response) => Reply::Ok(response),
            Err(error) => Reply::Error(error),
        };
        reply(&mut writer, &answer)?;
    }
    Ok(())
}

fn parse(line: Line) -> Result<Request, ControlError> {
    let bad_request = |message| {
        ControlError::new(
            ErrorKind::BadRequest,
            message,
            "send one JSON object a line, as docs/control.md says",
        )
    };
    match line {
        Line::TooLong => Err(bad_request(format!(
            "the request is longer than {MAX_LINE} bytes"
        ))),
        Line::Whole(line) => serde_json::from_slice(&line)
            .map_err(|error| bad_request(format!("the request is malformed: {error}"))),
    }
}

fn reply(mut writer: impl Write, reply: &Reply<Response>) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    writer.write_all(&line)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, Read};
    use std::os::unix::fs::PermissionsExt;
    use std::sync::{Barrier, mpsc};

    use proptest::collection::vec;
    use proptest::prelude::{
        Just, ProptestConfig, Strategy, any, prop_assert_eq, prop_oneof, proptest,
    };
    use serde_json::Value;
    use tempfile::TempDir;

    use super::*;
    use crate::protocol::Stats;

    /// Says yes to all, and gives the bytes of `set` back as a sample's number.
    struct Echo;

    impl Handler for Echo {
        fn handle(&self, request: Request) -> Result<Response, ControlError> {
            Ok(match request {
                Request::Set { bytes } => Response::Stats(Stats {
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
        Server::bind(path, Arc::new(Echo))
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

    fn is_bad_request(answer: &Value) -> bool {
        answer["error"]["kind"] == "bad-request"
    }

    #[test]
    fn only_the_owner_may_use_the_socket() {
        let (_directory, path) = place();
        let _server = bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
    }

    #[test]
    fn the_socket_is_removed_at_the_end() {
        let (_directory, path) = place();
        let server = bind(&path).unwrap();
        assert_eq!(server.path(), path);
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn the_socket_of_another_is_left_alone() {
        let (_directory, path) = place();
        let first = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = bind(&path).unwrap();
        drop(first);
        assert_eq!(talk(&path, b"{\"command\":\"info\"}\n").len(), 1);
    }

    #[test]
    fn a_live_socket_is_not_replaced() {
        let (_directory, path) = place();
        let _server = bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(BindError::Live(live)) if live == path));
        assert_eq!(talk(&path, b"{\"command\":\"info\"}\n").len(), 1);
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let (_directory, path) = place();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _server = bind(&path).unwrap();
        assert_eq!(talk(&path, b"{\"command\":\"info\"}\n").len(), 1);
    }

    #[test]
    fn a_file_is_not_replaced() {
        let (_directory, path) = place();
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(BindError::NotASocket(file)) if file == path));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_directory_that_is_missing_is_named() {
        let (_directory, path) = place();
        let path = path.join("balloon.sock");
        let error = bind(&path).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }

    #[test]
    fn of_many_that_start_at_once_one_wins() {
        let (_directory, path) = place();
        for _ in 0..200 {
            drop(UnixListener::bind(&path).unwrap());
            let start = Barrier::new(4);
            let racer = || {
                start.wait();
                bind(&path).ok()
            };
            let servers: Vec<_> = thread::scope(|scope| {
                let racers = [(); 4].map(|()| scope.spawn(racer));
                racers
                    .into_iter()
                    .filter_map(|racer| racer.join().unwrap())
                    .collect()
            });
            assert_eq!(servers.len(), 1);
            assert_eq!(talk(&path, b"\n").len(), 1);
        }
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
        let request = b"{\"command\":\"info\"}";
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

        // One goes, and its place is free as soon as its thread has noticed.
        let mut last = clients.pop().unwrap();
        last.shutdown(Shutdown::Write).unwrap();
        assert_eq!(last.read(&mut [0]).unwrap(), 0);
        assert_eq!(talk(&path, b"{\"command\":\"info\"}\n").len(), 1);
    }

    #[test]
    fn the_end_waits_for_a_request_and_disconnects_clients() {
        struct Slow(mpsc::SyncSender<()>);
        impl Handler for Slow {
            fn handle(&self, _: Request) -> Result<Response, ControlError> {
                self.0.send(()).unwrap();
                thread::sleep(Duration::from_millis(50));
                self.0.send(()).unwrap();
                Ok(Response::Done {})
            }
        }
        let (_directory, path) = place();
        let (sender, events) = mpsc::sync_channel(2);
        let server = Server::bind(&path, Arc::new(Slow(sender))).unwrap();
        let mut idle = UnixStream::connect(&path).unwrap();
        let mut busy = UnixStream::connect(&path).unwrap();
        busy.write_all(b"{\"command\":\"info\"}\n").unwrap();
        events.recv().unwrap();
        drop(server);
        assert_eq!(events.try_recv(), Ok(()));
        assert_eq!(idle.read(&mut [0]).unwrap(), 0);
    }

    /// Bytes that are often a request, or nearly one.
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
