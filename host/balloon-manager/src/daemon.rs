// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A balloon device of vhost-user-balloon, over the daemon's control socket.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use balloon_control::{ControlError, ErrorKind, Info, Lease, Request, Shortfall, Stat, Stats};
use balloon_policy::{Millis, Sample, Stopped};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::balloon::{ANSWER, Balloon, Change, Outcome};
use crate::config::PAGE;
use crate::lines::Lines;

/// The owner of the leases of each manager.
const OWNER: &str = "balloon-manager";

/// The feature with which a guest sends statistics when it is short of memory.
const PRESSURE: &str = "pressure";

/// The time between two attempts to subscribe. A daemon sends an event at least as often.
const RETRY: Duration = Duration::from_secs(1);

/// The answer to a request without a result.
#[derive(Debug, Deserialize)]
struct Nothing {}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply<T> {
    Ok(T),
    Error(ControlError),
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The daemon refuses the request.
    Refused(ControlError),
    /// The connection is useless now.
    Broken(anyhow::Error),
}

/// A connection to a control socket.
#[derive(Debug)]
pub(crate) struct Connection(Lines);

impl Connection {
    pub(crate) async fn open(path: &Path) -> Result<Self> {
        Ok(Self(Lines::open(path).await?))
    }

    /// The process that listens.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.0.pid()
    }

    /// The state of the balloon.
    pub(crate) async fn balloon(&mut self) -> Result<Balloon> {
        match self.call::<Info>(&Request::Info {}, ANSWER).await {
            Ok(info) => Ok(balloon(&info)),
            Err(Failure::Refused(error)) => Err(error.into()),
            Err(Failure::Broken(error)) => Err(error),
        }
    }

    /// Sets a target.
    pub(crate) async fn set(&mut self, change: Change) -> Result<Outcome> {
        let request = Request::Set {
            bytes: change.target,
            expected: Some(change.before),
            lease: change.terms.map(|terms| milliseconds(terms.time)),
            fallback: change.terms.map(|terms| terms.fallback),
            owner: change.terms.map(|_| OWNER.to_owned()),
            release: change.terms.and(change.release),
        };
        match self.call(&request, ANSWER).await {
            Ok(Nothing {}) => Ok(Outcome::Set),
            Err(Failure::Refused(error)) => Ok(match (error.kind, error.target) {
                (ErrorKind::Conflict, Some(target)) => Outcome::Conflict(target),
                _ => Outcome::Refused(format!("{error}; {}", error.advice)),
            }),
            Err(Failure::Broken(error)) => Err(error),
        }
    }

    pub(crate) async fn call<T: DeserializeOwned>(
        &mut self,
        request: &impl Serialize,
        limit: Duration,
    ) -> Result<T, Failure> {
        let reply = match timeout(limit, self.exchange(request)).await {
            Ok(reply) => reply,
            Err(elapsed) => Err(anyhow::Error::new(elapsed).context("the daemon does not answer")),
        };
        match reply {
            Ok(Reply::Ok(answer)) => Ok(answer),
            Ok(Reply::Error(error)) => Err(Failure::Refused(error)),
            Err(error) => Err(Failure::Broken(error)),
        }
    }

    async fn exchange<T: DeserializeOwned>(
        &mut self,
        request: &impl Serialize,
    ) -> Result<Reply<T>> {
        self.0.send(request).await?;
        self.0.receive().await
    }
}

fn balloon(info: &Info) -> Balloon {
    let withheld = !info.withheld.is_empty();
    let lease = info.lease.as_ref();
    let is_ours = |lease: &Lease| lease.owner.as_deref() == Some(OWNER);
    let claimed = lease.is_some_and(|lease| !is_ours(lease));
    Balloon {
        memory: info.shared.or(info.memory).filter(|_| info.guest.connected),
        unusable: match (info.shared, info.memory) {
            (Some(shared), Some(memory)) => shared.saturating_sub(memory),
            _ => 0,
        },
        connected: info.guest.connected,
        vmm: info.vmm,
        largest: info
            .memory
            .unwrap_or(u64::MAX)
            .min(info.limit.unwrap_or(u64::MAX)),
        target: info.target,
        leased: lease.is_some_and(is_ours),
        claimed,
        notifies: info.guest.features.iter().any(|name| name == PRESSURE),
        lapsed: info.lapsed,
        release: info.release,
        released: info.released,
        // What the device counts, not what the guest reports. Memory that is put into the balloon while the daemon
        // withholds memory is not returned to the host. It stays in the resident memory, if that is known.
        size: match withheld && info.resident.is_none() {
            true => 0,
            false => info.held,
        },
        resident: info.resident,
        granule: info.granule,
        driver: info.guest.driver,
        frozen: withheld || claimed || info.guest.open_requests > 0 || info.grace.is_some(),
        stopped: info.guest.short_of_target.map(|reason| match reason {
            Shortfall::Floor | Shortfall::NoMemory => Stopped::Full,
            Shortfall::AfterOom => Stopped::AfterOom,
            Shortfall::Excluded => Stopped::Excluded,
        }),
    }
}

/// An event. Of others than statistics only the time matters.
#[derive(Deserialize)]
struct News {
    stats: Option<Stats>,
}

/// A daemon's events, for the tasks of a VM.
pub(crate) struct Watch {
    pub(crate) path: PathBuf,
    pub(crate) epoch: Instant,
    /// The interval of statistics.
    pub(crate) paces: watch::Receiver<Duration>,
    pub(crate) samples: watch::Sender<Option<Sample>>,
    /// The number of the newest statistics.
    pub(crate) sequence: Option<u64>,
    /// Notified of each event, and when the daemon sends none. Each may come with another state of the balloon: statistics
    /// change the guest's memory. The state must be requested, since an event may be older than a target that was set
    /// after it.
    pub(crate) changed: Arc<Notify>,
}

impl Watch {
    /// Follows the daemon's events. This ends with the sender of `paces`.
    pub(crate) async fn run(mut self) {
        loop {
            let pace = *self.paces.borrow_and_update();
            let mut paces = self.paces.clone();
            tokio::select! {
                changed = paces.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // With the next subscription the daemon has the new interval.
                    continue;
                }
                // The request for the state fails as well, and is the one that counts.
                _ = self.follow(pace) => {}
            }
            self.changed.notify_one();
            sleep(RETRY).await;
        }
    }

    async fn follow(&mut self, pace: Duration) -> Result<()> {
        let mut connection = Connection::open(&self.path).await?;
        let subscribe = Request::Subscribe {
            stats_milliseconds: Some(milliseconds(pace)),
        };
        timeout(ANSWER, connection.exchange::<Nothing>(&subscribe)).await??;
        loop {
            let event: News = timeout(ANSWER, connection.0.receive()).await??;
            if let Some(stats) = event.stats {
                self.take(&stats);
            }
            self.changed.notify_one();
        }
    }

    /// Takes statistics. Each subscription begins with the newest ones, which may have come before.
    fn take(&mut self, stats: &Stats) {
        if self.sequence.replace(stats.sequence) == Some(stats.sequence) {
            return;
        }
        let now = milliseconds(self.epoch.elapsed());
        let taken = now.saturating_sub(stats.requested);
        self.samples.send_replace(sample(stats, taken));
    }
}

fn milliseconds(time: Duration) -> Millis {
    Millis::try_from(time.as_millis()).unwrap_or(Millis::MAX)
}

fn sample(stats: &Stats, taken: Millis) -> Option<Sample> {
    let value = |stat| stats.values.get(&stat).copied();
    let free = value(Stat::FreeMemory)? / PAGE;
    let count = |stat| value(stat).unwrap_or(0);
    Some(Sample {
        taken,
        free,
        available: value(Stat::AvailableMemory).map_or(free, |bytes| bytes / PAGE),
        stalls: count(Stat::AllocStalls),
        swapped_in: count(Stat::SwapIn) / PAGE,
        kills: count(Stat::OomKills),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_balloon_whose_memory_is_withheld_counts_if_resident_memory_is_known() {
        let size = |withheld: &[&str], resident| {
            let info = Info {
                held: 3 << 30,
                resident,
                withheld: withheld.iter().map(|&reason| reason.to_owned()).collect(),
                ..Info::default()
            };
            let balloon = balloon(&info);
            assert_eq!(balloon.frozen, !withheld.is_empty());
            balloon.size
        };
        assert_eq!(size(&[], None), 3 << 30);
        assert_eq!(size(&["inhibited"], None), 0);
        assert_eq!(size(&["inhibited"], Some(1 << 30)), 3 << 30);
    }

    #[test]
    fn statistics_that_come_again_are_no_news() {
        let (samples, newest) = watch::channel(None);
        let (_pace, paces) = watch::channel(RETRY);
        let mut watch = Watch {
            path: PathBuf::new(),
            epoch: Instant::now().checked_sub(Duration::from_secs(60)).unwrap(),
            paces,
            samples,
            sequence: None,
            changed: Arc::default(),
        };
        let mut taken = |sequence, requested| {
            watch.take(&Stats {
                requested,
                sequence,
                values: BTreeMap::from([(Stat::FreeMemory, PAGE)]),
                ..Stats::default()
            });
            newest.borrow().map(|sample: Sample| sample.taken)
        };
        let first = taken(7, 100);
        assert!(first.is_some());
        // The daemon and the manager round the time.
        assert_eq!(taken(7, 110), first);
        assert_eq!(taken(7, 0), first);
        assert!(taken(8, 0) > first);
    }
}
