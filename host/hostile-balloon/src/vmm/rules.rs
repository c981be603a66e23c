// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a VMM's balloon device offers, and what it accepts of its driver.

use balloon_wire::config;
use vhost_user_balloon::virtio::kind::Kind;
use vm_memory::GuestMemoryMmap;

use crate::vmm::chain::{Chain, NUMBER};

/// The result of a check. An error is what the driver has done, and what the VMM then does.
pub(crate) type Verdict = Result<(), String>;

/// A device.
#[derive(Debug)]
pub(crate) struct Profile {
    /// The VMM's name.
    pub(crate) name: &'static str,
    /// The feature bits that it offers, with all of its options.
    pub(crate) features: u64,
    /// Its queues by their numbers: what each is for, if Linux knows that, and how many entries it has.
    pub(crate) queues: &'static [(Option<Kind>, u16)],
    /// Whether it uses one message after the other, with an interrupt each, or all of them together.
    pub(crate) uses_singly: bool,
    /// Whether it writes the length of a report to the used ring, although it has written nothing to the buffers.
    pub(crate) counts_reports: bool,
}

impl Profile {
    /// Checks that the driver has set up the queues of the features that it accepted, under the numbers that the device
    /// has given to its queues.
    pub(crate) fn check_queues(&self, accepted: u64, ready: &[bool]) -> Verdict {
        if accepted & !self.features != 0 {
            return Err(format!(
                "features {accepted:#x} of {:#x} that are offered",
                self.features
            ));
        }
        let present: Vec<Kind> = Kind::present(accepted).collect();
        for (number, ((kind, _), ready)) in self.queues.iter().zip(ready).enumerate() {
            let is_expected = kind.is_some_and(|kind| present.contains(&kind));
            if is_expected != *ready {
                let what = kind.map_or("of another feature".to_owned(), |kind| format!("{kind:?}"));
                let done = if *ready { "is set up" } else { "is not set up" };
                return Err(format!(
                    "queue {number} {done}, which is {what}, with the features {accepted:#x}"
                ));
            }
        }
        Ok(())
    }
}

/// What a VMM's device accepts. Each function checks one thing that the driver does.
pub(crate) trait Rules: Send + Sync {
    /// The device.
    fn profile(&self) -> &'static Profile;

    /// The driver writes `status`, and the status was `before`.
    fn check_status(&self, _before: u8, _status: u8) -> Verdict {
        Ok(())
    }

    /// The driver sets up a queue while the device has this status.
    fn check_set_up(&self, _status: u8) -> Verdict {
        Ok(())
    }

    /// The driver is ready, has accepted these features, and has set up some of the queues.
    fn check_ready(&self, accepted: u64, ready: &[bool]) -> Verdict;

    /// The driver reads a part of the configuration space.
    fn check_read(&self, _offset: u64, _length: usize) -> Verdict {
        Ok(())
    }

    /// A list of pages on the inflate or the deflate queue.
    fn check_pages(&self, chain: &Chain) -> Verdict;

    /// A message on the statistics queue.
    fn check_statistics(&self, _chain: &Chain) -> Verdict {
        Ok(())
    }

    /// A statistic with this tag.
    fn check_tag(&self, _tag: u16) -> Verdict {
        Ok(())
    }

    /// A report of free pages.
    fn check_report(&self, chain: &Chain, memory: &GuestMemoryMmap) -> Verdict;
}

/// Checks that the driver writes only its own field, and the whole of it: the balloon's size. The other VMMs would
/// take any part of it, and Firecracker also the host's own fields.
pub(crate) fn check_write(offset: u64, length: usize) -> Verdict {
    let actual = u64::try_from(config::ACTUAL).unwrap_or(0);
    if offset != actual || length != size_of::<u32>() {
        return Err(format!(
            "a write of {length} bytes at {offset} of the configuration space: Cloud Hypervisor refuses it"
        ));
    }
    Ok(())
}

/// Checks that a list of pages is whole numbers that the driver has written.
pub(crate) fn check_numbers(chain: &Chain) -> Verdict {
    for part in &chain.parts {
        if part.is_writable {
            return Err("a list of pages that the device is to write: it is not read".to_owned());
        }
        if part.length % NUMBER != 0 {
            return Err(format!(
                "a list of pages of {} bytes, which are no whole numbers",
                part.length
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vhost_user_balloon::virtio::features::Feature;

    use super::*;
    use crate::vmm::chain::Part;

    const PROFILE: Profile = Profile {
        name: "a VMM",
        features: Feature::Stats.mask() | Feature::FreePageReporting.mask(),
        queues: &[
            (Some(Kind::Inflate), 4),
            (Some(Kind::Deflate), 4),
            (Some(Kind::Stats), 4),
            (Some(Kind::Reporting), 4),
            (None, 4),
        ],
        uses_singly: false,
        counts_reports: false,
    };

    #[test]
    fn queues_have_the_numbers_of_the_device() {
        let reporting = Feature::FreePageReporting.mask();
        let check = |accepted, ready: &[bool]| PROFILE.check_queues(accepted, ready);
        let all = PROFILE.features;
        assert_eq!(check(all, &[true, true, true, true, false]), Ok(()));
        assert_eq!(check(reporting, &[true, true, false, true, false]), Ok(()));
        for (accepted, ready, text) in [
            (
                reporting,
                [true, true, true, false, false],
                "queue 2 is set up, which is Stats, with the features 0x20",
            ),
            (
                all,
                [true, true, true, false, false],
                "queue 3 is not set up, which is Reporting, with the features 0x22",
            ),
            (
                all,
                [true; 5],
                "queue 4 is set up, which is of another feature, with the features 0x22",
            ),
        ] {
            assert_eq!(check(accepted, &ready), Err(text.to_owned()));
        }
        assert_eq!(
            check(Feature::PagePoison.mask(), &[true, true]),
            Err("features 0x10 of 0x22 that are offered".to_owned())
        );
    }

    #[test]
    fn only_the_size_may_be_written() {
        assert_eq!(check_write(4, 4), Ok(()));
        for (offset, length) in [(0, 4), (4, 2), (4, 8), (8, 4)] {
            assert!(check_write(offset, length).is_err(), "{length} at {offset}");
        }
    }

    #[test]
    fn page_lists_are_whole_numbers_to_read() {
        let chain = |length, is_writable| Chain {
            head: 0,
            parts: vec![Part {
                address: 0,
                length,
                is_writable,
            }],
        };
        assert_eq!(check_numbers(&chain(1024, false)), Ok(()));
        assert!(check_numbers(&chain(1024, true)).is_err());
        assert!(check_numbers(&chain(1023, false)).is_err());
    }
}
