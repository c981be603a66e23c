// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the device is, and what of it is kept in a file: the host's settings.
//!
//! What the guest has said is not in the file. A process that takes the device up while the guest goes on
//! hears it from the one that keeps the connection, and another guest has not said it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use log::warn;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::config::Fields;

/// The version of the file's format. It changes only when a daemon of this version would misread the file.
const VERSION: u32 = 1;

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The configuration space.
    pub config: Fields,
    /// How often the guest is asked for statistics, in seconds. 0 is never.
    pub stats_interval: u32,
    /// Until when no memory is given back to the host, in seconds of the system's clock, if a client has said so.
    pub inhibited_until: Option<u64>,
}

/// What is in the file. Fields that a newer daemon has added are passed over.
#[derive(Serialize, Deserialize)]
struct Settings {
    #[serde(default)]
    version: u32,
    /// In balloon pages.
    target: u32,
    stats_interval: u32,
    #[serde(default)]
    inhibited_until: Option<u64>,
}

impl State {
    /// The state of a device without a file.
    pub fn new(stats_interval: u32) -> Self {
        Self {
            config: Fields::default(),
            stats_interval,
            inhibited_until: None,
        }
    }

    /// Reads it from a file, if there is one. One that makes no sense is moved aside, since a VM with the
    /// defaults is better than none.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn load(path: &Path) -> Result<Option<Self>> {
        let text = match fs::read(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.with_context(|| format!("reading {}", path.display()))?,
        };
        let reason = match serde_json::from_slice::<Settings>(&text) {
            Ok(settings) if settings.version <= VERSION => return Ok(Some(settings.into())),
            Ok(settings) => format!("its version is {}", settings.version),
            Err(error) => error.to_string(),
        };
        let aside = beside(path, ".bad");
        warn!(
            "{} has no state of a balloon that this daemon can read ({reason}); moved it to {}, and starting without it",
            path.display(),
            aside.display()
        );
        fs::rename(path, &aside)
            .with_context(|| format!("moving {} to {}", path.display(), aside.display()))?;
        Ok(None)
    }

    /// Writes it to a file, which has the old or the new state at any time, also after a loss of power.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let settings = Settings {
            version: VERSION,
            target: self.config.target,
            stats_interval: self.stats_interval,
            inhibited_until: self.inhibited_until,
        };
        let mut new = NamedTempFile::new_in(directory)?;
        new.write_all(&serde_json::to_vec(&settings)?)?;
        new.as_file().sync_all()?;
        new.persist(path)?;
        File::open(directory)?.sync_all()
    }

    /// For how long no memory is to be given back to the host, if a client has said so.
    pub fn inhibited(&self) -> Option<Duration> {
        let until =
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(self.inhibited_until?))?;
        let rest = until.duration_since(SystemTime::now()).ok()?;
        Some(rest).filter(|rest| !rest.is_zero())
    }
}

impl From<Settings> for State {
    fn from(settings: Settings) -> Self {
        Self {
            config: Fields {
                target: settings.target,
                ..Fields::default()
            },
            stats_interval: settings.stats_interval,
            inhibited_until: settings.inhibited_until,
        }
    }
}

/// The path with something behind it.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State {
            config: Fields {
                target: 5,
                ..Fields::default()
            },
            stats_interval: 3,
            inhibited_until: Some(1 << 40),
        }
    }

    #[test]
    fn the_hosts_settings_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        assert_eq!(State::load(&path).unwrap(), None);
        let mut state = state();
        state.save(&path).unwrap();
        assert_eq!(State::load(&path).unwrap().as_ref(), Some(&state));
        state.config.actual = 4;
        state.save(&path).unwrap();
        assert_eq!(State::load(&path).unwrap().unwrap().config.actual, 0);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_broken_file_is_moved_aside() {
        for text in [
            "",
            "{\"config\":{}}",
            "\0\0\0",
            "{\"version\":2,\"target\":1,\"stats_interval\":1}",
        ] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("state");
            fs::write(&path, text).unwrap();
            assert_eq!(State::load(&path).unwrap(), None, "{text}");
            assert!(!path.exists());
            let aside = fs::read_to_string(directory.path().join("state.bad"));
            assert_eq!(aside.unwrap(), text);
            state().save(&path).unwrap();
        }
    }

    #[test]
    fn files_of_other_versions_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        for text in [
            "{\"target\":5,\"stats_interval\":3}",
            "{\"version\":1,\"target\":5,\"stats_interval\":3,\"mood\":\"good\"}",
        ] {
            fs::write(&path, text).unwrap();
            let state = State::load(&path).unwrap().unwrap();
            assert_eq!((state.config.target, state.stats_interval), (5, 3));
        }
    }

    #[test]
    fn a_time_limit_ends() {
        let mut state = state();
        assert!(state.inhibited().is_some());
        state.inhibited_until = Some(1);
        assert_eq!(state.inhibited(), None);
    }
}
