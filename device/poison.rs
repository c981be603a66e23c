// SPDX-License-Identifier: GPL-2.0

//! Page poison: the value of free pages, if the kernel relies on it.
//!
//! With `init_on_free=1` or `page_poison=1` the kernel relies on the content of free pages, and a
//! host that discards the memory must know it.
//!
//! Specification: clause 5.5.6.6, Page Poison.

#![forbid(unsafe_code)]

use crate::{
    device::{
        feature::{
            Feature,
            Setup, //
        },
        queues::Queues, //
    },
    rust::{
        mm::memory,
        virtio,
        virtio_balloon, //
    }, //
};

use kernel::{
    device::Core,
    prelude::*,
    sync::Arc, //
};

/// The value of free pages, of which the device is notified after each reset, before it is ready.
pub(crate) struct Poison {
    value: u32,
}

impl Poison {
    /// Sets up the feature.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or as for [`virtio::Config::write_le32`].
    pub(crate) fn probe(setup: &mut Setup<'_, '_>) -> Result<Option<Arc<dyn Feature>>> {
        match memory::free_page_value() {
            Some(value) if setup.dev.has_feature(virtio_balloon::F_PAGE_POISON) => {
                let poison = Self { value };

                poison.notify(setup.dev)?;
                Ok(Some(Arc::new(poison, GFP_KERNEL)?))
            }
            _ => Ok(None),
        }
    }

    fn notify(&self, dev: &virtio::Device<Core<'_>>) -> Result {
        dev.config()?
            .write_le32(virtio_balloon::POISON_VAL, self.value)
    }
}

impl Feature for Poison {
    fn restore(&self, dev: &virtio::Device<Core<'_>>, _queues: &mut Queues<'_>) -> Result {
        self.notify(dev)
    }
}
