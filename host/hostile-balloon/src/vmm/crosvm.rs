// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! crosvm's device, as of commit f1e797a68dad.
//!
//! Its thread ends at the first chain that it cannot read. The device then does nothing any more, and does not say so.
//! It numbers its queues by the features that it offers.

use balloon_wire::stat;
use vhost_user_balloon::virtio::features::Feature;
use vhost_user_balloon::virtio::kind::Kind;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::GuestMemoryMmap;

use crate::vmm::chain::{Chain, Part};
use crate::vmm::rules::{Profile, Rules, Verdict, check_numbers};

/// Two bits that Linux does not know: suspending a single device, and reports of the working set.
const SUSPEND: u64 = 1 << 42;
const WORKING_SET: u64 = 1 << 8;

const PROFILE: Profile = Profile {
    name: "crosvm",
    features: (1 << VIRTIO_F_VERSION_1)
        | SUSPEND
        | WORKING_SET
        | Feature::EventIdx.mask()
        | Feature::MustTellHost.mask()
        | Feature::Stats.mask()
        | Feature::DeflateOnOom.mask()
        | Feature::FreePageReporting.mask(),
    queues: &[
        (Some(Kind::Inflate), 128),
        (Some(Kind::Deflate), 128),
        (Some(Kind::Stats), 128),
        (Some(Kind::Reporting), 128),
        // For reports of the working set.
        (None, 128),
        (None, 128),
    ],
    uses_singly: true,
    counts_reports: false,
};

/// The device.
pub(crate) struct Crosvm;

impl Rules for Crosvm {
    fn profile(&self) -> &'static Profile {
        &PROFILE
    }

    fn check_ready(&self, accepted: u64, ready: &[bool]) -> Verdict {
        PROFILE.check_queues(accepted, ready)
    }

    fn check_pages(&self, chain: &Chain) -> Verdict {
        check_numbers(chain)?;
        check_order(chain)
    }

    fn check_statistics(&self, chain: &Chain) -> Verdict {
        check_order(chain)?;
        let readable = chain.parts.iter().filter(|part| !part.is_writable);
        let length: u64 = readable.map(|part| u64::from(part.length)).sum();
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length == 0 || length % stat::SIZE != 0 {
            return Err(format!(
                "statistics of {length} bytes, which are no whole ones of {} bytes",
                stat::SIZE
            ));
        }
        Ok(())
    }

    fn check_report(&self, chain: &Chain, _memory: &GuestMemoryMmap) -> Verdict {
        check_order(chain)?;
        chain
            .parts
            .iter()
            .try_for_each(|part| part.check_whole_pages())
    }
}

/// Checks that the chain is not empty, and that the parts to read come first.
fn check_order(chain: &Chain) -> Verdict {
    let is_late = |pair: &[Part]| pair[0].is_writable && !pair[1].is_writable;
    if chain.parts.windows(2).any(is_late) {
        return Err("a part to read follows one to write: the device stops".to_owned());
    }
    let length: u64 = chain.parts.iter().map(|part| u64::from(part.length)).sum();
    if length == 0 || u32::try_from(length).is_err() {
        return Err("a message without content, or of 4 GiB: the device stops".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message with parts of these lengths, and whether the device writes them.
    fn chain(parts: &[(u32, bool)]) -> Chain {
        let parts = parts.iter().map(|&(length, is_writable)| Part {
            address: 0x1000,
            length,
            is_writable,
        });
        Chain {
            head: 0,
            parts: parts.collect(),
        }
    }

    #[test]
    fn a_list_may_have_any_length_but_none() {
        for parts in [
            &[(4, false)][..],
            &[(1028, false)],
            &[(4, false), (8, false)],
        ] {
            assert_eq!(Crosvm.check_pages(&chain(parts)), Ok(()));
        }
        assert_eq!(
            Crosvm.check_pages(&chain(&[(0, false)])),
            Err("a message without content, or of 4 GiB: the device stops".to_owned())
        );
    }

    #[test]
    fn parts_to_read_come_first() {
        let memory = GuestMemoryMmap::new();
        let page = 0x1000;
        let check = |parts: &[(u32, bool)]| Crosvm.check_report(&chain(parts), &memory);
        assert_eq!(check(&[(page, false), (page, true)]), Ok(()));
        assert_eq!(
            check(&[(page, true), (page, false)]),
            Err("a part to read follows one to write: the device stops".to_owned())
        );
        let huge = u32::MAX & !0xfff;
        assert!(check(&[(huge, true), (huge, true)]).is_err());
    }

    #[test]
    fn statistics_are_whole() {
        assert_eq!(Crosvm.check_statistics(&chain(&[(160, false)])), Ok(()));
        for parts in [&[(165, false)][..], &[(160, true)]] {
            assert!(Crosvm.check_statistics(&chain(parts)).is_err());
        }
    }

    #[test]
    fn queues_are_numbered_by_what_is_offered() {
        let accepted = PROFILE.features & !(SUSPEND | WORKING_SET);
        let check = |accepted, ready: &[bool]| Crosvm.check_ready(accepted, ready);
        assert_eq!(
            check(accepted, &[true, true, true, true, false, false]),
            Ok(())
        );
        let without = accepted & !Feature::Stats.mask();
        assert_eq!(
            check(without, &[true, true, false, true, false, false]),
            Ok(())
        );
        assert!(check(without, &[true, true, true, false, false, false]).is_err());
    }
}
