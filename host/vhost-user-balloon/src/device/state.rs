// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of the device. The host's settings are stored in a file.
//!
//! The guest's own values are not in the file. A new worker for a running guest receives them from the
//! supervisor, and for another guest they are not valid.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use log::warn;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::lease::{KeptLease, Lease, NewTarget, Release, clock};
use super::term::Term;
use crate::virtio::config::Fields;

/// The version of the file's format. It changes only when a daemon of this version would misread the file.
const VERSION: u32 = 1;

/// The longest `inhibit`. A client that dies must not end ballooning forever.
pub const MAX_INHIBIT: Duration = Duration::from_secs(24 * 60 * 60);

/// The maximum number of owners at the same time.
pub const MAX_INHIBITORS: usize = 32;

/// The state of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The configuration space.
    pub config: Fields,
    /// The interval of statistics requests, in seconds. 0 is never.
    pub stats_interval: u32,
    /// The active `inhibit`s, by owner and [`since_boot`]. The empty name is for clients without one. A reboot of the
    /// host ends them, and all pinning.
    pub inhibitors: BTreeMap<String, Term>,
    /// The lease on the target, if it has one.
    pub lease: Option<Lease>,
    /// The target is that after a lease that has run out, and no client has set another one.
    pub lapsed: bool,
    /// What the device may release by itself during the lease. It is not in the file: a new process releases nothing.
    pub release: Release,
    /// The device has lowered the target by itself, and has not written that to the file yet.
    pub unsaved: bool,
}

/// The time since the host was booted. Unlike the time of day it cannot be set, and it continues
/// while the host is suspended.
pub fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// The content of the file. Fields of newer daemons are ignored.
#[derive(Serialize, Deserialize)]
struct Settings {
    #[serde(default)]
    version: u32,
    /// In balloon pages. During a lease it is the target after that, since older daemons know no leases.
    target: u32,
    #[serde(default)]
    lease: Option<KeptLease>,
    #[serde(default)]
    lapsed: bool,
    stats_interval: u32,
    /// The longest of those below. Older daemons know only this one.
    #[serde(default)]
    inhibited: Option<Term>,
    #[serde(default)]
    inhibitors: BTreeMap<String, Term>,
}

impl State {
    /// The state of a device without a file.
    pub fn new(stats_interval: u32) -> Self {
        Self {
            config: Fields::default(),
            stats_interval,
            inhibitors: BTreeMap::new(),
            lease: None,
            lapsed: false,
            release: Release::default(),
            unsaved: false,
        }
    }

    /// Reads it from a file, if there is one. An invalid file is renamed, since a VM with the defaults is better than
    /// none. The file may have had an `inhibit`, so no memory is returned to the host for the longest possible time.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn load(path: &Path, stats_interval: u32) -> Result<Self> {
        let text = match fs::read(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Ok(Self::new(stats_interval));
            }
            other => other.with_context(|| format!("reading {}", path.display()))?,
        };
        let reason = match serde_json::from_slice::<Settings>(&text) {
            Ok(settings) if settings.version <= VERSION => {
                let state = Self::from(settings);
                if state.lease.is_some() {
                    // One process after the other must not begin the lease once more.
                    if let Err(error) = state.save(path) {
                        warn!("cannot write {}: {error}", path.display());
                    }
                }
                return Ok(state);
            }
            Ok(settings) => format!("its version is {}", settings.version),
            Err(error) => error.to_string(),
        };
        let aside = beside(path, ".bad");
        warn!(
            "{} has no state of a balloon that this daemon can read ({reason}); moved it to {}, and starting \
             without it: the target and the interval of the statistics are lost, and no memory is returned to the \
             host for a day, or until `balloonctl resume`",
            path.display(),
            aside.display()
        );
        let mut state = Self::new(stats_interval);
        state.inhibit(since_boot(), "", MAX_INHIBIT);
        // The file exists at any time: without a file there is no inhibit.
        fs::copy(path, &aside)
            .map(drop)
            .and_then(|()| state.save(path))
            .with_context(|| format!("moving {} to {}", path.display(), aside.display()))?;
        Ok(state)
    }

    /// Writes it to a file, which has the old or the new state at any time, also after a loss of power. Leaves a file
    /// that has the state already: a client may repeat a command without end.
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
            target: self
                .lease
                .as_ref()
                .map_or(self.config.target, |lease| lease.fallback),
            lease: self
                .lease
                .as_ref()
                .map(|lease| KeptLease::new(self.config.target, lease)),
            lapsed: self.lapsed,
            stats_interval: self.stats_interval,
            inhibited: self
                .inhibitors
                .values()
                .max_by_key(|one| one.until)
                .copied(),
            inhibitors: self.inhibitors.clone(),
        };
        let text = serde_json::to_vec(&settings)?;
        if fs::read(path).is_ok_and(|old| old == text) {
            return Ok(());
        }
        let mut new = NamedTempFile::new_in(directory)?;
        new.write_all(&text)?;
        new.as_file().sync_all()?;
        new.persist(path)?;
        File::open(directory)?.sync_all()
    }

    /// Stops returning memory to the host for so long from `now` on, or until a later end that this owner requested
    /// before. Returns whether there was room for another owner.
    pub fn inhibit(&mut self, now: Duration, owner: &str, time: Duration) -> bool {
        self.inhibitors.retain(|_, one| one.rest(now).is_some());
        let rest = self.inhibitors.get(owner).and_then(|one| one.rest(now));
        if rest.is_none() && self.inhibitors.len() >= MAX_INHIBITORS {
            return false;
        }
        let time = rest.unwrap_or_default().max(time);
        self.inhibitors
            .insert(owner.to_owned(), Term::new(now, time));
        true
    }

    /// Sets the target from `now` on, if the expected one is in force.
    ///
    /// # Errors
    ///
    /// Another target is in force: this one.
    pub fn set_target(&mut self, new: NewTarget, now: Duration) -> Result<(), u32> {
        let target = self.config.target;
        // A client may not know yet what the device has released.
        let set = u64::from(target) + u64::from(self.release.used);
        let is_known = |pages: u64| pages == u64::from(target) || pages == set;
        if new.expected.is_some_and(|pages| !is_known(pages)) {
            return Err(target);
        }
        let is_own = |lease: &Lease| lease.owner == new.owner;
        let is_renewed = self.lease.as_ref().is_some_and(is_own) && new.release.is_none();
        let is_same = new.expected == Some(new.pages.into());
        let stays = match new.lease {
            Some(_) => is_renewed && (is_same || new.pages == target),
            // A client ends its lease.
            None => is_same,
        };
        if !stays {
            self.release = Release {
                left: new.release.unwrap_or(0).min(new.pages),
                used: 0,
            };
            self.config.target = new.pages;
        } else if new.lease.is_none() {
            self.release.left = 0;
        }
        let old = self.lease.take();
        let before = old.as_ref().map_or(target, |lease| lease.fallback);
        // The file has the first renewal, and need not have the others.
        let from = old.map_or(now, |lease| lease.term.from);
        self.lease = new.lease.map(|time| Lease {
            term: Term {
                from,
                until: now.saturating_add(time),
            },
            time,
            found: false,
            fallback: new.fallback.unwrap_or(before),
            owner: new.owner,
        });
        self.lapsed = false;
        Ok(())
    }

    /// Lowers the target by what a client has let the device release. Returns by how much.
    pub fn release(&mut self) -> u32 {
        let pages = std::mem::take(&mut self.release.left);
        self.release.used += pages;
        self.config.target -= pages;
        self.unsaved |= pages > 0;
        pages
    }

    /// Ends a lease that has run out. Returns whether it had.
    pub fn lapse(&mut self, now: Duration) -> bool {
        let is_over = |lease: &mut Lease| lease.term.until <= now;
        let Some(lease) = self.lease.take_if(is_over) else {
            return false;
        };
        self.config.target = lease.fallback;
        (self.lapsed, self.release) = (true, Release::default());
        true
    }

    /// Ends the `inhibit` of an owner, or of all.
    pub fn resume(&mut self, owner: Option<&str>) {
        match owner {
            Some(owner) => drop(self.inhibitors.remove(owner)),
            None => self.inhibitors.clear(),
        }
    }

    /// The remaining time from `now` on of each owner's `inhibit`.
    pub fn inhibitors(&self, now: Duration) -> impl Iterator<Item = (&str, Duration)> {
        self.inhibitors
            .iter()
            .filter_map(move |(owner, one)| Some((owner.as_str(), one.rest(now)?)))
    }

    /// The longest of these times.
    pub fn inhibited(&self, now: Duration) -> Option<Duration> {
        self.inhibitors(now).map(|(_, rest)| rest).max()
    }
}

impl From<Settings> for State {
    fn from(settings: Settings) -> Self {
        let fallback = settings.target;
        let leased = settings.lease.as_ref().map(|lease| lease.target);
        let lease = settings
            .lease
            .and_then(|lease| lease.find(fallback, clock()));
        Self {
            config: Fields {
                target: leased.filter(|_| lease.is_some()).unwrap_or(fallback),
                ..Fields::default()
            },
            release: Release::default(),
            unsaved: false,
            lapsed: settings.lapsed || leased.is_some() != lease.is_some(),
            lease,
            stats_interval: settings.stats_interval,
            inhibitors: match settings.inhibited {
                Some(one) if settings.inhibitors.is_empty() => [(String::new(), one)].into(),
                _ => settings.inhibitors,
            },
        }
    }
}

/// The path with a suffix.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn inhibited(owner: &str, until: u64) -> (String, Term) {
        let one = Term {
            from: Duration::from_secs(5),
            until: Duration::from_secs(until),
        };
        (owner.to_owned(), one)
    }

    fn state() -> State {
        State {
            config: Fields {
                target: 5,
                ..Fields::default()
            },
            stats_interval: 3,
            inhibitors: [inhibited("", 10), inhibited("backup", 9)].into(),
            lease: None,
            lapsed: false,
            release: Release::default(),
            unsaved: false,
        }
    }

    #[test]
    fn the_hosts_settings_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        assert_eq!(State::load(&path, 7).unwrap(), State::new(7));
        let mut state = state();
        state.save(&path).unwrap();
        assert_eq!(State::load(&path, 7).unwrap(), state);
        state.config.actual = 4;
        state.save(&path).unwrap();
        assert_eq!(State::load(&path, 7).unwrap().config.actual, 0);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_has_the_state_is_not_written_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let mut state = state();
        // Each write makes another file.
        let mut saved = |target| {
            state.config.target = target;
            state.save(&path).unwrap();
            fs::metadata(&path).unwrap().ino()
        };
        let first = saved(5);
        // The next file cannot have the number of one that still exists.
        let _first = File::open(&path).unwrap();
        assert_eq!(saved(5), first);
        assert_ne!(saved(6), first);
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
            let state = State::load(&path, 7).unwrap();
            assert_eq!(
                (state.config.target, state.stats_interval),
                (0, 7),
                "{text}"
            );
            // The file may have had an inhibit.
            let rest = state.inhibited(since_boot()).unwrap();
            assert!(rest > MAX_INHIBIT - Duration::from_secs(60), "{text}");
            assert_eq!(State::load(&path, 8).unwrap(), state);
            let aside = fs::read_to_string(directory.path().join("state.bad"));
            assert_eq!(aside.unwrap(), text);
            self::state().save(&path).unwrap();
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
            let state = State::load(&path, 7).unwrap();
            assert_eq!((state.config.target, state.stats_interval), (5, 3));
        }
    }

    #[test]
    fn older_daemons_know_of_one_inhibit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        state().save(&path).unwrap();
        let mut text: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(text["inhibited"]["until"]["secs"], 10);
        // The file of such a daemon.
        text.as_object_mut().unwrap().remove("inhibitors");
        fs::write(&path, text.to_string()).unwrap();
        let state = State::load(&path, 7).unwrap();
        assert_eq!(state.inhibitors, [inhibited("", 10)].into());
    }

    #[test]
    fn each_owner_has_a_time_limit_of_its_own() {
        let mut state = State::new(0);
        let at = Duration::from_secs;
        assert!(state.inhibit(at(10), "", at(600)));
        assert!(state.inhibit(at(10), "backup", at(60)));
        assert_eq!(state.inhibited(at(20)), Some(at(590)));
        state.resume(Some("snapshot"));
        state.resume(Some(""));
        assert_eq!(
            state.inhibitors(at(20)).collect::<Vec<_>>(),
            [("backup", at(50))]
        );
        state.inhibit(at(20), "", at(1));
        state.resume(None);
        assert_eq!(state.inhibited(at(20)), None);

        for number in 0..MAX_INHIBITORS {
            assert!(state.inhibit(at(30), &number.to_string(), at(60)));
        }
        assert!(!state.inhibit(at(30), "another", at(60)));
        assert!(state.inhibit(at(30), "0", at(70)));
        assert!(state.inhibit(at(90), "another", at(60)));
    }

    #[test]
    fn a_time_limit_ends() {
        let mut state = State::new(0);
        let at = Duration::from_millis;
        state.inhibit(at(900), "", Duration::from_secs(600));
        assert_eq!(state.inhibited(at(900)), Some(Duration::from_secs(600)));
        assert_eq!(state.inhibited(at(600_899)), Some(at(1)));
        assert_eq!(state.inhibited(at(600_900)), None);
        // The host was booted again.
        assert_eq!(state.inhibited(at(899)), None);
    }

    #[test]
    fn a_time_limit_is_extended_and_not_shortened() {
        let mut state = State::new(0);
        let at = Duration::from_secs;
        state.inhibit(at(10), "", at(600));
        state.inhibit(at(20), "", at(1));
        assert_eq!(state.inhibited(at(20)), Some(at(590)));
        state.inhibit(at(30), "", at(600));
        assert_eq!(state.inhibited(at(30)), Some(at(600)));
        // The host was booted again.
        state.inhibit(at(1), "", at(5));
        assert_eq!(state.inhibited(at(1)), Some(at(5)));
    }
    const fn leased(pages: u32, seconds: u64, fallback: Option<u32>) -> NewTarget {
        NewTarget {
            pages,
            expected: None,
            lease: Some(Duration::from_secs(seconds)),
            fallback,
            owner: None,
            release: None,
        }
    }

    #[test]
    fn a_lease_ends_in_the_target_before_it() {
        let at = Duration::from_secs;
        let mut state = state();
        state.set_target(leased(7, 60, None), at(100)).unwrap();
        // It is renewed, with the same target and with another one.
        state.set_target(leased(7, 60, None), at(130)).unwrap();
        state.set_target(leased(8, 60, None), at(140)).unwrap();
        assert!(!state.lapse(at(199)) && !state.lapsed);
        assert_eq!(state.config.target, 8);
        assert!(state.lapse(at(200)) && state.lapsed);
        assert_eq!((state.config.target, &state.lease), (5, &None));
        assert!(!state.lapse(at(300)));
        // A target without a lease ends a lease.
        state.set_target(leased(7, 60, None), at(300)).unwrap();
        assert!(!state.lapsed);
        state.set_target(9.into(), at(310)).unwrap();
        assert!(!state.lapse(at(400)));
        assert_eq!(state.config.target, 9);
    }

    #[test]
    fn a_lease_ends_in_the_target_that_is_stated() {
        let at = Duration::from_secs;
        let mut state = state();
        state.set_target(leased(7, 60, Some(3)), at(0)).unwrap();
        state.set_target(leased(7, 60, None), at(30)).unwrap();
        assert_eq!(state.lease.as_ref().map(|lease| lease.fallback), Some(3));
        state.set_target(leased(7, 60, Some(4)), at(60)).unwrap();
        assert!(state.lapse(at(120)));
        assert_eq!(state.config.target, 4);
    }

    #[test]
    fn a_release_lasts_until_the_next_target() {
        let at = Duration::from_secs;
        let mut state = state();
        let set = |pages, expected, release| NewTarget {
            expected,
            release,
            ..leased(pages, 60, None)
        };
        let now = |state: &State| {
            let Release { left, used } = state.release;
            (state.config.target, left, used)
        };
        state.set_target(set(9, None, Some(4)), at(0)).unwrap();
        assert_eq!(now(&state), (9, 4, 0));
        // Renewals leave it, also those of a client that does not know of it.
        state.set_target(set(9, Some(9), None), at(1)).unwrap();
        assert_eq!(state.release(), 4);
        assert_eq!(now(&state), (5, 0, 4));
        for pages in [9, 5] {
            state
                .set_target(set(pages, Some(pages.into()), None), at(2))
                .unwrap();
            assert_eq!(now(&state), (5, 0, 4));
        }
        assert_eq!(state.set_target(set(8, Some(6), None), at(3)), Err(5));
        // The next target replaces either.
        state.set_target(set(8, Some(9), Some(2)), at(3)).unwrap();
        assert_eq!(now(&state), (8, 2, 0));
        state.set_target(set(7, Some(8), None), at(3)).unwrap();
        assert_eq!((now(&state), state.release()), ((7, 0, 0), 0));
        state.set_target(set(7, None, Some(9)), at(4)).unwrap();
        assert!(state.lapse(at(64)));
        assert_eq!(now(&state), (5, 0, 0));
    }

    /// Another program neither inherits an allowance nor takes a lowered target for its own.
    #[test]
    fn a_release_is_that_of_the_leases_owner() {
        let set = |pages, owner: Option<&str>, release| NewTarget {
            owner: owner.map(str::to_owned),
            expected: Some(pages),
            release,
            ..leased(9, 60, None)
        };
        for other in [None, Some("night")] {
            let mut state = state();
            state
                .set_target(set(5, Some("manager"), Some(4)), Duration::ZERO)
                .unwrap();
            state
                .set_target(set(9, other, None), Duration::ZERO)
                .unwrap();
            assert_eq!((state.config.target, state.release()), (9, 0));
            state
                .set_target(set(9, Some("manager"), Some(4)), Duration::ZERO)
                .unwrap();
            assert_eq!(state.release(), 4);
            state
                .set_target(set(9, other, None), Duration::ZERO)
                .unwrap();
            assert_eq!((state.config.target, state.release.used), (9, 0));
        }
    }

    #[test]
    fn the_end_of_a_lease_leaves_what_was_released_with_the_guest() {
        // The client may know of the release, or not yet.
        for known in [9, 5] {
            let mut state = state();
            let new = NewTarget {
                release: Some(4),
                ..leased(9, 60, None)
            };
            state.set_target(new, Duration::ZERO).unwrap();
            assert_eq!(state.release(), 4);
            // The first answer may be lost.
            for _ in 0..2 {
                let end = NewTarget {
                    expected: Some(known.into()),
                    ..known.into()
                };
                state.set_target(end, Duration::ZERO).unwrap();
                assert_eq!((state.config.target, &state.lease), (5, &None));
                assert_eq!((state.release.used, state.release()), (4, 0));
            }
            state.set_target(9.into(), Duration::ZERO).unwrap();
            assert_eq!((state.config.target, state.release.used), (9, 0));
        }
        // No release is left without a lease.
        let mut state = state();
        let new = NewTarget {
            release: Some(4),
            ..leased(9, 60, None)
        };
        state.set_target(new, Duration::ZERO).unwrap();
        let end = NewTarget {
            expected: Some(9),
            ..9.into()
        };
        state.set_target(end, Duration::ZERO).unwrap();
        assert_eq!((state.config.target, state.release()), (9, 0));
    }

    #[test]
    fn a_conflict_changes_nothing() {
        let mut state = state();
        state
            .set_target(leased(7, 60, None), Duration::ZERO)
            .unwrap();
        let before = state.clone();
        let new = NewTarget {
            expected: Some(5),
            ..leased(9, 600, Some(1))
        };
        assert_eq!(state.set_target(new, Duration::from_secs(1)), Err(7));
        assert_eq!(state, before);
    }

    #[test]
    fn a_lease_is_kept_and_older_daemons_use_the_target_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let mut state = state();
        let new = NewTarget {
            owner: Some("manager".to_owned()),
            ..leased(7, 60, None)
        };
        state.set_target(new, clock()).unwrap();
        state.save(&path).unwrap();
        let text: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(
            (&text["target"], &text["lease"]["target"]),
            (&5.into(), &7.into())
        );
        let later = State::load(&path, 7).unwrap();
        let lease = later.lease.clone().unwrap();
        assert_eq!(later.config.target, 7);
        assert_eq!(
            (lease.fallback, lease.owner.as_deref()),
            (5, Some("manager"))
        );
        // It begins once more, and not again with each further process.
        assert!(lease.term.until >= state.lease.unwrap().term.until);
        assert_eq!(State::load(&path, 7).unwrap(), later);

        // It has run out when the next process starts, or the host was booted again.
        for start in [Duration::ZERO, clock() + Duration::from_secs(60)] {
            let mut state = self::state();
            state.set_target(leased(7, 0, None), start).unwrap();
            state.save(&path).unwrap();
            let later = State::load(&path, 7).unwrap();
            assert_eq!((later.config.target, later.lease.clone()), (5, None));
            assert!(later.lapsed);
            assert_eq!(State::load(&path, 7).unwrap(), later);
        }
    }

    #[test]
    fn renewals_do_not_write_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let at = Duration::from_secs;
        let mut state = state();
        // Each write makes another file, which the open ones cannot be.
        let mut files = Vec::new();
        let mut saved = |pages, time, now| {
            state
                .set_target(leased(pages, time, None), at(now))
                .unwrap();
            state.save(&path).unwrap();
            files.push(File::open(&path).unwrap());
            fs::metadata(&path).unwrap().ino()
        };
        let first = saved(7, 60, 100);
        assert_eq!((saved(7, 60, 120), saved(7, 60, 140)), (first, first));
        assert_ne!(saved(8, 60, 140), first);
        let second = saved(8, 60, 160);
        assert_ne!(saved(8, 30, 160), second);
    }
}
