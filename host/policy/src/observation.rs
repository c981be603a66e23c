// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The input and the output of the policy.

use serde::{Deserialize, Serialize};

/// A number of pages of 4 KiB.
pub type Pages = u64;

/// Milliseconds of a clock that does not go back.
pub type Millis = u64;

/// A GiB.
pub const GIB: Pages = 1 << 18;

/// A MiB.
pub const MIB: Pages = 1 << 8;

/// A VM, by a number that no other VM gets while the policy knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VmId(pub u32);

/// The administrator's settings for a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The VM keeps this much.
    pub floor: Pages,
    /// The VM gets no more than this.
    pub ceiling: Pages,
    /// Its share when there is not enough for all.
    pub weight: u16,
}

/// Why a guest has stopped inflating below its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stopped {
    /// It has reached the driver's reserve, or it cannot allocate memory.
    Full,
    /// It ran out of memory.
    AfterOom,
    /// Its administrator has turned ballooning off.
    Excluded,
}

/// The guest's statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// When the sample was requested.
    pub taken: Millis,
    /// Free memory.
    pub free: Pages,
    /// Memory that processes can get without swapping.
    pub available: Pages,
    /// The number of allocations that had to reclaim memory themselves.
    pub stalls: u64,
    /// Pages read from swap.
    pub swapped_in: Pages,
    /// The number of processes killed for lack of memory.
    pub kills: u64,
}

/// What a device may release by itself: it lowers its target when the guest notices that it is short of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// The device can do so, and its guest sends notices.
    pub offered: bool,
    /// By how much it may still lower the target.
    pub left: Pages,
    /// By how much it has, since the target was set.
    pub used: Pages,
}

impl Release {
    /// A device that never does so.
    pub const NONE: Self = Self {
        offered: false,
        left: 0,
        used: 0,
    };
}

/// The state of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Which one.
    pub id: VmId,
    /// Its settings.
    pub settings: Settings,
    /// Its memory, in the balloon or not.
    pub memory: Pages,
    /// The balloon's target.
    pub target: Pages,
    /// The balloon's size. The host has this memory back.
    pub size: Pages,
    /// The VM's resident memory, if known.
    pub resident: Option<Pages>,
    /// The part of its memory that the guest says it can never use: reserved for a crash kernel, or not plugged.
    #[serde(default)]
    pub unusable: Pages,
    /// The newest action for this VM of which, and of all older ones, the fate was known before the device reported
    /// this state: they were carried out, refused, or lost for good.
    pub answered: u64,
    /// The discard granularity.
    pub granule: Pages,
    /// The lease on the target has run out: the daemon has set another target by itself, and no program has since.
    #[serde(default)]
    pub lapsed: bool,
    /// What the device may release by itself.
    #[serde(default)]
    pub release: Release,
    /// The guest's driver works. It does not while the VM is paused.
    pub driver: bool,
    /// The VM must be left alone: memory is withheld, the guest boots, or another program has a lease or a request.
    pub frozen: bool,
    /// Why the balloon is smaller than its target.
    pub stopped: Option<Stopped>,
    /// The newest statistics.
    pub sample: Option<Sample>,
}

impl Vm {
    /// A VM with a working driver and a balloon that has its target as its size. Nothing else is known of it.
    pub const fn new(id: VmId, settings: Settings, memory: Pages, balloon: Pages) -> Self {
        Self {
            id,
            settings,
            memory,
            target: balloon,
            size: balloon,
            resident: None,
            unusable: 0,
            answered: 0,
            granule: 1,
            lapsed: false,
            release: Release::NONE,
            driver: true,
            frozen: false,
            stopped: None,
            sample: None,
        }
    }

    /// The memory that the guest has touched, and what it can never touch, if the first is known.
    pub(crate) fn touched(&self) -> Option<Pages> {
        let resident = self.resident?;
        Some(resident.saturating_add(self.unusable))
    }
}

/// How much the host's own processes wait for memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostPressure {
    /// Hardly ever.
    #[default]
    None,
    /// Some of them do.
    Some,
    /// All of them do at times.
    Full,
}

/// Memory for a VM that is about to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    /// Which one.
    pub id: u32,
    /// How much.
    pub pages: Pages,
}

/// The state of the host and of its VMs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// When.
    pub now: Millis,
    /// The memory for all VMs.
    pub pool: Pages,
    /// The part of it that stays free for the host.
    pub reserve: Pages,
    /// How much the host itself waits for memory.
    #[serde(default)]
    pub pressure: HostPressure,
    /// Memory for VMs to come.
    #[serde(default)]
    pub reservations: Vec<Reservation>,
    /// The VMs, each one once.
    pub vms: Vec<Vm>,
}

/// A sign that a guest needs memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pressure {
    /// The guest killed a process, or nearly did.
    Oom,
    /// The balloon shrank below its target.
    SelfDeflated,
    /// Allocations had to reclaim memory themselves.
    Stalls,
    /// The guest reads from swap.
    SwapIn,
    /// Hardly any memory is available.
    LowAvailable,
    /// The VM quickly uses the last memory that it has not used before.
    Growth,
}

/// Why a target changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The guest shows a sign that it needs memory.
    Pressed(Pressure),
    /// The guest has less than it needs or can use, and there is memory for it.
    Wanted,
    /// The guest does not use the memory.
    Unused,
    /// The VM has more than its ceiling.
    Ceiling,
    /// Other VMs, a reservation or the host need the memory, and this VM has more than its share.
    Contended,
    /// The guest does not give the memory: the target follows the balloon.
    Abandoned,
}

/// A new target for a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// Later actions have higher numbers.
    pub number: u64,
    /// Which VM.
    pub vm: VmId,
    /// The target.
    pub target: Pages,
    /// The target that it replaces.
    pub before: Pages,
    /// By how much the device may lower the target by itself.
    #[serde(default)]
    pub release: Pages,
    /// Why.
    pub cause: Cause,
    /// The numbers that imply the target.
    pub account: Account,
}

/// The policy's view of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Which VM.
    pub vm: VmId,
    /// Its memory.
    pub memory: Pages,
    /// The VM's grant: its memory less the balloon's target.
    pub grant: Pages,
    /// The memory that the VM can touch until its device reports otherwise. This counts against the
    /// pool.
    pub charge: Pages,
    /// The memory that the guest uses and cannot reclaim, as far as known.
    pub used: Option<Pages>,
    /// The free memory that the guest should have.
    pub headroom: Pages,
    /// The part of the grant that the VM does not give: what the guest uses, and what its driver keeps available.
    #[serde(default)]
    pub kept: Pages,
    /// The memory that the guest needs.
    pub need: Pages,
    /// The memory that the guest can use, its caches and its recent peak included.
    pub want: Pages,
    /// The VM's share of the capacity.
    pub share: Pages,
    /// The VM's share if all VMs wanted all of their memory. The VM gets it when the manager ends.
    pub fallback: Pages,
    /// Why the policy takes no memory from the VM now.
    pub spared: Option<Spared>,
    /// The newest sign of need.
    pub pressed: Option<Pressure>,
}

/// Why the policy takes no memory from a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Spared {
    /// No driver works: the guest boots, or has none.
    NoDriver,
    /// It must be left alone.
    Frozen,
    /// Ballooning is turned off in the guest.
    Excluded,
    /// The device has refused a target. The policy tries again later.
    Refused,
    /// Another program changes the target.
    OtherController,
    /// There are no statistics, or only old ones.
    NoStatistics,
    /// The guest has not inflated to its target. The policy tries again later.
    Uncooperative,
    /// The VM or the policy has just started. If others wait for memory, it gives what it does not need all the same.
    Starting,
}

/// The decisions of the policy, and the reasons.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// New targets.
    pub actions: Vec<Action>,
    /// Reservations that have their memory from now on.
    pub admitted: Vec<u32>,
    /// The memory to divide: the pool without its reserves and reservations.
    pub capacity: Pages,
    /// The memory that all VMs can touch, with the reservations that have their memory.
    pub charged: Pages,
    /// The VMs.
    pub accounts: Vec<Account>,
}
