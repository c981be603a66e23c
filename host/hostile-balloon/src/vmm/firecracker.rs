// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Firecracker's device, as of commit 81b38b9dad60.
//!
//! It reads only the first descriptor of a list of pages and of statistics. A list that it considers too long stays
//! in the queue for good.

use balloon_wire::stat;
use vhost_user_balloon::virtio::features::Feature;
use vhost_user_balloon::virtio::kind::Kind;
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use vm_memory::GuestMemoryMmap;

use crate::vmm::chain::{Chain, NUMBER};
use crate::vmm::rules::{Profile, Rules, Verdict, check_numbers};

/// The most page frame numbers of a message.
const PAGES: u32 = 256;

/// The longest message of statistics in bytes.
const STATISTICS: u32 = 256 * 10;

/// The first tag that the device does not know.
const UNKNOWN_TAG: u16 = 16;

/// The steps of the driver's set-up, each with all bits of the status.
const SEEN: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVEN: u32 = SEEN | VIRTIO_CONFIG_S_DRIVER;
const NEGOTIATED: u32 = DRIVEN | VIRTIO_CONFIG_S_FEATURES_OK;
const READY: u32 = NEGOTIATED | VIRTIO_CONFIG_S_DRIVER_OK;
const STEPS: [(u32, u32); 4] = [
    (0, SEEN),
    (SEEN, DRIVEN),
    (DRIVEN, NEGOTIATED),
    (NEGOTIATED, READY),
];

const PROFILE: Profile = Profile {
    name: "Firecracker",
    features: (1 << VIRTIO_F_VERSION_1)
        | Feature::Stats.mask()
        | Feature::DeflateOnOom.mask()
        | Feature::FreePageHinting.mask()
        | Feature::FreePageReporting.mask(),
    queues: &[
        (Some(Kind::Inflate), 256),
        (Some(Kind::Deflate), 256),
        (Some(Kind::Stats), 256),
        (Some(Kind::Hinting), 256),
        (Some(Kind::Reporting), 256),
    ],
    uses_singly: false,
    counts_reports: false,
};

/// The device.
pub(crate) struct Firecracker;

impl Rules for Firecracker {
    fn profile(&self) -> &'static Profile {
        &PROFILE
    }

    fn check_status(&self, before: u8, status: u8) -> Verdict {
        let (from, to) = (u32::from(before), u32::from(status));
        if to == 0 || to & VIRTIO_CONFIG_S_FAILED != 0 || STEPS.contains(&(from, to)) {
            return Ok(());
        }
        Err(format!(
            "status {to:#x} after {from:#x}, which is no step of the set-up: it is ignored"
        ))
    }

    fn check_set_up(&self, status: u8) -> Verdict {
        if u32::from(status) != NEGOTIATED {
            return Err(format!(
                "a queue is set up while the status is {status:#x}: that is ignored"
            ));
        }
        Ok(())
    }

    /// The device needs all of its queues, also those of features that the driver has not accepted.
    fn check_ready(&self, accepted: u64, ready: &[bool]) -> Verdict {
        PROFILE.check_queues(accepted, ready)?;
        if !ready.iter().all(|ready| *ready) {
            return Err(format!(
                "features {accepted:#x} of {:#x} leave a queue without a driver: the device does not start",
                PROFILE.features
            ));
        }
        Ok(())
    }

    fn check_pages(&self, chain: &Chain) -> Verdict {
        check_numbers(chain)?;
        check_single(chain, "a list of pages")?;
        let pages: u32 = chain.parts.iter().map(|part| part.length / NUMBER).sum();
        if pages > PAGES {
            return Err(format!(
                "{pages} pages in a message, and {PAGES} are the most: the message is never returned"
            ));
        }
        Ok(())
    }

    fn check_statistics(&self, chain: &Chain) -> Verdict {
        check_single(chain, "a message of statistics")?;
        for part in &chain.parts {
            if part.is_writable {
                return Err("statistics that the device is to write".to_owned());
            }
            let length = usize::try_from(part.length).unwrap_or(usize::MAX);
            if part.length > STATISTICS || length % stat::SIZE != 0 {
                return Err(format!(
                    "statistics of {length} bytes: the device reads whole ones of 10 bytes, up to {STATISTICS} bytes"
                ));
            }
        }
        Ok(())
    }

    fn check_tag(&self, tag: u16) -> Verdict {
        if tag >= UNKNOWN_TAG {
            return Err(format!(
                "a statistic with the tag {tag}, which the device counts as an error"
            ));
        }
        Ok(())
    }

    fn check_report(&self, chain: &Chain, _memory: &GuestMemoryMmap) -> Verdict {
        chain
            .parts
            .iter()
            .try_for_each(|part| part.check_whole_pages())
    }
}

/// Checks that a message has one part.
fn check_single(chain: &Chain, what: &str) -> Verdict {
    match chain.parts.len() {
        1 => Ok(()),
        parts => Err(format!(
            "{what} in {parts} parts: the device reads the first one only"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::chain::Part;

    /// A message with parts of these lengths.
    fn chain(lengths: &[u32]) -> Chain {
        let parts = lengths.iter().map(|&length| Part {
            address: 0x1000,
            length,
            is_writable: false,
        });
        Chain {
            head: 0,
            parts: parts.collect(),
        }
    }

    fn refusal(verdict: Verdict) -> String {
        verdict.expect_err("it is refused")
    }

    #[test]
    fn a_message_has_up_to_256_pages_in_one_part() {
        for length in [0, 4, 1024] {
            assert_eq!(Firecracker.check_pages(&chain(&[length])), Ok(()));
        }
        assert_eq!(
            refusal(Firecracker.check_pages(&chain(&[1028]))),
            "257 pages in a message, and 256 are the most: the message is never returned"
        );
        assert_eq!(
            refusal(Firecracker.check_pages(&chain(&[4, 4]))),
            "a list of pages in 2 parts: the device reads the first one only"
        );
    }

    #[test]
    fn statistics_are_whole_and_known() {
        assert_eq!(Firecracker.check_statistics(&chain(&[160])), Ok(()));
        for lengths in [&[165][..], &[2570], &[80, 80]] {
            assert!(Firecracker.check_statistics(&chain(lengths)).is_err());
        }
        assert_eq!(Firecracker.check_tag(15), Ok(()));
        assert!(Firecracker.check_tag(16).is_err());
    }

    #[test]
    fn the_driver_takes_one_step_at_a_time() {
        for (before, status) in [(0, 1), (1, 3), (3, 11), (11, 15), (15, 0), (3, 0x83)] {
            assert_eq!(Firecracker.check_status(before, status), Ok(()));
        }
        for (before, status) in [(0, 3), (3, 15), (15, 11), (15, 15)] {
            assert!(Firecracker.check_status(before, status).is_err());
        }
        assert_eq!(Firecracker.check_set_up(11), Ok(()));
        assert!(Firecracker.check_set_up(3).is_err());
        assert!(Firecracker.check_set_up(15).is_err());
    }

    #[test]
    fn every_queue_needs_a_driver() {
        let features = PROFILE.features;
        assert_eq!(Firecracker.check_ready(features, &[true; 5]), Ok(()));
        let without = features & !Feature::FreePageReporting.mask();
        let text = refusal(Firecracker.check_ready(without, &[true, true, true, true, false]));
        assert!(text.ends_with("the device does not start"), "{text}");
    }
}
