// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM's balloon, over the control socket of its daemon.
//!
//! Each VM has tasks of its own, and each request has a time limit: a daemon that hangs delays no other VM. Statistics
//! have a connection of their own, since the daemon waits for the guest before it answers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use balloon_control::{ControlError, Info, Request, Shortfall, Stat, Stats};
use balloon_policy::{Millis, Pages, Sample, Stopped, Vm, VmId};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, interval, timeout};

use crate::config::{Config, PAGE};
use crate::resident::Memory;

/// How long a daemon may take for an answer.
const ANSWER: Duration = Duration::from_secs(2);

/// How long a guest may take for statistics.
const GUEST: Duration = Duration::from_secs(5);

/// The largest answer.
const MAX_ANSWER: u64 = 1 << 20;

/// How often a VM is polled, at rest and while it needs attention.
pub(crate) const SLOW: Duration = Duration::from_secs(1);
pub(crate) const FAST: Duration = Duration::from_millis(100);

/// A request that was in flight when its connection broke has an effect within this duration, or
/// none.
const FATE: Duration = Duration::from_secs(10);

/// Sets a target.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    pub(crate) number: u64,
    pub(crate) bytes: u64,
}

/// The reports of a daemon.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) info: Info,
    pub(crate) resident: Option<Pages>,
    pub(crate) sample: Option<Sample>,
    /// The newest order with a known fate.
    pub(crate) answered: u64,
    /// The daemon answers, and the fate of all orders is known.
    pub(crate) reachable: bool,
}

impl State {
    /// The VM as the policy sees it, or nothing if there is none.
    pub(crate) fn vm(&self, id: VmId, name: &str, config: &Config) -> Option<Vm> {
        let info = &self.info;
        let shared = info.shared.or(info.memory)?;
        if !info.guest.connected {
            return None;
        }
        let largest = info
            .memory
            .unwrap_or(shared)
            .min(info.limit.unwrap_or(u64::MAX));
        let least = shared.saturating_sub(largest).div_ceil(PAGE);
        let memory = shared / PAGE;
        let settings = config.settings(name, memory, least);
        let untouchable = settings.is_none() || !info.withheld.is_empty();
        Some(Vm {
            id,
            settings: settings.or_else(|| Config::default().settings(name, memory, least))?,
            memory,
            target: info.target / PAGE,
            // While memory is withheld, memory in the balloon is not returned to the host.
            size: match info.withheld.is_empty() {
                true => info.size / PAGE,
                false => 0,
            },
            resident: self.resident,
            answered: self.answered,
            granule: (info.granule / PAGE).max(1),
            driver: info.guest.driver,
            frozen: untouchable
                || !self.reachable
                || info.guest.open_requests > 0
                || info.grace.is_some(),
            stopped: info.guest.short_of_target.map(|reason| match reason {
                Shortfall::Floor | Shortfall::NoMemory => Stopped::Full,
                Shortfall::AfterOom => Stopped::AfterOom,
                Shortfall::Excluded => Stopped::Excluded,
            }),
            sample: self.sample,
        })
    }
}

/// The manager's side of a VM's tasks. They end when it is dropped.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) orders: mpsc::UnboundedSender<Order>,
    pub(crate) pace: watch::Sender<Duration>,
}

/// Starts the tasks of the VM with this control socket. They send what its daemon reports.
pub(crate) fn start(
    id: VmId,
    path: PathBuf,
    epoch: Instant,
    reports: mpsc::UnboundedSender<(VmId, State)>,
) -> Handle {
    let (orders, received) = mpsc::unbounded_channel();
    let (pace, paces) = watch::channel(SLOW);
    let (sample, samples) = watch::channel(None);
    tokio::spawn(watch_statistics(path.clone(), epoch, paces.clone(), sample));
    tokio::spawn(async move {
        let mut task = Task {
            id,
            path,
            memory: Memory::default(),
            connection: None,
            state: None,
            reports,
            samples,
        };
        task.run(received, paces).await;
    });
    Handle { orders, pace }
}

struct Task {
    id: VmId,
    path: PathBuf,
    memory: Memory,
    connection: Option<Connection>,
    state: Option<State>,
    reports: mpsc::UnboundedSender<(VmId, State)>,
    samples: watch::Receiver<Option<Sample>>,
}

impl Task {
    async fn run(
        &mut self,
        mut orders: mpsc::UnboundedReceiver<Order>,
        mut paces: watch::Receiver<Duration>,
    ) {
        let mut timer = interval(*paces.borrow_and_update());
        let mut answered = 0;
        loop {
            tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => {
                        if self.set(order).await.is_err() {
                            self.lose().await;
                        }
                        answered = order.number;
                    }
                    None => return,
                },
                changed = paces.changed() => match changed {
                    Ok(()) => {
                        timer = interval(*paces.borrow_and_update());
                        continue;
                    }
                    Err(_) => return,
                },
                _ = timer.tick() => {}
            }
            self.report(answered).await;
        }
    }

    /// Sets a target. A daemon that refuses it has answered.
    async fn set(&mut self, order: Order) -> Result<()> {
        let request = Request::Set { bytes: order.bytes };
        let answer: Result<Nothing, Failure> =
            self.connection().await?.call(&request, ANSWER).await;
        match answer {
            Ok(Nothing {}) => Ok(()),
            Err(Failure::Refused(error)) => {
                log::warn!("{}: {error}; {}", self.path.display(), error.advice);
                Ok(())
            }
            Err(Failure::Broken(error)) => Err(error),
        }
    }

    /// The fate of the last order is unknown, until enough time has passed.
    async fn lose(&mut self) {
        self.connection = None;
        self.send(|state| state.reachable = false);
        tokio::time::sleep(FATE).await;
    }

    async fn report(&mut self, answered: u64) {
        let info = match self.connection().await {
            Ok(connection) => connection.call::<Info>(&Request::Info {}, ANSWER).await,
            Err(error) => Err(Failure::Broken(error)),
        };
        let info = match info {
            Ok(info) => info,
            Err(_) => {
                self.connection = None;
                self.send(|state| state.reachable = false);
                return;
            }
        };
        let pid = self.connection.as_ref().and_then(Connection::pid);
        let shared = info.shared.unwrap_or(0);
        let resident = pid.and_then(|pid| self.memory.resident(pid, shared));
        let sample = *self.samples.borrow();
        self.state = Some(State {
            info,
            resident: resident.map(|bytes| bytes / PAGE),
            sample,
            answered,
            reachable: true,
        });
        self.send(|_| {});
    }

    /// Sends the state after a change.
    fn send(&mut self, change: impl FnOnce(&mut State)) {
        if let Some(state) = &mut self.state {
            change(state);
            // The manager may have ended.
            let _ = self.reports.send((self.id, state.clone()));
        }
    }

    async fn connection(&mut self) -> Result<&mut Connection> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => Connection::open(&self.path).await?,
        };
        Ok(self.connection.insert(connection))
    }
}

/// Requests statistics at the present interval.
async fn watch_statistics(
    path: PathBuf,
    epoch: Instant,
    mut paces: watch::Receiver<Duration>,
    samples: watch::Sender<Option<Sample>>,
) {
    let mut connection = None;
    let mut timer = interval(*paces.borrow_and_update());
    loop {
        tokio::select! {
            changed = paces.changed() => match changed {
                Ok(()) => timer = interval(*paces.borrow_and_update()),
                Err(_) => return,
            },
            _ = timer.tick() => {}
        }
        if connection.is_none() {
            connection = Connection::open(&path).await.ok();
        }
        let Some(open) = &mut connection else {
            continue;
        };
        let taken = Millis::try_from(epoch.elapsed().as_millis()).unwrap_or(Millis::MAX);
        match open
            .call::<Stats>(&Request::Stats { fresh: true }, GUEST)
            .await
        {
            Ok(stats) => {
                samples.send_replace(sample(&stats, taken));
            }
            // The guest has no statistics at the moment.
            Err(Failure::Refused(_)) => {}
            Err(Failure::Broken(_)) => connection = None,
        }
    }
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
pub(crate) struct Connection(BufReader<UnixStream>);

impl Connection {
    pub(crate) async fn open(path: &Path) -> Result<Self> {
        let stream = timeout(ANSWER, UnixStream::connect(path))
            .await?
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// The process that listens.
    fn pid(&self) -> Option<i32> {
        self.0.get_ref().peer_cred().ok()?.pid()
    }

    pub(crate) async fn call<T: DeserializeOwned>(
        &mut self,
        request: &impl serde::Serialize,
        limit: Duration,
    ) -> Result<T, Failure> {
        let reply = match timeout(limit, self.exchange(request)).await {
            Ok(reply) => reply,
            Err(elapsed) => Err(elapsed.into()),
        };
        match reply {
            Ok(Reply::Ok(answer)) => Ok(answer),
            Ok(Reply::Error(error)) => Err(Failure::Refused(error)),
            Err(error) => Err(Failure::Broken(error)),
        }
    }

    async fn exchange<T: DeserializeOwned>(
        &mut self,
        request: &impl serde::Serialize,
    ) -> Result<Reply<T>> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.0.get_mut().write_all(&line).await?;
        line.clear();
        let mut limited = (&mut self.0).take(MAX_ANSWER);
        limited.read_until(b'\n', &mut line).await?;
        if line.last() != Some(&b'\n') {
            bail!("the connection has ended in an answer");
        }
        Ok(serde_json::from_slice(&line)?)
    }
}
