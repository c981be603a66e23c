// SPDX-License-Identifier: GPL-2.0

use crate::rust::{
    pfn_array::PfnArray,
    virtio::ByteOrder,
    virtqueue::Buffer, //
};

use kernel::prelude::*;

#[kunit_tests(virtio_balloon_rs_pfn_array)]
mod tests {
    use super::*;

    #[test]
    fn an_array_holds_as_much_as_it_says() {
        let array = PfnArray::new(GFP_KERNEL);
        assert!(array.is_ok());
        let Ok(mut array) = array else { return };

        assert_eq!(array.room(), PfnArray::CAPACITY);
        for pfn in 0..PfnArray::CAPACITY as u32 {
            assert!(array.push(pfn));
        }
        assert_eq!(array.room(), 0);
        assert!(!array.push(0));

        array.clear();
        assert_eq!(array.room(), PfnArray::CAPACITY);
    }

    #[test]
    fn the_device_sees_what_is_filled_and_no_more() {
        let array = PfnArray::new(GFP_KERNEL);
        assert!(array.is_ok());
        let Ok(mut array) = array else { return };

        assert_eq!(array.memory().1, 0);
        assert!(array.push(1) && array.push(2) && array.push(3));
        assert_eq!(array.memory().1, 12);
        array.clear();
        assert_eq!(array.memory().1, 0);
    }

    #[test]
    fn the_memory_stays_where_it_is() {
        let array = PfnArray::new(GFP_KERNEL);
        assert!(array.is_ok());
        let Ok(array) = array else { return };

        let before = array.memory().0;
        let moved = KBox::new(array, GFP_KERNEL);
        assert!(moved.is_ok_and(|moved| moved.memory().0 == before));
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
