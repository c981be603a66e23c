// SPDX-License-Identifier: GPL-2.0

//! The priorities of the features' OOM notifiers: the kernel calls the largest first.

#![forbid(unsafe_code)]

use kernel::prelude::*;

/// Hints come first, so that the balloon need not deflate.
pub(crate) const HINTS: c_int = BALLOON + 1;

/// The priority of the balloon's notifier, which is that of virtio_balloon.
pub(crate) const BALLOON: c_int = 80;
