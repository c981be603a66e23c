// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory and devices for tests.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion,
};

use crate::counters::{Counter, Counters};
use crate::device::floor::Floor;
use crate::device::state::State;
use crate::device::{Device, Settings};
use crate::memory::discard::Granularity;
use crate::queues::virtqueue::{Next, Receiver, Unfinished, serve};
use crate::vhost_user::channel::Channel;
use crate::virtio::features::{Feature, offer};

#[path = "../tests/end_to_end/pinned.rs"]
pub(crate) mod pinned;

/// A balloon page in bytes.
pub(crate) const PAGE: u64 = 4096;

/// The end of the hole in the guest's address space, in bytes.
pub(crate) const HOLE: u64 = 2 << 20;

/// A file in memory.
pub(crate) fn memory_file(bytes: u64) -> Arc<File> {
    let flags = MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create("guest", flags).unwrap());
    file.set_len(bytes).unwrap();
    Arc::new(file)
}

thread_local! {
    /// A file's content before each step of writing it, while it is recorded.
    static STEPS: RefCell<Option<Vec<Vec<u8>>>> = const { RefCell::new(None) };
}

/// Marks the place before a step of writing a file.
pub(crate) fn before_step(file: &File) {
    STEPS.with_borrow_mut(|steps| {
        let Some(steps) = steps else {
            return;
        };
        let mut content = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut content, 0).unwrap();
        steps.push(content);
    });
}

/// The files that this process leaves if it is killed during `act`, one for each step of writing the file.
pub(crate) fn left_when_killed(act: impl FnOnce()) -> Vec<Arc<File>> {
    STEPS.set(Some(Vec::new()));
    act();
    let contents = STEPS.take().into_iter().flatten();
    contents
        .map(|content| {
            let file = memory_file(0);
            file.write_all_at(&content, 0).unwrap();
            file
        })
        .collect()
}

/// A file in huge pages of a size of which the host has none, if it has two sizes. The file has
/// room for one.
pub(crate) fn huge_file() -> (Arc<File>, u64) {
    let sizes = [
        (MFdFlags::MFD_HUGE_1GB, 1 << 30),
        (MFdFlags::MFD_HUGE_2MB, 2 << 20),
    ];
    let mut files = sizes.iter().filter_map(|&(size, bytes)| {
        let file = memfd_create("guest", MFdFlags::MFD_HUGETLB | size).ok()?;
        Some((File::from(file), bytes))
    });
    let (file, bytes) = files.next().unwrap();
    file.set_len(bytes).unwrap();
    (Arc::new(file), bytes)
}

/// A guest's memory: a file with two regions, one at 0 and one at [`HOLE`] in the guest's address space,
/// and no byte that is zero.
pub(crate) struct MemoryFiles {
    file: Arc<File>,
    low: u64,
    high: u64,
}

impl MemoryFiles {
    pub(crate) fn new(low: u64, high: u64) -> Self {
        let files = Self {
            file: memory_file(low + high),
            low,
            high,
        };
        files.fill();
        files
    }

    pub(crate) fn fill(&self) {
        let bytes = vec![0xa5; usize::try_from(self.low + self.high).unwrap()];
        self.file.write_all_at(&bytes, 0).unwrap();
    }

    pub(crate) fn memory(&self) -> GuestMemoryMmap {
        let region = |start, bytes, offset| {
            let file = FileOffset::from_arc(Arc::clone(&self.file), offset);
            (
                GuestAddress(start),
                usize::try_from(bytes).unwrap(),
                Some(file),
            )
        };
        GuestMemoryMmap::from_ranges_with_files([
            region(0, self.low, 0),
            region(HOLE, self.high, self.low),
        ])
        .unwrap()
    }

    /// A part of the low memory, in bytes, and none of the high memory.
    pub(crate) fn part(&self, start: u64, end: u64) -> GuestMemoryMmap {
        let file = FileOffset::from_arc(Arc::clone(&self.file), start);
        let bytes = usize::try_from(end - start).unwrap();
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(start), bytes, Some(file))]).unwrap()
    }

    /// The page in the file for this page of the guest.
    pub(crate) fn file_page(&self, page: u64) -> Option<u64> {
        let (low, high, hole) = (self.low / PAGE, self.high / PAGE, HOLE / PAGE);
        if page < low {
            Some(page)
        } else if (hole..hole + high).contains(&page) {
            Some(page - hole + low)
        } else {
            None
        }
    }

    /// The pages in the file that are all zeroes.
    pub(crate) fn holes(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; usize::try_from(self.low + self.high).unwrap()];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        (0..)
            .zip(bytes.chunks(4096))
            .filter(|(_, bytes)| bytes.iter().all(|&byte| byte == 0))
            .map(|(page, _)| page)
            .collect()
    }
}

/// A driver's side of a queue with 512 descriptors, at the beginning of a memory of 16 MiB.
pub(crate) struct GuestQueue {
    pub(crate) memory: GuestMemoryMmap,
    vring: VringMutex,
    descriptors: u16,
    buffers: u64,
}

impl GuestQueue {
    const SIZE: u16 = 512;
    const DESCRIPTORS: u64 = 0x1000;
    const AVAIL: u64 = 0x3000;
    const USED: u64 = 0x4000;

    pub(crate) fn new() -> Self {
        let file = FileOffset::from_arc(memory_file(16 << 20), 0);
        let region = (GuestAddress(0), 16 << 20, Some(file));
        let memory = GuestMemoryMmap::from_ranges_with_files([region]).unwrap();
        let atomic = GuestMemoryAtomic::new(memory.clone());
        let vring = VringMutex::new(atomic, Self::SIZE).unwrap();
        vring.set_queue_size(Self::SIZE);
        vring
            .set_queue_info(Self::DESCRIPTORS, Self::AVAIL, Self::USED)
            .unwrap();
        vring.set_queue_event_idx(true);
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        Self {
            memory,
            vring,
            descriptors: 0,
            buffers: 8 << 20,
        }
    }

    /// The memory's file.
    pub(crate) fn file(&self) -> &File {
        let region = self.memory.iter().next().unwrap();
        region.file_offset().unwrap().file()
    }

    fn load(&self, address: u64) -> u16 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    fn store(&self, address: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub(crate) fn vrings(&self) -> Vec<VringMutex> {
        vec![self.vring.clone()]
    }

    pub(crate) fn vring(&self) -> MutexGuard<'_, VringState> {
        self.vring.get_mut()
    }

    fn describe(&mut self, address: u64, length: u32, flags: u32, next: u16) {
        let flags = u16::try_from(flags).unwrap();
        let descriptor = Descriptor::new(address, length, flags, next);
        let place = Self::DESCRIPTORS + 16 * u64::from(self.descriptors);
        self.memory
            .write_obj(descriptor, GuestAddress(place))
            .unwrap();
        self.descriptors = (self.descriptors + 1) % Self::SIZE;
    }

    pub(crate) fn send_head(&mut self, head: u16) {
        let index = self.load(Self::AVAIL + 2);
        self.store(Self::AVAIL + 4 + 2 * u64::from(index % Self::SIZE), head);
        self.set_avail_index(index.wrapping_add(1));
    }

    pub(crate) fn set_avail_index(&mut self, index: u16) {
        self.store(Self::AVAIL + 2, index);
    }

    /// Sends a message of these buffers.
    pub(crate) fn send(&mut self, buffers: &[&[u8]]) {
        let head = self.descriptors;
        for (place, buffer) in buffers.iter().enumerate() {
            self.memory
                .write_slice(buffer, GuestAddress(self.buffers))
                .unwrap();
            let flags = if place + 1 < buffers.len() {
                VRING_DESC_F_NEXT
            } else {
                0
            };
            let length = u32::try_from(buffer.len()).unwrap();
            self.describe(self.buffers, length, flags, self.descriptors + 1);
            self.buffers += 4096;
        }
        self.send_head(head);
    }

    /// Sends a message that a device may write to, with buffers from and of so many bytes.
    pub(crate) fn send_writable(&mut self, buffers: &[(u64, u32)]) {
        let head = self.descriptors;
        for (place, &(address, length)) in buffers.iter().enumerate() {
            let last = place + 1 == buffers.len();
            let next = if last { 0 } else { VRING_DESC_F_NEXT };
            self.describe(
                address,
                length,
                VRING_DESC_F_WRITE | next,
                self.descriptors + 1,
            );
        }
        self.send_head(head);
    }

    /// Sends a message of 4 bytes, followed by a device-writable buffer of so many bytes.
    pub(crate) fn send_mixed(&mut self, address: u64, length: u32) {
        let head = self.descriptors;
        self.describe(self.buffers, 4, VRING_DESC_F_NEXT, head + 1);
        self.describe(address, length, VRING_DESC_F_WRITE, 0);
        self.send_head(head);
    }

    /// Sends a message without an end.
    pub(crate) fn send_loop(&mut self) {
        let head = self.descriptors;
        self.describe(self.buffers, 0, VRING_DESC_F_NEXT, head);
        self.send_head(head);
    }

    /// Sends a message that is outside of the guest's memory.
    pub(crate) fn send_outside(&mut self) {
        let head = self.descriptors;
        self.describe(1 << 40, 4, 0, 0);
        self.send_head(head);
    }

    /// Sends a message whose descriptors, so many empty ones, are in a table of their own.
    pub(crate) fn send_indirect(&mut self, descriptors: u16) {
        let head = self.descriptors;
        for number in 0..descriptors {
            let last = number + 1 == descriptors;
            let flags = if last { 0 } else { VRING_DESC_F_NEXT };
            let descriptor = Descriptor::new(0, 0, flags.try_into().unwrap(), number + 1);
            let place = self.buffers + 16 * u64::from(number);
            self.memory
                .write_obj(descriptor, GuestAddress(place))
                .unwrap();
        }
        self.describe(
            self.buffers,
            u32::from(descriptors) * 16,
            VRING_DESC_F_INDIRECT,
            0,
        );
        self.send_head(head);
    }

    /// Makes a device handle messages, and returns when to serve the queue again.
    pub(crate) fn serve(&self, counters: &Counters, receiver: &mut impl Receiver) -> Next {
        self.serve_on(counters, &mut Unfinished::default(), receiver)
    }

    /// The same, with a batch that may be unfinished.
    pub(crate) fn serve_on(
        &self,
        counters: &Counters,
        unfinished: &mut Unfinished,
        receiver: &mut impl Receiver,
    ) -> Next {
        serve(
            &mut self.vring(),
            &self.memory,
            &mut Vec::new(),
            unfinished,
            counters,
            &Counter::default(),
            receiver,
        )
    }

    /// Restarts the driver, with an empty queue.
    pub(crate) fn reset(&mut self) {
        self.set_avail_index(0);
        self.store(Self::USED + 2, 0);
        self.descriptors = 0;
        self.vring.set_queue_next_avail(0);
        self.vring.set_queue_next_used(0);
    }

    /// The device's next position in the queue.
    pub(crate) fn next_avail(&self) -> u16 {
        self.vring.queue_next_avail()
    }

    /// The head of a used message, and how many bytes the device has written.
    pub(crate) fn used_element(&self, number: u16) -> (u16, u32) {
        let place = Self::USED + 4 + 8 * u64::from(number % Self::SIZE);
        let length = self.memory.read_obj(GuestAddress(place + 4)).unwrap();
        (self.load(place), length)
    }

    /// The number of used messages.
    pub(crate) fn used(&self) -> u16 {
        self.load(Self::USED + 2)
    }

    /// The message for which the device requests a notification.
    pub(crate) fn avail_event(&self) -> u16 {
        self.load(Self::USED + 4 + 8 * u64::from(Self::SIZE))
    }
}

/// A device without a front end.
pub(crate) fn device(features: &[Feature], extensions: bool) -> Device {
    device_with(memory_file(0).try_clone().unwrap(), features, extensions)
}

/// A device with this end of a channel.
pub(crate) fn device_with(
    end: impl Into<OwnedFd>,
    features: &[Feature],
    extensions: bool,
) -> Device {
    let settings = Settings {
        features: offer(features, extensions),
        granularity: Granularity::Auto,
        prefault: false,
        allowed: Vec::new(),
        name: None,
        floor: Floor::Bytes(1 << 20),
        boot_grace: Duration::from_secs(60),
    };
    let state = State::new(0);
    Device::new(settings, state, None, Channel::new(end.into()), None).unwrap()
}
