// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory demand of a guest's processes over time.

use balloon_policy::{MIB, Millis, Pages};
use fastrand::Rng;

/// The time between two steps of the simulation.
pub(crate) const TICK: Millis = 100;

/// After which time a process that was killed starts again.
const RESTART: Millis = 10_000;

/// How the memory of a process changes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// It keeps its memory.
    Steady { size: Pages },
    /// It runs jobs, with pauses of a random length between them.
    Jobs {
        size: Pages,
        length: Millis,
        pause: Millis,
    },
    /// It grows, and drops to a third: a garbage collector.
    Sawtooth { size: Pages },
    /// It grows to its limit, and starts again.
    Leak { size: Pages },
    /// It follows the time of the day, whose length this is.
    Daily { size: Pages, day: Millis },
}

/// A process.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    kind: Kind,
    /// How fast it allocates, in pages a tick.
    speed: Pages,
    /// Its memory.
    pub(crate) held: Pages,
    /// Its demand.
    pub(crate) wanted: Pages,
    /// When its present phase ends.
    until: Millis,
    busy: bool,
    offset: Millis,
}

impl Process {
    pub(crate) fn new(kind: Kind, speed: Pages, rng: &mut Rng) -> Self {
        let offset = rng.u64(..120_000);
        Self {
            kind,
            speed: speed.max(1),
            held: 0,
            wanted: 0,
            until: offset,
            busy: false,
            offset,
        }
    }

    /// How much it allocates in this tick. It frees what it does not want.
    pub(crate) fn wish(&mut self, now: Millis, rng: &mut Rng) -> Pages {
        if now >= self.until || !matches!(self.kind, Kind::Jobs { .. }) {
            self.plan(now, rng);
        }
        self.held = self.held.min(self.wanted);
        (self.wanted - self.held).min(self.speed)
    }

    fn plan(&mut self, now: Millis, rng: &mut Rng) {
        if now < self.until {
            // It waits for its start.
            if self.held == 0 {
                return;
            }
        }
        match self.kind {
            Kind::Steady { size } => self.wanted = size,
            Kind::Jobs {
                size,
                length,
                pause,
            } => {
                self.busy = !self.busy;
                let (wanted, time) = match self.busy {
                    true => (size / 2 + rng.u64(0..=size / 2), length),
                    false => (size / 16, pause),
                };
                self.wanted = wanted;
                self.until = now + time / 2 + rng.u64(0..=time);
            }
            Kind::Sawtooth { size } => {
                self.wanted = size;
                if self.held == size {
                    self.wanted = size / 3;
                }
            }
            Kind::Leak { size } => {
                self.wanted = size;
                if self.held == size {
                    (self.held, self.wanted) = (0, 0);
                    self.until = now + RESTART;
                }
            }
            Kind::Daily { size, day } => {
                // A triangle.
                let time = (now + self.offset * 720) % day;
                let height = time.min(day - time) * 2;
                self.wanted = size / 5 + size * 4 / 5 * height / day;
            }
        }
    }

    /// It is killed, and starts again later.
    pub(crate) fn kill(&mut self, now: Millis) {
        (self.held, self.wanted, self.busy) = (0, 0, false);
        self.until = now + RESTART;
    }
}

/// The processes of a guest of `memory`.
pub(crate) fn processes(memory: Pages, rng: &mut Rng) -> Vec<Process> {
    let part = |rng: &mut Rng, low: u64, high: u64| memory * rng.u64(low..=high) / 100;
    let mut processes = Vec::new();
    let size = part(rng, 4, 12);
    processes.push((Kind::Steady { size }, 100 * MIB));
    let fast = rng.u64(50..=400) * MIB;
    let kind = match rng.u32(..10) {
        0..2 => return spawn(&processes, rng),
        2..6 => Kind::Jobs {
            size: part(rng, 20, 70),
            length: rng.u64(5_000..=60_000),
            pause: rng.u64(20_000..=240_000),
        },
        6 => Kind::Sawtooth {
            size: part(rng, 20, 50),
        },
        7 => Kind::Leak {
            size: part(rng, 30, 60),
        },
        _ => Kind::Daily {
            size: part(rng, 20, 60),
            day: 86_400_000,
        },
    };
    let speed = match kind {
        Kind::Sawtooth { .. } => rng.u64(1..=10) * MIB,
        Kind::Leak { .. } => rng.u64(1..=2) * MIB,
        _ => fast,
    };
    processes.push((kind, speed));
    spawn(&processes, rng)
}

fn spawn(kinds: &[(Kind, Pages)], rng: &mut Rng) -> Vec<Process> {
    let spawn = |&(kind, speed): &(Kind, Pages)| Process::new(kind, speed, rng);
    kinds.iter().map(spawn).collect()
}
