// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device as a whole PCI device, behind QEMU's vfio-user client, which passes on each register access of the
//! driver's transport.
//!
//! It is a virtio device of the specification's clause 4.1 (Virtio Over PCI Bus), without a legacy interface. It
//! interrupts by INTx, since QEMU 11.1 crashes when such a device with MSI-X is unplugged. All registers are in one
//! BAR:
//!
//! | offset | |
//! |---|---|
//! | 0 | the common configuration |
//! | 0x1000 | the interrupt's status |
//! | 0x2000 | the device's configuration space |
//! | 0x3000 | notifications. A hostile device does not need them: it looks at the queues all the time |

use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use log::warn;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, Server, ServerBackend};
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost_user_balloon::queues::virtqueue::MAX_QUEUE_SIZE;
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestRegionMmap};

use crate::device::{Device, Transport, Watch, lock};
use crate::pci_space::{
    COMMON, DEVICE_CONFIG, NOTIFICATIONS, STATUS, Shape, interrupts, regions, space,
};
use crate::plan::Flaw;
use crate::ring::RawQueue;

/// The number for no MSI-X vector.
const NO_VECTOR: u64 = 0xffff;

/// The offset of the command register, the only writable one in the PCI configuration space.
const COMMAND: std::ops::Range<usize> = 4..6;

/// The cause of an interrupt.
const QUEUE: u8 = 1;
const CONFIG: u8 = 2;

/// The interrupt line of the device.
#[derive(Default)]
struct Line {
    /// The front end's event for it.
    file: Option<File>,
    /// The causes that the guest has not read yet.
    status: u8,
    /// Whether the interrupt is masked, since the front end has received it.
    masked: bool,
}

impl Line {
    /// Interrupts the guest for `what`.
    fn interrupt(&mut self, what: u8) {
        self.status |= what;
        if let (Some(mut file), false, 1..) = (self.file.as_ref(), self.masked, self.status) {
            // It fails when the event's counter is full.
            let _ = file.write_all(&1_u64.to_ne_bytes());
            self.masked = true;
        }
    }
}

/// A queue, and the interrupt of its driver.
struct PciQueue {
    queue: Queue,
    line: Arc<Mutex<Line>>,
}

impl RawQueue for PciQueue {
    fn queue(&self) -> &Queue {
        &self.queue
    }

    fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    fn interrupt(&self) {
        lock(&self.line).interrupt(QUEUE);
    }
}

/// The registers, except those of queues.
#[derive(Default)]
struct Registers {
    offered_word: u32,
    accepted_word: u32,
    accepted: u64,
    status: u8,
    /// It differs with each read.
    generation: u8,
    queue: u16,
}

/// The device.
pub(crate) struct Pci {
    device: Arc<Device>,
    /// What else follows from the driver's accesses.
    watch: Option<Arc<dyn Watch>>,
    flaw: Option<Flaw>,
    /// How many entries each queue has.
    sizes: Vec<u16>,
    /// The PCI configuration space.
    space: Mutex<[u8; 256]>,
    registers: Mutex<Registers>,
    queues: Vec<Mutex<PciQueue>>,
    line: Arc<Mutex<Line>>,
}

impl Pci {
    /// A PCI device of this shape.
    pub(crate) fn new(device: Arc<Device>, shape: Shape, watch: Option<Arc<dyn Watch>>) -> Self {
        let line = Arc::<Mutex<Line>>::default();
        let queue = |_| {
            // Its largest size is a power of two.
            let queue = Queue::new(u16::try_from(MAX_QUEUE_SIZE).ok()?).ok()?;
            Some(Mutex::new(PciQueue {
                queue,
                line: Arc::clone(&line),
            }))
        };
        Self {
            device,
            watch,
            flaw: shape.flaw,
            space: Mutex::new(space(&shape)),
            registers: Mutex::default(),
            queues: shape.sizes.iter().filter_map(queue).collect(),
            sizes: shape.sizes,
            line,
        }
    }

    /// Calls a function on the queue that the driver has selected.
    fn with_chosen<T>(
        &self,
        registers: &Registers,
        act: impl FnOnce(&mut PciQueue) -> T,
    ) -> Option<T> {
        let queue = self.queues.get(usize::from(registers.queue))?;
        Some(act(&mut lock(queue)))
    }

    /// How many entries the queue with this number has.
    fn size_of(&self, number: u16) -> u16 {
        self.sizes.get(usize::from(number)).copied().unwrap_or(0)
    }

    /// The current common configuration.
    fn common(&self) -> [u8; COMMON] {
        let mut registers = lock(&self.registers);
        registers.generation = registers.generation.wrapping_add(1);
        let registers = &*registers;
        let word = |bits: u64, word: u32| match word {
            0 => bits & u64::from(u32::MAX),
            1 => bits >> 32,
            _ => 0,
        };
        let has_entries = self.flaw != Some(Flaw::NoEntries) || registers.queue != 0;
        let elsewhere = self.flaw == Some(Flaw::NotifiedElsewhere);
        let mut image = [0; COMMON];
        let mut put = |offset: usize, size: usize, value: u64| {
            if let Some(place) = image.get_mut(offset..offset + size) {
                place.copy_from_slice(&value.to_le_bytes()[..size]);
            }
        };
        put(0, 4, registers.offered_word.into());
        // One bit is between QEMU and a back end.
        let offered = self.device.features() & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        put(4, 4, word(offered, registers.offered_word));
        put(8, 4, registers.accepted_word.into());
        put(12, 4, word(registers.accepted, registers.accepted_word));
        put(16, 2, NO_VECTOR);
        put(18, 2, self.queues.len().try_into().unwrap_or(0));
        put(20, 1, registers.status.into());
        put(21, 1, registers.generation.into());
        put(22, 2, registers.queue.into());
        self.with_chosen(registers, |PciQueue { queue, .. }| {
            let size = if queue.ready() {
                queue.size()
            } else {
                self.size_of(registers.queue)
            };
            put(24, 2, u64::from(size) * u64::from(has_entries));
            put(26, 2, NO_VECTOR);
            put(28, 2, queue.ready().into());
            let place = if elsewhere { 0x7fff } else { registers.queue };
            put(30, 2, place.into());
            put(32, 8, queue.desc_table());
            put(40, 8, queue.avail_ring());
            put(48, 8, queue.used_ring());
        });
        image
    }

    /// Handles a write of the driver to the common configuration.
    fn set_common(&self, offset: u64, value: u32) {
        let mut registers = lock(&self.registers);
        let [low, high, ..] = value.to_le_bytes();
        let half = u16::from_le_bytes([low, high]);
        match offset {
            0 => registers.offered_word = value,
            8 => registers.accepted_word = value,
            // There are none above the lower 64.
            12 if registers.accepted_word < 2 => {
                let shift = 32 * registers.accepted_word;
                registers.accepted &= !(u64::from(u32::MAX) << shift);
                registers.accepted |= u64::from(value) << shift;
            }
            20 => {
                drop(registers);
                self.set_status(low);
            }
            22 => registers.queue = half,
            _ => {
                let most = self.size_of(registers.queue);
                self.with_chosen(&registers, |chosen| match offset {
                    24 => chosen.queue.set_size(half),
                    28 => {
                        // The driver may not have changed it.
                        if chosen.queue.size() > most {
                            chosen.queue.set_size(most);
                        }
                        chosen.queue.set_ready(half == 1);
                    }
                    32 => chosen.queue.set_desc_table_address(Some(value), None),
                    36 => chosen.queue.set_desc_table_address(None, Some(value)),
                    40 => chosen.queue.set_avail_ring_address(Some(value), None),
                    44 => chosen.queue.set_avail_ring_address(None, Some(value)),
                    48 => chosen.queue.set_used_ring_address(Some(value), None),
                    52 => chosen.queue.set_used_ring_address(None, Some(value)),
                    _ => {}
                });
                let status = registers.status;
                drop(registers);
                // The others are interrupts' vectors.
                if let (Some(watch), 24 | 28..) = (&self.watch, offset) {
                    watch.sets_up_queue(status);
                }
            }
        }
    }

    /// Handles a write of the driver to the status.
    fn set_status(&self, status: u8) {
        let mut registers = lock(&self.registers);
        let before = registers.status;
        if status == 0 {
            *registers = Registers::default();
            drop(registers);
            self.reset_queues();
        } else {
            registers.status = status;
            if self.flaw == Some(Flaw::RefusesFeatures) {
                registers.status &= !flag(VIRTIO_CONFIG_S_FEATURES_OK);
            }
            self.device.set_acked(registers.accepted);
            drop(registers);
        }
        if let Some(watch) = &self.watch {
            watch.sets_status(self, before, status);
        }
    }

    /// Passes on a write of the driver to a place behind the common configuration.
    fn watch_write(&self, offset: u64, data: &[u8]) {
        let Some(watch) = &self.watch else { return };
        match (offset, data.first_chunk()) {
            (DEVICE_CONFIG..NOTIFICATIONS, _) => watch.writes_config(offset - DEVICE_CONFIG, data),
            (NOTIFICATIONS.., Some(number)) => watch.notifies(self, u16::from_le_bytes(*number)),
            _ => {}
        }
    }

    fn reset_queues(&self) {
        for (number, queue) in self.queues.iter().enumerate() {
            lock(queue).queue.reset();
            self.device.forget(number);
        }
    }
}

impl Transport for Pci {
    fn serve(
        self: Arc<Self>,
        socket: &Path,
        announce: &dyn Fn(),
        begin: Box<dyn FnOnce()>,
    ) -> Result<()> {
        let server = Server::new(socket, true, interrupts(), regions())?;
        announce();
        let mut client = Client {
            pci: self,
            begin: Some(begin),
        };
        Ok(server.run(&mut client)?)
    }

    fn with_queue(&self, number: usize, act: &mut dyn FnMut(&mut dyn RawQueue)) {
        if let Some(queue) = self.queues.get(number) {
            act(&mut *lock(queue));
        }
    }

    fn config_changed(&self) {
        lock(&self.line).interrupt(CONFIG);
    }

    fn need_reset(&self) {
        let mut registers = lock(&self.registers);
        // The kernel waits without end for a device that was reset to have no status.
        if registers.status & flag(VIRTIO_CONFIG_S_DRIVER_OK) != 0 {
            registers.status |= flag(VIRTIO_CONFIG_S_NEEDS_RESET);
            drop(registers);
            self.config_changed();
        }
    }

    fn is_pci(&self) -> bool {
        true
    }
}

/// A bit of the status, which has eight.
fn flag(bit: u32) -> u8 {
    u8::try_from(bit).unwrap_or(0)
}

/// The part of `image` from `offset` on.
fn part(image: &[u8], offset: u64, length: usize) -> Vec<u8> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    image.iter().copied().skip(start).take(length).collect()
}

/// The client of vfio-user.
struct Client {
    pci: Arc<Pci>,
    /// The function to call when one connects.
    begin: Option<Box<dyn FnOnce()>>,
}

impl Client {
    /// Replaces the guest's memory map by the result of `change`, if there is one.
    fn change_memory(&self, change: impl FnOnce(&GuestMemoryMmap) -> Option<GuestMemoryMmap>) {
        let memory = self.pci.device.memory();
        let Ok(guard) = memory.lock() else { return };
        match change(&memory.memory()) {
            Some(changed) => guard.replace(changed),
            None => warn!("a part of the guest's memory does not fit"),
        }
    }
}

impl ServerBackend for Client {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let bytes = match (region, offset) {
            (VFIO_PCI_CONFIG_REGION_INDEX, _) => part(&*lock(&self.pci.space), offset, data.len()),
            (VFIO_PCI_BAR0_REGION_INDEX, DEVICE_CONFIG..NOTIFICATIONS) => {
                let offset = offset - DEVICE_CONFIG;
                if let Some(watch) = &self.pci.watch {
                    watch.reads_config(offset, data.len());
                }
                let offset = usize::try_from(offset).unwrap_or(usize::MAX);
                self.pci.device.read_config(offset, data.len())
            }
            // It is read once.
            (VFIO_PCI_BAR0_REGION_INDEX, STATUS) => {
                vec![mem::take(&mut lock(&self.pci.line).status)]
            }
            (VFIO_PCI_BAR0_REGION_INDEX, _) => part(&self.pci.common(), offset, data.len()),
            _ => Vec::new(),
        };
        data.fill(0);
        for (place, byte) in data.iter_mut().zip(bytes) {
            *place = byte;
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut word = [0; 4];
        for (place, byte) in word.iter_mut().zip(data) {
            *place = *byte;
        }
        let length = u64::try_from(COMMON).unwrap_or(0);
        match region {
            VFIO_PCI_BAR0_REGION_INDEX if offset < length => {
                self.pci.set_common(offset, u32::from_le_bytes(word));
            }
            VFIO_PCI_CONFIG_REGION_INDEX => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let mut space = lock(&self.pci.space);
                for ((place, old), new) in space.iter_mut().enumerate().skip(start).zip(data) {
                    if COMMAND.contains(&place) {
                        *old = *new;
                    }
                }
            }
            VFIO_PCI_BAR0_REGION_INDEX => self.pci.watch_write(offset, data),
            // The device ignores all other writes.
            _ => {}
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        _flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        file: Option<File>,
    ) -> io::Result<()> {
        // The device cannot access memory without a file.
        let Some(file) = file else { return Ok(()) };
        let file = FileOffset::new(file, offset);
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let region = GuestRegionMmap::from_range(GuestAddress(address), size, Some(file))
            .map_err(io::Error::other)?;
        self.change_memory(|memory| memory.insert_region(Arc::new(region)).ok());
        Ok(())
    }

    fn dma_unmap(&mut self, _flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        self.change_memory(|memory| {
            let (memory, _) = memory.remove_region(GuestAddress(address), size).ok()?;
            Some(memory)
        });
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.pci.set_status(0);
        // QEMU does so when it plugs the device.
        if let Some(begin) = self.begin.take() {
            begin();
        }
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        _start: u32,
        _count: u32,
        mut files: Vec<File>,
    ) -> io::Result<()> {
        if index == VFIO_PCI_INTX_IRQ_INDEX {
            let mut line = lock(&self.pci.line);
            if flags & VFIO_IRQ_SET_ACTION_TRIGGER != 0 {
                line.file = files.pop();
            }
            line.masked = flags & VFIO_IRQ_SET_ACTION_MASK != 0;
            if flags & VFIO_IRQ_SET_ACTION_UNMASK != 0 {
                // For causes that the guest has not read yet.
                line.interrupt(0);
            }
        }
        Ok(())
    }
}
