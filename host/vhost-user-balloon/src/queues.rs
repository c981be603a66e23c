// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's messages: one module for each virtqueue, over those that take messages and decode lists of pages.

pub mod answers;
pub mod deflate;
pub mod hinting;
pub mod inflate;
pub mod pages;
pub mod reporting;
pub mod requests;
pub mod stats;
pub mod virtqueue;
