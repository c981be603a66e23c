// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The paths of files and directories.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use vm::Kernel;

/// The top directories.
pub(crate) struct Places {
    /// The repository.
    pub(crate) checkout: PathBuf,
    /// The cache that all checkouts on this machine share.
    pub(crate) cache: PathBuf,
}

impl Places {
    pub(crate) fn find() -> Result<Self> {
        let checkout = env::current_dir()?;
        ensure!(
            checkout.join("Kbuild").exists(),
            "{} is not the repository; run make there",
            checkout.display()
        );
        let cache = env::var_os("XDG_CACHE_HOME").context("use guest/build-root to run this")?;
        Ok(Self {
            checkout,
            cache: PathBuf::from(cache).join("virtio-balloon-rs"),
        })
    }

    /// The build directory of this checkout.
    pub(crate) fn build(&self) -> PathBuf {
        self.checkout.join("build")
    }

    /// The build directory for one kernel.
    pub(crate) fn build_for(&self, kernel: Kernel) -> PathBuf {
        self.build().join(format!("{kernel}-kernel"))
    }

    /// The guests' logs.
    pub(crate) fn logs(&self) -> PathBuf {
        self.build().join("log")
    }
}
