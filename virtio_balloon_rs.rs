// SPDX-License-Identifier: GPL-2.0

//! Virtio memory balloon driver.
//!
//! The host requests memory by a target in the device's configuration space. The driver allocates
//! that much memory, reports the pages to the host, and does not use them. When the target
//! decreases, the driver frees the pages.
//!
//! The path of a page: [`balloon`] follows the target and gets pages from [`sources`]; [`messages`]
//! describe them to the device, with the encoder of [`bitmap`]; [`rust::virtio`] has the queues.
//! [`features`] has the other features of a device, and [`device`] their shared parts: life cycle,
//! negotiation, settings. [`rust`] is the layer over the kernel's C.
//!
//! C header: [`include/uapi/linux/virtio_balloon.h`](srctree/include/uapi/linux/virtio_balloon.h)
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
    balloon::balloon_feature::BalloonFeature,
    device::{
        driver::{
            Driver,
            FeatureList, //
        },
        feature::Probe,
        poison::Poison,
        settings::Parameters, //
    },
    features::{
        hinting::hinting_feature::Hints,
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

impl FeatureList for BalloonFeatures {
    const ID_TABLE: IdTable = &ID_TABLE;
    // Hints are freed before the balloon is, which may take long. Statistics and requests are
    // answered until it is. If a feature is missing, `make clippy` finds its unused function.
    const PROBES: &'static [Probe] = &[
        Poison::probe,
        Hints::probe,
        BalloonFeature::probe,
        Stats::probe,
        Reporting::probe,
        requests::requests_feature::probe,
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
            description: "Follow the host's target; N keeps the balloon empty, while statistics, hints and reports continue",
        },
        encoding: u8 {
            default: 0,
            description: "Encoding of messages, for measurements: 0 shortest, 1 ranges, 2 bitmaps, 255 page frame numbers",
        },
        memory_blocks: bool {
            default: true,
            description: "If the kernel zeroes memory on allocation, take free memory blocks offline and online instead",
        },
        floor_mib: i32 {
            default: -1,
            description: "Reserve: available memory in MiB that is left to the guest (0: stop when no memory is available, -1: depends on the guest's memory)",
        },
    },
}
