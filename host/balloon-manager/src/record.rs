// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A recording of all decisions, as JSON lines.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use anyhow::{Context, Result};
use balloon_policy::{Decision, Observation, Profile};
use serde::{Deserialize, Serialize};

/// A step of the policy.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Line {
    pub(crate) profile: Profile,
    pub(crate) observation: Observation,
    pub(crate) decision: Decision,
}

#[derive(Debug)]
pub(crate) struct Record(File);

impl Record {
    /// Creates the file. One of that name is replaced: a recording begins with the manager.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).open(path);
        Ok(Self(file.with_context(|| {
            format!("cannot create {}", path.display())
        })?))
    }

    pub(crate) fn write(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.0
            .write_all(&text)
            .context("cannot write the recording")
    }

    pub(crate) fn read(path: &Path) -> Result<impl Iterator<Item = Result<Line>>> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let lines = BufReader::new(file).lines();
        Ok(lines.map(|line| Ok(serde_json::from_str(&line?)?)))
    }
}
