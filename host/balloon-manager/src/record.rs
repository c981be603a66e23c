// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A recording of all decisions, as JSON lines.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use anyhow::{Context, Result};
use balloon_policy::{Decision, Observation, Policy, Profile};
use serde::{Deserialize, Serialize};

use crate::text;

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

/// Reads a recording, and decides again. Returns how many decisions there are.
///
/// # Errors
///
/// A decision differs, or the recording cannot be read.
pub(crate) fn replay(path: &Path) -> Result<usize> {
    let mut policy: Option<Policy> = None;
    let mut count = 0;
    for line in Record::read(path)? {
        let line = line.with_context(|| format!("line {} of {}", count + 1, path.display()))?;
        let policy = policy.get_or_insert_with(|| Policy::new(line.profile));
        policy.set_profile(line.profile);
        let decision = policy.step(&line.observation);
        count += 1;
        anyhow::ensure!(
            decision == line.decision,
            "decision {count} differs: recorded {:?}, now {:?}",
            line.decision.actions,
            decision.actions
        );
        for action in &decision.actions {
            println!(
                "{:>8}.{:03} vm {}: {}",
                line.observation.now / 1_000,
                line.observation.now % 1_000,
                action.vm.0,
                text::action(action)
            );
        }
    }
    Ok(count)
}
