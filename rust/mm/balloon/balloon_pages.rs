// SPDX-License-Identifier: GPL-2.0

//! The pages in the balloon.

use crate::rust::{
    mm::{
        balloon::{
            node_pages::{
                ByOrder,
                NodePages, //
            },
            replace::MigratePage, //
        },
        node::{
            Node,
            NodeSet, //
        },
        pages::{
            page::MAX_ORDER,
            page_list::PageList, //
        }, //
    },
    work::{
        poll::poll_timeout,
        thread::Thread, //
    }, //
};

use core::mem;
use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    sync::Arc, //
};

/// How many pages (kernel pages) leave a node before the next node is chosen: 64 MiB, or the
/// largest block if that has more. A block that does not fit would be split into order-0 pages.
const PAGES_PER_NODE: usize = match 26 - PAGE_SHIFT {
    order if order > MAX_ORDER as usize => 1 << order,
    _ => 1 << MAX_ORDER,
};

/// Pages in the balloon, by the nodes that they are on.
///
/// Dropping it frees the pages. The kernel isolates some of them for page migration together with
/// other pages, and returns all at the end, perhaps after it has waited for the disk. A thread
/// waits for that if it takes longer than [`MigratePage::END_TIMEOUT`].
///
/// # Invariants
///
/// The pages of `nodes` are on the node with that number, unless the kernel has migrated them
/// since.
pub(crate) struct BalloonPages<R: MigratePage> {
    nodes: KVec<Pin<KBox<NodePages<R>>>>,
    replace: Arc<R>,
}

impl<R: MigratePage> BalloonPages<R> {
    /// Makes an empty balloon.
    ///
    /// If `adjust_managed` is set, the guest's total memory shrinks by the size of the balloon.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or the error of `replace`.
    pub(crate) fn new(adjust_managed: bool, replace: impl PinInit<R, Error>) -> Result<Self> {
        let replace = Arc::pin_init(replace, GFP_KERNEL)?;
        let mut nodes = KVec::new();

        for _ in 0..Node::count() {
            nodes.push(NodePages::new(adjust_managed, replace.clone())?, GFP_KERNEL)?;
        }
        Ok(Self { nodes, replace })
    }

    /// Returns the owner's handler of page migration.
    pub(crate) fn replacer(&self) -> &R {
        &self.replace
    }

    /// Returns how many pages (kernel pages) are in the balloon.
    pub(crate) fn len(&self) -> usize {
        self.nodes.iter().map(|node| node.len()).sum()
    }

    /// Returns how many pages (kernel pages) of `nodes` are in the balloon.
    pub(crate) fn len_on(&self, nodes: &NodeSet) -> usize {
        self.filled(nodes).map(|(_, node)| node.len()).sum()
    }

    /// Returns how many blocks of each order are in the balloon, order-0 pages being those of order
    /// 0.
    pub(crate) fn by_order(&self) -> ByOrder {
        let mut by_order = [0; MAX_ORDER as usize + 1];

        for node in &self.nodes {
            node.add_by_order(&mut by_order);
        }
        by_order
    }

    /// Returns those of `nodes` that have pages in the balloon.
    fn filled<'a>(&'a self, nodes: &'a NodeSet) -> impl Iterator<Item = (Node, &'a NodePages<R>)> {
        self.nodes
            .iter()
            .enumerate()
            .filter(|(_, pages)| pages.len() > 0)
            .filter_map(|(number, pages)| Some((Node::new(number)?, &**pages)))
            .filter(|(node, _)| nodes.contains(*node))
    }

    /// Puts `pages` into the balloon.
    pub(crate) fn insert(&self, mut pages: PageList) {
        // All pages are on the only node.
        if let [node] = self.nodes.as_slice() {
            return node.insert(pages);
        }

        while let Some((number, some)) = pages.take_node() {
            if let Some(node) = self.nodes.get(number) {
                node.insert(some);
            }
        }
    }

    /// Takes up to `max` pages (kernel pages) out of the balloon: up to `max_blocks` blocks that
    /// fit, otherwise up to the same number of order-0 pages. They are of one of `nodes`: the one
    /// with the largest share of its memory in the balloon.
    ///
    /// Returns none if there are none, or if all of the rest is isolated for migration.
    pub(crate) fn take(&self, max: usize, max_blocks: usize, nodes: &NodeSet) -> PageList {
        let max = match self.nodes.len() {
            1 => max,
            _ => max.min(PAGES_PER_NODE),
        };
        // The share in thousandths, and the number, of the node that was tried last.
        let mut tried = None;

        loop {
            let next = self
                .filled(nodes)
                .map(|(node, pages)| {
                    let share = pages.len().saturating_mul(1_000) / node.present_pages().max(1);
                    ((share, node.number()), pages)
                })
                .filter(|(place, _)| tried.is_none_or(|tried| *place < tried))
                .max_by_key(|(place, _)| *place);
            let Some((place, pages)) = next else {
                return PageList::new();
            };

            let taken = pages.take(max, max_blocks);
            if !taken.is_empty() {
                return taken;
            }
            tried = Some(place);
        }
    }
}

impl<R: MigratePage> Drop for BalloonPages<R> {
    fn drop(&mut self) {
        self.replacer().end();
        let mut nodes = mem::replace(&mut self.nodes, KVec::new());

        let freed = poll_timeout(R::END_TIMEOUT, || {
            nodes.retain(|node| !node.free());
            nodes.is_empty().then_some(())
        });
        if freed.is_some() {
            return;
        }
        pr_info!(
            "page migration holds pages of a balloon that has ended: a thread waits for them\n"
        );
        // Without a thread, such as while the module is unloaded, wait for the pages here.
        let thread = Thread::start(c"balloon_rs_pages", None, move || {
            drop(nodes);
            Ok(())
        });
        if let Ok(thread) = thread {
            thread.detach();
        }
    }
}
