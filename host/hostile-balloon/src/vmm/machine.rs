// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device that does what a VMM's does, and ends at the first thing that the VMM would not accept.

use std::collections::BTreeMap;
use std::process;
use std::sync::{Arc, Mutex};

use balloon_wire::BALLOON_PAGE_SIZE;
use log::{error, info};
use nix::fcntl::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};
use serde_json::json;
use vhost_user_balloon::virtio::features::Feature;
use vhost_user_balloon::virtio::kind::Kind;
use virtio_bindings::bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::device::{Device, Transport, Watch, lock};
use crate::ring::Ring;
use crate::vmm::chain::{Chain, Table};
use crate::vmm::hints::{Hint, Hints};
use crate::vmm::rules::{Rules, Verdict, check_write};

/// The fields of the configuration space: the target, the size, and the id of hints.
const TARGET: usize = 0;
const ACTUAL: usize = 1;
const HINTS: usize = 2;

/// What the test wants the device to do.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// Nothing but the answer.
    Show,
    /// Set the target, in balloon pages.
    Target(u32),
    /// Request statistics.
    Statistics,
    /// Begin a round of hints, and end it when the driver does, if that is true.
    Hint(bool),
    /// End the round of hints.
    EndHints,
}

/// What the device has seen of its driver: the answer to each order. It is counted from the last reset on, except the
/// sums.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Seen {
    /// Whether a driver uses the device.
    active: bool,
    /// The size in balloon pages that the driver has written.
    actual: u32,
    /// How many messages there were, in sum.
    messages: u64,
    /// How many pages were inflated and deflated, in sum.
    inflated: u64,
    deflated: u64,
    /// The hinted and reported memory that the device has discarded in bytes, in sum.
    hinted: u64,
    reported: u64,
    /// How often the driver has sent statistics, and the latest values by their tags.
    samples: u64,
    statistics: BTreeMap<u16, u64>,
    /// The commands of both sides about hints.
    host_hint: u32,
    guest_hint: Option<u32>,
}

#[derive(Default)]
struct State {
    seen: Seen,
    /// The buffer for statistics that the device has.
    statistics: Option<u16>,
    hints: Hints,
}

/// The device.
pub(crate) struct Machine {
    rules: Box<dyn Rules>,
    device: Arc<Device>,
    state: Mutex<State>,
}

impl Machine {
    /// A device with these rules.
    pub(crate) fn new(rules: Box<dyn Rules>, device: Arc<Device>) -> Self {
        Self {
            rules,
            device,
            state: Mutex::default(),
        }
    }

    /// Follows an order, and returns what the device has seen.
    pub(crate) fn follow(&self, transport: &dyn Transport, order: Order) -> Seen {
        let mut state = lock(&self.state);
        match order {
            Order::Show => {}
            Order::Target(pages) => {
                self.device.config().fields[TARGET] = pages;
                transport.config_changed();
            }
            Order::Statistics => self.request_statistics(transport, &mut state),
            Order::Hint(ends_itself) => {
                state.hints.begin(ends_itself);
                self.publish_hint(transport, &state.hints);
            }
            Order::EndHints => {
                state.hints.end();
                self.publish_hint(transport, &state.hints);
            }
        }
        state.seen.host_hint = state.hints.host;
        state.seen.guest_hint = state.hints.guest;
        state.seen.actual = self.device.config().fields[ACTUAL];
        state.seen.clone()
    }

    /// Returns the buffer for statistics, if the device has it.
    fn request_statistics(&self, transport: &dyn Transport, state: &mut State) {
        let queues = self.rules.profile().queues;
        let number = queues
            .iter()
            .position(|(kind, _)| *kind == Some(Kind::Stats));
        let (Some(number), Some(head)) = (number, state.statistics.take()) else {
            return;
        };
        let used = self
            .device
            .with_ring(transport, number, |mut ring| put(&mut ring, &[(head, 0)]));
        self.insist(used.unwrap_or(Ok(())));
    }

    fn publish_hint(&self, transport: &dyn Transport, hints: &Hints) {
        self.device.config().fields[HINTS] = hints.host;
        transport.config_changed();
    }

    /// Ends the process, with a message, if the VMM would not accept what the driver has done.
    fn insist(&self, verdict: Verdict) {
        if let Err(text) = verdict {
            let text = format!("{} does not accept: {text}", self.rules.profile().name);
            error!("{text}");
            println!("{}", json!({ "rejected": text }));
            process::exit(1);
        }
    }

    /// The driver is ready.
    fn start(&self, transport: &dyn Transport, state: &mut State) -> Verdict {
        let accepted = self.device.acked();
        let queues = self.rules.profile().queues;
        let mut ready = Vec::new();
        for number in 0..queues.len() {
            transport.with_queue(number, &mut |raw| {
                let queue = raw.queue_mut();
                queue.set_event_idx(Feature::EventIdx.is_in(accepted));
                ready.push(queue.ready());
            });
        }
        self.rules.check_ready(accepted, &ready)?;
        info!("a driver with the features {accepted:#x}");
        state.seen.active = true;
        // It may have made messages available before.
        (0..queues.len()).try_for_each(|number| self.serve(transport, number, state))
    }

    /// Takes the messages of a queue.
    fn serve(&self, transport: &dyn Transport, number: usize, state: &mut State) -> Verdict {
        let Some((Some(kind), _)) = self.rules.profile().queues.get(number) else {
            return Ok(());
        };
        let before = state.hints.host;
        let served = self.device.with_ring(transport, number, |mut ring| {
            self.serve_ring(*kind, state, &mut ring)
        });
        if state.hints.host != before {
            self.publish_hint(transport, &state.hints);
        }
        served.unwrap_or(Ok(()))
    }

    fn serve_ring(&self, kind: Kind, state: &mut State, ring: &mut Ring<'_>) -> Verdict {
        let uses_singly = self.rules.profile().uses_singly;
        loop {
            let (queue, memory) = ring.library();
            let table = Table {
                address: queue.desc_table(),
                entries: queue.size(),
            };
            let chains = queue
                .iter(memory)
                .map_err(|error| format!("more messages than a queue has entries: {error}"))?;
            let heads: Vec<u16> = chains.map(|chain| chain.head_index()).collect();
            let mut used = Vec::new();
            for head in heads {
                let (_, memory) = ring.library();
                let chain = Chain::read(table, head, memory)?;
                state.seen.messages += 1;
                used.extend(self.take(kind, state, &chain, memory)?);
                if uses_singly {
                    put(ring, &used)?;
                    used.clear();
                }
            }
            put(ring, &used)?;
            let (queue, memory) = ring.library();
            if !queue.event_idx_enabled() || !queue.enable_notification(memory).unwrap_or(false) {
                return Ok(());
            }
        }
    }

    /// Takes a message. Returns it with the length for the used ring, unless the device keeps it.
    fn take(
        &self,
        kind: Kind,
        state: &mut State,
        chain: &Chain,
        memory: &GuestMemoryMmap,
    ) -> Result<Option<(u16, u32)>, String> {
        let mut length = 0;
        match kind {
            Kind::Inflate | Kind::Deflate => {
                self.rules.check_pages(chain)?;
                let pages = chain.pages(memory)?;
                let count = u64::try_from(pages.len()).unwrap_or(0);
                if kind == Kind::Inflate {
                    discard_pages(memory, &pages)?;
                    state.seen.inflated += count;
                } else {
                    state.seen.deflated += count;
                }
            }
            Kind::Stats => {
                self.take_statistics(state, chain, memory)?;
                return Ok(None);
            }
            Kind::Hinting => {
                for part in &chain.parts {
                    match state.hints.take(*part, memory)? {
                        Hint::Nothing => {}
                        Hint::End => state.hints.end(),
                        Hint::Discard => {
                            discard(memory, part.address, part.length.into())?;
                            state.seen.hinted += u64::from(part.length);
                        }
                    }
                }
            }
            Kind::Reporting => {
                self.rules.check_report(chain, memory)?;
                for part in &chain.parts {
                    discard(memory, part.address, part.length.into())?;
                    state.seen.reported += u64::from(part.length);
                    if self.rules.profile().counts_reports {
                        length += part.length;
                    }
                }
            }
            Kind::Requests => return Err("a message of the extended protocol".to_owned()),
        }
        Ok(Some((chain.head, length)))
    }

    fn take_statistics(
        &self,
        state: &mut State,
        chain: &Chain,
        memory: &GuestMemoryMmap,
    ) -> Verdict {
        self.rules.check_statistics(chain)?;
        let values = chain.statistics(memory)?;
        values
            .iter()
            .try_for_each(|&(tag, _)| self.rules.check_tag(tag))?;
        if state.statistics.replace(chain.head).is_some() {
            return Err("a second buffer for statistics".to_owned());
        }
        state.seen.samples += 1;
        state.seen.statistics = values.into_iter().collect();
        Ok(())
    }

    /// The driver has reset the device.
    fn reset(&self, state: &mut State) {
        let mut config = self.device.config();
        config.fields[ACTUAL] = 0;
        config.fields[HINTS] = 0;
        state.statistics = None;
        state.hints = Hints::default();
        state.seen.active = false;
        state.seen.samples = 0;
        state.seen.statistics.clear();
    }
}

impl Watch for Machine {
    fn sets_status(&self, transport: &dyn Transport, before: u8, status: u8) {
        let mut state = lock(&self.state);
        self.insist(self.rules.check_status(before, status));
        if status == 0 {
            self.reset(&mut state);
        } else if u32::from(status) & VIRTIO_CONFIG_S_DRIVER_OK != 0 && !state.seen.active {
            self.insist(self.start(transport, &mut state));
        }
    }

    fn sets_up_queue(&self, status: u8) {
        self.insist(self.rules.check_set_up(status));
    }

    fn reads_config(&self, offset: u64, length: usize) {
        self.insist(self.rules.check_read(offset, length));
    }

    fn writes_config(&self, offset: u64, bytes: &[u8]) {
        self.insist(check_write(offset, bytes.len()));
        if let Some(bytes) = bytes.first_chunk() {
            self.device.config().fields[ACTUAL] = u32::from_le_bytes(*bytes);
        }
    }

    fn notifies(&self, transport: &dyn Transport, queue: u16) {
        let mut state = lock(&self.state);
        if state.seen.active {
            self.insist(self.serve(transport, queue.into(), &mut state));
        }
    }
}

/// Uses messages, and interrupts if the driver wants that.
fn put(ring: &mut Ring<'_>, used: &[(u16, u32)]) -> Verdict {
    let (queue, memory) = ring.library();
    if used.is_empty() {
        return Ok(());
    }
    if put_all(queue, memory, used).map_err(|error| format!("a used ring: {error}"))? {
        ring.interrupt();
    }
    Ok(())
}

fn put_all(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    used: &[(u16, u32)],
) -> Result<bool, virtio_queue::Error> {
    for &(head, length) in used {
        queue.add_used(memory, head, length)?;
    }
    queue.needs_notification(memory)
}

/// Discards pages, which are in ascending order.
fn discard_pages(memory: &GuestMemoryMmap, pages: &[u32]) -> Verdict {
    for run in pages.chunk_by(|page, next| page + 1 == *next) {
        let length = u64::try_from(run.len()).unwrap_or(0) * BALLOON_PAGE_SIZE;
        if let Some(first) = run.first() {
            discard(memory, u64::from(*first) * BALLOON_PAGE_SIZE, length)?;
        }
    }
    Ok(())
}

/// Discards memory of the guest, whose content is zero from then on.
fn discard(memory: &GuestMemoryMmap, address: u64, length: u64) -> Verdict {
    let (mut address, end) = (address, address + length);
    while address < end {
        let region = memory.find_region(GuestAddress(address));
        let region = region.ok_or_else(|| format!("no memory at {address:#x}"))?;
        let start = address - region.start_addr().0;
        let part = (end - address).min(region.len() - start);
        let file = region
            .file_offset()
            .ok_or_else(|| format!("no file with the memory at {address:#x}"))?;
        let offset = i64::try_from(file.start() + start).map_err(|error| error.to_string())?;
        let size = i64::try_from(part).map_err(|error| error.to_string())?;
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file.file(), flags, offset, size).map_err(|error| {
            format!("{part} bytes at {address:#x} cannot be discarded: {error}")
        })?;
        address += part;
    }
    Ok(())
}
