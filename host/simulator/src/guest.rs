// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest: its processes, its page cache and its balloon.

use balloon_policy::{GIB, MIB, Millis, Pages, Sample, Settings, Stopped, Vm, VmId};
use fastrand::Rng;

use crate::load::{Process, TICK, processes};

/// The memory of the kernel.
const KERNEL: Pages = 120 * MIB;

/// Below this much free memory the kernel reclaims caches.
const WATERMARK: Pages = 32 * MIB;

/// A driver with a small reserve leaves this much available.
const SMALL_RESERVE: Pages = 64 * MIB;

/// Caches do not shrink below this: the programs that run are in it.
const LEAST_CACHE: Pages = 48 * MIB;

/// A guest's limits for a tick: background reclaim, all reclaim, and inflating.
const BACKGROUND_RECLAIM: Pages = 100 * MIB;
const RECLAIM: Pages = 400 * MIB;
const INFLATE: Pages = 512 * MIB;

/// The cost of direct reclaim and of a page that has to be read again, in microseconds.
const RECLAIM_COST: u64 = 1;
const MISS_COST: u64 = 25;

/// A process that gets no memory for this long is killed.
const KILL_AFTER: Millis = 1_000;

/// What a guest has that reports hardly any memory.
const TINY: Pages = 64 * MIB;

/// How long a guest takes to start.
const BOOT: Millis = 15_000;

/// How a guest deviates from an honest one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behaviour {
    Honest,
    /// It has no statistics.
    Silent,
    /// It never inflates.
    Stuck,
    /// It always reports pressure.
    Liar,
    /// It reports that it has hardly any memory. Its daemon refuses a larger balloon.
    Tiny,
}

/// What happened to a guest.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Losses {
    /// Processes killed by the guest.
    pub(crate) kills: u64,
    /// Time that its processes waited for memory, in microseconds.
    pub(crate) stalled: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) memory: Pages,
    pub(crate) settings: Settings,
    pub(crate) behaviour: Behaviour,
    pub(crate) losses: Losses,
    /// The resident memory.
    pub(crate) resident: Pages,
    /// The available memory that the driver leaves to it.
    pub(crate) reserve: Pages,
    processes: Vec<Process>,
    /// The files that are read again and again, and how many pages of them a tick.
    files: Pages,
    reads: Pages,
    /// Files that are read once, in pages a tick.
    stream: Pages,
    cached: Pages,
    /// Cache that is not read again.
    stale: Pages,
    target: Pages,
    size: Pages,
    stopped: bool,
    /// Without progress since then.
    waiting: Option<Millis>,
    down_until: Millis,
    stalls: u64,
    answered: u64,
    rng: Rng,
}

impl Guest {
    /// A guest whose driver has a small reserve, or the one of `virtio_balloon_rs` by default.
    pub(crate) fn new(default_reserve: bool, mut rng: Rng) -> Self {
        let memory = [2, 4, 4, 8, 8, 16][rng.usize(..6)] * GIB;
        let files = memory * rng.u64(2..=30) / 100;
        let processes = processes(memory, &mut rng);
        // A quarter of the hosts has such a guest.
        let behaviour = match rng.u32(..100) {
            0 => Behaviour::Silent,
            1 => Behaviour::Stuck,
            2 => Behaviour::Liar,
            3 => Behaviour::Tiny,
            _ => Behaviour::Honest,
        };
        let reads = rng.u64(0..=100);
        let stream = if rng.u32(..5) == 0 {
            rng.u64(0..=5 * MIB)
        } else {
            0
        };
        let mut guest = Self {
            memory,
            settings: Settings {
                floor: (memory / 8).max(512 * MIB),
                ceiling: memory,
                weight: 1_000,
            },
            behaviour,
            losses: Losses::default(),
            resident: KERNEL,
            reserve: match default_reserve {
                true => reserve_by_default(memory),
                false => SMALL_RESERVE,
            },
            processes,
            files,
            reads,
            stream,
            cached: files,
            stale: 0,
            target: 0,
            size: 0,
            stopped: false,
            waiting: None,
            down_until: 0,
            stalls: 0,
            answered: 0,
            rng,
        };
        // It has been running for a while.
        guest.resident = guest.occupied();
        guest
    }

    /// A guest with these processes and no files, whose driver leaves so much available.
    #[cfg(test)]
    pub(crate) fn running(
        memory: Pages,
        reserve: Pages,
        processes: Vec<Process>,
        rng: Rng,
    ) -> Self {
        Self {
            memory,
            settings: Settings {
                floor: memory / 8,
                ceiling: memory,
                weight: 1_000,
            },
            behaviour: Behaviour::Honest,
            reserve,
            processes,
            files: 0,
            stream: 0,
            cached: 0,
            ..Self::new(false, rng)
        }
    }

    /// It begins with this much usable memory.
    pub(crate) fn begin(&mut self, usable: Pages) {
        self.size = self.memory - usable.min(self.memory);
        self.target = self.size;
        self.resident = self.usable();
        self.reclaim(self.occupied().saturating_sub(self.usable()));
    }

    /// All memory may have been used and freed.
    pub(crate) fn age(&mut self) {
        self.resident = self.memory;
    }

    /// Whether it is responsible for its losses.
    pub(crate) fn lies(&self) -> bool {
        matches!(self.behaviour, Behaviour::Liar | Behaviour::Tiny)
    }

    pub(crate) fn usable(&self) -> Pages {
        self.memory - self.size
    }

    /// The memory of the processes and the kernel.
    fn used(&self) -> Pages {
        KERNEL
            + self
                .processes
                .iter()
                .map(|process| process.held)
                .sum::<Pages>()
    }

    fn occupied(&self) -> Pages {
        self.used() + self.cached + self.stale
    }

    fn free(&self) -> Pages {
        self.usable().saturating_sub(self.occupied())
    }

    /// The memory that processes can get without swapping.
    fn available(&self) -> Pages {
        let free = self.free().saturating_sub(WATERMARK);
        free + self.stale + self.cached.saturating_sub(LEAST_CACHE) / 2
    }

    /// The memory that the guest would use if it could, without its caches.
    pub(crate) fn demand(&self) -> Pages {
        let wanted = self.processes.iter().map(|process| process.wanted);
        KERNEL + wanted.sum::<Pages>()
    }

    /// The cache that is worth having.
    pub(crate) fn working_files(&self) -> Pages {
        if self.reads > 0 { self.files } else { 0 }
    }

    pub(crate) fn is_up(&self, now: Millis) -> bool {
        now >= self.down_until
    }

    /// It is killed by the host, or reset by its user.
    pub(crate) fn restart(&mut self, now: Millis) {
        for process in &mut self.processes {
            process.kill(now + BOOT);
        }
        (self.cached, self.stale, self.size) = (0, 0, 0);
        self.resident = KERNEL;
        self.down_until = now + BOOT;
    }

    pub(crate) fn set_target(&mut self, number: u64, target: Pages) {
        let refused = self.behaviour == Behaviour::Tiny && target > self.target;
        if !refused {
            self.target = target.min(self.memory);
        }
        self.answered = number;
    }

    /// Lets a tick pass.
    pub(crate) fn tick(&mut self, now: Millis, reporting: bool) {
        if !self.is_up(now) {
            self.losses.stalled += TICK * 1_000;
            return;
        }
        self.move_balloon();
        self.run_processes(now);
        self.read_files();
        let occupied = self.occupied().min(self.usable());
        self.resident = match reporting {
            true => occupied,
            false => self.resident.clamp(occupied, self.usable().max(occupied)),
        };
    }

    fn move_balloon(&mut self) {
        self.stopped = false;
        if self.target <= self.size {
            self.size = self.target;
            return;
        }
        if self.behaviour == Behaviour::Stuck {
            return;
        }
        let most = self.available().saturating_sub(self.reserve);
        let wish = (self.target - self.size).min(INFLATE).min(most);
        let free = self.free().saturating_sub(WATERMARK);
        if free < wish {
            self.reclaim((wish - free).min(BACKGROUND_RECLAIM));
        }
        let taken = wish.min(self.free().saturating_sub(WATERMARK));
        self.size += taken;
        self.stopped = taken == 0;
        self.resident = self.resident.min(self.usable());
    }

    /// Drops at most `wish` of the caches. Returns how much.
    fn reclaim(&mut self, wish: Pages) -> Pages {
        let stale = wish.min(self.stale);
        self.stale -= stale;
        let cached = (wish - stale).min(self.cached.saturating_sub(LEAST_CACHE));
        self.cached -= cached;
        stale + cached
    }

    fn run_processes(&mut self, now: Millis) {
        let (mut wished, mut got) = (0, 0);
        for index in 0..self.processes.len() {
            let wish = self.processes[index].wish(now, &mut self.rng);
            let free = self.free().saturating_sub(WATERMARK);
            if free < wish {
                let reclaimed = self.reclaim((wish - free).min(RECLAIM));
                let direct = reclaimed.saturating_sub(BACKGROUND_RECLAIM);
                self.stalls += u64::from(direct > 0);
                self.losses.stalled += direct * RECLAIM_COST;
            }
            let taken = wish.min(self.free().saturating_sub(WATERMARK));
            self.processes[index].held += taken;
            (wished, got) = (wished + wish, got + taken);
        }
        if got == wished {
            self.waiting = None;
            return;
        }
        self.stalls += 1;
        self.losses.stalled += TICK * 1_000 * (wished - got) / wished;
        if got > 0 {
            self.waiting = None;
        }
        let since = *self.waiting.get_or_insert(now);
        if now - since >= KILL_AFTER {
            self.waiting = None;
            self.losses.kills += 1;
            if let Some(largest) = self.processes.iter_mut().max_by_key(|one| one.held) {
                largest.kill(now);
            }
        }
    }

    /// Reads files through the cache: a fifth of them gets four fifths of the reads, and so does a fifth of that.
    fn read_files(&mut self) {
        let part = self.cached * 1_000 / self.files.max(1);
        let hits = match part {
            0..40 => part * 16,
            40..200 => 640 + (part - 40),
            200..1_000 => 800 + (part - 200) / 4,
            _ => 1_000,
        };
        let misses = self.reads * (1_000 - hits) / 1_000;
        self.losses.stalled += misses * MISS_COST;
        let room = |guest: &Self| guest.free().saturating_sub(WATERMARK);
        let read = misses.min(self.files.saturating_sub(self.cached));
        // Files that are read again replace other files in the cache.
        if room(self) < read {
            self.stale -= self.stale.min(read - room(self));
        }
        self.cached += read.min(room(self));
        self.stale += self.stream.min(room(self));
    }

    pub(crate) fn observe(&self, id: u32, now: Millis) -> Vm {
        let available = self.available();
        let sample = match self.behaviour {
            Behaviour::Silent => None,
            Behaviour::Liar => Some((0, 0, now)),
            Behaviour::Tiny => Some((self.free().min(TINY), available.min(TINY), self.stalls)),
            _ => Some((self.free(), available, self.stalls)),
        };
        let sample = sample.map(|(free, available, stalls)| Sample {
            taken: now,
            free,
            available,
            stalls,
            swapped_in: 0,
            kills: self.losses.kills,
        });
        let (mut settings, mut unusable) = (self.settings, 0);
        if self.behaviour == Behaviour::Tiny {
            unusable = self.memory - TINY;
            settings.floor = settings.floor.max(self.memory - self.target);
            // What it gets now cannot be taken back.
            if self.target > 0 {
                settings.ceiling = settings.floor;
            }
        }
        Vm {
            size: self.size,
            resident: Some(self.resident),
            unusable,
            answered: self.answered,
            driver: self.is_up(now),
            stopped: (self.stopped && self.target > self.size).then_some(Stopped::Full),
            sample: sample.filter(|_| self.is_up(now)),
            ..Vm::new(VmId(id), settings, self.memory, self.target)
        }
    }
}

/// What `virtio_balloon_rs` leaves to a guest by default: a part of its memory that decreases with its size.
fn reserve_by_default(memory: Pages) -> Pages {
    let mut reserve = 8 * MIB;
    let mut start = 0;
    for (end, parts) in [(128, 2), (512, 4), (2_048, 8), (8_192, 16), (u64::MAX, 32)] {
        let end = MIB.saturating_mul(end).min(memory);
        reserve += end.saturating_sub(start) / parts;
        start = end;
    }
    reserve
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_reserve_is_the_one_of_the_driver() {
        let reserves = [GIB, 4 * GIB, 8 * GIB, 16 * GIB].map(reserve_by_default);
        assert_eq!(reserves, [232 * MIB, 488 * MIB, 744 * MIB, 1_000 * MIB]);
    }
}
