// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The wire format of the virtio balloon and of its extension, from the headers `linux/virtio_balloon.h`
//! and `linux/virtio_balloon_ext.h`.
//!
//! All fields are little-endian, whatever their Rust type says.

use std::mem::offset_of;

pub use generated::*;

pub mod page_set;
pub mod request;
pub mod status;

/// The guest's encoder, for tests only: it has the guest code's licence, GPL-2.0, and no host program
/// contains it. It also has the guest code's format.
#[cfg(test)]
#[rustfmt::skip]
#[path = "../../../bitmap.rs"]
mod bitmap;

/// The input of the encoder.
#[cfg(test)]
#[rustfmt::skip]
#[path = "../../../rust/mm/pfn_range.rs"]
mod pfn_range;

/// The constants of the headers, under their names in the guest code.
#[cfg(test)]
mod rust {
    pub(crate) mod mm {
        pub(crate) use crate::pfn_range;
    }

    pub(crate) mod virtio_balloon {
        pub(crate) use crate::virtio_balloon_page_set as PageSet;

        #[allow(clippy::cast_possible_truncation, reason = "the values are small")]
        pub(crate) mod page_set {
            pub(crate) const RANGES: u8 = crate::VIRTIO_BALLOON_PAGE_SET_RANGES as u8;
            pub(crate) const BITMAP: u8 = crate::VIRTIO_BALLOON_PAGE_SET_BITMAP as u8;
            pub(crate) const MORE: u32 = crate::VIRTIO_BALLOON_PAGE_SET_MORE;
            pub(crate) const MAX_BYTES: usize = crate::VIRTIO_BALLOON_PAGE_SET_MAX_BYTES as usize;
            pub(crate) const COUNT_BITS: u32 = crate::VIRTIO_BALLOON_PAGE_SET_COUNT_BITS;
        }
    }
}

/// The offsets of the configuration space's fields, in bytes (specification, clause 5.5.4).
pub mod config {
    use super::{offset_of, virtio_balloon_ext_config as Config};

    /// The target in balloon pages.
    pub const NUM_PAGES: usize = offset_of!(Config, base.num_pages);
    /// The balloon size in balloon pages.
    pub const ACTUAL: usize = offset_of!(Config, base.actual);
    /// The command id of free page hinting.
    pub const FREE_PAGE_HINT_CMD_ID: usize =
        offset_of!(Config, base.__bindgen_anon_1.free_page_hint_cmd_id);
    /// The value of the guest's free pages.
    pub const POISON_VAL: usize = offset_of!(Config, base.poison_val);
    /// The device's granule in bytes.
    pub const DISCARD_GRANULE: usize = offset_of!(Config, discard_granule);
    /// The guest's stop reason.
    pub const STOP_REASON: usize = offset_of!(Config, stop_reason);
    /// The size of the configuration space with every field.
    pub const SIZE: usize = size_of::<Config>();
}

/// The offsets of a statistic's fields, in bytes (specification, clause 5.5.6.3).
pub mod stat {
    use super::{offset_of, virtio_balloon_stat as Stat};

    /// Its tag.
    pub const TAG: usize = offset_of!(Stat, tag);
    /// Its value.
    pub const VAL: usize = offset_of!(Stat, val);
    /// The size of a statistic.
    pub const SIZE: usize = size_of::<Stat>();
}

/// The size of a balloon page in bytes, whatever the guest's pages are (specification, clause 5.5.6).
pub const BALLOON_PAGE_SIZE: u64 = 1 << VIRTIO_BALLOON_PFN_SHIFT;

#[allow(
    missing_docs,
    non_camel_case_types,
    clippy::pedantic,
    reason = "the names and the comments are the headers'"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

#[cfg(test)]
mod tests {
    use super::page_set::Encoding;
    use super::request::Completion;
    use super::*;

    /// The numbers that the header defines below this comment, up to the next empty line.
    fn defined_below(comment: &str) -> Vec<u32> {
        const HEADER: &str = include_str!("../../../uapi/linux/virtio_balloon_ext.h");
        let (_, below) = HEADER.split_once(comment).expect("the header has it");
        below
            .lines()
            .skip(1)
            .take_while(|line| !line.is_empty())
            .filter_map(|line| line.strip_prefix("#define ")?.split_whitespace().nth(1))
            .map(|number| number.parse().expect("it is a number"))
            .collect()
    }

    #[test]
    fn every_value_in_the_header_is_known() {
        let encodings: Vec<_> = Encoding::ALL.iter().map(|e| e.number()).collect();
        assert_eq!(defined_below("/* Values of encoding */"), encodings);
        let statuses = defined_below("/* Values of status */");
        assert!(statuses.len() > 1, "{statuses:?}");
        for status in statuses {
            let completion = [VIRTIO_BALLOON_COMPLETION | (status << 16), 0, 1, 0];
            let bytes = completion.map(u32::to_le_bytes);
            assert!(Completion::parse(bytes.as_flattened()).is_ok(), "{status}");
        }
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        assert_eq!(
            [
                config::NUM_PAGES,
                config::ACTUAL,
                config::FREE_PAGE_HINT_CMD_ID,
                config::POISON_VAL,
                config::DISCARD_GRANULE,
                config::STOP_REASON,
                config::SIZE,
            ],
            [0, 4, 8, 12, 16, 20, 24]
        );
        assert_eq!([stat::TAG, stat::VAL, stat::SIZE], [0, 2, 10]);
        assert_eq!(BALLOON_PAGE_SIZE, 4096);
        assert_eq!(
            [
                VIRTIO_BALLOON_F_PAGE_SETS,
                VIRTIO_BALLOON_F_HOST_REQUESTS,
                VIRTIO_BALLOON_F_STOP_REASON,
                VIRTIO_BALLOON_F_PRESSURE,
                VIRTIO_BALLOON_F_STATUS
            ],
            [56, 57, 58, 59, 60]
        );
    }
}
