// SPDX-License-Identifier: GPL-2.0

//! How much each NUMA node can give. All numbers are kernel pages.

#![forbid(unsafe_code)]

use crate::rust::mm::node::Node;

/// Returns `whole` * `some` / `all`, or up to a thousandth of `whole` less.
pub(crate) fn part(whole: usize, some: usize, all: usize) -> usize {
    // The division comes first, so that the product does not overflow.
    let in_1024 = (some.min(all) << 10) / all.max(1);

    whole / 1024 * in_1024 + whole % 1024 * in_1024 / 1024
}

/// Returns how much `node` can give, so that it keeps its share of the reserve `floor`.
pub(crate) fn room(node: Node, floor: usize) -> usize {
    let present = Node::all().map(Node::present_pages).sum();
    let share = part(floor, node.present_pages(), present);

    node.available_pages().saturating_sub(share)
}

/// Returns the same as a part of the node's memory, in thousandths. The node with the largest part
/// gives first.
pub(crate) fn precedence(node: Node, floor: usize) -> usize {
    part(1 << 10, room(node, floor), node.present_pages())
}
