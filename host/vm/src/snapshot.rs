// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that is saved to files, and restored from them. docs/snapshots.md describes the same
//! steps.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::guest::Guest;
use crate::home::Home;
use crate::memory_file::MemoryFile;
use crate::qmp::Qmp;
use crate::size::Size;

/// A guest in files, which are removed in the end.
#[derive(Debug)]
pub struct Snapshot {
    directory: TempDir,
    /// The size of the files.
    pub size: Size,
    /// For how long the guest was stopped.
    pub took: Duration,
}

impl Snapshot {
    /// The guest's memory, a file with holes.
    fn memory(&self) -> PathBuf {
        self.directory.path().join("memory")
    }

    /// The rest of its state, as a migration stream.
    fn state(&self) -> Value {
        let path = self.directory.path().join("state");
        json!({ "uri": format!("file:{}", path.display()) })
    }
}

impl Guest {
    /// Stops the guest, saves it, and resumes it. For guests with
    /// [`Config::memory_file`](crate::Config::memory_file) and devices that can be migrated. The snapshot is in a
    /// directory of its own in `parent`.
    pub fn save(&self, parent: &Path) -> Result<Snapshot> {
        let qmp = self.qmp();
        let file = self.home().memory_file.clone();
        let file = file.context("the guest's memory has to be in a file with a name")?;
        let mut snapshot = Snapshot {
            directory: TempDir::new_in(parent)?,
            size: Size::default(),
            took: Duration::default(),
        };
        let start = Instant::now();
        qmp.execute::<Value>("stop", &json!({}))?;
        leave_memory_alone(&qmp)?;
        qmp.execute::<Value>("migrate", &snapshot.state())?;
        self.wait_migrated(&qmp, |_| Ok(()))?;
        copy(&file, &snapshot.memory())?;
        snapshot.took = start.elapsed();
        qmp.execute::<Value>("cont", &json!({}))?;

        for entry in fs::read_dir(snapshot.directory.path())? {
            snapshot.size = snapshot.size + MemoryFile::open(&entry?.path())?.resident()?;
        }
        Ok(snapshot)
    }

    /// Restores the guest in another QEMU, with a copy of the memory: the snapshot does not change.
    pub fn restore(&self, snapshot: &Snapshot) -> Result<()> {
        let home = self.home();
        let file = snapshot.directory.path().join("memory-of-the-restored");
        copy(&snapshot.memory(), &file)?;
        let config = self.config().clone().memory_file(&file);
        let config = config.argument("-incoming", "defer");
        let restored = Home::start(&config, |stream| home.agent.by_way_of(stream))?;
        leave_memory_alone(&restored.qmp)?;
        restored
            .qmp
            .execute::<Value>("migrate-incoming", &snapshot.state())?;
        self.wait_migrated(&restored.qmp, |_| Ok(()))?;
        restored.qmp.execute::<Value>("cont", &json!({}))?;
        self.moved(restored);
        Ok(())
    }
}

/// Makes a QEMU migrate its state except shared memory.
fn leave_memory_alone(qmp: &Qmp) -> Result<()> {
    let capabilities =
        json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] });
    qmp.execute::<Value>("migrate-set-capabilities", &capabilities)?;
    Ok(())
}

/// Copies a file and keeps its holes.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp")
        .arg("--sparse=auto")
        .args([from, to])
        .status()?;
    ensure!(
        status.success(),
        "cp fails to copy {}: {status}",
        from.display()
    );
    Ok(())
}
