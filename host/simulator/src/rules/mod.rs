// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rules that are compared. Those of other projects are written from their arithmetic, which their tests check.

mod fixed;
mod mom;
mod ours;
mod pressure;
mod proxmox;
mod rule;
mod xen;

pub use fixed::none;
pub use rule::{Rule, Truth, View};

/// All of them, ours first and the oracle last.
pub fn all() -> Vec<Box<dyn Rule>> {
    vec![
        Box::new(ours::Ours::new("ours", balloon_policy::Profile::Balanced)),
        Box::new(ours::Ours::new(
            "ours, performance",
            balloon_policy::Profile::Performance,
        )),
        Box::new(ours::Ours::new(
            "ours, density",
            balloon_policy::Profile::Density,
        )),
        Box::new(none()),
        Box::new(fixed::fixed()),
        Box::new(fixed::reporting()),
        Box::new(proxmox::Proxmox::default()),
        Box::new(mom::Mom::default()),
        Box::new(xen::Squeezed::default()),
        Box::new(xen::Qmemman::default()),
        Box::new(pressure::Hypeman::default()),
        Box::new(pressure::Controller::default()),
        Box::new(pressure::Vm0::default()),
        Box::new(ours::Oracle),
    ]
}
