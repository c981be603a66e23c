// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is kept over a restart of the daemon, in a file.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use log::error;
use serde::{Deserialize, Serialize};

use crate::config::Fields;

/// A guest that inflates writes its balloon's size after every message. The file is not written more
/// often than this.
const PAUSE: Duration = Duration::from_millis(100);

/// What is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The configuration space.
    pub config: Fields,
    /// How often the guest is asked for statistics, in seconds. 0 is never.
    pub stats_interval: u32,
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
        serde_json::from_slice(&text)
            .with_context(|| format!("{} has no state of a balloon; remove it", path.display()))
            .map(Some)
    }

    /// Writes it to a file, which has the old or the new state at any time.
    fn save(&self, path: &Path) -> io::Result<()> {
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(&new, path)
    }
}

#[derive(Debug, Default)]
struct Waiting {
    state: Option<State>,
    ended: bool,
}

/// What writes the file. What it was given last is in the file when this has been dropped.
#[derive(Debug)]
pub struct Saver {
    waiting: Arc<(Mutex<Waiting>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Saver {
    /// Begins to write to `path` what it is given.
    ///
    /// # Errors
    ///
    /// There is no thread for it.
    pub fn start(path: PathBuf) -> Result<Self> {
        let waiting = Arc::new((Mutex::new(Waiting::default()), Condvar::new()));
        let thread = thread::Builder::new().name("state".to_owned()).spawn({
            let waiting = Arc::clone(&waiting);
            move || write(&path, &waiting)
        })?;
        Ok(Self {
            waiting,
            thread: Some(thread),
        })
    }

    /// Has this state written to the file soon.
    pub fn save(&self, state: State) {
        let (waiting, changed) = &*self.waiting;
        // No thread can leave it half changed.
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.state = Some(state);
        changed.notify_one();
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        let (waiting, changed) = &*self.waiting;
        waiting.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // A thread that has panicked has said so.
            let _ = thread.join();
        }
    }
}

fn write(path: &Path, (waiting, changed): &(Mutex<Waiting>, Condvar)) {
    loop {
        let (state, ended) = {
            let lock = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let idle = |waiting: &mut Waiting| waiting.state.is_none() && !waiting.ended;
            let mut lock = changed
                .wait_while(lock, idle)
                .unwrap_or_else(PoisonError::into_inner);
            (lock.state.take(), lock.ended)
        };
        match state {
            Some(state) => {
                if let Err(error) = state.save(path) {
                    error!(
                        "cannot write {}: {error}; a restart would forget the target",
                        path.display()
                    );
                }
            }
            None => return,
        }
        if !ended {
            thread::sleep(PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_state_is_in_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        assert_eq!(State::load(&path).unwrap(), None);
        let mut state = State {
            config: Fields::default(),
            stats_interval: 3,
        };
        let saver = Saver::start(path.clone()).unwrap();
        for target in 0..100 {
            state.config.target = target;
            saver.save(state.clone());
        }
        drop(saver);
        assert_eq!(State::load(&path).unwrap(), Some(state));
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
