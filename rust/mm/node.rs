// SPDX-License-Identifier: GPL-2.0

//! NUMA nodes.
//!
//! C headers: [`include/linux/nodemask.h`](srctree/include/linux/nodemask.h),
//! [`include/linux/mmzone.h`](srctree/include/linux/mmzone.h)

use crate::rust::bindings;

use kernel::prelude::*;

/// Reads a variable of the kernel, or a part of it, that may be changing. A torn value is no worse
/// than an old one.
macro_rules! read_global {
    ($($place:tt)+) => {
        // SAFETY: The variable exists. A volatile access stands for READ_ONCE().
        unsafe { (&raw const $crate::rust::bindings::$($place)+).read_volatile() }
    };
}
pub(super) use read_global;

/// Returns the value of a kernel counter that may be negative for a moment.
pub(super) fn count(counter: bindings::atomic_long_t) -> usize {
    counter.counter.max(0) as usize
}

/// The number of bits in a word of a kernel mask.
const BITS: usize = c_ulong::BITS as usize;

/// Returns the numbers of the set bits of a kernel mask.
fn bits<const N: usize>(mask: [c_ulong; N]) -> impl Iterator<Item = usize> {
    mask.into_iter().enumerate().flat_map(|(index, mut word)| {
        core::iter::from_fn(move || {
            let bit = word.trailing_zeros() as usize;

            // Clears the lowest bit.
            word &= word.wrapping_sub(1);
            (bit < BITS).then_some(index * BITS + bit)
        })
    })
}

/// Returns the nodes that are in a state.
fn nodes_in(state: bindings::node_states) -> impl Iterator<Item = Node> {
    // It changes when memory is plugged: an old value does no harm.
    let mask = read_global!(node_states[state as usize].bits);

    // INVARIANT: Nodes in any state are possible.
    bits(mask).map(|number| Node(number as c_int))
}

/// Returns the numbers of the CPUs that are online.
pub(super) fn online_cpus() -> impl Iterator<Item = c_int> {
    // It changes when a CPU is plugged: an old value does no harm.
    bits(read_global!(__cpu_online_mask.bits)).map(|cpu| cpu as c_int)
}

/// Returns a counter of all nodes.
pub(super) fn counter(item: bindings::node_stat_item) -> usize {
    count(read_global!(vm_node_stat[item as usize]))
}

/// Reads a field of a node that may be changing. A torn value is no worse than an old one.
macro_rules! read {
    ($node:expr, $($field:tt)+) => {{
        let node: Node = $node;

        // SAFETY: By the type invariants it is a node. A volatile access stands for READ_ONCE().
        unsafe { (&raw const (*node.data()).$($field)+).read_volatile() }
    }};
}

/// A set of NUMA nodes.
#[derive(Clone, Copy)]
pub(crate) struct NodeSet(bindings::nodemask_t);

impl NodeSet {
    /// Returns all nodes.
    pub(crate) fn all() -> Self {
        Self(read_global!(
            node_states[bindings::node_states_N_POSSIBLE as usize]
        ))
    }

    /// Returns the nodes that are short of memory now.
    pub(crate) fn short() -> Self {
        let mut set = Self::all();

        for node in Node::all().filter(|node| !node.is_short()) {
            set.remove(node);
        }
        set
    }

    /// Removes `node`.
    pub(crate) fn remove(&mut self, node: Node) {
        self.0.bits[node.index() / BITS] &= !(1 << (node.index() % BITS));
    }

    /// Returns whether `node` belongs to it.
    pub(crate) fn contains(&self, node: Node) -> bool {
        self.0.bits[node.index() / BITS] & 1 << (node.index() % BITS) != 0
    }
}

/// A NUMA node.
///
/// # Invariants
///
/// The node is possible (`N_POSSIBLE`): its data exist as long as the kernel runs, also while it
/// has no memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Node(c_int);

impl Node {
    /// Returns all that have memory.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        nodes_in(bindings::node_states_N_MEMORY)
    }

    /// Returns all that are online.
    pub(super) fn online() -> impl Iterator<Item = Self> {
        nodes_in(bindings::node_states_N_ONLINE)
    }

    /// Returns the node `number`, if it is possible (`N_POSSIBLE`).
    pub(crate) fn new(number: usize) -> Option<Self> {
        nodes_in(bindings::node_states_N_POSSIBLE).find(|node| node.0 as usize == number)
    }

    /// Returns a number larger than those of all nodes.
    pub(crate) fn count() -> usize {
        nodes_in(bindings::node_states_N_POSSIBLE)
            .last()
            .map_or(0, |node| node.0 as usize + 1)
    }

    /// Returns its number.
    pub(in crate::rust) fn number(self) -> c_int {
        self.0
    }

    /// Returns the same as an index.
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }

    pub(super) fn data(self) -> *mut bindings::pglist_data {
        // SAFETY: By the type invariants it is a node.
        unsafe { bindings::NODE_DATA(self.0) }
    }

    /// Returns a counter of the node.
    fn counter(self, item: bindings::node_stat_item) -> usize {
        count(read!(self, vm_stat[item as usize]))
    }

    /// Returns how many kernel pages there are.
    pub(crate) fn present_pages(self) -> usize {
        read!(self, node_present_pages)
    }

    /// Returns how many kernel pages the kernel reserves for itself: the high watermarks of its
    /// zones, boosts included, and their lowmem reserves.
    pub(super) fn reserved_pages(self) -> usize {
        read!(self, totalreserve_pages)
    }

    /// Returns how many kernel pages are page cache.
    pub(super) fn file_pages(self) -> usize {
        self.counter(bindings::node_stat_item_NR_ACTIVE_FILE)
            + self.counter(bindings::node_stat_item_NR_INACTIVE_FILE)
    }

    /// Returns how many kernel pages of the page cache are mapped, at least: mapped pages may also
    /// be shared memory, which is no page cache.
    pub(super) fn mapped_file_pages(self) -> usize {
        self.counter(bindings::node_stat_item_NR_FILE_MAPPED)
            .saturating_sub(self.counter(bindings::node_stat_item_NR_SHMEM))
            .min(self.file_pages())
    }

    /// Returns how many kernel pages of slabs and similar memory can be reclaimed.
    pub(super) fn reclaimable_pages(self) -> usize {
        self.counter(bindings::node_stat_item_NR_SLAB_RECLAIMABLE_B)
            + self.counter(bindings::node_stat_item_NR_KERNEL_MISC_RECLAIMABLE)
    }

    /// Returns how many kernel pages of the node are in balloons. Adds up the counters of the CPUs,
    /// so that tests can rely on the number.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(super) fn ballooned_on_cpus(self) -> isize {
        const ITEM: usize = bindings::node_stat_item_NR_BALLOON_PAGES as usize;

        // SAFETY: The data are valid, and have such counters for each CPU.
        let diff = |cpu| unsafe {
            let all = (*self.data()).per_cpu_nodestats;
            let this: *mut bindings::per_cpu_nodestat =
                bindings::per_cpu_ptr(all.cast(), cpu).cast();
            let counters = (&raw const (*this).vm_node_stat_diff).cast::<i8>();

            counters.add(ITEM).read_volatile()
        };

        online_cpus().map(|cpu| isize::from(diff(cpu))).sum()
    }
}
