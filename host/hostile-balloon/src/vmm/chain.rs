// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The driver's messages: chains of descriptors.
//!
//! The checks here are for errors after which no VMM serves the queue as before. Firecracker takes no more messages
//! from it, Cloud Hypervisor leaves out the rest of the chain, and crosvm ends the device's thread.

use balloon_wire::BALLOON_PAGE_SIZE;
use balloon_wire::stat;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// The length of a descriptor, and of a page frame number, in bytes.
const DESCRIPTOR: u64 = 16;
pub(crate) const NUMBER: u32 = 4;

/// A queue's table of descriptors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    pub(crate) address: u64,
    pub(crate) entries: u16,
}

/// A part of a message: one buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) address: u64,
    pub(crate) length: u32,
    /// Whether the device writes it.
    pub(crate) is_writable: bool,
}

/// A message.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    /// The index of its first descriptor.
    pub(crate) head: u16,
    pub(crate) parts: Vec<Part>,
}

impl Chain {
    /// Reads the chain that begins with the descriptor `head`.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(crate) fn read(table: Table, head: u16, memory: &GuestMemoryMmap) -> Result<Self, String> {
        let (mut parts, mut index) = (Vec::new(), head);
        loop {
            if index >= table.entries {
                return Err(format!(
                    "descriptor {index} of a queue with {} entries",
                    table.entries
                ));
            }
            if parts.len() >= usize::from(table.entries) {
                return Err("a chain of descriptors that loops".to_owned());
            }
            let place = GuestAddress(table.address + DESCRIPTOR * u64::from(index));
            let descriptor: Descriptor = memory
                .read_obj(place)
                .map_err(|error| format!("descriptor {index} cannot be read: {error}"))?;
            let flags = u32::from(descriptor.flags());
            if flags & !(VRING_DESC_F_NEXT | VRING_DESC_F_WRITE) != 0 {
                return Err(format!("a descriptor with the flags {flags:#x}"));
            }
            let part = Part {
                address: descriptor.addr().0,
                length: descriptor.len(),
                is_writable: descriptor.is_write_only(),
            };
            part.check_place(memory)?;
            parts.push(part);
            if !descriptor.has_next() {
                return Ok(Self { head, parts });
            }
            index = descriptor.next();
        }
    }

    /// Its page frame numbers.
    ///
    /// # Errors
    ///
    /// One is twice in the message, or has no page in the guest's memory.
    pub(crate) fn pages(&self, memory: &GuestMemoryMmap) -> Result<Vec<u32>, String> {
        let bytes = self.bytes(memory)?;
        let words = bytes.chunks_exact(4).filter_map(<[u8]>::first_chunk);
        let mut pages: Vec<u32> = words.map(|word| u32::from_le_bytes(*word)).collect();
        pages.sort_unstable();
        if let Some(pair) = pages.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("page {:#x} twice in a message", pair[0]));
        }
        let is_outside = |page: &&u32| {
            let address = GuestAddress(u64::from(**page) * BALLOON_PAGE_SIZE);
            !memory.address_in_range(address)
        };
        match pages.iter().find(is_outside) {
            Some(page) => Err(format!("page {page:#x}, which is outside of memory")),
            None => Ok(pages),
        }
    }

    /// Its statistics: tags and values.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub(crate) fn statistics(&self, memory: &GuestMemoryMmap) -> Result<Vec<(u16, u64)>, String> {
        let bytes = self.bytes(memory)?;
        let read = |entry: &[u8]| {
            let tag = entry.get(stat::TAG..)?.first_chunk()?;
            let value = entry.get(stat::VAL..)?.first_chunk()?;
            Some((u16::from_le_bytes(*tag), u64::from_le_bytes(*value)))
        };
        Ok(bytes.chunks_exact(stat::SIZE).filter_map(read).collect())
    }

    /// The content of all parts that the driver has written.
    fn bytes(&self, memory: &GuestMemoryMmap) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        for part in self.parts.iter().filter(|part| !part.is_writable) {
            let start = bytes.len();
            bytes.resize(start + usize::try_from(part.length).unwrap_or(0), 0);
            memory
                .read_slice(&mut bytes[start..], GuestAddress(part.address))
                .map_err(|error| format!("a message cannot be read: {error}"))?;
        }
        Ok(bytes)
    }
}

impl Part {
    /// Checks that it is in the guest's memory. An empty one is nowhere.
    fn check_place(self, memory: &GuestMemoryMmap) -> Result<(), String> {
        let length = usize::try_from(self.length).unwrap_or(usize::MAX);
        if length > 0 && !memory.check_range(GuestAddress(self.address), length) {
            return Err(format!(
                "a buffer of {length} bytes at {:#x}, which is outside of memory",
                self.address
            ));
        }
        Ok(())
    }

    /// Checks that it consists of whole pages.
    pub(crate) fn check_whole_pages(self) -> Result<(), String> {
        if self.length == 0
            || self.address % BALLOON_PAGE_SIZE != 0
            || u64::from(self.length) % BALLOON_PAGE_SIZE != 0
        {
            return Err(format!(
                "{} bytes at {:#x} as free memory, which are no whole pages",
                self.length, self.address
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 1 << 20;
    const TABLE: Table = Table {
        address: 0x1000,
        entries: 4,
    };
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    /// Memory with these descriptors: address, length, flags and the next one.
    fn memory(descriptors: &[(u64, u32, u16, u16)]) -> GuestMemoryMmap {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE)]).unwrap();
        for (index, &(address, length, flags, next)) in descriptors.iter().enumerate() {
            let place = TABLE.address + DESCRIPTOR * u64::try_from(index).unwrap();
            memory
                .write_obj(
                    Descriptor::new(address, length, flags, next),
                    GuestAddress(place),
                )
                .unwrap();
        }
        memory
    }

    fn refusal<T: std::fmt::Debug>(result: Result<T, String>) -> String {
        result.expect_err("it is refused")
    }

    #[test]
    fn a_chain_has_its_parts_in_order() {
        let memory = memory(&[(0x4000, 8, NEXT, 2), (0, 0, 0, 0), (0x5000, 16, WRITE, 0)]);
        let chain = Chain::read(TABLE, 0, &memory).unwrap();
        assert_eq!(chain.head, 0);
        let parts = chain.parts.iter();
        let parts: Vec<_> = parts
            .map(|part| (part.address, part.length, part.is_writable))
            .collect();
        assert_eq!(parts, [(0x4000, 8, false), (0x5000, 16, true)]);
    }

    #[test]
    fn a_broken_chain_is_refused() {
        for (descriptors, text) in [
            (
                &[(0x4000, 8, NEXT, 4)][..],
                "descriptor 4 of a queue with 4 entries",
            ),
            (&[(0x4000, 8, NEXT, 0)], "a chain of descriptors that loops"),
            (&[(0x4000, 16, 4, 0)], "a descriptor with the flags 0x4"),
            (
                &[(0xf_fff8, 16, 0, 0)],
                "a buffer of 16 bytes at 0xffff8, which is outside of memory",
            ),
        ] {
            let memory = memory(descriptors);
            assert_eq!(refusal(Chain::read(TABLE, 0, &memory)), text);
        }
    }

    #[test]
    fn page_frame_numbers_are_unique_and_in_memory() {
        let memory = memory(&[(0x4000, 8, 0, 0)]);
        let chain = Chain::read(TABLE, 0, &memory).unwrap();
        for (pages, expected) in [
            ([9, 7], Ok(vec![7, 9])),
            ([7, 7], Err("page 0x7 twice in a message".to_owned())),
            (
                [7, 0x100],
                Err("page 0x100, which is outside of memory".to_owned()),
            ),
        ] {
            memory
                .write_slice(&pages.map(u32::to_le_bytes).concat(), GuestAddress(0x4000))
                .unwrap();
            assert_eq!(chain.pages(&memory), expected);
        }
    }

    #[test]
    fn free_memory_is_whole_pages() {
        let part = |address, length| Part {
            address,
            length,
            is_writable: true,
        };
        assert_eq!(part(0x4000, 0x3000).check_whole_pages(), Ok(()));
        for bad in [part(0x4000, 0), part(0x4000, 4), part(0x4800, 0x1000)] {
            let text = refusal(bad.check_whole_pages());
            assert!(text.ends_with("which are no whole pages"), "{text}");
        }
    }
}
