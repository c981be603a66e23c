// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Listening sockets in the file system.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::Gid;

/// How long another process may hold the lock. It needs it for a moment only.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// How often to try to get the lock.
const LOCK_INTERVAL: Duration = Duration::from_millis(5);

/// Why no process can listen on a path.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process listens there.
    #[error("another daemon listens on {0}; stop that one, or choose another socket")]
    Live(PathBuf),
    /// There is a file which is not a socket.
    #[error("{0} is not a socket; remove it, or choose another path")]
    NotASocket(PathBuf),
    /// Another process does not release the lock.
    #[error("another process holds the lock {0}; end that process, or choose another socket")]
    Locked(PathBuf),
    /// Another error with the path.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// The path of the socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

fn io_error(path: &Path, source: impl Into<io::Error>) -> BindError {
    BindError::Io {
        path: path.to_owned(),
        source: source.into(),
    }
}

/// Which users may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The permissions of the socket's file.
    pub mode: u32,
    /// The group of the socket's file, if it is not the process's own.
    pub group: Option<Gid>,
}

impl Default for Access {
    /// The owner only.
    fn default() -> Self {
        Self {
            mode: 0o600,
            group: None,
        }
    }
}

impl Access {
    /// Gives these permissions to the file of a socket.
    ///
    /// # Errors
    ///
    /// The process is not in the group, or the file is not its own.
    pub fn apply(&self, path: &Path) -> io::Result<()> {
        if let Some(group) = self.group {
            chown(path, None, Some(group.as_raw()))?;
        }
        fs::set_permissions(path, Permissions::from_mode(self.mode))
    }
}

/// A socket in the file system, by its path and its identity.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    /// The socket that is at this path now.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn new(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            identity: identity(&fs::symlink_metadata(path)?),
        })
    }

    /// Removes it, unless another one is at its path by now.
    pub fn remove(&self) {
        let metadata = fs::symlink_metadata(&self.path);
        if metadata.is_ok_and(|metadata| identity(&metadata) == self.identity) {
            // The next daemon replaces it if this fails.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Listens on the socket `path`. It appears there at once with its permissions, and accepts connections. A
/// socket that a dead process has left there is replaced. The caller removes the file.
///
/// # Errors
///
/// Another process listens there, another file is there, or no socket can be created.
pub fn listen(path: &Path, access: Access) -> Result<(UnixListener, SocketFile), BindError> {
    let failed = |source: io::Error| io_error(path, source);
    // If two daemons start at once, only one may see the stale socket: otherwise the second one would
    // remove the socket of the first.
    let _lock = Lock::new(path)?;
    check_stale(path)?;
    let new = with_suffix(path, ".new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }

    let descriptor = socket::socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(|errno| io_error(path, errno))?;
    // The file gets the mode that the socket has now.
    fchmod(&descriptor, Mode::S_IRUSR | Mode::S_IWUSR)
        .and_then(|()| UnixAddr::new(&new))
        .and_then(|address| socket::bind(descriptor.as_raw_fd(), &address))
        .map_err(|errno| io_error(path, errno))?;
    let publish = || {
        access.apply(&new)?;
        socket::listen(&descriptor, Backlog::MAXCONN)?;
        let file = SocketFile::new(&new)?;
        fs::rename(&new, path)?;
        Ok(SocketFile {
            path: path.to_owned(),
            ..file
        })
    };
    let file = publish().map_err(|source| {
        // The error of the caller's own path is the one to report.
        let _ = fs::remove_file(&new);
        failed(source)
    })?;
    Ok((UnixListener::from(descriptor), file))
}

/// Checks that a path is free, or has a socket that no process listens on.
fn check_stale(path: &Path) -> Result<(), BindError> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|source| io_error(path, source))?,
    };
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(BindError::Live(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(source) => Err(io_error(path, source)),
    }
}

/// A lock that only the owner of the socket can take, unlike one on the directory.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: Flock<File>,
}

impl Lock {
    fn new(socket: &Path) -> Result<Self, BindError> {
        let path = with_suffix(socket, ".lock");
        let failed = |source: io::Error| io_error(&path, source);
        let start = Instant::now();
        loop {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(OFlag::O_NOFOLLOW.bits())
                .open(&path)
                .map_err(failed)?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => {
                    // The process that had the lock has removed the file.
                    let ours = file.metadata().map_err(failed)?;
                    let there = fs::symlink_metadata(&path);
                    if there.is_ok_and(|there| identity(&there) == identity(&ours)) {
                        return Ok(Self { path, _file: file });
                    }
                }
                Err((_, Errno::EWOULDBLOCK)) if start.elapsed() < LOCK_TIMEOUT => {
                    thread::sleep(LOCK_INTERVAL);
                }
                Err((_, Errno::EWOULDBLOCK)) => return Err(BindError::Locked(path)),
                Err((_, errno)) => return Err(io_error(&path, errno)),
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // The lock is still held. A file that stays is used again.
        let _ = fs::remove_file(&self.path);
    }
}

/// The path with a suffix.
fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use nix::unistd::getgid;
    use tempfile::TempDir;

    use super::*;

    /// A directory with a path for a socket in it.
    fn place() -> (TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("balloon.sock");
        (directory, path)
    }

    fn bind(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
        listen(path, Access::default())
    }

    fn names(directory: &TempDir) -> Vec<String> {
        fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn only_the_owner_may_use_the_socket() {
        let (directory, path) = place();
        let _listening = bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o600);
        assert_eq!(names(&directory), ["balloon.sock"]);
    }

    #[test]
    fn a_group_may_use_the_socket_if_asked_for() {
        let (_directory, path) = place();
        let access = Access {
            mode: 0o660,
            group: Some(getgid()),
        };
        let _listening = listen(&path, access).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o660);
        assert_eq!(metadata.gid(), getgid().as_raw());
    }

    #[test]
    fn the_socket_is_removed_at_the_end() {
        let (directory, path) = place();
        let (_listener, file) = bind(&path).unwrap();
        file.remove();
        assert!(names(&directory).is_empty());
    }

    #[test]
    fn the_socket_of_another_daemon_stays() {
        let (_directory, path) = place();
        let (_first, file) = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let (_second, _) = bind(&path).unwrap();
        file.remove();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_live_socket_is_not_replaced() {
        let (_directory, path) = place();
        let _listening = bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(BindError::Live(live)) if live == path));
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let (_directory, path) = place();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _listening = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
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
    fn a_lock_on_the_directory_does_no_harm() {
        let (directory, path) = place();
        let file = File::open(directory.path()).unwrap();
        let _lock = Flock::lock(file, FlockArg::LockExclusive).unwrap();
        bind(&path).unwrap();
    }

    #[test]
    fn a_lock_is_waited_for_and_named() {
        let (_directory, path) = place();
        let lock = Lock::new(&path).unwrap();
        let mode = fs::metadata(&lock.path).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o600);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| bind(&path).is_ok());
            thread::sleep(Duration::from_millis(50));
            assert!(!path.exists());
            drop(lock);
            assert!(waiting.join().unwrap());
        });
        fs::remove_file(&path).unwrap();
        let lock = Lock::new(&path).unwrap();
        assert!(matches!(bind(&path), Err(BindError::Locked(file)) if file == lock.path));
    }

    #[test]
    fn of_many_that_start_at_once_one_wins() {
        let (directory, path) = place();
        for _ in 0..200 {
            drop(UnixListener::bind(&path).unwrap());
            let start = Barrier::new(4);
            let racer = || {
                start.wait();
                bind(&path).ok()
            };
            let listening: Vec<_> = thread::scope(|scope| {
                let racers = [(); 4].map(|()| scope.spawn(racer));
                racers
                    .into_iter()
                    .filter_map(|racer| racer.join().unwrap())
                    .collect()
            });
            assert_eq!(listening.len(), 1);
            UnixStream::connect(&path).unwrap();
            assert_eq!(names(&directory), ["balloon.sock"]);
            listening[0].1.remove();
        }
    }
}
