// SPDX-License-Identifier: GPL-2.0

//! Deflating for a guest that has run out of memory.

#![forbid(unsafe_code)]

use crate::{
    balloon::{
        queues::deflate,
        state::Balloon, //
    },
    device::{
        oom_order,
        timeouts, //
    },
    rust::{
        mm::{
            hotplug::memory_block::MemoryBlock,
            node::NodeSet, //
        },
        notifiers::oom::OomNotify,
        trace::Reason,
        work::task::Task, //
    }, //
};

use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    sync::atomic::Relaxed, //
};

/// How many pages an OOM deflates at least: 64 MiB.
const OOM_SHARE: usize = 1 << (26 - PAGE_SHIFT);

impl Task<Balloon> {
    /// Has the balloon pause.
    fn pause(&self) {
        self.events.out_of_memory();
        self.schedule();
    }

    /// Waits for the memory block that the offliner is taking, if there is one. Returns how many
    /// kernel pages come back.
    fn wait_for_block(&self) -> usize {
        let Some(offliner) = self.offliner.as_ref().filter(|offliner| offliner.is_busy()) else {
            return 0;
        };

        // The pause begins first: the balloon would take the block again as soon as it is free.
        self.pause();
        match offliner.ends_within(timeouts::OOM_BLOCK) {
            true => MemoryBlock::pages() as usize,
            false => 0,
        }
    }
}

impl OomNotify for Task<Balloon> {
    const PRIORITY: c_int = oom_order::BALLOON;

    /// Deflates a part of the balloon at once: enough for the guest to continue for a while.
    fn out_of_memory(&self) -> usize {
        // Pages that are not in the balloon yet come first: the device need not be notified of
        // them.
        let ready = self
            .offliner
            .as_ref()
            .map_or(0, |offliner| offliner.cancel());
        if ready > 0 {
            self.pause();
            return ready;
        }
        // An allocation may be bound to a node: memory of another node would not help it. The first
        // free pages may end the shortage.
        let nodes = NodeSet::short();
        let there = self.pages.len_on(&nodes);
        if self.quiescing.load(Relaxed) {
            return 0;
        }
        if there == 0 {
            return self.wait_for_block();
        }

        let guard = self.migrations().block();
        let wanted = (there / 8).max(OOM_SHARE);
        let released = deflate::release(
            &self.deflate,
            &self.pages,
            &mut self.oom_batch.lock(),
            nodes,
            wanted,
            Reason::OutOfMemory,
            &guard,
        );
        drop(guard);

        if released > 0 {
            self.pause();
        }
        if !deflate::is_awaited_out_of_memory(&self.deflate) {
            return released;
        }

        let is_acknowledged = || deflate::is_acknowledged(&self.deflate, &self.pages).then_some(());
        if self.oom_timeout.poll(is_acknowledged).is_none() {
            return 0;
        }
        if released > 0 {
            // The device has used the messages that were just sent. It need not interrupt for them.
            self.queue_used();
            self.schedule();
        }
        released
    }
}
