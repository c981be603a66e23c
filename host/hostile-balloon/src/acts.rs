// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The actions of a hostile device: one after the other, all from the seed's random numbers.
//!
//! The device writes only to used rings, to device-writable buffers, to pages that the driver gave to it, and to its
//! own configuration space. (It also writes to the other rings, which the driver must not rely on.) If it overwrote
//! other memory of the guest, it would do harm without any fault of the driver.

use std::io;
use std::process;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use balloon_wire::request::{Command, SIZE, Wanted};
use balloon_wire::{BALLOON_PAGE_SIZE, VIRTIO_BALLOON_CMD_ID_DONE, VIRTIO_BALLOON_CMD_ID_STOP};
use fastrand::Rng;
use log::info;
use vhost_user_balloon::virtio::features::Feature;
use vhost_user_balloon::virtio::kind::{Kind, MAX_QUEUES};
use virtio_bindings::bindings::virtio_ring::VRING_USED_F_NO_NOTIFY;

use crate::device::{Device, Transport, any_field};
use crate::mood::{Act, Mood};
use crate::plan::End;
use crate::ring::{Buffer, Ring};

/// How long the device stays in one mood, in milliseconds.
const MOOD: std::ops::Range<u64> = 20..120;

/// The line for the test when the device has done its part, and the one when it has no driver.
pub(crate) const OVER: &str = "over";
pub(crate) const NO_DRIVER: &str = "no driver";

/// The maximum number of requests, interrupts or changes in a flood.
const FLOOD: u32 = 64;

/// The fields of the configuration space with the target, and with the command id of free page
/// hinting.
const TARGET: usize = 0;
const HINTS: usize = 2;

/// What acts.
pub(crate) struct Actor<'a> {
    device: &'a Device,
    transport: &'a dyn Transport,
    /// Whether the device announces changes of the configuration space.
    tells: bool,
    /// The lines of the test.
    orders: Receiver<()>,
    random: Rng,
    /// The id of the latest request.
    request: u64,
    hint: u32,
}

impl<'a> Actor<'a> {
    /// Acts on the driver of `device` with the numbers of `random`.
    pub(crate) fn new(device: &'a Device, transport: &'a dyn Transport, random: Rng) -> Self {
        Self {
            device,
            transport,
            tells: true,
            orders: orders(),
            random,
            request: 0,
            hint: VIRTIO_BALLOON_CMD_ID_DONE,
        }
    }

    /// Requests 128 MiB, and hints.
    pub(crate) fn want(&self) {
        let mut config = self.device.config();
        config.fields[TARGET] = 1 << 15;
        config.fields[HINTS] = 2;
    }

    /// Waits for a driver, and returns whether one binds before the test sends a line.
    pub(crate) fn wait_driver(&self) -> bool {
        while !self.is_ordered() {
            if self.with_ring(0, |_| ()).is_some() {
                return true;
            }
            thread::sleep(Duration::from_millis(1));
        }
        false
    }

    /// Is hostile for a while.
    pub(crate) fn act(&mut self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            let moods = [
                Mood::WellBehaved,
                Mood::WellBehaved,
                Mood::Careless,
                Mood::Careless,
                Mood::Cruel,
            ];
            let mood = moods[self.random.usize(..moods.len())];
            let until = start.elapsed() + Duration::from_millis(self.random.u64(MOOD));
            info!("{mood:?}");
            while start.elapsed() < until.min(time) {
                self.step(mood);
            }
        }
    }

    /// Announces its behaviour at the end.
    pub(crate) fn decide(&mut self, end: End) {
        info!("and from now on {end:?}");
        {
            let mut config = self.device.config();
            config.wild &= end == End::Hostile;
            if end == End::WellBehaved {
                config.fields[TARGET] = 0;
                config.fields[HINTS] = VIRTIO_BALLOON_CMD_ID_DONE;
            }
        }
        self.changed();
        // From here on the driver may stop the device at any moment. QEMU would then crash on a
        // change of the configuration space.
        self.tells = self.transport.is_pci();
    }

    /// Continues until the process ends.
    pub(crate) fn end(&mut self, end: End) {
        loop {
            match end {
                End::WellBehaved => self.behave(),
                End::Slow => {
                    for queue in 0..MAX_QUEUES {
                        self.with_ring(queue, |mut ring| {
                            ring.take();
                            if let Some(buffer) = ring.memo.held.pop() {
                                ring.put(buffer.id, 0);
                                ring.interrupt();
                            }
                        });
                    }
                    thread::sleep(Duration::from_secs(1));
                }
                End::Hostile => self.act(Duration::from_secs(1)),
                End::Silent => thread::park(),
                End::FallsSilent => {
                    self.behave_until_ordered();
                    println!("{OVER}");
                    self.end(End::Silent);
                }
                End::Breaks => {
                    self.behave_until_ordered();
                    self.with_ring(0, |mut ring| {
                        ring.put_stranger(u32::from(ring.size()), 0);
                        ring.interrupt();
                    });
                    println!("{OVER}");
                    self.end(End::WellBehaved);
                }
                End::Gone => {
                    self.behave_for(Duration::from_secs(1));
                    process::exit(0)
                }
            }
        }
    }

    fn behave_for(&self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            self.behave();
        }
    }

    fn behave_until_ordered(&self) {
        while !self.is_ordered() {
            self.behave();
        }
    }

    /// Whether the test has sent another line, or has ended.
    fn is_ordered(&self) -> bool {
        self.orders.try_recv() != Err(TryRecvError::Empty)
    }

    fn behave(&self) {
        (0..MAX_QUEUES).for_each(|queue| self.use_all(queue));
        thread::sleep(Duration::from_millis(1));
    }

    fn with_ring<T>(&self, queue: usize, act: impl FnOnce(Ring<'_>) -> T) -> Option<T> {
        self.device.with_ring(self.transport, queue, act)
    }

    fn step(&mut self, mood: Mood) {
        let is_pci = self.transport.is_pci();
        let act = Act::choose(mood, is_pci, &mut self.random);
        self.perform(act);
        // Some follow so fast that the driver sees several at once.
        if self.random.bool() {
            thread::sleep(Duration::from_millis(self.random.u64(..4)));
        }
    }

    fn perform(&mut self, act: Act) {
        let queue = self.random.usize(..MAX_QUEUES);
        match act {
            Act::Use => (0..MAX_QUEUES).for_each(|queue| self.use_all(queue)),
            Act::Storm => {
                for _ in 0..self.random.u32(..FLOOD) {
                    (0..MAX_QUEUES).for_each(|queue| self.interrupt(queue));
                    self.changed();
                }
                info!("{act:?}");
            }
            Act::Overwrite => self.overwrite(queue),
            Act::Target => self.set(TARGET),
            Act::Hints => self.change_hint(),
            Act::Field => {
                let field = self.random.usize(..self.device.config().fields.len());
                self.set(field);
            }
            Act::Wild => {
                let wild = self.random.bool();
                info!("fields that change with every read: {wild}");
                self.device.config().wild = wild;
                self.changed();
            }
            Act::Ask => self.ask(1, Self::request),
            Act::AskAnything => self.ask(1, Self::anything),
            Act::AskMuch => self.ask(FLOOD, Self::request),
            Act::Pause => thread::sleep(Duration::from_millis(self.random.u64(..20))),
            Act::NeedReset => {
                info!("{act:?}");
                self.transport.need_reset();
            }
            Act::UseAny
            | Act::UseWithAnyLength
            | Act::UseStranger
            | Act::UseTwice
            | Act::MoveIndex
            | Act::Interrupt
            | Act::Mute
            | Act::Scribble
            | Act::ResetQueue => {
                self.on(queue, act, |ring, random| disturb(ring, act, random));
            }
        }
    }

    /// Sets another command id of free page hinting.
    fn change_hint(&mut self) {
        let (hint, random) = (self.hint, &mut self.random);
        self.hint = match random.u8(..6) {
            0 => VIRTIO_BALLOON_CMD_ID_STOP,
            1 => VIRTIO_BALLOON_CMD_ID_DONE,
            2 => hint.wrapping_sub(1),
            3 => random.u32(..),
            _ => hint.wrapping_add(1),
        };
        info!("hints with the id {}", self.hint);
        self.device.config().fields[HINTS] = self.hint;
        self.changed();
    }

    /// Calls a function on a queue, if the queue is ready, and interrupts nearly always.
    fn on(&mut self, queue: usize, act: Act, change: impl FnOnce(&mut Ring<'_>, &mut Rng)) {
        let random = &mut self.random;
        let done = self.device.with_ring(self.transport, queue, |mut ring| {
            change(&mut ring, random);
            if random.u8(..8) > 0 {
                ring.interrupt();
            }
        });
        if done.is_some() {
            info!("{act:?} on queue {queue}");
        }
    }

    /// Announces a change of the configuration space.
    fn changed(&self) {
        if self.tells {
            self.transport.config_changed();
        }
    }

    fn interrupt(&self, queue: usize) {
        self.with_ring(queue, |ring| ring.interrupt());
    }

    /// The purpose of the queue with this number.
    fn kind(&self, queue: usize) -> Option<Kind> {
        Kind::of(queue, self.device.acked())
    }

    /// Uses all buffers of a queue except those that wait for a request.
    fn use_all(&self, queue: usize) {
        let requests = self.kind(queue) == Some(Kind::Requests);
        self.with_ring(queue, |mut ring| {
            ring.take();
            let held = std::mem::take(&mut ring.memo.held);
            let (used, kept): (Vec<_>, Vec<_>) = held
                .into_iter()
                .partition(|buffer| !requests || buffer.writable.is_empty());
            ring.memo.held = kept;
            if !used.is_empty() {
                info!("{} buffers used on queue {queue}", used.len());
                for buffer in used {
                    ring.put(buffer.id, 0);
                }
                ring.interrupt();
            }
        });
    }

    /// Writes to the memory of buffers that the device has not used yet, then uses them.
    fn overwrite(&mut self, queue: usize) {
        let acked = self.device.acked();
        // The guest relies on the content of such pages.
        if Feature::PagePoison.is_in(acked) {
            return;
        }
        let kind = self.kind(queue);
        let has_numbers = kind == Some(Kind::Inflate) && !Feature::PageSets.is_in(acked);
        self.on(queue, Act::Overwrite, |ring, random| {
            ring.take();
            let mut junk = [0; 64];
            random.fill(&mut junk);
            for buffer in std::mem::take(&mut ring.memo.held) {
                for &(address, length) in &buffer.writable {
                    let length = usize::try_from(length).map_or(0, |length| length.min(junk.len()));
                    ring.overwrite(address.0, junk.get(..length).unwrap_or_default());
                }
                if has_numbers {
                    for &number in &buffer.numbers {
                        ring.overwrite(u64::from(number) * BALLOON_PAGE_SIZE, &junk);
                    }
                }
                ring.put(buffer.id, any_length(random));
            }
        });
    }

    /// Sets a field, and announces that nearly always.
    fn set(&mut self, field: usize) {
        let value = any_field(&mut self.random);
        info!("field {field} is {value:#x}");
        self.device.config().fields[field] = value;
        if self.random.u8(..8) > 0 {
            self.changed();
        }
    }

    /// Makes up to `count` requests.
    fn ask(&mut self, count: u32, request: fn(&mut Self) -> [u8; SIZE]) {
        let Some(queue) = Kind::Requests.number(self.device.acked()) else {
            return;
        };
        for _ in 0..count {
            let bytes = request(self);
            // A part of a request is not a request.
            let length = match self.random.u8(..8) {
                0 => any_length(&mut self.random),
                _ => 32,
            };
            let asked = self.with_ring(queue, |mut ring| {
                ring.take();
                let is_free = |buffer: &Buffer| !buffer.writable.is_empty();
                let place = ring.memo.held.iter().position(is_free)?;
                let buffer = ring.memo.held.remove(place);
                let (address, _) = buffer.writable.first()?;
                ring.overwrite(address.0, &bytes);
                ring.put(buffer.id, length);
                ring.interrupt();
                Some(())
            });
            if asked.flatten().is_none() {
                return;
            }
            info!("request {bytes:02x?} of {length} bytes");
        }
    }

    /// A request that a driver can answer.
    fn request(&mut self) -> [u8; SIZE] {
        let random = &mut self.random;
        self.request = match random.u8(..8) {
            0 => self.request,
            1 => self.request.wrapping_sub(1),
            2 => random.u64(..4),
            _ => self.request.wrapping_add(1),
        };
        let wanted = Wanted {
            block_shift: random.u8(10..24),
            start: any_address(random),
            end: any_address(random),
        };
        let command = match random.u8(..5) {
            0 | 1 => Command::UnusedSkip(wanted),
            2 => Command::UnusedDiscard(wanted),
            3 => Command::DropCaches {
                pages: random.bool(),
                slab: random.bool(),
            },
            _ => Command::Cancel {
                id: self.request.wrapping_sub(random.u64(..4)),
            },
        };
        command.encode(self.request)
    }

    /// A request of which some or all fields are random.
    fn anything(&mut self) -> [u8; SIZE] {
        let mut bytes = self.request();
        let start = self.random.usize(..SIZE);
        let end = self.random.usize(start..=SIZE);
        if let Some(part) = bytes.get_mut(start..end) {
            self.random.fill(part);
        }
        bytes
    }
}

/// The lines of standard input, from a thread of their own.
fn orders() -> Receiver<()> {
    let (sender, orders) = mpsc::channel();
    thread::spawn(move || io::stdin().lines().try_for_each(|_| sender.send(())));
    orders
}

/// Executes an action on one ring.
fn disturb(ring: &mut Ring<'_>, act: Act, random: &mut Rng) {
    match act {
        Act::UseAny => {
            ring.take();
            let held = ring.memo.held.len();
            if held > 0 {
                let buffer = ring.memo.held.swap_remove(random.usize(..held));
                ring.put(buffer.id, 0);
            }
        }
        Act::UseWithAnyLength => {
            ring.take();
            for buffer in std::mem::take(&mut ring.memo.held) {
                ring.put(buffer.id, any_length(random));
            }
        }
        Act::UseStranger => {
            let ids = [u32::from(ring.size()), u32::MAX, random.u32(..1024)];
            ring.put_stranger(ids[random.usize(..ids.len())], 0);
        }
        Act::UseTwice => {
            if let Some(id) = ring.memo.before {
                ring.put_stranger(id, any_length(random));
            }
        }
        Act::MoveIndex => {
            let steps = [1, 2, ring.size(), u16::MAX, random.u16(..)];
            ring.skip(steps[random.usize(..steps.len())]);
        }
        Act::Mute => {
            let flags =
                u16::from(random.bool()) * u16::try_from(VRING_USED_F_NO_NOTIFY).unwrap_or(0);
            ring.mute(flags, random.u16(..));
        }
        Act::Scribble => ring.scribble(random),
        Act::ResetQueue => ring.begin_anew(),
        // Only the interrupt, which follows every action.
        _ => {}
    }
}

fn any_length(random: &mut Rng) -> u32 {
    match random.u8(..5) {
        0 => 0,
        1 => u32::MAX,
        2 => random.u32(..),
        _ => random.u32(..64),
    }
}

fn any_address(random: &mut Rng) -> u64 {
    match random.u8(..4) {
        0 => 0,
        1 => random.u64(..),
        2 => u64::MAX,
        _ => random.u64(..1 << 31),
    }
}
