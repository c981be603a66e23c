// SPDX-License-Identifier: GPL-2.0

//! The balloon's wire format, from the C header that defines it.
//!
//! C header: [`include/uapi/linux/virtio_balloon.h`](srctree/include/uapi/linux/virtio_balloon.h)

use super::{
    bindings,
    virtio::{
        Feature,
        Field, //
    },
};

use core::mem::offset_of;

/// Pages may be used only after the device has been told, and has answered.
pub(crate) const F_MUST_TELL_HOST: Feature =
    Feature::new(bindings::VIRTIO_BALLOON_F_MUST_TELL_HOST);

/// The binary logarithm of the size of a balloon page in bytes.
pub(crate) const PFN_SHIFT: u32 = bindings::VIRTIO_BALLOON_PFN_SHIFT;

/// How large the device wants the balloon to be, in balloon pages. Little-endian on legacy devices, too.
pub(crate) const NUM_PAGES: Field<u32> =
    Field::new(offset_of!(bindings::virtio_balloon_config, num_pages));

/// How large the balloon is, in balloon pages. Little-endian on legacy devices, too.
pub(crate) const ACTUAL: Field<u32> =
    Field::new(offset_of!(bindings::virtio_balloon_config, actual));
