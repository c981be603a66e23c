// SPDX-License-Identifier: GPL-2.0

use crate::rust::{
    virtio::{
        Buffer,
        ByteOrder, //
    },
    virtio_balloon::{
        stat,
        Stat, //
    }, //
};

use kernel::prelude::*;

#[kunit_tests(virtio_balloon_rs_buffer)]
mod tests {
    use super::*;

    #[test]
    fn the_device_sees_the_filled_part_only() {
        let buffer = KVec::<u32>::with_capacity(256, GFP_KERNEL);
        assert!(buffer.is_ok());
        let Ok(mut buffer) = buffer else { return };

        assert_eq!(buffer.memory().1, 0);
        for value in 1..=3 {
            assert!(buffer.push_within_capacity(value).is_ok());
        }
        assert_eq!(buffer.memory().1, 12);
        buffer.clear();
        assert_eq!(buffer.memory().1, 0);
    }

    #[test]
    fn the_memory_stays_where_it_is() {
        let buffer = KVec::<u32>::with_capacity(256, GFP_KERNEL);
        assert!(buffer.is_ok());
        let Ok(buffer) = buffer else { return };

        let before = buffer.memory().0;
        let moved = KBox::new(buffer, GFP_KERNEL);
        assert!(moved.is_ok_and(|moved| moved.memory().0 == before));
    }

    #[test]
    fn a_statistic_has_ten_bytes() {
        let mut buffer = KVec::new();
        let stat = Stat::new(stat::MEMFREE, 1 << 40, ByteOrder::Little);

        assert!(buffer.push(stat, GFP_KERNEL).is_ok());
        assert_eq!(buffer.memory().1, 10);
    }

    #[test]
    fn only_a_legacy_device_sees_the_byte_order_of_the_guest() {
        let value = 0x0102_0304u32;

        assert_eq!(
            ByteOrder::Little.to_device32(value).to_ne_bytes(),
            value.to_le_bytes()
        );
        assert_eq!(ByteOrder::Native.to_device32(value), value);
    }
}
