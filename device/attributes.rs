// SPDX-License-Identifier: GPL-2.0

//! The device's attributes in sysfs. docs/sysfs-bus-virtio-balloon describes them.

#![forbid(unsafe_code)]

use crate::{
    device::{
        announced::STOP_REASON,
        bound_device::BoundDevice,
        settings::Floor, //
    },
    rust::fs::sysfs::{
        attributes,
        Attribute, //
    }, //
};

use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    str::kstrtobool_bytes, //
};

/// The directory that they are in.
const DIRECTORY: &CStr = STOP_REASON.directory;

attributes! {
    /// All of them.
    pub(crate) static ATTRIBUTES: BoundDevice = DIRECTORY {
        FloorMib,
        Inflate,
        TargetKib,
        ActualKib,
        Reason,
    }
}

/// See [`Settings::floor_mib`](crate::device::settings::Settings::floor_mib).
struct FloorMib;

impl Attribute<BoundDevice> for FloorMib {
    const NAME: &'static CStr = c"floor_mib";
    const STORE: Option<fn(&BoundDevice, &str) -> Result> = Some(|bound, text| {
        let floor = text.parse().ok().and_then(Floor::new).ok_or(EINVAL)?;
        bound.set(|settings| settings.set_floor(floor));
        Ok(())
    });
    type Value = i32;

    fn show(bound: &BoundDevice) -> Result<i32> {
        Ok(bound.settings().floor_mib())
    }
}

/// See [`Settings::inflate`](crate::device::settings::Settings::inflate).
struct Inflate;

impl Attribute<BoundDevice> for Inflate {
    const NAME: &'static CStr = c"inflate";
    const STORE: Option<fn(&BoundDevice, &str) -> Result> = Some(|bound, text| {
        let inflate = kstrtobool_bytes(text.as_bytes())?;
        bound.set(|settings| settings.set_inflate(inflate));
        Ok(())
    });
    type Value = u8;

    fn show(bound: &BoundDevice) -> Result<u8> {
        Ok(bound.settings().inflate().into())
    }
}

/// The host's target.
struct TargetKib;

impl Attribute<BoundDevice> for TargetKib {
    const NAME: &'static CStr = c"target_kib";
    type Value = usize;

    fn show(bound: &BoundDevice) -> Result<usize> {
        Ok(kib(bound.status()?.target()))
    }
}

/// What is in the balloon.
struct ActualKib;

impl Attribute<BoundDevice> for ActualKib {
    const NAME: &'static CStr = c"actual_kib";
    type Value = usize;

    fn show(bound: &BoundDevice) -> Result<usize> {
        Ok(kib(bound.status()?.size()))
    }
}

/// Why the balloon is below the target. Changes are announced.
struct Reason;

impl Attribute<BoundDevice> for Reason {
    const NAME: &'static CStr = STOP_REASON.name;
    type Value = &'static str;

    fn show(bound: &BoundDevice) -> Result<&'static str> {
        Ok(bound.status()?.stop_reason())
    }
}

/// Converts kernel pages to KiB.
fn kib(pages: usize) -> usize {
    pages << (PAGE_SHIFT - 10)
}
