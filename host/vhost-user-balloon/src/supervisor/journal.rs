// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The messages that another worker needs to continue the device.

use std::mem;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use balloon_wire::config;
use log::{error, warn};
use nix::sys::uio::pread;
use nix::unistd::write;

use super::configuration::{Configuration, access, is_in};
use super::memory::{Region, adds_memory, regions, word};
use super::optional::refusal;
use crate::vhost_user::message::{Message, request};

/// The protocol feature by which the front end may request an acknowledgement of each message.
const REPLY_ACK: u8 = 1 << 3;

/// The inflate queue. A driver that sets it up from index 0 is a new one.
const INFLATE: u32 = 0;

/// The messages that set up the device, without those that later messages have replaced or
/// cancelled.
#[derive(Debug, Default)]
pub struct Journal {
    messages: Vec<Message>,
    /// Whether the driver is new, and no worker has started it yet.
    is_new: bool,
    configuration: Configuration,
    /// The workers' last answer to each other request that has a reply.
    answers: Vec<Message>,
    /// Changes with the set of file descriptors of the messages.
    descriptors: u64,
}

impl Journal {
    /// A journal of these messages and answers, whose driver `is_new`.
    pub fn new(
        messages: Vec<Message>,
        is_new: bool,
        configuration: Configuration,
        answers: Vec<Message>,
    ) -> Self {
        Self {
            messages,
            is_new,
            configuration,
            answers,
            descriptors: 0,
        }
    }

    /// The configuration space.
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// The answers to other requests.
    pub fn answers(&self) -> &[Message] {
        &self.answers
    }

    /// Records a worker's answer, and returns whether that changes the journal.
    pub fn record_answer(&mut self, answer: Message) -> bool {
        match answer.request() {
            request::GET_CONFIG => return self.configuration.record(&answer),
            // It changes with each message of the guest, and is in the ring.
            request::GET_VRING_BASE => return false,
            _ => {}
        }
        let is_same = |old: &Message| old.request() == answer.request();
        let before = self.answers.iter().position(is_same);
        let before = before.map(|place| self.answers.swap_remove(place));
        let changed = before.is_none_or(|before| before.body() != answer.body());
        self.answers.push(answer);
        changed
    }

    /// The messages.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Whether the driver is new, and no worker has started it yet.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Records that a worker has started the driver, and returns whether that changes the journal.
    pub fn started(&mut self) -> bool {
        mem::take(&mut self.is_new)
    }

    /// Whether the driver continues with an earlier worker's device.
    pub fn continues(&self) -> bool {
        self.has_rings(INFLATE) && !self.is_new
    }

    /// A number that changes with the file descriptors.
    pub fn descriptors(&self) -> u64 {
        self.descriptors
    }

    /// Whether the worker acknowledges messages: the protocol's features are negotiated.
    pub fn acknowledges(&self) -> bool {
        self.find(request::SET_PROTOCOL_FEATURES, 0).is_some()
    }

    /// Prepares a message of the front end for the worker, which must acknowledge it.
    pub fn prepare(&self, message: &mut Message) {
        // The front end must not negotiate it: it would wait, and the guest with it, whenever the guest
        // writes its balloon's size.
        if message.request() == request::SET_PROTOCOL_FEATURES {
            if let Some(features) = message.body_mut().first_mut() {
                *features |= REPLY_ACK;
            }
        }
        message.set_wants_answer(!has_reply(message) && self.acknowledges());
    }

    /// Prepares the worker's answer for the front end.
    pub fn prepare_answer(answer: &mut Message) {
        // The library offers it by itself.
        if answer.request() == request::GET_PROTOCOL_FEATURES {
            if let Some(features) = answer.body_mut().first_mut() {
                *features &= !REPLY_ACK;
            }
        }
    }

    /// The message that notifies the front end of a change of the configuration space.
    pub fn channel(&self) -> Option<&OwnedFd> {
        let message = self.find(request::SET_BACKEND_REQ_FD, 0)?;
        message.descriptors().first()
    }

    /// Whether a queue has a size and rings.
    pub fn has_rings(&self, queue: u32) -> bool {
        [request::SET_VRING_NUM, request::SET_VRING_ADDR]
            .iter()
            .all(|&request| self.find(request, queue).is_some())
    }

    /// Whether the rings in a message are in the memory that the front end has sent.
    pub fn has_memory_for(&self, message: &Message) -> bool {
        /// The offsets of the rings' addresses in the message.
        const RINGS: [usize; 3] = [8, 16, 24];
        let address = |at| word(message.body(), at);
        RINGS
            .iter()
            .all(|&at| address(at).is_some_and(|ring| self.locate(ring).is_some()))
    }

    /// Whether the rings of all queues are in memory. They are not while the front end changes the bounds of a region:
    /// it removes the region, and then adds another one.
    pub fn has_memory(&self) -> bool {
        let addresses = |message: &&Message| message.request() == request::SET_VRING_ADDR;
        let mut rings = self.messages.iter().filter(addresses);
        rings.all(|message| self.has_memory_for(message))
    }

    /// Whether a message was recorded before. An earlier supervisor may have been killed before it took the message out
    /// of the socket, and the worker would not accept it twice.
    pub fn has_recorded(&self, message: &Message) -> bool {
        let mut messages = self.messages.iter();
        match message.request() {
            request::SET_OWNER | request::ADD_MEM_REG => messages
                .any(|old| (old.request(), old.body()) == (message.request(), message.body())),
            request::REM_MEM_REG => {
                let bounds = |region: Region| (region.address, region.size);
                let removed = regions(message).map(bounds).next();
                let mut known = messages.filter(|old| adds_memory(old)).flat_map(regions);
                !known.any(|region| Some(bounds(region)) == removed)
            }
            _ => false,
        }
    }

    fn find(&self, request: u32, queue: u32) -> Option<&Message> {
        self.messages
            .iter()
            .find(|message| message.request() == request && self::queue(message) == queue)
    }

    /// Records a message that the worker has handled, and returns whether that changes the journal. It
    /// replaces an earlier message in the same position, since messages depend on those before them, such as
    /// the features of the protocol.
    pub fn record(&mut self, message: Message) -> bool {
        let (request, queue) = (message.request(), queue(&message));
        let before = self.descriptor_count();
        let mut changed = !message.descriptors().is_empty();
        self.record_driver(&message);
        match request {
            request::GET_CONFIG => return false,
            // A stopped queue restarts with other rings, perhaps in other memory, and other events. The
            // front end may query its index once more.
            request::GET_VRING_BASE => {
                let index = self.used_index(queue);
                self.messages.retain_mut(|old| {
                    if self::queue(old) != queue || !is_about_queue(old) {
                        return true;
                    }
                    set_base(old, index);
                    old.request() == request::SET_VRING_BASE
                });
            }
            // A queue is not enabled at first.
            request::SET_VRING_ENABLE if takes_away(&message) => self
                .messages
                .retain(|old| (old.request(), self::queue(old)) != (request, queue)),
            request::REM_MEM_REG => self.messages.retain(|old| {
                old.request() != request::ADD_MEM_REG || region(old) != region(&message)
            }),
            _ => {
                let again = |old: &&mut Message| {
                    request != request::ADD_MEM_REG
                        && (old.request(), self::queue(old)) == (request, queue)
                };
                match self.messages.iter_mut().find(again) {
                    Some(old) => {
                        changed |= !old.descriptors().is_empty();
                        *old = message;
                    }
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
        }
        if changed || self.descriptor_count() != before {
            self.descriptors += 1;
        }
        true
    }

    /// Records whether the driver is a new one, and what it has written.
    fn record_driver(&mut self, message: &Message) {
        match message.request() {
            request::SET_VRING_BASE if queue(message) == INFLATE => {
                self.is_new = number(message) == Some(0);
                // It has reported nothing, and the next worker must not take the previous one's report for it.
                if self.is_new {
                    self.messages.iter_mut().for_each(clear_report);
                    self.configuration.reset();
                }
            }
            request::SET_CONFIG => self.configuration.record_written(message),
            _ => {}
        }
    }

    fn descriptor_count(&self) -> usize {
        self.messages
            .iter()
            .map(|message| message.descriptors().len())
            .sum()
    }

    /// Sends all of it to another worker. The guest's writes to the configuration space come after the features, which
    /// say what the driver writes. The queues start after that, so that a driver continues with what it has reported. A
    /// new driver has reported nothing before its queues start, and its writes come last. A message that this worker
    /// refuses, and the previous one accepted, is removed.
    ///
    /// # Errors
    ///
    /// The worker is gone, does not answer, or has refused a message.
    pub fn replay(&mut self, backend: &UnixStream) -> Result<()> {
        let turn = |message: &Message| match message.request() {
            request::SET_CONFIG if self.is_new => 3,
            request::SET_VRING_KICK => 2,
            request::SET_CONFIG => 1,
            _ => 0,
        };
        let starts = |message: &Message| {
            let rings = || self.find(request::SET_VRING_ADDR, queue(message));
            message.request() != request::SET_VRING_KICK || rings().is_some()
        };
        // A queue whose rings were refused does not start.
        let mut places: Vec<_> = (0..self.messages.len())
            .filter(|&place| self.messages.get(place).is_some_and(starts))
            .collect();
        places.sort_by_key(|&place| self.messages.get(place).map(turn));
        for place in places {
            let queue = self.messages.get(place).map(queue);
            let index = queue.and_then(|queue| self.used_index(queue));
            let Some(message) = self.messages.get_mut(place) else {
                break;
            };
            // Messages of the guest that the previous worker has used must not be served again.
            set_base(message, index);
            if let (request::SET_VRING_KICK | request::SET_VRING_CALL, [event]) =
                (message.request(), message.descriptors())
            {
                signal(event);
            }
            message.send(backend)?;
            if !is_answered(message) {
                continue;
            }
            let answer = Message::receive(backend)
                .with_context(|| format!("waiting for the answer to {}", name(message)))?;
            if is_refusal(message, &answer) {
                let message = self.messages.remove(place);
                self.descriptors += 1;
                error!(
                    "the worker refuses {}; continuing without it",
                    name(&message)
                );
                anyhow::bail!("the worker has refused {}", name(&message));
            }
        }
        Ok(())
    }

    /// Sends an interrupt that a killed worker may owe the guest.
    pub fn interrupt(&self, queue: u32) {
        let call = self.find(request::SET_VRING_CALL, queue);
        if let Some([event]) = call.map(Message::descriptors) {
            signal(event);
        }
    }

    /// The position at which a queue continues: after the used messages, or where it was stopped.
    pub fn index_of(&self, queue: u32) -> Option<u16> {
        let stopped = || number(self.find(request::SET_VRING_BASE, queue)?);
        self.used_index(queue).or_else(stopped)
    }

    /// The number of used messages of a queue, from its used ring.
    fn used_index(&self, queue: u32) -> Option<u16> {
        const USED: usize = 16;
        self.index(self.find(request::SET_VRING_ADDR, queue)?, USED)
    }

    /// The index of the ring whose address is at this offset in a message.
    fn index(&self, addresses: &Message, ring: usize) -> Option<u16> {
        // Both rings begin with flags of 16 bits.
        let address = word(addresses.body(), ring)?.checked_add(2)?;
        let mut index = [0; 2];
        let (file, at) = self.locate(address)?;
        let read = pread(file, &mut index, at.try_into().ok()?);
        (read == Ok(index.len())).then(|| u16::from_le_bytes(index))
    }

    /// The location of a front end's address in the memory that it has sent.
    fn locate(&self, address: u64) -> Option<(&OwnedFd, u64)> {
        self.messages
            .iter()
            .filter(|message| adds_memory(message))
            .flat_map(|message| regions(message).zip(message.descriptors()))
            .find_map(|(region, file)| {
                let distance = address.checked_sub(region.address)?;
                let at = region.offset.checked_add(distance)?;
                (distance < region.size).then_some((file, at))
            })
    }
}

/// The number in a message about a queue, which comes after that of the queue.
fn number(message: &Message) -> Option<u16> {
    let bytes = message.body().get(4..)?.first_chunk()?;
    Some(u16::from_ne_bytes(*bytes))
}

/// Clears the driver's report of its balloon in a write to the configuration space, if the message is one.
fn clear_report(message: &mut Message) {
    if message.request() != request::SET_CONFIG {
        return;
    }
    let (start, written) = access(message.body());
    let header = message.body().len() - written.len();
    let written = message.body_mut().get_mut(header..).unwrap_or_default();
    for (place, byte) in (start..).zip(written) {
        if is_in(&[config::ACTUAL, config::STOP_REASON], place) {
            *byte = 0;
        }
    }
}

/// Sets the index in the message with a queue's index, if this is one.
fn set_base(message: &mut Message, index: Option<u16>) {
    let is_base = message.request() == request::SET_VRING_BASE;
    if let (true, Some(index), Some(base)) = (is_base, index, message.body_mut().get_mut(4..8)) {
        base.copy_from_slice(&u32::from(index).to_ne_bytes());
    }
}

/// Signals the event of a queue. A notification of the guest may have reached no worker, and a killed
/// worker may not have sent an interrupt. Each side would wait for the other one.
pub(super) fn signal(event: &OwnedFd) {
    if let Err(error) = write(event, &1_u64.to_ne_bytes()) {
        warn!("cannot signal the event of a queue: {error}");
    }
}

/// Whether the protocol always has a reply to a message.
pub(super) fn has_reply(message: &Message) -> bool {
    matches!(
        message.request(),
        request::GET_FEATURES
            | request::GET_PROTOCOL_FEATURES
            | request::GET_QUEUE_NUM
            | request::GET_MAX_MEM_SLOTS
            | request::GET_VRING_BASE
            | request::GET_CONFIG
    ) || refusal(message).is_some()
}

/// Whether the worker answers a message.
pub(super) fn is_answered(message: &Message) -> bool {
    has_reply(message) || message.wants_answer()
}

/// Whether an answer to a message is that the worker does not accept it.
pub(super) fn is_refusal(message: &Message, answer: &Message) -> bool {
    !has_reply(message) && word(answer.body(), 0) != Some(0)
}

/// Whether the front end takes something away with a message, a queue or memory. It is gone then, whatever the worker
/// answers.
pub(super) fn takes_away(message: &Message) -> bool {
    match message.request() {
        request::GET_VRING_BASE | request::REM_MEM_REG => true,
        request::SET_VRING_ENABLE => number(message) == Some(0),
        _ => false,
    }
}

/// A message's name in the specification of vhost-user.
pub(super) fn name(message: &Message) -> String {
    let (request, queue) = (message.request(), queue(message));
    match request {
        request::SET_FEATURES => "SET_FEATURES".to_owned(),
        request::SET_MEM_TABLE => "SET_MEM_TABLE".to_owned(),
        request::SET_VRING_NUM => format!("SET_VRING_NUM of queue {queue}"),
        request::SET_VRING_ADDR => format!("SET_VRING_ADDR of queue {queue}"),
        request::GET_VRING_BASE => format!("GET_VRING_BASE of queue {queue}"),
        request::SET_VRING_KICK => format!("SET_VRING_KICK of queue {queue}"),
        request::SET_VRING_CALL => format!("SET_VRING_CALL of queue {queue}"),
        request::SET_BACKEND_REQ_FD => "SET_BACKEND_REQ_FD".to_owned(),
        request::GET_CONFIG => "GET_CONFIG".to_owned(),
        request::SET_CONFIG => "SET_CONFIG".to_owned(),
        request::ADD_MEM_REG => "ADD_MEM_REG".to_owned(),
        _ => format!("the message {request}"),
    }
}

/// Whether a message is about a queue.
pub(super) fn is_about_queue(message: &Message) -> bool {
    matches!(
        message.request(),
        request::SET_VRING_NUM..=request::SET_VRING_ERR | request::SET_VRING_ENABLE
    )
}

/// The queue of a message, or its offset in the configuration space, or 0 if it has neither.
pub(super) fn queue(message: &Message) -> u32 {
    if is_about_queue(message) || message.request() == request::SET_CONFIG {
        message.body().first().copied().unwrap_or_default().into()
    } else {
        0
    }
}

/// The identity of a region that is added or removed: its address in the guest, its size, and the front
/// end's address. The offset in the file follows, and is 0 in QEMU's removals.
fn region(message: &Message) -> Option<&[u8]> {
    message.body().get(8..32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory_file;
    use crate::vhost_user::message::tests::message;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::fs;
    use std::io;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::thread;

    use super::request::{GET_FEATURES, SET_FEATURES};

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().copied().flat_map(u64::to_ne_bytes).collect()
    }

    fn vring(queue: u32, value: u32) -> Vec<u8> {
        [queue, value].map(u32::to_ne_bytes).concat()
    }

    /// A journal of a device with one active queue. Its memory is at 0x10000 in the front end and at
    /// 0x1000 in the file, and its used ring is at the memory's end.
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

    /// The messages that another worker receives.
    fn replayed(journal: &mut Journal) -> Vec<(u32, Vec<u8>)> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        journal.replay(&ours).unwrap();
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
        let replayed = replayed(&mut journal(&file));
        assert!(replayed.contains(&(request::SET_VRING_BASE, vring(0, 0x1234))));
        assert!(replayed.contains(&(request::SET_VRING_BASE, vring(1, 0x1234))));
        assert_eq!(replayed.len(), 8);
    }

    #[test]
    fn a_repeated_message_is_replayed_once_and_in_its_place() {
        let mut journal = journal(&memory_file(0x3000));
        journal.record(message(SET_FEATURES, &words(&[2]), vec![]));
        journal.record(message(request::SET_CONFIG, b"\0first", vec![]));
        journal.record(message(request::SET_CONFIG, b"\0last", vec![]));
        let replayed = replayed(&mut journal);
        let count = |request| {
            replayed
                .iter()
                .filter(|(other, _)| *other == request)
                .count()
        };
        assert_eq!((count(SET_FEATURES), count(request::SET_CONFIG)), (1, 1));
        assert_eq!(replayed.first(), Some(&(SET_FEATURES, words(&[2]))));
        assert!(replayed.contains(&(request::SET_CONFIG, b"\0last".to_vec())));
    }

    #[test]
    fn a_queue_that_is_not_enabled_needs_no_message() {
        let mut journal = journal(&memory_file(0x3000));
        journal.record(message(request::SET_VRING_ENABLE, &vring(1, 0), vec![]));
        let enabled: Vec<_> = replayed(&mut journal)
            .into_iter()
            .filter(|(request, _)| *request == request::SET_VRING_ENABLE)
            .collect();
        assert_eq!(enabled, [(request::SET_VRING_ENABLE, vring(0, 1))]);
    }

    #[test]
    fn a_queue_that_has_ended_stays_so() {
        let file = memory_file(0x3000);
        file.write_all_at(&[0, 0, 0x34, 0x12], 0x1000 + 0x1ff0)
            .unwrap();
        let mut journal = journal(&file);
        journal.record(message(request::GET_VRING_BASE, &vring(1, 0), vec![]));
        let replayed = replayed(&mut journal);
        assert!(replayed.contains(&(request::SET_VRING_ENABLE, vring(0, 1))));
        assert!(!replayed.contains(&(request::SET_VRING_ENABLE, vring(1, 1))));
        // The front end may not have received the answer.
        assert!(replayed.contains(&(request::SET_VRING_BASE, vring(1, 0x1234))));
        assert_eq!(replayed.len(), 6);
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
        journal.record(message(request::REM_MEM_REG, &region, vec![]));
        let about = |(request, body): &(u32, Vec<u8>)| {
            (8..=14).contains(request)
                && *request != request::SET_VRING_BASE
                && body.first() == Some(&1)
        };
        assert!(!replayed(&mut journal).iter().any(about));
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
        replayed(&mut journal);
        assert!(events.iter().all(|event| event.read().is_ok()));
    }

    #[test]
    fn memory_that_is_gone_is_not_replayed() {
        let mut journal = journal(&memory_file(0x3000));
        let mut remove = |start| {
            let region = words(&[0, 0, 0x2000, start, 0]);
            journal.record(message(request::REM_MEM_REG, &region, vec![]));
            replayed(&mut journal)
                .iter()
                .any(|(request, _)| *request == request::ADD_MEM_REG)
        };
        assert!(remove(0x20000), "another region stays");
        assert!(!remove(0x10000));
    }

    #[test]
    fn memory_is_replayed_before_the_rings_in_it() {
        let file = memory_file(0x3000);
        let mut journal = journal(&file);
        let region = words(&[0, 0x8000, 0x2000, 0x20000, 0x1000]);
        let file = file.try_clone().unwrap().into();
        journal.record(message(request::ADD_MEM_REG, &region, vec![file]));
        let addresses = words(&[0, 0x20000, 0x21ff0, 0x21000, 0]);
        journal.record(message(request::SET_VRING_ADDR, &addresses, vec![]));
        let replayed = replayed(&mut journal);
        let memory = replayed.iter().position(|(_, body)| *body == region);
        let rings = replayed.iter().position(|(_, body)| *body == addresses);
        assert!(memory < rings, "{memory:?} {rings:?}");
    }

    #[test]
    fn queues_start_when_the_configuration_is_known() {
        let file = memory_file(0x3000);
        let mut journal = Journal::default();
        // Before the features of the driver are known.
        journal.record(message(request::SET_CONFIG, b"\0size", vec![]));
        journal.messages.extend(self::journal(&file).messages);
        let event = vec![file.try_clone().unwrap().into()];
        journal.record(message(request::SET_VRING_KICK, &words(&[0]), event));
        let last = |journal: &mut Journal| {
            let replayed = replayed(journal);
            let requests = replayed.iter().map(|(request, _)| *request);
            requests.skip(replayed.len() - 2).collect::<Vec<_>>()
        };
        assert_eq!(
            last(&mut journal),
            [request::SET_CONFIG, request::SET_VRING_KICK]
        );
        // A new driver has not written it before its start.
        journal.record(message(request::SET_VRING_BASE, &vring(0, 0), vec![]));
        assert_eq!(
            last(&mut journal),
            [request::SET_VRING_KICK, request::SET_CONFIG]
        );
    }

    #[test]
    fn a_queue_whose_rings_are_refused_does_not_start() {
        let file = memory_file(0x3000);
        let mut journal = journal(&file);
        for queue in [0, 1] {
            let event = vec![file.try_clone().unwrap().into()];
            journal.record(message(request::SET_VRING_KICK, &words(&[queue]), event));
        }
        let rings =
            |message: &Message| message.request() == request::SET_VRING_ADDR && queue(message) == 1;
        journal.messages.retain(|message| !rings(message));
        let started: Vec<_> = replayed(&mut journal)
            .into_iter()
            .filter(|(request, _)| *request == request::SET_VRING_KICK)
            .collect();
        assert_eq!(started, [(request::SET_VRING_KICK, words(&[0]))]);
    }

    /// A write of these bytes to the configuration space.
    fn written(start: u32, bytes: &[u8]) -> Vec<u8> {
        let size = u32::try_from(bytes.len()).unwrap();
        let header = [start, size, 0].map(u32::to_ne_bytes);
        [header.as_flattened(), bytes].concat()
    }

    /// Whether a message of the journal has this body.
    fn has(journal: &Journal, body: &[u8]) -> bool {
        let mut messages = journal.messages().iter();
        messages.any(|message| message.body() == body)
    }

    #[test]
    fn a_driver_is_new_until_a_worker_has_started_it() {
        let mut journal = journal(&memory_file(0x3000));
        let record = |journal: &mut Journal, request, body: &[u8]| {
            journal.record(message(request, body, vec![]));
            journal.continues()
        };
        assert!(!record(&mut journal, request::SET_VRING_BASE, &vring(0, 0)));
        assert!(!record(&mut journal, request::SET_VRING_NUM, &vring(0, 16)));
        assert!(journal.started());
        assert!(journal.continues());
        assert!(!journal.started());
        // A stopped VM continues, and another driver follows.
        assert!(!record(&mut journal, request::GET_VRING_BASE, &vring(0, 0)));
        for (base, continues) in [(7, true), (0, false), (7, true)] {
            record(&mut journal, request::SET_VRING_NUM, &vring(0, 16));
            let addresses = words(&[0, 0x10000, 0x11ff0, 0x11000, 0]);
            record(&mut journal, request::SET_VRING_ADDR, &addresses);
            let base = vring(0, base);
            let now = record(&mut journal, request::SET_VRING_BASE, &base);
            assert_eq!(now, continues);
        }
    }

    #[test]
    fn a_new_driver_has_reported_nothing() {
        let mut journal = journal(&memory_file(0x3000));
        let all: Vec<_> = (1..=24).collect();
        let mut record = |request, body: &[u8]| {
            journal.record(message(request, body, vec![]));
        };
        record(request::SET_CONFIG, &written(0, &all));
        record(request::SET_CONFIG, &written(5, &[1, 2, 3, 4]));
        record(request::SET_CONFIG, &written(u32::MAX, &[1, 2]));
        // Another queue, and a stopped VM that continues.
        record(request::SET_VRING_BASE, &vring(1, 0));
        record(request::SET_VRING_BASE, &vring(0, 7));
        assert!(has(&journal, &written(0, &all)));
        journal.record(message(request::SET_VRING_BASE, &vring(0, 0), vec![]));
        let mut rest = all;
        rest[4..8].fill(0);
        rest[20..24].fill(0);
        for bytes in [
            written(0, &rest),
            written(5, &[0, 0, 0, 4]),
            written(u32::MAX, &[1, 2]),
        ] {
            assert!(has(&journal, &bytes), "{bytes:?}");
        }
        // What it reports itself stays.
        let report = written(0, &[9; 24]);
        journal.record(message(request::SET_CONFIG, &report, vec![]));
        assert!(has(&journal, &report));
    }

    #[test]
    fn the_answers_of_another_worker_are_not_for_the_front_end() {
        let mut journal = Journal::default();
        journal.record(message(GET_FEATURES, b"", vec![]));
        journal.record(message(SET_FEATURES, &words(&[1]), vec![]));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let worker = thread::spawn(move || -> io::Result<u32> {
            Message::receive(&theirs)?;
            message(GET_FEATURES, &words(&[3]), vec![]).send(&theirs)?;
            Ok(Message::receive(&theirs)?.request())
        });
        journal.replay(&ours).unwrap();
        assert_eq!(worker.join().unwrap().unwrap(), SET_FEATURES);
    }

    #[test]
    fn a_message_that_another_worker_refuses_is_left_out() {
        let mut journal = Journal::default();
        let mut record = |request, body: &[u8]| {
            let mut message = message(request, body, vec![]);
            journal.prepare(&mut message);
            journal.record(message);
        };
        record(request::SET_PROTOCOL_FEATURES, &words(&[0x11]));
        record(SET_FEATURES, &words(&[1]));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let worker = thread::spawn(move || {
            let features = Message::receive(&theirs).unwrap();
            assert_eq!(features.body(), words(&[0x19]));
            assert!(!features.wants_answer());
            let refused = Message::receive(&theirs).unwrap();
            assert!(refused.wants_answer());
            refused.answer(&words(&[1])).send(&theirs).unwrap();
        });
        let error = journal.replay(&ours).unwrap_err().to_string();
        worker.join().unwrap();
        assert!(error.contains("SET_FEATURES"), "{error}");
        assert_eq!(journal.messages().len(), 1);
    }

    #[test]
    fn the_front_end_does_not_wait_for_acknowledgements() {
        let mut answer = message(request::GET_PROTOCOL_FEATURES, &words(&[0x19]), vec![]);
        Journal::prepare_answer(&mut answer);
        assert_eq!(answer.body(), words(&[0x11]));
    }

    #[test]
    fn changes_of_file_descriptors_are_noticed() {
        let file = memory_file(0x3000);
        let mut journal = journal(&file);
        let mut number = journal.descriptors();
        let mut changes = |request, body: &[u8], files| {
            journal.record(message(request, body, files));
            let changed = journal.descriptors() != number;
            number = journal.descriptors();
            changed
        };
        assert!(!changes(request::SET_CONFIG, b"\0content", vec![]));
        assert!(!changes(request::SET_VRING_ENABLE, &vring(0, 0), vec![]));
        let event = || vec![file.try_clone().unwrap().into()];
        assert!(changes(request::SET_VRING_CALL, &words(&[0]), event()));
        assert!(changes(request::SET_VRING_CALL, &words(&[0]), event()));
        assert!(changes(request::SET_VRING_CALL, &words(&[0]), vec![]));
        assert!(!changes(request::GET_VRING_BASE, &vring(1, 0), vec![]));
        let region = words(&[0, 0, 0x2000, 0x10000, 0]);
        assert!(changes(request::REM_MEM_REG, &region, vec![]));
    }
}
