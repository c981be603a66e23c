// SPDX-License-Identifier: GPL-2.0

//! The steps towards the target: growing and shrinking the balloon.

#![forbid(unsafe_code)]

use crate::{
    balloon::{
        policy::stop_reason::StopReason,
        queues::{
            deflate,
            inflate::Stop, //
        },
        state::{
            mib,
            Balloon,
            Worker, //
        }, //
    },
    device::timeouts,
    rust::{
        mm::{
            contig::drain,
            memory,
            node::{
                Node,
                NodeSet, //
            }, //
        },
        trace::Reason,
        work::task::Task, //
    },
    sources::{
        memory_blocks::Offliner,
        nodes::{
            part,
            precedence,
            room, //
        },
        page_allocator::PageAllocator, //
    }, //
};

use core::ops::ControlFlow;
use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    time::Msecs, //
};

/// How many pages one run inflates or deflates, so that the device begins soon: 1 GiB.
pub(crate) const PAGES_PER_RUN: usize = 1 << (30 - PAGE_SHIFT);

/// In a large guest one run inflates this part of the memory instead, so that it sends few
/// messages: in whole GiB, since a message has many ranges for a remainder below a block.
const PART_PER_RUN: usize = 8;

/// The most that one run inflates: what a batch has windows for, wherever the memory begins.
const MAX_PER_RUN: usize = 7 * PAGES_PER_RUN;

/// The most pages that one run allocates if the kernel zeroes them: 64 MiB.
const ZEROED_PER_RUN: usize = 1 << (26 - PAGE_SHIFT);

impl Balloon {
    /// Inflates by up to `wanted` pages. Returns how long to wait before the next attempt without
    /// an event.
    pub(super) fn grow(&self, worker: &mut Worker, target: usize, wanted: usize) -> Option<Msecs> {
        let now = self.now();
        let ready = self
            .offliner
            .as_ref()
            .map_or(0, |offliner| offliner.ready());

        let spare = || self.available_above_reserve();
        if let Some(pause) = worker.growth.pause(now, ready, spare) {
            return Some(pause);
        }
        if !self.may_send() {
            return None;
        }
        self.drain_lists(worker, wanted);

        if let Some(offliner) = &self.offliner {
            if let ControlFlow::Break(again) = self.grow_by_blocks(worker, offliner, wanted, ready)
            {
                return again;
            }
        }

        let reserve = memory::ReserveGuard::begin();
        let above_floor = self.available_above_reserve();
        let now_wanted = wanted.min(match memory::is_zeroed_on_allocation() {
            true => ZEROED_PER_RUN,
            false => (memory::present_pages() / PART_PER_RUN)
                .next_multiple_of(PAGES_PER_RUN)
                .min(MAX_PER_RUN),
        });
        let stop = self.grow_by_nodes(worker, now_wanted.min(above_floor));
        drop(reserve);

        match stop {
            Stop::Done if now_wanted <= above_floor => {
                worker.growth.succeed();
                (now_wanted < wanted).then_some(0)
            }
            Stop::NotNow => None,
            Stop::Done | Stop::Reserve => self.give_up(worker, StopReason::Floor, target, now),
            Stop::NoMemory => self.give_up(worker, StopReason::NoMemory, target, now),
        }
    }

    /// Returns whether pages may be inflated. A deflated and unreported page may be among the
    /// allocated ones: the device would see the deflate after the next inflate. A new target is
    /// read first.
    fn may_send(&self) -> bool {
        self.migrations().is_settled()
            && !self.deflate.lock().is_pending()
            && !self.events.has_target_changed()
    }

    /// Drains the per-CPU page lists if that makes the balloon grow: other tasks have to fill the
    /// lists of their CPUs again afterwards.
    fn drain_lists(&self, worker: &Worker, wanted: usize) {
        if worker.growth.stopped() != Some(StopReason::Floor) {
            return;
        }
        let with_lists = memory::available_pages() + memory::pcp_pages();
        let above_floor = with_lists.saturating_sub(self.settings().floor_pages());

        if above_floor >= wanted.min(drain::WORTHWHILE) {
            drain::drain_free_lists();
        }
    }

    /// Inflates with the `ready` pages of memory blocks, or requests more of these. Continues if
    /// the page allocator is next.
    fn grow_by_blocks(
        &self,
        worker: &mut Worker,
        offliner: &Task<Offliner>,
        wanted: usize,
        ready: usize,
    ) -> ControlFlow<Option<Msecs>> {
        offliner.want(wanted);
        let ready = ready.min(wanted);

        if ready > 0 {
            let (source, mut left) = (&**offliner, ready);
            let (inflate, batch) = (&mut worker.inflate, &mut worker.batch);
            let may_send = || self.may_send();
            let stop = inflate.fill(&self.pages, batch, source, &mut left, may_send);
            if stop == Stop::Done {
                worker.growth.succeed();
            }
            return ControlFlow::Break((stop == Stop::Done).then_some(0));
        }
        if offliner.is_busy() {
            return ControlFlow::Break(None);
        }
        let may_take = worker.growth.may_take_blocks(offliner.is_cancelled());
        if may_take && Offliner::is_worthwhile(wanted) {
            worker.growth.take_blocks();
            offliner.begin(wanted);
            return ControlFlow::Break(None);
        }
        ControlFlow::Continue(())
    }

    /// Inflates by up to `left` pages from the page allocator. What a node cannot give is taken
    /// from the others.
    fn grow_by_nodes(&self, worker: &mut Worker, mut left: usize) -> Stop {
        let mut nodes = NodeSet::all();
        let mut stop = Stop::Reserve;

        while left > 0 {
            let before = left;

            match self.take_shares(worker, &mut nodes, &mut left) {
                Stop::NotNow => return Stop::NotNow,
                Stop::NoMemory => stop = Stop::NoMemory,
                Stop::Done | Stop::Reserve => (),
            }
            if left == before {
                return stop;
            }
        }
        Stop::Done
    }

    /// Takes up to `left` pages, from each of `nodes` in proportion to its available memory, and
    /// subtracts them from `left`. Removes nodes that cannot give their share from `nodes`. The
    /// queue may be full before each node has given its share, so the node that has given least
    /// comes first.
    fn take_shares(&self, worker: &mut Worker, nodes: &mut NodeSet, left: &mut usize) -> Stop {
        let floor = self.settings().floor_pages();
        let asked = *nodes;
        let among = || Node::all().filter(|&node| asked.contains(node));
        let mut all: usize = among().map(|node| room(node, floor)).sum();
        let first = among().max_by_key(|&node| precedence(node, floor));
        let others = among().filter(|&node| Some(node) != first);
        let mut order = Iterator::chain(first.into_iter(), others).peekable();
        let mut stop = Stop::Done;

        while let Some(node) = order.next() {
            let this_room = room(node, floor);
            let share = match order.peek() {
                Some(_) => part(*left, this_room, all),
                None => *left,
            };
            all = all.saturating_sub(this_room);

            worker.batch.take_from(node);
            let spare = || room(node, floor).min(self.available_above_reserve());
            let source = PageAllocator::new(spare);
            let (inflate, batch) = (&mut worker.inflate, &mut worker.batch);
            let may_send = || self.may_send();
            let mut missing = share;
            let this = inflate.fill(&self.pages, batch, source, &mut missing, may_send);

            *left -= share - missing;
            match this {
                Stop::Done => (),
                Stop::NotNow => return Stop::NotNow,
                Stop::Reserve | Stop::NoMemory => {
                    nodes.remove(node);
                    if stop != Stop::NoMemory {
                        stop = this;
                    }
                }
            }
        }
        stop
    }

    /// Records why the balloon cannot grow to `target`, and logs it the first time. Returns how
    /// long to wait before the next attempt.
    fn give_up(
        &self,
        worker: &mut Worker,
        reason: StopReason,
        target: usize,
        now: i64,
    ) -> Option<Msecs> {
        let spare = self.available_above_reserve();
        if worker.growth.fail(reason, spare, now) && worker.log_limit.allows() {
            dev_info!(
                self.dev,
                "{} of {} MiB in the balloon: {}; retrying with pauses of up to 30 seconds\n",
                mib(self.pages.len() + worker.inflate.in_flight()),
                mib(target),
                reason.words()
            );
        }

        worker.growth.pause(now, 0, || spare)
    }

    /// Deflates by up to `wanted` pages. Returns how long to wait before the next step without an
    /// event.
    pub(super) fn shrink(&self, worker: &mut Worker, wanted: usize) -> Option<Msecs> {
        let limit = wanted.min(PAGES_PER_RUN);
        // Continues when the device has used a message.
        if !self.migrations().is_settled() {
            return None;
        }
        let guard = self.migrations().block();
        let released = deflate::release(
            &self.deflate,
            &self.pages,
            &mut worker.batch,
            NodeSet::all(),
            limit,
            Reason::Target,
            &guard,
        );
        drop(guard);

        if released > 0 {
            worker.progress.restart();
        }

        if released == limit {
            (limit < wanted).then_some(0)
        } else if self.deflate.lock().is_pending() {
            None
        } else {
            // Only page migration, which has isolated pages of the balloon, prevents it.
            Some(timeouts::ISOLATION)
        }
    }
}
