// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the device is, and what of it is kept in a file: the host's wishes.
//!
//! What the guest has said is not in the file. A process that takes the device up while the guest goes on
//! hears it from the one that keeps the connection, and another guest has not said it.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::config::Fields;

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The configuration space.
    pub config: Fields,
    /// How often the guest is asked for statistics, in seconds. 0 is never.
    pub stats_interval: u32,
}

/// What is in the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wishes {
    /// In balloon pages.
    target: u32,
    stats_interval: u32,
}

impl State {
    /// Reads it from a file, if there is one.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or is something else.
    pub fn load(path: &Path) -> Result<Option<Self>> {
        let text = match fs::read(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.with_context(|| format!("reading {}", path.display()))?,
        };
        let wishes: Wishes = serde_json::from_slice(&text)
            .with_context(|| format!("{} has no state of a balloon; remove it", path.display()))?;
        Ok(Some(Self {
            config: Fields {
                target: wishes.target,
                ..Fields::default()
            },
            stats_interval: wishes.stats_interval,
        }))
    }

    /// Writes it to a file, which has the old or the new state at any time.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let wishes = Wishes {
            target: self.config.target,
            stats_interval: self.stats_interval,
        };
        fs::write(&new, serde_json::to_vec(&wishes)?)?;
        fs::rename(&new, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_wishes_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        assert_eq!(State::load(&path).unwrap(), None);
        let mut state = State {
            config: Fields {
                target: 5,
                ..Fields::default()
            },
            stats_interval: 3,
        };
        state.save(&path).unwrap();
        assert_eq!(State::load(&path).unwrap().as_ref(), Some(&state));
        state.config.actual = 4;
        state.save(&path).unwrap();
        assert_eq!(State::load(&path).unwrap().unwrap().config.actual, 0);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn another_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        fs::write(&path, "{\"config\":{}}").unwrap();
        let error = State::load(&path).unwrap_err();
        assert!(error.to_string().contains("remove it"), "{error}");
    }
}
