// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The client's side of the socket.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufReader, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Uid, User};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::framing::{Line, read_line};
use crate::protocol::{ControlError, Reply, Request};

/// How long the daemon may take for an answer. The daemon itself waits for the guest, but not that
/// long.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long an answer may be, in bytes.
const MAX_ANSWER: usize = 1 << 20;

/// Why there is no valid answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no socket.
    #[error("there is no socket {0}")]
    Missing(PathBuf),
    /// No process listens on the socket.
    #[error("no daemon listens on {0}")]
    Stale(PathBuf),
    /// The socket belongs to another user.
    #[error("no permission to use {path}, it belongs to {owner}")]
    Denied {
        /// The socket.
        path: PathBuf,
        /// The owner.
        owner: String,
    },
    /// The socket cannot be used for another reason.
    #[error("cannot connect to {path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The daemon did not answer in time.
    #[error("the daemon does not answer within {} s", .0.as_secs())]
    Silent(Duration),
    /// The connection has ended.
    #[error("the daemon has closed the connection")]
    Gone,
    /// The process that listens there does not speak this protocol, or another version of it.
    #[error("the answer is not understood: {0}")]
    Garbled(String),
    /// The daemon refuses the request.
    #[error(transparent)]
    Refused(#[from] ControlError),
}

impl ClientError {
    /// The remedy.
    pub fn advice(&self) -> String {
        match self {
            Self::Missing(_) => {
                "start vhost-user-balloon, or name its control socket with --socket".to_owned()
            }
            Self::Stale(_) => {
                "the daemon has died and left its socket: start vhost-user-balloon again".to_owned()
            }
            Self::Denied { owner, .. } if owner == "root" => "run this as root".to_owned(),
            Self::Denied { owner, .. } => format!("run this as {owner} or as root"),
            Self::Connect { .. } => {
                "name the daemon's control socket with --socket or BALLOON_SOCKET".to_owned()
            }
            Self::Silent(_) => "see the daemon's log, and restart it if it hangs".to_owned(),
            Self::Gone => "see the daemon's log, and try again".to_owned(),
            Self::Garbled(_) => {
                "see that --socket names the control socket, and that the daemon is of this version"
                    .to_owned()
            }
            Self::Refused(error) => error.advice.clone(),
        }
    }
}

/// An answer, as the daemon has sent it.
#[derive(Clone, Debug)]
pub struct Answer(Box<RawValue>);

impl Answer {
    /// The JSON object, word for word.
    pub fn json(&self) -> &str {
        self.0.get()
    }

    /// The answer as the type for the request.
    ///
    /// # Errors
    ///
    /// It is not of that type.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        serde_json::from_str(self.json()).map_err(|error| ClientError::Garbled(error.to_string()))
    }
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the daemon with the socket `path`.
    ///
    /// # Errors
    ///
    /// There is no such socket, no daemon listens on it, or it belongs to another user.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|error| unreachable(path, error))?;
        stream
            .set_read_timeout(Some(ANSWER_TIMEOUT))
            .and_then(|()| stream.set_write_timeout(Some(ANSWER_TIMEOUT)))
            .map_err(|error| unreachable(path, error))?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    ///
    /// The daemon, or balloon-manager, refuses it, or the connection fails. After a failure the connection stays closed, so
    /// that a late answer is not mistaken for that of the next request.
    pub fn call(&mut self, request: &impl Serialize) -> Result<Answer, ClientError> {
        let reply = self.exchange(request).inspect_err(|_| {
            // The connection is useless now, whether this succeeds or not.
            let _ = self.stream.get_ref().shutdown(Shutdown::Both);
        })?;
        match reply {
            Reply::Ok(answer) => Ok(Answer(answer)),
            Reply::Error(error) => Err(error.into()),
        }
    }

    /// Subscribes to the events of the daemon. The first one is the present state. The daemon requests statistics at this
    /// interval at least.
    ///
    /// # Errors
    ///
    /// The daemon refuses it, or the connection fails.
    pub fn subscribe(mut self, statistics: Option<Duration>) -> Result<Events, ClientError> {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.call(&Request::Subscribe {
            stats_milliseconds: statistics.map(milliseconds),
        })?;
        Ok(Events {
            stream: self.stream,
        })
    }

    fn exchange(&mut self, request: &impl Serialize) -> Result<Reply<Box<RawValue>>, ClientError> {
        let mut line =
            serde_json::to_vec(request).map_err(|error| ClientError::Garbled(error.to_string()))?;
        line.push(b'\n');
        match self.stream.get_mut().write_all(&line) {
            // The daemon may have sent the reason before it closed the connection.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            other => other.map_err(|error| failed(&error))?,
        }
        let line = receive(&mut self.stream)?;
        serde_json::from_slice(&line).map_err(|error| ClientError::Garbled(error.to_string()))
    }
}

/// An event, as the daemon has sent it.
#[derive(Clone, Debug)]
pub enum News {
    /// The state: an [`Info`](crate::Info).
    Info(Answer),
    /// A sample of the guest's statistics: [`Stats`](crate::Stats).
    Stats(Answer),
    /// Nothing has changed for a while.
    Alive,
}

/// The events of a daemon.
#[derive(Debug)]
pub struct Events {
    stream: BufReader<UnixStream>,
}

/// Readable when the daemon has sent something, unless that [was read](Events::is_read).
impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.get_ref().as_fd()
    }
}

impl Events {
    /// Whether the next event, or its begin, was read from the socket along with the one before.
    pub fn is_read(&self) -> bool {
        !self.stream.buffer().is_empty()
    }

    /// Waits for the next event, and for `limit` at most. The connection is useless after that.
    ///
    /// # Errors
    ///
    /// The connection fails, or the daemon sends nothing for a long time.
    pub fn next(&mut self, limit: Duration) -> Result<Option<News>, ClientError> {
        let limit = limit.min(ANSWER_TIMEOUT);
        // No time at all would be no limit.
        let timeout = Some(limit.max(Duration::from_millis(1)));
        let set = self.stream.get_ref().set_read_timeout(timeout);
        set.map_err(|error| failed(&error))?;
        loop {
            let line = match receive(&mut self.stream) {
                Err(ClientError::Silent(_)) if limit < ANSWER_TIMEOUT => return Ok(None),
                other => other?,
            };
            let mut event: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(&line)
                .map_err(|error| ClientError::Garbled(error.to_string()))?;
            let mut take = |name| event.remove(name).map(Answer);
            if let Some(news) = take("info").map(News::Info) {
                return Ok(Some(news));
            }
            if let Some(news) = take("stats").map(News::Stats) {
                return Ok(Some(news));
            }
            if take("alive").is_some() {
                return Ok(Some(News::Alive));
            }
        }
    }
}

/// Reads a line.
fn receive(stream: &mut BufReader<UnixStream>) -> Result<Vec<u8>, ClientError> {
    match read_line(stream, MAX_ANSWER).map_err(|error| failed(&error))? {
        Some(Line::Whole(line)) => Ok(line),
        Some(Line::TooLong) => Err(ClientError::Garbled(format!(
            "it is longer than {MAX_ANSWER} bytes"
        ))),
        None => Err(ClientError::Gone),
    }
}

/// The meaning of an error of an open connection.
fn failed(error: &io::Error) -> ClientError {
    match error.kind() {
        // Linux's error for a socket's timeout.
        io::ErrorKind::WouldBlock => ClientError::Silent(ANSWER_TIMEOUT),
        _ => ClientError::Gone,
    }
}

/// The meaning of an error of `connect()`.
fn unreachable(path: &Path, source: io::Error) -> ClientError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => ClientError::Missing(path),
        io::ErrorKind::ConnectionRefused => ClientError::Stale(path),
        io::ErrorKind::PermissionDenied => ClientError::Denied {
            owner: owner(&path),
            path,
        },
        _ => ClientError::Connect { path, source },
    }
}

/// The owner of the socket, or of the directory that hides it.
fn owner(path: &Path) -> String {
    let visible = path.ancestors().find_map(|path| fs::metadata(path).ok());
    let Some(uid) = visible.map(|metadata| Uid::from_raw(metadata.uid())) else {
        return "somebody else".to_owned();
    };
    match User::from_uid(uid) {
        Ok(Some(user)) => user.name,
        _ => format!("user {uid}"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;
    use crate::protocol::{ErrorKind, Metrics, Stats};

    /// Sends a request to a daemon that answers one request with `answer` and disconnects.
    fn ask(answer: &'static str) -> (Client, Result<Answer, ClientError>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("balloon.sock");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; 19]).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let mut client = Client::connect(&path).unwrap();
        let answer = client.call(&Request::Info {});
        (client, answer)
    }

    #[test]
    fn an_answer_is_handed_on_word_for_word() {
        let (_client, answer) = ask("{\"ok\":{ \"text\":\"one\",  \"new\":1}}\n");
        let answer = answer.unwrap();
        assert_eq!(answer.json(), "{ \"text\":\"one\",  \"new\":1}");
        assert_eq!(answer.parse::<Metrics>().unwrap().text, "one");
        assert!(matches!(
            answer.parse::<Stats>(),
            Err(ClientError::Garbled(_))
        ));
    }

    #[test]
    fn an_error_is_handed_on() {
        let (_client, answer) =
            ask("{\"error\":{\"kind\":\"timeout\",\"message\":\"m\",\"advice\":\"a\"}}\n");
        let error = answer.unwrap_err();
        assert_eq!(
            (error.to_string(), error.advice()),
            ("m".to_owned(), "a".to_owned())
        );
        assert!(matches!(error, ClientError::Refused(error) if error.kind == ErrorKind::Timeout));
    }

    #[test]
    fn a_daemon_that_goes_away_is_noticed() {
        let (mut client, answer) = ask("");
        assert!(matches!(answer, Err(ClientError::Gone)));
        assert!(matches!(
            client.call(&Request::Info {}),
            Err(ClientError::Gone)
        ));
    }

    #[test]
    fn other_protocols_are_noticed() {
        let (_client, answer) = ask("SSH-2.0-OpenSSH\n");
        assert!(matches!(answer, Err(ClientError::Garbled(_))));
    }

    #[test]
    fn events_that_are_not_known_are_passed_over() {
        let (client, server) = UnixStream::pair().unwrap();
        let events =
            b"{\"mood\":{}}\n{\"info\":{\"text\":\"one\"}}\n{\"stats\":{}}\n{\"alive\":{}}\n";
        (&server).write_all(events).unwrap();
        let mut events = Events {
            stream: BufReader::new(client),
        };
        assert!(!events.is_read());
        let first = events.next(Duration::from_millis(1));
        assert!(matches!(first, Ok(Some(News::Info(answer))) if answer.json().contains("one")));
        assert!(events.is_read());
        let mut next = || events.next(Duration::from_millis(1));
        assert!(matches!(next(), Ok(Some(News::Stats(_)))));
        assert!(matches!(next(), Ok(Some(News::Alive))));
        assert!(matches!(next(), Ok(None)));
        drop(server);
        assert!(matches!(next(), Err(ClientError::Gone)));
    }

    #[test]
    fn errors_of_connecting_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("balloon.sock");
        assert!(matches!(
            Client::connect(&path),
            Err(ClientError::Missing(_))
        ));
        drop(UnixListener::bind(&path).unwrap());
        assert!(matches!(Client::connect(&path), Err(ClientError::Stale(_))));
        let denied = unreachable(&path, io::ErrorKind::PermissionDenied.into());
        let me = User::from_uid(Uid::current()).unwrap().unwrap().name;
        assert!(matches!(denied, ClientError::Denied { owner, .. } if owner == me));
        let advice = |owner: &str| {
            let (path, owner) = (path.clone(), owner.to_owned());
            ClientError::Denied { path, owner }.advice()
        };
        assert_eq!(advice("root"), "run this as root");
        assert_eq!(advice("me"), "run this as me or as root");
    }
}
