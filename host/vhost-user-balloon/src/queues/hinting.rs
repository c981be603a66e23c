// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Free page hinting (specification, clause 5.5.6.5).
//!
//! The host has a command id in the configuration space. The guest sends the id, then buffers of memory
//! that was free, then the id that stands for the end.
//!
//! The device never returns hinted memory to the host. The guest may use the memory again at any time,
//! even before the device has seen the hint, and would lose its data. A hint only allows a copy to omit
//! the content from before the command, if the copying program knows all writes since then.

use std::time::SystemTime;

use balloon_wire::{VIRTIO_BALLOON_CMD_ID_DONE, VIRTIO_BALLOON_CMD_ID_STOP};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use super::virtqueue::{Chain, Progress, Receiver, buffers, read};
use crate::budget::Budget;
use crate::counters::{Counters, Refusal};
use crate::sync::{Mutex, lock};

const STOP: u32 = VIRTIO_BALLOON_CMD_ID_STOP;
const DONE: u32 = VIRTIO_BALLOON_CMD_ID_DONE;

/// The command, and the guest's progress with it.
#[derive(Debug)]
pub struct Hints {
    /// The id in the configuration space.
    command: u32,
    /// The last assigned id.
    last: u32,
    /// The id of the command that the guest is answering.
    open: Option<u32>,
}

impl Default for Hints {
    /// The guest may still know the ids of an earlier worker, and ignores an id that it knows. Ids start from the
    /// clock's milliseconds: no worker issues a thousand ids a second.
    fn default() -> Self {
        let milliseconds = SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap_or_default()
            .as_millis();
        Self {
            command: DONE,
            last: u32::try_from(milliseconds & u128::from(u32::MAX)).unwrap_or(DONE),
            open: None,
        }
    }
}

impl Hints {
    /// The id in the configuration space.
    pub fn command(&self) -> u32 {
        self.command
    }

    /// Requests hints with a new id. An id is not reused while the guest may be answering it.
    pub fn start(&mut self) {
        loop {
            self.last = self.last.wrapping_add(1);
            if self.last != STOP && self.last != DONE && self.open != Some(self.last) {
                break;
            }
        }
        self.command = self.last;
    }

    /// Stops the hints. The guest keeps the hinted memory.
    pub fn stop(&mut self) {
        self.command = STOP;
    }

    /// Allows the guest to use the hinted memory again.
    pub fn done(&mut self) {
        self.command = DONE;
    }

    /// Resets the state for a new driver, which knows no command.
    pub fn restart(&mut self) {
        self.done();
        self.open = None;
    }

    /// Handles the id of the command that the guest answers, or the end of its hints. The id of the
    /// configuration space without a command is not valid here.
    fn announce(&mut self, id: u32) {
        self.open = if id == STOP || id == DONE {
            None
        } else {
            Some(id)
        };
    }
}

/// The receiver of the hinting queue.
#[derive(Debug)]
pub struct Hinting<'a> {
    /// The guest's memory, which contains the messages.
    pub memory: &'a GuestMemoryMmap,
    /// The hinted memory.
    pub hints: &'a Mutex<Hints>,
    /// The counters.
    pub counters: &'a Counters,
}

impl Hinting<'_> {
    fn hint(&mut self, chain: Chain<'_>) -> Result<(), Refusal> {
        let mut id = Vec::new();
        read(self.memory, chain.clone(), size_of::<u32>(), &mut id)?;
        // Locked for one message only, since reads of the configuration space need the command.
        let mut hints = lock(self.hints);
        match <[u8; 4]>::try_from(id.as_slice()) {
            Ok(id) => hints.announce(u32::from_le_bytes(id)),
            Err(_) if !id.is_empty() => return Err(Refusal::Truncated),
            Err(_) => {}
        }
        let mut result = Ok(());
        let whole = buffers(chain, |descriptor| {
            if !descriptor.is_write_only() {
                return;
            }
            if hints.open != Some(hints.command) {
                result = Err(Refusal::StaleHint);
                return;
            }
            let length = descriptor.len();
            let inside = usize::try_from(length)
                .is_ok_and(|length| self.memory.check_range(descriptor.addr(), length));
            if inside && length > 0 {
                self.counters.hinted.add(length.into());
            } else {
                result = Err(Refusal::OutsideMemory);
            }
        });
        result.and(whole)
    }
}

impl Receiver for Hinting<'_> {
    fn take(&mut self, chain: Chain<'_>, _again: bool) -> bool {
        if let Err(reason) = self.hint(chain) {
            self.counters.refuse(reason);
        }
        true
    }

    fn finish(&mut self, _done: &mut u64, _budget: Budget) -> Progress {
        Progress::Done
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::sync::Level;
    use crate::testing::GuestQueue;

    fn run(guest: &GuestQueue, hints: &mut Hints) -> Counters {
        let counters = Counters::default();
        let shared = Mutex::new(Level::Short, std::mem::take(hints));
        let mut receiver = Hinting {
            memory: &guest.memory,
            hints: &shared,
            counters: &counters,
        };
        guest.serve(&counters, &mut receiver);
        *hints = std::mem::take(&mut lock(&shared));
        counters
    }

    #[test]
    fn a_new_worker_does_not_repeat_ids() {
        let mut first = Hints::default();
        let ids = [(); 3].map(|()| {
            first.start();
            first.command()
        });
        thread::sleep(Duration::from_millis(10));
        let mut second = Hints::default();
        second.start();
        assert!(!ids.contains(&second.command()), "{ids:?}");
    }

    #[test]
    fn hints_belong_to_their_command() {
        let mut guest = GuestQueue::new();
        let mut hints = Hints::default();
        hints.start();
        let id = hints.command();
        guest.send(&[&id.to_le_bytes()]);
        guest.send_writable(&[(1 << 20, 4096), (2 << 20, 8192)]);
        guest.send_writable(&[(1 << 20, 4096)]);
        guest.send(&[&STOP.to_le_bytes()]);
        guest.send_writable(&[(3 << 20, 4096)]);
        let counters = run(&guest, &mut hints);
        assert_eq!(counters.hinted.get(), 4 * 4096);
        assert_eq!(counters.refused(Refusal::StaleHint), 1);
        assert_eq!(guest.used(), 5);

        hints.start();
        guest.send(&[&id.to_le_bytes()]);
        guest.send_writable(&[(1 << 20, 4096)]);
        let counters = run(&guest, &mut hints);
        assert_eq!(counters.hinted.get(), 0);
        assert_eq!(counters.refused(Refusal::StaleHint), 1);
    }

    #[test]
    fn what_stands_for_no_command_has_no_hints() {
        let mut guest = GuestQueue::new();
        let mut hints = Hints::default();
        for id in [DONE, STOP] {
            guest.send(&[&id.to_le_bytes()]);
            guest.send_writable(&[(1 << 20, 4096)]);
            let counters = run(&guest, &mut hints);
            assert_eq!(counters.hinted.get(), 0);
            assert_eq!(counters.refused(Refusal::StaleHint), 1);
            hints.stop();
        }
    }

    #[test]
    fn hints_outside_memory_are_refused() {
        let mut guest = GuestQueue::new();
        let mut hints = Hints::default();
        hints.start();
        guest.send(&[&hints.command().to_le_bytes()]);
        guest.send_writable(&[((16 << 20) - 4096, 8192)]);
        guest.send(&[b"ab"]);
        let counters = run(&guest, &mut hints);
        assert_eq!(counters.refused(Refusal::OutsideMemory), 1);
        assert_eq!(counters.refused(Refusal::Truncated), 1);
        assert_eq!(counters.hinted.get(), 0);
    }

    #[test]
    fn ids_skip_what_stands_for_something_else() {
        let mut hints = Hints {
            last: u32::MAX - 1,
            open: Some(2),
            ..Hints::default()
        };
        hints.start();
        assert_eq!(hints.command(), u32::MAX);
        hints.start();
        assert_eq!(hints.command(), 3);
        hints.stop();
        assert_eq!(hints.command(), STOP);
        hints.done();
        assert_eq!(hints.command(), DONE);
    }
}
