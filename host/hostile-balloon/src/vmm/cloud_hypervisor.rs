// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Cloud Hypervisor's device, as of commit ae44c2971c83.
//!
//! It skips what it does not accept, and returns the message all the same: the memory is then lost for both sides.

use vhost_user_balloon::virtio::features::Feature;
use vhost_user_balloon::virtio::kind::Kind;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::vmm::chain::Chain;
use crate::vmm::rules::{Profile, Rules, Verdict, check_numbers};

/// The longest part of a list of pages in bytes.
const LIST: u32 = 256 * 4;

/// The length of the configuration space in bytes: the target, and the size.
const CONFIG: u64 = 8;

const PROFILE: Profile = Profile {
    name: "Cloud Hypervisor",
    features: (1 << VIRTIO_F_VERSION_1)
        | Feature::DeflateOnOom.mask()
        | Feature::FreePageReporting.mask(),
    queues: &[
        (Some(Kind::Inflate), 128),
        (Some(Kind::Deflate), 128),
        (Some(Kind::Reporting), 32),
    ],
    uses_singly: false,
    counts_reports: true,
};

/// The device.
pub(crate) struct CloudHypervisor;

impl Rules for CloudHypervisor {
    fn profile(&self) -> &'static Profile {
        &PROFILE
    }

    fn check_ready(&self, accepted: u64, ready: &[bool]) -> Verdict {
        PROFILE.check_queues(accepted, ready)
    }

    fn check_read(&self, offset: u64, length: usize) -> Verdict {
        let length = u64::try_from(length).unwrap_or(u64::MAX);
        if offset.saturating_add(length) > CONFIG {
            return Err(format!(
                "a read of {length} bytes at {offset} of a configuration space of {CONFIG}: it has no result"
            ));
        }
        Ok(())
    }

    fn check_pages(&self, chain: &Chain) -> Verdict {
        check_numbers(chain)?;
        match chain.parts.iter().find(|part| part.length > LIST) {
            Some(part) => Err(format!(
                "a list of pages of {} bytes, and {LIST} are the most: it is skipped",
                part.length
            )),
            None => Ok(()),
        }
    }

    fn check_report(&self, chain: &Chain, memory: &GuestMemoryMmap) -> Verdict {
        for part in &chain.parts {
            part.check_whole_pages()?;
            let (start, length) = (part.address, u64::from(part.length));
            let region = memory.find_region(GuestAddress(start));
            if region.is_none_or(|region| start + length > region.start_addr().0 + region.len()) {
                return Err(format!(
                    "a report of {length} bytes at {start:#x} leaves its region of memory: the rest is skipped"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::chain::Part;

    /// A message with parts of these places and lengths.
    fn chain(parts: &[(u64, u32)]) -> Chain {
        let parts = parts.iter().map(|&(address, length)| Part {
            address,
            length,
            is_writable: false,
        });
        Chain {
            head: 0,
            parts: parts.collect(),
        }
    }

    #[test]
    fn a_part_has_up_to_256_pages() {
        let check = |parts: &[(u64, u32)]| CloudHypervisor.check_pages(&chain(parts));
        assert_eq!(check(&[(0, 1024), (0, 1024)]), Ok(()));
        assert_eq!(
            check(&[(0, 1024), (0, 1028)]),
            Err("a list of pages of 1028 bytes, and 1024 are the most: it is skipped".to_owned())
        );
    }

    #[test]
    fn the_configuration_space_has_two_fields() {
        assert_eq!(CloudHypervisor.check_read(0, 4), Ok(()));
        assert_eq!(CloudHypervisor.check_read(4, 4), Ok(()));
        assert!(CloudHypervisor.check_read(8, 4).is_err());
        assert!(CloudHypervisor.check_read(4, 8).is_err());
    }

    #[test]
    fn a_report_stays_in_its_region() {
        let regions = [(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000)];
        let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
        let check = |parts: &[(u64, u32)]| CloudHypervisor.check_report(&chain(parts), &memory);
        assert_eq!(check(&[(0, 0x4000), (0x4000, 0x4000)]), Ok(()));
        assert!(check(&[(0x3000, 0x2000)]).is_err());
        assert!(check(&[(0x3000, 0x800)]).is_err());
    }
}
