// SPDX-License-Identifier: GPL-2.0

//! Virtio memory balloon driver.
//!
//! The host asks for memory by setting a target in the device's configuration space. The driver
//! takes that much from the page allocator, tells the host which pages it got, and leaves them
//! alone; when the target falls, the pages go back to the page allocator.
//!
//! The way of a page: [`balloon`] follows the target and gets pages from [`sources`]; [`messages`]
//! describe them to the device, with the encoder of [`bitmap`]; [`rust::virtio`] has the queues.
//! [`features`] are the other things that a device may want, and [`device`] is what all features
//! share: their life cycle, negotiation, settings. [`rust`] is the layer over the kernel's C.
//!
//! C header: [`include/uapi/linux/virtio_balloon.h`](srctree/include/uapi/linux/virtio_balloon.h)
//!
//! Specification: "Virtual I/O Device (VIRTIO)", clause 5.5, Traditional Memory Balloon Device.

#![deny(unsafe_code)]

mod balloon;
mod bitmap;
mod device;
mod features;
mod free_pages;
mod messages;
mod rust;
mod sources;

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
#[path = "tests/kunit/mod.rs"]
mod kunit;

use crate::{
    balloon::feature::BalloonFeature,
    device::{
        driver::{
            Driver,
            Features, //
        },
        feature::Probe,
        poison::Poison,
        settings::Parameters, //
    },
    features::{
        hinting::feature::Hints,
        reporting::Reporting,
        requests,
        stats::Stats, //
    },
    rust::{
        virtio::{
            module_virtio_driver,
            virtio_device_table,
            IdTable, //
        },
        virtio_balloon::DEVICE_ID, //
    }, //
};

use kernel::prelude::*;

/// The features of this driver.
struct BalloonFeatures;

impl Features for BalloonFeatures {
    const ID_TABLE: IdTable = &ID_TABLE;
    // A feature that is missing here is an unused function, which `make clippy` refuses.
    const PROBES: &'static [Probe] = &[
        Poison::probe,
        Hints::probe,
        BalloonFeature::probe,
        Stats::probe,
        Reporting::probe,
        requests::feature::probe,
    ];

    fn parameters() -> Result<Parameters> {
        Parameters::new(
            module_parameters::inflate.value(),
            module_parameters::encoding.value(),
            module_parameters::memory_blocks.value(),
            module_parameters::floor_mib.value(),
        )
    }
}

virtio_device_table!(ID_TABLE, [DEVICE_ID]);

type BalloonDriver = Driver<BalloonFeatures>;

module_virtio_driver! {
    type: BalloonDriver,
    name: "virtio_balloon_rs",
    authors: ["The virtio_balloon_rs developers"],
    description: "Virtio balloon driver",
    license: "GPL",
    params: {
        inflate: bool {
            default: true,
            description: "Whether the host's wishes for memory are followed; statistics, hints and reports go on if not",
        },
        encoding: u8 {
            default: 0,
            description: "How pages are named, for measuring: 0 as short as possible, 1 ranges, 2 bitmaps, 3 page frame numbers",
        },
        memory_blocks: bool {
            default: true,
            description: "Whether free memory blocks are taken offline and online, for the balloon and for the host, where the kernel zeroes what it allocates",
        },
        floor_mib: i32 {
            default: -1,
            description: "Available memory in MiB below which the balloon does not grow, nor are hints given (0: no limit, -1: by the guest's memory)",
        },
    },
}
