// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rules that change no target.

use balloon_policy::Pages;

use super::rule::{Rule, View};

/// No target changes after the start.
#[derive(Debug)]
pub struct Fixed {
    name: &'static str,
    reporting: bool,
    /// The guests have balloons, which leave them their part of the pool.
    divided: bool,
}

/// Each VM has all of its memory.
pub const fn none() -> Fixed {
    Fixed {
        name: "none",
        reporting: false,
        divided: false,
    }
}

/// The pool is divided once.
pub(crate) const fn fixed() -> Fixed {
    Fixed {
        name: "static",
        reporting: false,
        divided: true,
    }
}

/// Guests report free pages, and have no balloons.
pub(crate) const fn reporting() -> Fixed {
    Fixed {
        name: "reporting only",
        reporting: true,
        divided: false,
    }
}

struct Divided;

impl Rule for Divided {
    fn name(&self) -> &'static str {
        ""
    }

    fn step(&mut self, _view: &View) -> Vec<(usize, Pages)> {
        Vec::new()
    }
}

impl Rule for Fixed {
    fn name(&self) -> &'static str {
        self.name
    }

    fn reporting(&self) -> bool {
        self.reporting
    }

    fn start(&self, pool: Pages, memory: &[Pages]) -> Option<Vec<Pages>> {
        self.divided.then(|| Divided.start(pool, memory)).flatten()
    }

    fn step(&mut self, _view: &View) -> Vec<(usize, Pages)> {
        Vec::new()
    }
}
