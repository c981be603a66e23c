// SPDX-License-Identifier: GPL-2.0

//! The inflate and the deflate queue, and the reports that use both.

#![forbid(unsafe_code)]

pub(super) mod deflate;
pub(super) mod inflate;
pub(super) mod migration_reports;
