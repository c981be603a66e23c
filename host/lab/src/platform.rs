// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The programs of a guest's architecture.

use std::path::{Path, PathBuf};

/// Programs for a guest.
pub(crate) struct Platform {
    /// QEMU's program.
    pub(crate) qemu: PathBuf,
    /// The agent.
    pub(crate) agent: PathBuf,
    /// The busybox.
    pub(crate) shell: PathBuf,
}

impl Platform {
    /// For guests of the build root's architecture. The agent is in the directory of the other
    /// `tools`.
    pub(crate) fn of_build_root(tools: &Path) -> Self {
        Self {
            qemu: "qemu-system-x86_64".into(),
            agent: tools.join("agent"),
            shell: "/usr/bin/busybox".into(),
        }
    }
}
