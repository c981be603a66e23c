// SPDX-License-Identifier: GPL-2.0

//! The pages in a balloon, and their migration.

pub(crate) mod balloon_pages;
pub(crate) mod node_pages;
pub(crate) mod replace;
