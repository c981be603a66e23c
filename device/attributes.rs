// SPDX-License-Identifier: GPL-2.0

//! The device's attributes in sysfs. docs/sysfs-bus-virtio-balloon describes them.

#![forbid(unsafe_code)]

use crate::{
    balloon::stop_reason::StopReason,
    rust::fs::sysfs::{
        attributes,
        Attribute, //
    },
    BalloonData, //
};

use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    str::kstrtobool_bytes, //
};

/// The directory that they are in.
pub(crate) const DIRECTORY: &CStr = c"balloon";

attributes! {
    /// All of them.
    pub(crate) static ATTRIBUTES: BalloonData = DIRECTORY {
        FloorMib,
        Inflate,
        TargetKib,
        ActualKib,
        Reason,
    }
}

/// See [`Settings::floor_mib`](crate::device::settings::Settings::floor_mib).
struct FloorMib;

impl Attribute<BalloonData> for FloorMib {
    const NAME: &'static CStr = c"floor_mib";
    const STORE: Option<fn(&BalloonData, &str) -> Result> = Some(|data, text| {
        let floor_mib = text.parse().ok().filter(|&floor_mib| floor_mib >= -1);
        data.settings.set_floor_mib(floor_mib.ok_or(EINVAL)?);
        data.balloon.settings_changed();
        Ok(())
    });
    type Value = i32;

    fn show(data: &BalloonData) -> Result<i32> {
        Ok(data.settings.floor_mib())
    }
}

/// See [`Settings::inflate`](crate::device::settings::Settings::inflate).
struct Inflate;

impl Attribute<BalloonData> for Inflate {
    const NAME: &'static CStr = c"inflate";
    const STORE: Option<fn(&BalloonData, &str) -> Result> = Some(|data, text| {
        data.settings
            .set_inflate(kstrtobool_bytes(text.as_bytes())?);
        data.balloon.settings_changed();
        Ok(())
    });
    type Value = u8;

    fn show(data: &BalloonData) -> Result<u8> {
        Ok(data.settings.inflate().into())
    }
}

/// The host's target.
struct TargetKib;

impl Attribute<BalloonData> for TargetKib {
    const NAME: &'static CStr = c"target_kib";
    type Value = usize;

    fn show(data: &BalloonData) -> Result<usize> {
        Ok(kib(data.balloon.host_target()))
    }
}

/// What is in the balloon.
struct ActualKib;

impl Attribute<BalloonData> for ActualKib {
    const NAME: &'static CStr = c"actual_kib";
    type Value = usize;

    fn show(data: &BalloonData) -> Result<usize> {
        Ok(kib(data.balloon.size()))
    }
}

/// Why the balloon is smaller than the target. Changes are announced.
pub(crate) struct Reason;

impl Attribute<BalloonData> for Reason {
    const NAME: &'static CStr = c"stop_reason";
    type Value = &'static str;

    fn show(data: &BalloonData) -> Result<&'static str> {
        Ok(StopReason::name(data.balloon.reason()))
    }
}

/// Converts kernel pages to KiB.
fn kib(pages: usize) -> usize {
    pages << (PAGE_SHIFT - 10)
}
