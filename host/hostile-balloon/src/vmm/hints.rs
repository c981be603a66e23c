// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Free page hinting as Firecracker does it: it discards memory as soon as that is hinted.
//!
//! A part of four bytes is a command of the driver: the id of the host's round, or the end of the round.

use balloon_wire::{VIRTIO_BALLOON_CMD_ID_DONE, VIRTIO_BALLOON_CMD_ID_STOP};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Le32};

use crate::vmm::chain::{NUMBER, Part};

/// The id of the first round.
const FIRST: u32 = 2;

/// What the device does about a part of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hint {
    /// Nothing.
    Nothing,
    /// The driver has ended a round, and the device ends it, too.
    End,
    /// It discards the memory.
    Discard,
}

/// The state of hinting.
#[derive(Debug, Default)]
pub(crate) struct Hints {
    /// The device's command, which is in the configuration space.
    pub(crate) host: u32,
    /// The driver's command.
    pub(crate) guest: Option<u32>,
    /// The id of the latest round.
    last: u32,
    /// Whether the device ends a round that the driver has ended.
    ends_itself: bool,
}

impl Hints {
    /// Begins a round.
    pub(crate) fn begin(&mut self, ends_itself: bool) {
        self.last = self.last.wrapping_add(1).max(FIRST);
        self.host = self.last;
        self.ends_itself = ends_itself;
    }

    /// Ends the round.
    pub(crate) fn end(&mut self) {
        self.host = VIRTIO_BALLOON_CMD_ID_DONE;
    }

    /// Takes a part of a message.
    ///
    /// # Errors
    ///
    /// What the driver has done wrong.
    pub(crate) fn take(&mut self, part: Part, memory: &GuestMemoryMmap) -> Result<Hint, String> {
        if part.length == NUMBER {
            let id: Le32 = memory
                .read_obj(GuestAddress(part.address))
                .map_err(|error| format!("a command cannot be read: {error}"))?;
            return self.command(id.to_native());
        }
        part.check_whole_pages()?;
        let Some(guest) = self.guest else {
            return Err("free memory before any id: it is ignored".to_owned());
        };
        if guest == VIRTIO_BALLOON_CMD_ID_STOP {
            return Err("free memory after the end of the round".to_owned());
        }
        // It belongs to an earlier round, or the device has ended the round meanwhile.
        Ok(match guest == self.host {
            true => Hint::Discard,
            false => Hint::Nothing,
        })
    }

    fn command(&mut self, id: u32) -> Result<Hint, String> {
        if id != VIRTIO_BALLOON_CMD_ID_STOP && !(FIRST..=self.last).contains(&id) {
            return Err(format!(
                "the id {id} of hints, and the latest one of the device is {}",
                self.last
            ));
        }
        self.guest = Some(id);
        Ok(match id {
            VIRTIO_BALLOON_CMD_ID_STOP if self.ends_itself => Hint::End,
            _ => Hint::Nothing,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: u64 = 0x1000;

    /// The result of a part with the command `id`.
    fn command(hints: &mut Hints, memory: &GuestMemoryMmap, id: u32) -> Result<Hint, String> {
        memory.write_obj(Le32::from(id), GuestAddress(ID)).unwrap();
        let part = Part {
            address: ID,
            length: NUMBER,
            is_writable: false,
        };
        hints.take(part, memory)
    }

    #[test]
    fn a_round_has_an_id_memory_and_an_end() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let free = Part {
            address: 0x4000,
            length: 0x2000,
            is_writable: true,
        };
        let mut hints = Hints::default();
        hints.begin(true);
        assert_eq!(hints.host, 2);
        let early = hints.take(free, &memory);
        assert_eq!(
            early,
            Err("free memory before any id: it is ignored".to_owned())
        );
        assert_eq!(command(&mut hints, &memory, 2), Ok(Hint::Nothing));
        assert_eq!(hints.take(free, &memory), Ok(Hint::Discard));
        assert_eq!(command(&mut hints, &memory, 0), Ok(Hint::End));
        let late = hints.take(free, &memory);
        assert_eq!(
            late,
            Err("free memory after the end of the round".to_owned())
        );

        hints.begin(false);
        assert_eq!(command(&mut hints, &memory, 2), Ok(Hint::Nothing));
        assert_eq!(hints.take(free, &memory), Ok(Hint::Nothing));
        assert_eq!(command(&mut hints, &memory, 3), Ok(Hint::Nothing));
        assert_eq!(command(&mut hints, &memory, 0), Ok(Hint::Nothing));
        for id in [1, 4] {
            let text = command(&mut hints, &memory, id).unwrap_err();
            assert!(
                text.ends_with("the latest one of the device is 3"),
                "{text}"
            );
        }
    }
}
