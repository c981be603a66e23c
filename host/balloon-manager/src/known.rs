// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the manager knows of a VM.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use balloon_policy::{Account, Millis, Vm};
use tokio::time::Instant;

use crate::config::PAGE;
use crate::host::Room;
use crate::link::Place;
use crate::savings::Proposal;
use crate::state::State;
use crate::status::Past;
use crate::text;
use crate::vm::Handle;
use crate::waits::Wait;

/// A VM and its tasks.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) name: String,
    pub(crate) place: Place,
    pub(crate) handle: Handle,
    pub(crate) state: Option<State>,
    /// The room of the measured pool at the time of the VM's resident memory.
    pub(crate) room: Option<Room>,
    /// Since when the daemon of a running VM has not answered.
    pub(crate) lost: Option<Instant>,
    /// A client wants the VM to be left alone.
    pub(crate) paused: bool,
    /// The process of the VMM, which ran when the daemon reported it.
    pub(crate) vmm: Option<i32>,
    /// The VM as it was known last. It counts while its daemon has a new process that does not know the memory yet.
    pub(crate) vm: Option<Vm>,
    pub(crate) account: Option<Account>,
    pub(crate) wait: Option<Wait>,
    pub(crate) history: VecDeque<Past>,
    pub(crate) raises: u64,
    pub(crate) cuts: u64,
    /// In observe mode: the newest action, and its target.
    pub(crate) observed: u64,
    pub(crate) proposal: Option<Proposal>,
}

/// Whether there is a process with this number.
fn runs(pid: i32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

impl Known {
    pub(crate) const fn new(name: String, place: Place, handle: Handle) -> Self {
        Self {
            name,
            place,
            handle,
            state: None,
            room: None,
            lost: None,
            paused: false,
            vmm: None,
            vm: None,
            account: None,
            wait: None,
            history: VecDeque::new(),
            raises: 0,
            cuts: 0,
            observed: 0,
            proposal: None,
        }
    }

    /// The cause of the last action.
    pub(crate) fn cause(&self) -> Option<&'static str> {
        let past = self.history.front();
        past.map(|past| text::cause(past.action.cause))
    }

    /// Looks at the resident memory, if the pool is measured now.
    pub(crate) fn measure(&mut self, room: Option<Room>) {
        let (Some(_), Some(state)) = (room, &mut self.state) else {
            return;
        };
        if let Some(bytes) = self.handle.resident() {
            state.resident = Some(bytes / PAGE);
            self.room = room;
        }
    }

    /// Follows the guest's wait for memory. Returns how long one was that has ended with the memory.
    pub(crate) fn follow_wait(
        &mut self,
        vm: Option<(&Vm, &Account)>,
        now: Millis,
    ) -> Option<Millis> {
        let (vm, account) = vm?;
        let ended;
        (self.wait, ended) = Wait::follow(self.wait, vm, account, now);
        ended
    }

    /// The VM as it would be if the manager did not only observe.
    pub(crate) fn proposed(&mut self, vm: Vm) -> Vm {
        self.proposal = self.proposal.filter(|proposal| proposal.of == vm.target);
        match self.proposal {
            Some(proposal) if vm.driver => proposal.apply(vm),
            _ => vm,
        }
    }

    /// Takes the newest state. Returns the one before.
    pub(crate) fn replace(&mut self, state: State) -> Option<State> {
        match (state.reachable, state.balloon.connected) {
            (true, true) => {
                self.lost = None;
                self.vmm = state.balloon.vmm.filter(|&pid| runs(pid));
            }
            (false, true) => self.lost = self.lost.or_else(|| Some(Instant::now())),
            // VMs connect to a new daemon again.
            (_, false) => {}
        }
        self.room = state.room.or(self.room);
        self.state.replace(state)
    }

    /// Whether the VM may run although its daemon does not know it, or has gone: the daemon restarts. With QEMU's own
    /// device the VM ends as well.
    pub(crate) fn is_awaited(&self, time: Duration) -> bool {
        matches!(self.place, Place::Daemon(_))
            && self.lost.is_some_and(|lost| lost.elapsed() < time)
            && self.vmm.is_none_or(runs)
    }

    /// The VM's socket is missing, or is none of the configuration any more. Returns whether the VM may run on without it.
    pub(crate) fn lose(&mut self, place: &Place, time: Duration) -> bool {
        let runs = |state: &State| state.balloon.connected;
        if self.state.as_ref().is_some_and(runs) {
            self.lost.get_or_insert_with(Instant::now);
        }
        let (Place::Daemon(path) | Place::Qemu(path)) = place;
        !path.exists() && self.is_awaited(time)
    }
}
