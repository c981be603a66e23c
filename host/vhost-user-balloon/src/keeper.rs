// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Keeps the VMM's connection while the process that has the device is started anew.
//!
//! QEMU's generic vhost-user device does not take up its device again: when the connection has ended once,
//! the guest has a dead device, and QEMU itself ends as soon as the guest looks at the configuration space.
//! So the connection belongs to a small process that makes nothing of what a guest writes. The device is in
//! another one, its child. What the front end has said to set the device up is written down, and said again
//! to the next child, when one has crashed or is replaced after an update.

use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, process, thread};

use anyhow::{Context, Result, bail};
use balloon_control::{Access, listen};
use log::{debug, error, info, warn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{MsgFlags, getsockopt, send};
use nix::sys::uio::pread;
use nix::unistd::{Pid, write};

use crate::message::{Message, request};
use crate::options::Options;

/// How long a child may take until it listens.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// How often it is looked whether it does.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// How long to wait before what has failed is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// How many children in a row may fail.
const MAX_FAILURES: u32 = 5;

/// How long a child has to last with the device to have taken it up. What it makes of what it is told may
/// show only when all is told.
const STEADY: Duration = Duration::from_secs(5);

/// Serves front ends until it is told to end, by way of children.
///
/// # Errors
///
/// The socket is in use, or no child can be started.
pub fn run(options: &Options) -> Result<()> {
    let socket = options.socket.as_deref().context("name a --socket")?;
    let signals = signals()?;
    let (listener, file) = listen(socket, Access::default())?;
    let keeper = Worker::start(socket, options).map(|worker| Keeper {
        listener,
        signals,
        worker,
        vmm: 0,
        taken: None,
        failures: 0,
    });
    let result = keeper.and_then(Keeper::run);
    file.remove();
    result
}

/// Has signals wait until they are read: those that end the daemon, and the one that replaces the child.
fn signals() -> Result<SignalFd> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    Ok(SignalFd::with_flags(&signals, flags)?)
}

/// The path with something behind it.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// The child that has the device.
#[derive(Debug)]
struct Worker {
    program: PathBuf,
    arguments: Vec<OsString>,
    socket: PathBuf,
    /// Where its state is if the user has named no place: it lasts as long as the daemon.
    state: Option<PathBuf>,
    /// What is in the balloon, for the children.
    kept: File,
    child: Child,
    /// Each byte from it stands for a change of the configuration space.
    changes: UnixStream,
}

impl Worker {
    fn start(socket: &Path, options: &Options) -> Result<Self> {
        // What is at this path when a child is replaced may be newer than what runs now.
        let program = env::current_exe().context("finding this program")?;
        let inner = beside(socket, ".worker");
        let mut arguments: Vec<_> = env::args_os().skip(1).collect();
        arguments.extend(["--worker".into(), inner.clone().into()]);
        arguments.extend(["--parent".into(), process::id().to_string().into()]);
        let state = options.state.is_none().then(|| beside(socket, ".state"));
        if let Some(state) = &state {
            // One that is left from a daemon before this one is of another guest.
            let _ = fs::remove_file(state);
            arguments.extend(["--state".into(), state.into()]);
        }
        let kept = File::from(memfd_create("balloon", MFdFlags::MFD_CLOEXEC)?);
        let (child, changes) = spawn(&program, &arguments, &kept)?;
        let mut worker = Self {
            program,
            arguments,
            socket: inner,
            state,
            kept,
            child,
            changes,
        };
        // Whatever is wrong with the command line is to be told at once.
        worker.connect()?;
        Ok(worker)
    }

    /// Tells the child which process it is going to serve, 0 if that is not known.
    fn announce(&self, vmm: i32) -> Result<()> {
        let told = (&self.changes).write_all(&vmm.to_ne_bytes());
        told.context("telling the process with the device which VMM it serves")
    }

    /// Connects to the child, which may have just been started.
    fn connect(&mut self) -> Result<UnixStream> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if let Ok(stream) = UnixStream::connect(&self.socket) {
                stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
                stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
                return Ok(stream);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the process with the device has ended: {status}");
            }
            if Instant::now() > deadline {
                bail!("the process with the device does not listen");
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// What it says: that the configuration space has changed, or that it has ended.
    fn listen(&self) -> Next {
        // Changes that come together are one.
        match (&self.changes).read(&mut [0; 64]) {
            Ok(1..) => Next::Change,
            _ => Next::Back,
        }
    }

    /// Has it end, and finish before that what it has begun.
    fn stop(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            kill(Pid::from_raw(self.child.id().try_into()?), Signal::SIGTERM)?;
        }
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                error!("the process with the device does not end, and is killed");
                self.child.kill()?;
                self.child.wait()?;
            }
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Starts another one in its place.
    fn replace(&mut self) -> Result<()> {
        info!("starting the process with the device anew");
        self.stop()?;
        (self.child, self.changes) = spawn(&self.program, &self.arguments, &self.kept)?;
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            error!("the process with the device cannot be ended: {error}");
        }
        if let Some(state) = &self.state {
            // There is none if nothing has changed.
            let _ = fs::remove_file(state);
        }
    }
}

fn spawn(program: &Path, arguments: &[OsString], kept: &File) -> Result<(Child, UnixStream)> {
    let (changes, theirs) = UnixStream::pair()?;
    changes.set_nonblocking(true)?;
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::from(kept.try_clone()?))
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    Ok((child, changes))
}

/// What there is to do next.
enum Next {
    /// Somebody connects or sends something.
    Here,
    /// The child does, or has ended.
    Back,
    /// The configuration space has changed.
    Change,
    /// The child is to be replaced.
    Replace,
    /// The daemon is to end.
    End,
}

struct Keeper {
    listener: UnixListener,
    signals: SignalFd,
    worker: Worker,
    /// The process of the front end, or 0.
    vmm: i32,
    /// When a child has taken up the device of this front end.
    taken: Option<Instant>,
    /// How many in a row have failed.
    failures: u32,
}

impl Keeper {
    fn run(mut self) -> Result<()> {
        loop {
            match self.wait(self.listener.as_fd(), None)? {
                Next::End => return Ok(()),
                Next::Replace => self.worker.replace()?,
                // Nobody is there to be told, or to tell.
                Next::Change => {}
                Next::Back => {
                    error!("the process with the device has ended");
                    self.failed()?;
                }
                Next::Here => match self.listener.accept() {
                    Ok((front, _)) => {
                        info!("a VMM is connected");
                        match self.serve(&front) {
                            Ok(Next::End) => return Ok(()),
                            Ok(_) => info!("the VMM is gone"),
                            Err(error) => {
                                error!("giving the VMM up: {error:#}");
                                // A guest can have its VMM say what no device takes, and the next one
                                // has not.
                                self.failures = 0;
                            }
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        warn!("cannot serve a VMM now: {error}");
                        thread::sleep(PAUSE);
                    }
                },
            }
        }
    }

    /// Waits for something to do here, in the child, or at all.
    fn wait(&self, here: impl AsFd, back: Option<&UnixStream>) -> Result<Next> {
        let event = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut events = vec![
            event(self.signals.as_fd()),
            event(here.as_fd()),
            event(self.worker.changes.as_fd()),
        ];
        events.extend(back.map(|back| event(back.as_fd())));
        loop {
            match poll(&mut events, PollTimeout::NONE) {
                // A debugger has looked at the process, or it was stopped for a while.
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            let mut ready = events.iter().map(|event| event.any().unwrap_or(true));
            let (signal, here, change) = (ready.next(), ready.next(), ready.next());
            let back = ready.next();
            if signal == Some(true) {
                match self.signals.read_signal()? {
                    Some(signal) if signal.ssi_signo == Signal::SIGHUP as u32 => {
                        return Ok(Next::Replace);
                    }
                    Some(_) => return Ok(Next::End),
                    None => {}
                }
            } else if back == Some(true) {
                return Ok(Next::Back);
            } else if change == Some(true) {
                return Ok(self.worker.listen());
            } else if here == Some(true) {
                return Ok(Next::Here);
            }
        }
    }

    /// Serves a front end until it is gone, or the daemon is to end.
    fn serve(&mut self, front: &UnixStream) -> Result<Next> {
        // Messages come as a whole. Who sends a half one, or does not read, must not have this process wait:
        // it would not even be told to end.
        front.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        front.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        // It is 0 where the process is in another namespace.
        self.vmm = getsockopt(front, PeerCredentials).map_or(0, |peer| peer.pid());
        let mut journal = Journal::default();
        let mut channel = None;
        self.taken = None;
        let mut back = self.take_up(&mut journal)?;
        loop {
            match self.wait(front, Some(&back))? {
                Next::End => return Ok(Next::End),
                Next::Replace => {
                    // Without a connection the child finishes what it has begun, and ends.
                    back.shutdown(Shutdown::Both)?;
                    self.worker.replace()?;
                    self.taken = None;
                    back = self.take_up(&mut journal)?;
                }
                Next::Change => {
                    if let Some(channel) = &channel {
                        tell_change(channel);
                    }
                }
                Next::Back => match Message::receive(&back) {
                    Ok(mut answer) => {
                        journal.answered(&mut answer);
                        if answer.send(front).is_err() {
                            return Ok(Next::Here);
                        }
                    }
                    Err(error) => {
                        debug!("the process with the device is gone: {error}");
                        back = self.take_up(&mut journal)?;
                    }
                },
                Next::Here => {
                    let Ok(message) = Message::receive(front) else {
                        return Ok(Next::Here);
                    };
                    match (message.request(), message.descriptors()) {
                        (request::SET_BACKEND_REQ_FD, [socket]) => {
                            channel = Some(UnixStream::from(socket.try_clone()?));
                        }
                        (request::SET_VRING_KICK, [event]) => signal(event),
                        (request::ADD_MEM_REG | request::SET_MEM_TABLE, _)
                            if has_private_memory(front, &message) =>
                        {
                            error!(
                                "the guest's memory is not shared with other processes; start the VMM with \
                                 shared memory, as QEMU's memory-backend-memfd with share=on is"
                            );
                            return Ok(Next::Here);
                        }
                        _ => {}
                    }
                    let sent = message.send(&back);
                    journal.record(message);
                    if sent.is_err() {
                        back = self.take_up(&mut journal)?;
                    }
                }
            }
        }
    }

    /// Connects to the child, or to another one if it fails, and tells it all that is written down.
    fn take_up(&mut self, journal: &mut Journal) -> Result<UnixStream> {
        if self.taken.is_none_or(|taken| taken.elapsed() > STEADY) {
            self.failures = 0;
        } else {
            self.failed()?;
        }
        loop {
            let taken = self
                .worker
                .announce(self.vmm)
                .and_then(|()| self.worker.connect());
            let taken = taken.and_then(|back| {
                journal.tell(&back)?;
                Ok(back)
            });
            match taken {
                Ok(back) => {
                    self.taken = Some(Instant::now());
                    return Ok(back);
                }
                Err(error) => warn!("{error:#}"),
            }
            self.failed()?;
        }
    }

    /// Starts another child in place of one that has failed, at once if that was the first one in a row.
    fn failed(&mut self) -> Result<()> {
        self.failures += 1;
        if self.failures > MAX_FAILURES {
            bail!("the process with the device fails again and again");
        }
        if self.failures > 1 {
            thread::sleep(PAUSE);
        }
        self.worker.replace()
    }
}

/// Tells the front end that the configuration space has changed.
fn tell_change(channel: &UnixStream) {
    // The request, version 1 of the protocol, and the size of the rest.
    const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];
    let message = CONFIG_CHANGE.map(u32::to_ne_bytes).concat();
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    match send(channel.as_raw_fd(), &message, flags) {
        // One that is full has enough of these messages in it.
        Ok(_) | Err(Errno::EAGAIN) => {}
        Err(error) => warn!("cannot tell the VMM that the configuration has changed: {error}"),
    }
}

/// Signals the event of a queue. The guest may have sent a notification that no child has received, and a
/// child that was killed may have owed the guest an interrupt. Each side would wait for the other one.
fn signal(event: &OwnedFd) {
    if let Err(error) = write(event, &1_u64.to_ne_bytes()) {
        warn!("cannot signal the event of a queue: {error}");
    }
}

/// What another child has to be told to take up the device.
#[derive(Debug, Default)]
pub struct Journal {
    messages: Vec<Message>,
    /// The one that has not been answered yet.
    outstanding: Option<Message>,
}

impl Journal {
    /// Writes down a message, unless it changes nothing or is to be answered first.
    pub fn record(&mut self, message: Message) {
        if is_answered(&message) {
            self.outstanding = Some(message);
        } else {
            self.write(message);
        }
    }

    /// The child has answered.
    pub fn answered(&mut self, answer: &mut Message) {
        /// The feature that the front end may ask for an acknowledgement of each request.
        const REPLY_ACK: u8 = 1 << 3;
        let Some(message) = self.outstanding.take() else {
            return;
        };
        // The library offers it by itself. The front end would wait whenever the guest tells its balloon's
        // size, and the guest with it.
        if message.request() == request::GET_PROTOCOL_FEATURES {
            if let Some(features) = answer.body_mut().first_mut() {
                *features &= !REPLY_ACK;
            }
        }
        self.write(message);
    }

    /// What is said again replaces what was said before, in its place: what comes first there, such as the
    /// features of the protocol, what comes later depends on.
    fn write(&mut self, message: Message) {
        let (request, queue) = (message.request(), queue(&message));
        match request {
            request::GET_CONFIG => return,
            // A queue that has ended begins with other rings, perhaps in other memory, and other events.
            request::GET_VRING_BASE => {
                self.messages.retain(|old| {
                    !matches!(
                        old.request(),
                        request::SET_VRING_NUM
                            | request::SET_VRING_ADDR
                            | request::SET_VRING_BASE
                            | request::SET_VRING_KICK
                            | request::SET_VRING_CALL
                            | request::SET_VRING_ERR
                            | request::SET_VRING_ENABLE
                    ) || self::queue(old) != queue
                });
                return;
            }
            request::REM_MEM_REG => {
                self.messages.retain(|old| {
                    old.request() != request::ADD_MEM_REG || region(old) != region(&message)
                });
                return;
            }
            _ => {}
        }
        let again = |old: &&mut Message| {
            request != request::ADD_MEM_REG && (old.request(), self::queue(old)) == (request, queue)
        };
        match self.messages.iter_mut().find(again) {
            Some(old) => *old = message,
            // Rings that were moved may be in memory that was added since.
            None if matches!(request, request::ADD_MEM_REG | request::SET_MEM_TABLE) => {
                let addresses = |old: &Message| old.request() == request::SET_VRING_ADDR;
                let place = self.messages.iter().position(addresses);
                self.messages
                    .insert(place.unwrap_or(self.messages.len()), message);
            }
            None => self.messages.push(message),
        }
    }

    /// Says all of it to another child.
    ///
    /// # Errors
    ///
    /// The child is gone, or does not answer.
    pub fn tell(&mut self, back: &UnixStream) -> Result<()> {
        for place in 0..self.messages.len() {
            let index = self.messages.get(place).and_then(|message| {
                (message.request() == request::SET_VRING_BASE)
                    .then(|| self.used_index(queue(message)))
                    .flatten()
            });
            let Some(message) = self.messages.get_mut(place) else {
                break;
            };
            // What had been used by the last one is not to be done again.
            if let (Some(index), Some(base)) = (index, message.body_mut().get_mut(4..8)) {
                base.copy_from_slice(&u32::from(index).to_ne_bytes());
            }
            if let (request::SET_VRING_KICK | request::SET_VRING_CALL, [event]) =
                (message.request(), message.descriptors())
            {
                signal(event);
            }
            message.send(back)?;
            if is_answered(message) {
                Message::receive(back)?;
            }
        }
        if let Some(message) = &self.outstanding {
            message.send(back)?;
        }
        Ok(())
    }

    /// How many messages of a queue have been used, as its used ring says.
    fn used_index(&self, queue: u32) -> Option<u16> {
        const USED: usize = 16;
        let addresses = self.messages.iter().find(|message| {
            message.request() == request::SET_VRING_ADDR && self::queue(message) == queue
        })?;
        // The ring begins with flags of 16 bits.
        let address = word(addresses.body(), USED)?.checked_add(2)?;
        let mut index = [0; 2];
        let (file, at) = self.find(address)?;
        let read = pread(file, &mut index, at.try_into().ok()?);
        (read == Ok(index.len())).then(|| u16::from_le_bytes(index))
    }

    /// Where an address of the front end is in the memory that it has sent.
    fn find(&self, address: u64) -> Option<(&OwnedFd, u64)> {
        self.messages
            .iter()
            .filter(|message| {
                [request::ADD_MEM_REG, request::SET_MEM_TABLE].contains(&message.request())
            })
            .flat_map(|message| regions(message).zip(message.descriptors()))
            .find_map(|(region, file)| {
                let distance = address.checked_sub(region.address)?;
                let at = region.offset.checked_add(distance)?;
                (distance < region.size).then_some((file, at))
            })
    }
}

/// A region of the guest's memory, in bytes.
struct Region {
    size: u64,
    /// The front end's own address of it.
    address: u64,
    /// Where it begins in its file.
    offset: u64,
}

/// The regions in a message that has some.
fn regions(message: &Message) -> impl Iterator<Item = Region> {
    /// The address in the guest, and the fields above.
    const REGION: usize = 32;
    // Both kinds of messages have 8 bytes in front of the regions.
    const REGIONS: usize = 8;
    let regions = message.body().get(REGIONS..).unwrap_or_default();
    regions.chunks_exact(REGION).filter_map(|region| {
        Some(Region {
            size: word(region, 8)?,
            address: word(region, 16)?,
            offset: word(region, 24)?,
        })
    })
}

/// Whether some of the memory in a message is not shared, as far as that can be found out: of what the guest
/// writes to such memory no other process sees anything.
fn has_private_memory(front: &UnixStream, message: &Message) -> bool {
    let Ok(peer) = getsockopt(front, PeerCredentials) else {
        return false;
    };
    let maps = fs::read_to_string(format!("/proc/{}/maps", peer.pid())).unwrap_or_default();
    regions(message).any(|region| is_private(&maps, region.address))
}

/// Whether an address is in a private mapping, by what /proc/PID/maps says: begin, end and permissions of
/// each.
fn is_private(maps: &str, address: u64) -> bool {
    maps.lines().any(|line| {
        let mut words = line.split_whitespace();
        let (range, permissions) = (words.next(), words.next());
        let bounds = range.and_then(|range| range.split_once('-'));
        let number = |text| u64::from_str_radix(text, 16).unwrap_or_default();
        bounds.is_some_and(|(start, end)| (number(start)..number(end)).contains(&address))
            && permissions.is_some_and(|permissions| permissions.ends_with('p'))
    })
}

/// Whether a message is answered.
fn is_answered(message: &Message) -> bool {
    const GET_FEATURES: u32 = 1;
    const GET_QUEUE_NUM: u32 = 17;
    const GET_MAX_MEM_SLOTS: u32 = 36;
    matches!(
        message.request(),
        GET_FEATURES
            | request::GET_PROTOCOL_FEATURES
            | GET_QUEUE_NUM
            | GET_MAX_MEM_SLOTS
            | request::GET_VRING_BASE
            | request::GET_CONFIG
    ) || message.wants_answer()
}

/// The queue that a message is about, or the place in the configuration space, or 0 if it is about neither.
fn queue(message: &Message) -> u32 {
    match message.request() {
        request::SET_VRING_NUM..=request::SET_VRING_ERR
        | request::SET_VRING_ENABLE
        | request::SET_CONFIG => message.body().first().copied().unwrap_or_default().into(),
        _ => 0,
    }
}

/// What names a region that is added or removed: its address in the guest, its size, and the front end's
/// address. The offset in the file comes behind them, and is 0 in QEMU's removals.
fn region(message: &Message) -> Option<&[u8]> {
    message.body().get(8..32)
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::tests::message;
    use crate::testing::memory_file;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::io;
    use std::os::unix::fs::FileExt;

    const GET_FEATURES: u32 = 1;
    const SET_FEATURES: u32 = 2;

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().copied().flat_map(u64::to_ne_bytes).collect()
    }

    fn vring(queue: u32, value: u32) -> Vec<u8> {
        [queue, value].map(u32::to_ne_bytes).concat()
    }

    /// A journal of a device with one queue at work, whose memory is at 0x10000 in the front end and at
    /// 0x1000 in the file, and whose used ring is at the memory's end.
    fn journal(file: &fs::File) -> Journal {
        let mut journal = Journal::default();
        let mut record = |request, body: Vec<u8>, files| {
            journal.record(message(request, &body, files));
        };
        let region = words(&[0, 0, 0x2000, 0x10000, 0x1000]);
        record(SET_FEATURES, words(&[1]), vec![]);
        record(
            request::ADD_MEM_REG,
            region,
            vec![file.try_clone().unwrap().into()],
        );
        for queue in [0, 1] {
            record(request::SET_VRING_BASE, vring(queue, 7), vec![]);
            let addresses = words(&[u64::from(queue), 0x10000, 0x11ff0, 0x11000, 0]);
            record(request::SET_VRING_ADDR, addresses, vec![]);
            record(request::SET_VRING_ENABLE, vring(queue, 1), vec![]);
        }
        journal
    }

    /// What another child hears.
    fn told(journal: &mut Journal) -> Vec<(u32, Vec<u8>)> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        journal.tell(&ours).unwrap();
        drop(ours);
        std::iter::from_fn(|| Message::receive(&theirs).ok())
            .map(|message| (message.request(), message.body().to_vec()))
            .collect()
    }

    #[test]
    fn a_queue_goes_on_where_it_was_used() {
        let file = memory_file(0x3000);
        file.write_all_at(&[0, 0, 0x34, 0x12], 0x1000 + 0x1ff0)
            .unwrap();
        let told = told(&mut journal(&file));
        assert!(told.contains(&(request::SET_VRING_BASE, vring(0, 0x1234))));
        assert!(told.contains(&(request::SET_VRING_BASE, vring(1, 0x1234))));
        assert_eq!(told.len(), 8);
    }

    #[test]
    fn what_is_said_again_is_told_once_and_in_its_place() {
        let mut journal = journal(&memory_file(0x3000));
        journal.record(message(SET_FEATURES, &words(&[2]), vec![]));
        journal.record(message(request::SET_CONFIG, b"\0first", vec![]));
        journal.record(message(request::SET_CONFIG, b"\0last", vec![]));
        let told = told(&mut journal);
        let count = |request| told.iter().filter(|(other, _)| *other == request).count();
        assert_eq!((count(SET_FEATURES), count(request::SET_CONFIG)), (1, 1));
        assert_eq!(told.first(), Some(&(SET_FEATURES, words(&[2]))));
        assert!(told.contains(&(request::SET_CONFIG, b"\0last".to_vec())));
    }

    #[test]
    fn a_queue_that_has_ended_stays_so() {
        let mut journal = journal(&memory_file(0x3000));
        journal.record(message(request::GET_VRING_BASE, &vring(1, 0), vec![]));
        let told_before = told(&mut journal);
        // Nobody has heard the answer, so the question is asked again.
        assert_eq!(told_before.last().unwrap().0, request::GET_VRING_BASE);
        journal.answered(&mut message(request::GET_VRING_BASE, b"", vec![]));
        let told = told(&mut journal);
        assert!(told.contains(&(request::SET_VRING_ENABLE, vring(0, 1))));
        assert!(!told.contains(&(request::SET_VRING_ENABLE, vring(1, 1))));
        assert_eq!(told.len(), 5);
    }

    #[test]
    fn rings_of_a_queue_that_has_ended_are_gone_with_their_memory() {
        let file = memory_file(0x3000);
        let mut journal = journal(&file);
        let region = words(&[0, 0x8000, 0x2000, 0x20000, 0x1000]);
        let file = file.try_clone().unwrap().into();
        journal.record(message(request::ADD_MEM_REG, &region, vec![file]));
        journal.record(message(request::SET_VRING_NUM, &vring(1, 16), vec![]));
        let addresses = words(&[1, 0x20000, 0x21ff0, 0x21000, 0]);
        journal.record(message(request::SET_VRING_ADDR, &addresses, vec![]));
        journal.record(message(request::GET_VRING_BASE, &vring(1, 0), vec![]));
        journal.answered(&mut message(request::GET_VRING_BASE, b"", vec![]));
        journal.record(message(request::REM_MEM_REG, &region, vec![]));
        let about = |(request, body): &(u32, Vec<u8>)| {
            (8..=14).contains(request) && body.first() == Some(&1)
        };
        assert!(!told(&mut journal).iter().any(about));
    }

    #[test]
    fn both_sides_look_at_a_queue_that_is_taken_up() {
        let mut journal = journal(&memory_file(0x3000));
        let events = [(); 2].map(|()| EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
        for (request, event) in [request::SET_VRING_KICK, request::SET_VRING_CALL]
            .into_iter()
            .zip(&events)
        {
            let file = event.as_fd().try_clone_to_owned().unwrap();
            journal.record(message(request, &words(&[0]), vec![file]));
        }
        assert!(events.iter().all(|event| event.read().is_err()));
        told(&mut journal);
        assert!(events.iter().all(|event| event.read().is_ok()));
    }

    #[test]
    fn memory_that_is_gone_is_not_told() {
        let mut journal = journal(&memory_file(0x3000));
        let mut remove = |start| {
            let region = words(&[0, 0, 0x2000, start, 0]);
            journal.record(message(request::REM_MEM_REG, &region, vec![]));
            told(&mut journal)
                .iter()
                .any(|(request, _)| *request == request::ADD_MEM_REG)
        };
        assert!(remove(0x20000), "another region stays");
        assert!(!remove(0x10000));
    }

    #[test]
    fn memory_is_told_before_the_rings_in_it() {
        let file = memory_file(0x3000);
        let mut journal = journal(&file);
        let region = words(&[0, 0x8000, 0x2000, 0x20000, 0x1000]);
        let file = file.try_clone().unwrap().into();
        journal.record(message(request::ADD_MEM_REG, &region, vec![file]));
        let addresses = words(&[0, 0x20000, 0x21ff0, 0x21000, 0]);
        journal.record(message(request::SET_VRING_ADDR, &addresses, vec![]));
        let told = told(&mut journal);
        let memory = told.iter().position(|(_, body)| *body == region);
        let rings = told.iter().position(|(_, body)| *body == addresses);
        assert!(memory < rings, "{memory:?} {rings:?}");
    }

    #[test]
    fn private_memory_is_noticed() {
        let maps = "7f0000000000-7f0000002000 rw-s 00000000 00:01 7 /memfd:memory (deleted)\n\
                    7f0000002000-7f0000003000 rw-p 00000000 00:00 0\n";
        assert!(!is_private(maps, 0x7f00_0000_0000));
        assert!(!is_private(maps, 0x7f00_0000_1fff));
        assert!(is_private(maps, 0x7f00_0000_2000));
        assert!(!is_private(maps, 0x7f00_0000_3000));
        // This process is its own peer here.
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let stack = std::ptr::from_ref(&maps).addr() as u64;
        let region = words(&[0, 0, 0x1000, stack, 0]);
        let message = message(request::ADD_MEM_REG, &region, vec![]);
        assert!(has_private_memory(&ours, &message));
    }

    #[test]
    fn answers_of_another_child_are_kept_here() {
        let mut journal = Journal::default();
        journal.record(message(GET_FEATURES, b"", vec![]));
        journal.answered(&mut message(GET_FEATURES, b"", vec![]));
        journal.record(message(SET_FEATURES, &words(&[1]), vec![]));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = thread::spawn(move || -> io::Result<u32> {
            Message::receive(&theirs)?;
            message(GET_FEATURES, &words(&[3]), vec![]).send(&theirs)?;
            Ok(Message::receive(&theirs)?.request())
        });
        journal.tell(&ours).unwrap();
        assert_eq!(child.join().unwrap().unwrap(), SET_FEATURES);
    }
}
