// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One virtqueue, with operations that no library offers: the device writes the used ring directly.

use std::sync::atomic::Ordering;

use fastrand::Rng;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The offsets of the index and of the entries in a ring, and the length of a used entry, in bytes.
const INDEX: u64 = 2;
const ENTRIES: u64 = 4;
const USED_ENTRY: u64 = 8;

/// A buffer that the driver has made available.
#[derive(Clone, Debug)]
pub(crate) struct Buffer {
    /// The driver's id for it.
    pub(crate) id: u32,
    /// Its parts that the device writes: addresses and lengths in bytes.
    pub(crate) writable: Vec<(GuestAddress, u32)>,
    /// Its content as page frame numbers of 32 bits.
    pub(crate) numbers: Vec<u32>,
}

/// The device's state of a queue. It is void when the queue is stopped.
#[derive(Debug, Default)]
pub(crate) struct Memo {
    /// The buffers that the device has taken from the available ring, and not used yet.
    pub(crate) held: Vec<Buffer>,
    /// An id that the device has already used.
    pub(crate) before: Option<u32>,
    /// Whether the driver may consider a buffer that is stored here as used.
    pub(crate) has_lied: bool,
    /// The index of the next used entry.
    next: Option<u16>,
}

/// A queue of a transport.
pub(crate) trait RawQueue {
    /// The queue that the driver has set up.
    fn queue(&self) -> &Queue;
    /// The same, for changes of its position.
    fn queue_mut(&mut self) -> &mut Queue;
    /// Interrupts the driver, with or without a reason.
    fn interrupt(&self);
}

/// A ready queue, which cannot be stopped during the borrow.
pub(crate) struct Ring<'a> {
    raw: &'a mut dyn RawQueue,
    memory: &'a GuestMemoryMmap,
    pub(crate) memo: &'a mut Memo,
}

impl<'a> Ring<'a> {
    /// The queue, if a driver has set it up.
    pub(crate) fn new(
        raw: &'a mut dyn RawQueue,
        memory: &'a GuestMemoryMmap,
        memo: &'a mut Memo,
    ) -> Option<Self> {
        raw.queue().ready().then_some(Self { raw, memory, memo })
    }

    /// Takes the buffers in the available ring.
    pub(crate) fn take(&mut self) {
        /// More than a message has of them.
        const NUMBERS: usize = 256;
        let Ok(chains) = self.raw.queue_mut().iter(self.memory) else {
            return;
        };
        for chain in chains {
            let mut buffer = Buffer {
                id: chain.head_index().into(),
                writable: Vec::new(),
                numbers: Vec::new(),
            };
            for part in chain {
                if part.is_write_only() {
                    buffer.writable.push((part.addr(), part.len()));
                } else {
                    let count = usize::try_from(part.len() / 4).map_or(0, |n| n.min(NUMBERS));
                    let mut numbers = vec![0; 4 * count];
                    if self.memory.read_slice(&mut numbers, part.addr()).is_ok() {
                        let words = numbers.chunks_exact(4).filter_map(<[u8]>::first_chunk);
                        buffer
                            .numbers
                            .extend(words.map(|word| u32::from_le_bytes(*word)));
                    }
                }
            }
            self.memo.held.push(buffer);
        }
    }

    /// The library's queue, and the guest's memory, for a device that follows the protocol.
    pub(crate) fn library(&mut self) -> (&mut Queue, &'a GuestMemoryMmap) {
        (self.raw.queue_mut(), self.memory)
    }

    /// How many entries it has.
    pub(crate) fn size(&self) -> u16 {
        self.raw.queue().size()
    }

    /// Uses a buffer that was not available.
    pub(crate) fn put_stranger(&mut self, id: u32, len: u32) {
        self.memo.has_lied = true;
        self.put(id, len);
    }

    /// Uses a buffer.
    pub(crate) fn put(&mut self, id: u32, len: u32) {
        let next = self.next();
        let used = self.raw.queue().used_ring();
        let entry = used + ENTRIES + USED_ENTRY * u64::from(next % self.size());
        self.write(entry, &[id.to_le_bytes(), len.to_le_bytes()].concat());
        self.set_index(next.wrapping_add(1));
        self.memo.before = Some(id);
    }

    fn next(&self) -> u16 {
        let read = || {
            let index = self.raw.queue().used_idx(self.memory, Ordering::Relaxed);
            index.map_or(0, |index| index.0)
        };
        self.memo.next.unwrap_or_else(read)
    }

    /// Moves the used ring's index, forwards or backwards.
    pub(crate) fn skip(&mut self, step: u16) {
        self.memo.has_lied = true;
        self.set_index(self.next().wrapping_add(step));
    }

    /// Resets the device's side of the queue.
    pub(crate) fn begin_anew(&mut self) {
        *self.memo = Memo {
            has_lied: true,
            ..Memo::default()
        };
        self.raw.queue_mut().set_next_avail(0);
        self.set_index(0);
    }

    fn set_index(&mut self, index: u16) {
        self.memo.next = Some(index);
        let address = GuestAddress(self.raw.queue().used_ring() + INDEX);
        // It fails for rings outside of memory, which the driver cannot see either.
        let _ = self.memory.store(index.to_le(), address, Ordering::Release);
    }

    /// Interrupts the driver, with or without a reason.
    pub(crate) fn interrupt(&self) {
        self.raw.interrupt();
    }

    /// Writes the fields that control the driver's notifications: the flags, and an index after the
    /// ring.
    pub(crate) fn mute(&self, flags: u16, event: u16) {
        let used = self.raw.queue().used_ring();
        self.write(used, &flags.to_le_bytes());
        let behind = used + ENTRIES + USED_ENTRY * u64::from(self.size());
        self.write(behind, &event.to_le_bytes());
    }

    /// Writes to the driver's parts of the queue.
    pub(crate) fn scribble(&mut self, random: &mut Rng) {
        let queue = self.raw.queue();
        let (start, entry) = if random.bool() {
            (queue.desc_table(), 16)
        } else {
            (queue.avail_ring() + ENTRIES, 2)
        };
        let place = start + entry * u64::from(random.u16(..self.size()));
        self.write(place, &random.u16(..).to_le_bytes());
        self.memo.has_lied = true;
    }

    /// Writes to memory that the device owns while it holds a buffer. It does not if the driver may consider that
    /// buffer as used: the memory may have another owner, and corrupting it would show no fault of the driver.
    pub(crate) fn overwrite(&self, address: u64, bytes: &[u8]) {
        if !self.memo.has_lied {
            self.write(address, bytes);
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        // As for the index.
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }
}
