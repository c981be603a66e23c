// SPDX-License-Identifier: GPL-2.0

//! Virtio memory balloon driver.
//!
//! The host asks for memory by setting a target in the device's configuration space. The driver takes
//! that much from the page allocator, tells the host which pages it got, and leaves them alone; when the
//! target falls, the pages go back to the page allocator.
//!
//! Where to look: [`balloon`] decides what to do, [`inflate`] and [`deflate`] do it, [`target`] and
//! [`backoff`] are the arithmetic, and [`rust`] is the layer over the kernel's C, with the virtio bus.
//!
//! C header: [`include/uapi/linux/virtio_balloon.h`](srctree/include/uapi/linux/virtio_balloon.h)
//!
//! Specification: "Virtual I/O Device (VIRTIO)", clause 5.5, Traditional Memory Balloon Device.

#![deny(unsafe_code)]

mod backoff;
mod balloon;
mod deflate;
mod inflate;
mod message;
mod rust;
mod target;

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
#[path = "tests/kunit/mod.rs"]
mod kunit;

use rust::{
    task::{
        new_task,
        Task, //
    },
    virtio,
    virtio_balloon, //
};

use balloon::Balloon;
use kernel::{
    device,
    prelude::*, //
};

struct BalloonDriver;

virtio::virtio_device_table!(ID_TABLE, [virtio::DeviceId::BALLOON]);

impl virtio::Driver for BalloonDriver {
    type Data = Task<Balloon>;

    const ID_TABLE: virtio::IdTable = &ID_TABLE;
    const FEATURES: &'static [virtio::Feature] = &[virtio_balloon::F_MUST_TELL_HOST];

    fn validate(dev: &virtio::Device<device::Core<'_>>) -> Result {
        // The balloon names pages by their guest physical addresses, whatever the device uses for buffers.
        dev.clear_feature(virtio::Feature::ACCESS_PLATFORM);
        Ok(())
    }

    fn probe(dev: &virtio::Device<device::Core<'_>>) -> impl PinInit<Self::Data, Error> {
        let floor = module_parameters::floor_mib.value();

        new_task!(Balloon::new(dev, floor), c"virtio_balloon_rs")
    }

    fn ready(_dev: &virtio::Device<device::Core<'_>>, task: Pin<&Self::Data>) {
        task.schedule();
    }

    fn queue_used(task: Pin<&Self::Data>, _index: usize) {
        task.schedule();
    }

    fn config_changed(task: Pin<&Self::Data>) {
        task.target_changed();
        task.schedule();
    }

    fn unbind(_dev: &virtio::Device<device::Core<'_>>, task: Pin<&Self::Data>) {
        Balloon::give_back(&task);
    }

    fn freeze(_dev: &virtio::Device<device::Core<'_>>, task: Pin<&Self::Data>) {
        // The host need not keep what it knows of the balloon, and an image on the disk must not lack
        // memory: as if the driver were unbound.
        Balloon::give_back(&task);
    }

    fn restore(dev: &virtio::Device<device::Core<'_>>, task: Pin<&Self::Data>) -> Result {
        task.attach(dev)?;
        task.resume();
        Ok(())
    }

    fn shutdown(_dev: &virtio::Device<device::Core<'_>>, task: Pin<&Self::Data>) {
        task.stop();
    }
}

virtio::module_virtio_driver! {
    type: BalloonDriver,
    name: "virtio_balloon_rs",
    authors: ["The virtio_balloon_rs developers"],
    description: "Virtio balloon driver",
    license: "GPL",
    params: {
        floor_mib: u32 {
            default: 32,
            description: "Available memory in MiB below which the balloon does not grow (0: no limit)",
        },
    },
}
