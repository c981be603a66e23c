// SPDX-License-Identifier: GPL-2.0

//! The status of a balloon, in debugfs and sysfs.

#![forbid(unsafe_code)]

use crate::{
    balloon::{
        policy::stop_reason::StopReason,
        state::Balloon, //
    },
    device::feature::Status,
    rust::{
        fs::debugfs::Show,
        work::task::Task, //
    }, //
};

use kernel::fmt;

impl Show for Task<Balloon> {
    /// Writes one line for each value. Sizes are in kernel pages.
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let worker = self.worker.lock();
        let target = self.target(&worker);

        writeln!(f, "target {target}")?;
        writeln!(f, "held {}", self.pages.len())?;
        writeln!(f, "inflating {}", worker.inflate.in_flight())?;
        writeln!(f, "deflating {}", self.leaving())?;
        if let Some(offliner) = &self.offliner {
            writeln!(f, "memory_blocks {}", offliner.blocks())?;
        }
        for (order, blocks) in self.pages.by_order().iter().enumerate() {
            writeln!(f, "order_{order}_blocks {blocks}")?;
        }
        let reason = self.stop_reason(&worker, self.step(&worker, target));
        let reason = reason.map_or("none", StopReason::words);
        writeln!(f, "stop_reason {reason}")?;
        match worker.error {
            Some(error) => writeln!(f, "last_error {error:?}"),
            None => writeln!(f, "last_error none"),
        }
    }
}

impl Status for Balloon {
    fn target(&self) -> usize {
        self.host_target()
    }

    fn size(&self) -> usize {
        Balloon::size(self)
    }

    fn stop_reason(&self) -> &'static str {
        StopReason::name(self.reason())
    }
}
