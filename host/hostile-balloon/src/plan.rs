// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The features of a device, and its behaviour at the end: the part of a seed that does not depend on
//! the guest.

use std::time::Duration;

use clap::ValueEnum;
use fastrand::Rng;
use serde::Serialize;
use vhost_user_balloon::virtio::features::{Feature, config_size, offer};
use vhost_user_balloon::virtio::kind::Kind;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_IN_ORDER;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// How long a device is hostile after a driver has started it.
const SHORTEST: u64 = 100;
const LONGEST: u64 = 500;

/// A device.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The feature bits that it offers.
    pub(crate) features: u64,
    /// QEMU's options for it.
    pub(crate) properties: Properties,
    /// How long it is hostile before it may be unplugged.
    pub(crate) time: Duration,
    /// Its behaviour from then on.
    pub(crate) end: End,
    /// Its defect from the start.
    pub(crate) flaw: Option<Flaw>,
}

/// A defect of a whole PCI device. A driver must not bind to such a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// Its first queue has no entries.
    NoEntries,
    /// Its queues have a number of entries that is no power of two.
    OddEntries,
    /// It refuses the features that its driver chooses.
    RefusesFeatures,
    /// It cannot interrupt.
    NoInterrupts,
    /// The notification addresses of its queues are outside of its BAR.
    NotifiedElsewhere,
    /// It lacks the capability for its configuration space.
    HiddenConfig,
    /// Its configuration space extends beyond its BAR.
    ConfigBeyondEnd,
}

impl Flaw {
    const ALL: [Self; 7] = [
        Self::NoEntries,
        Self::OddEntries,
        Self::RefusesFeatures,
        Self::NoInterrupts,
        Self::NotifiedElsewhere,
        Self::HiddenConfig,
        Self::ConfigBeyondEnd,
    ];
}

/// The properties of QEMU's device.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Properties {
    pub(crate) num_vqs: usize,
    pub(crate) vq_size: u16,
    pub(crate) config_size: usize,
}

/// The behaviour of a device during teardown by its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum End {
    /// It follows the protocol.
    WellBehaved,
    /// It behaves as before.
    Hostile,
    /// It uses one buffer a second.
    Slow,
    /// It uses no buffer any more.
    Silent,
    /// It follows the protocol until the test sends a line, and uses no buffer any more.
    FallsSilent,
    /// It follows the protocol until the test sends a line, and uses a buffer that the first queue does not have.
    Breaks,
    /// It vanishes, as if it were pulled out, after a second in which it follows the protocol.
    Gone,
}

impl Plan {
    /// The device of a seed, from the seed's random numbers.
    pub(crate) fn new(random: &mut Rng, is_pci: bool) -> Self {
        let all = Feature::ALL.iter().copied();
        let chosen: Vec<Feature> = all.filter(|_| random.bool()).collect();
        let mut features = offer(&chosen, false);
        for feature in [VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_F_IN_ORDER] {
            if random.u8(..4) == 0 {
                features |= 1 << feature;
            }
        }
        let sizes = [256, 256, 256, 1024, 64, 16, 4, 2, 1];
        Self {
            features,
            properties: Properties {
                // Some lack the queue of an offered feature.
                num_vqs: queues(features) - usize::from(random.u8(..64) == 0),
                vq_size: sizes[random.usize(..sizes.len())],
                // Some lack fields.
                config_size: match random.u8(..8) {
                    0 => 4 * random.usize(1..6),
                    _ => config_size(features),
                },
            },
            time: Duration::from_millis(random.u64(SHORTEST..LONGEST)),
            end: match random.u8(..128) {
                0 => End::Slow,
                1..9 => End::Silent,
                9..49 => End::Hostile,
                _ => End::WellBehaved,
            },
            flaw: (is_pci && random.u8(..16) == 0)
                .then(|| Flaw::ALL[random.usize(..Flaw::ALL.len())]),
        }
    }

    /// A device that behaves like this from the start, and offers these features. Without features it offers all but
    /// page sets, which would need too few messages.
    pub(crate) fn only(end: End, offered: &[Feature]) -> Self {
        let features = match offered {
            [] => Feature::ALL
                .iter()
                .filter(|&&feature| feature != Feature::PageSets)
                .fold(offer(&[], true), |set, feature| set | feature.mask()),
            offered => offer(offered, false),
        };
        Self {
            features,
            properties: Properties {
                num_vqs: queues(features),
                vq_size: 256,
                config_size: config_size(features),
            },
            time: Duration::ZERO,
            end,
            flaw: None,
        }
    }
}

/// How many queues a device with these features has.
fn queues(features: u64) -> usize {
    Kind::ALL
        .iter()
        .filter(|kind| kind.number(features).is_some())
        .count()
}
