// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Checks the front end's setup of the device.
//!
//! A VM must not end because of wrong QEMU options: it runs without a balloon, or QEMU does not start. So this skips
//! messages that no worker accepts. It logs each problem once for each VM, with the right option.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use log::{Level, error, info, log};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::journal::{Journal, is_about_queue, queue};
use super::memory::{adds_memory, word};
use super::optional::{self, Optional};
use crate::queues::virtqueue::MAX_QUEUE_SIZE;
use crate::vhost_user::message::{Message, request};
use crate::virtio::features::config_size;
use crate::virtio::kind::{Kind, MAX_QUEUES};

/// How long after its last message a front end has announced all of its queues. Another message shows it at once.
const QUIET: Duration = Duration::from_secs(5);

/// What to do with a message of the front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The worker gets it.
    Forward,
    /// The worker does not get it, and the front end gets no error.
    LeaveOut,
    /// The front end loses its connection. It has not started its VM yet.
    Disconnect,
}

/// A problem with the options of the front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Problem {
    NoConfig,
    ShortConfig,
    PrivateMemory,
    QueueSize,
    Descriptors,
    /// A message with this name.
    NotOffered(&'static str),
}

/// The known options of the front end.
#[derive(Debug)]
pub(super) struct Setup {
    /// The features that the device offers.
    offered: u64,
    /// How many queues the front end has announced.
    queues: usize,
    /// Whether that was checked.
    checked: bool,
    /// When the last message arrived.
    last: Instant,
    /// Whether a message that adds memory was skipped, so that memory is missing.
    lacks_memory: bool,
    /// Whether the front end announces its queues before a driver has accepted features, as QEMU does. It then has an
    /// option for the number of queues, and each of its reads covers the whole configuration space. Unknown before either.
    announces: Option<bool>,
    /// The deadline for a driver to start the device, until one has.
    driver_due: Option<Instant>,
    logged: BTreeSet<Problem>,
}

impl Setup {
    /// The setup of the front end with this journal. Its guest boots within `boot`.
    /// Checks of an earlier supervisor are not repeated.
    pub(super) fn new(journal: &Journal, boot: Duration) -> Self {
        let is_new = journal.messages().is_empty();
        Self {
            offered: 0,
            queues: 0,
            checked: false,
            announces: (!is_new).then_some(false),
            driver_due: is_new.then(|| Instant::now() + boot),
            last: Instant::now(),
            lacks_memory: false,
            logged: BTreeSet::new(),
        }
    }

    /// Records an answer of the worker.
    pub(super) fn answered(&mut self, answer: &Message) {
        if answer.request() == request::GET_FEATURES {
            self.offered = word(answer.body(), 0).unwrap_or_default();
        }
    }

    /// Whether the number of queues has still to be checked.
    pub(super) fn is_pending(&self) -> bool {
        self.announces == Some(true) && !self.checked
    }

    /// Checks the number of queues, when the front end has announced all of them. Without one of its queues a
    /// driver does not start.
    pub(super) fn check_queues(&mut self) {
        if self.last.elapsed() >= QUIET {
            self.count_queues();
        }
    }

    fn count_queues(&mut self) {
        if !self.is_pending() {
            return;
        }
        self.checked = true;
        let (has, needed) = (self.queues, Kind::present(self.offered).count());
        let level = match has {
            _ if has < needed => Level::Error,
            _ if has > MAX_QUEUES => Level::Warn,
            _ if has > needed => Level::Info,
            _ => return,
        };
        log!(
            level,
            "QEMU's device has {has} queues, and a balloon with these --features and --extensions has {needed}; \
             start QEMU's device with num_vqs={needed}"
        );
    }

    /// When to check whether a driver has started.
    pub(super) fn driver_due(&self) -> Option<Instant> {
        self.driver_due
    }

    /// Logs that no driver has started in time. vhost-user has no message with the device type that
    /// QEMU shows to the guest.
    pub(super) fn check_driver(&mut self) {
        if self.driver_due.is_some_and(|due| Instant::now() >= due) {
            self.driver_due = None;
            info!(
                "no driver has started the device yet; if the guest has booted, its kernel lacks a driver for a \
                 virtio balloon, or QEMU's device has another number than virtio-id=5"
            );
        }
    }

    /// Checks a message of the front end.
    pub(super) fn check(&mut self, message: &Message, journal: &Journal) -> Verdict {
        self.last = Instant::now();
        if let Some(message) = optional::find(message) {
            self.not_offered(message);
            return Verdict::LeaveOut;
        }
        let queue = queue(message);
        if is_about_queue(message) {
            let number = usize::try_from(queue).unwrap_or(usize::MAX);
            self.announces.get_or_insert(true);
            self.queues = self.queues.max(number.saturating_add(1));
            if number >= MAX_QUEUES {
                return Verdict::LeaveOut;
            }
        } else {
            self.count_queues();
        }
        if message.request() == request::SET_VRING_ADDR {
            self.driver_due = None;
        }
        match message.request() {
            request::SET_FEATURES => {
                self.announces.get_or_insert(false);
                Verdict::Forward
            }
            request::SET_PROTOCOL_FEATURES if !has_config(message) => {
                self.no_config();
                Verdict::Disconnect
            }
            request::GET_CONFIG => {
                self.check_config(message);
                Verdict::Forward
            }
            request::SET_VRING_NUM if !has_queue_size(message) => {
                self.log(
                    Problem::QueueSize,
                    &format!(
                        "the device has queues of a size that is no power of two up to {MAX_QUEUE_SIZE}; start \
                         QEMU's device with vq_size=256, Cloud Hypervisor's with queue_sizes=[256,256], or \
                         crosvm's with max-queue-size=256"
                    ),
                );
                Verdict::LeaveOut
            }
            request::SET_VRING_ADDR if !journal.has_memory_for(message) => {
                if !self.lacks_memory {
                    self.private_memory();
                }
                Verdict::LeaveOut
            }
            // Without rings a queue does not start.
            request::SET_VRING_KICK if !journal.has_rings(queue) => Verdict::LeaveOut,
            _ => Verdict::Forward,
        }
    }

    /// Records a skipped message.
    pub(super) fn left_out(&mut self, message: &Message) {
        self.lacks_memory |= adds_memory(message);
    }

    /// Logs that the supervisor could not receive the file descriptors of this message.
    pub(super) fn no_descriptors(&mut self, message: &str) {
        self.log(
            Problem::Descriptors,
            &format!(
                "no file descriptor is left for {message} from the VMM, and the VM runs without its balloon; raise \
                 LimitNOFILE= of the daemon's service, and start the VM again"
            ),
        );
    }

    /// Logs that the front end uses a part of the protocol that it should not.
    fn not_offered(&mut self, message: &Optional) {
        let Optional { name, feature, .. } = message;
        self.log(
            Problem::NotOffered(name),
            &format!(
                "refusing {name} from the VMM, which belongs to VHOST_USER_PROTOCOL_F_{feature}: this daemon does not \
                 offer that; the guest keeps its balloon"
            ),
        );
    }

    /// Logs that the daemon cannot see the guest's memory.
    pub(super) fn private_memory(&mut self) {
        self.log(
            Problem::PrivateMemory,
            "the guest's memory is not shared with other processes; start the VMM with shared memory, as QEMU's \
             memory-backend-memfd with share=on is, and with memory-backend= in QEMU's option -machine",
        );
    }

    fn no_config(&mut self) {
        let needed = config_size(self.offered);
        self.log(
            Problem::NoConfig,
            &format!(
                "QEMU's device has no configuration space, and the guest would read a target of 16 TiB; start it \
                 with config_size={needed}"
            ),
        );
    }

    fn check_config(&mut self, message: &Message) {
        let needed = config_size(self.offered);
        let read = word(message.body(), 0).unwrap_or_default();
        // The offset comes first.
        let (offset, size) = (read & u64::from(u32::MAX), read >> 32);
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if self.announces == Some(true) && offset == 0 && size < needed {
            self.log(
                Problem::ShortConfig,
                &format!(
                    "QEMU's device has {size} bytes of configuration space, and a balloon with these --features \
                     and --extensions has {needed}; start QEMU's device with config_size={needed}"
                ),
            );
        }
    }

    fn log(&mut self, problem: Problem, text: &str) {
        if self.logged.insert(problem) {
            error!("{text}");
        }
    }
}

/// Whether the front end uses the device's configuration space.
fn has_config(message: &Message) -> bool {
    let features = word(message.body(), 0).unwrap_or_default();
    features & VhostUserProtocolFeatures::CONFIG.bits() != 0
}

/// Whether the device can have a queue of this size.
fn has_queue_size(message: &Message) -> bool {
    let size = word(message.body(), 0).unwrap_or_default() >> 32;
    size.is_power_of_two() && size <= MAX_QUEUE_SIZE as u64
}
