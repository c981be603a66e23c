// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Numbers and reasons as text.

use std::fmt::Write;

use balloon_policy::{Account, Action, Cause, Pages, Pressure, Refusal, Spared};
use bytesize::ByteSize;

use crate::config::PAGE;
use crate::status::{Past, Status, VmStatus};

/// A number of pages as a size.
pub(crate) fn size(pages: Pages) -> String {
    ByteSize(pages.saturating_mul(PAGE)).to_string()
}

const fn pressure(sign: Pressure) -> &'static str {
    match sign {
        Pressure::Oom => "it killed a process",
        Pressure::SelfDeflated => "its balloon shrank below the target",
        Pressure::Stalls => "allocations had to reclaim memory",
        Pressure::SwapIn => "it reads from swap",
        Pressure::LowAvailable => "hardly any memory is available",
        Pressure::Growth => "it quickly uses its last memory",
    }
}

/// A cause as a part of a sentence.
pub(crate) const fn cause(cause: Cause) -> &'static str {
    match cause {
        Cause::Pressed(sign) => pressure(sign),
        Cause::Wanted => "it can use more, and there is memory for it",
        Cause::Unused => "it does not use the memory",
        Cause::Ceiling => "it has more than its ceiling",
        Cause::Contended => "others need the memory, and it has more than its share",
        Cause::Abandoned => "it does not give the memory",
    }
}

const fn spared(reason: Spared) -> &'static str {
    match reason {
        Spared::NoDriver => "no driver",
        Spared::Frozen => "left alone",
        Spared::Excluded => "ballooning is off in the guest",
        Spared::Refused => "its daemon refused a target",
        Spared::OtherController => "another program changes its target",
        Spared::NoStatistics => "no recent statistics",
        Spared::Uncooperative => "does not give memory",
        Spared::Starting => "starting",
    }
}

/// The grants before and after an action, in bytes.
pub(crate) const fn grants(action: &Action) -> (u64, u64) {
    let account = &action.account;
    let grant = account.memory.saturating_sub(action.target);
    (
        account.grant.saturating_mul(PAGE),
        grant.saturating_mul(PAGE),
    )
}

/// An action, and the numbers that imply it.
pub(crate) fn action(action: &Action) -> String {
    let account = &action.account;
    let (from, to) = grants(action);
    format!(
        "its grant from {} to {}, since {} ({})",
        ByteSize(from),
        ByteSize(to),
        cause(action.cause),
        numbers(account)
    )
}

fn numbers(account: &Account) -> String {
    let used = account.used.map_or_else(
        || "unknown use".to_owned(),
        |used| format!("uses {}", size(used)),
    );
    let kept = match account.kept {
        0 => String::new(),
        kept => format!("gives all but {}, ", size(kept)),
    };
    format!(
        "{used}, headroom {}, {kept}needs {}, wants {}, share {}",
        size(account.headroom),
        size(account.need),
        size(account.want),
        size(account.share)
    )
}

/// The arithmetic of a refusal.
pub(crate) fn refusal(refusal: &Refusal) -> String {
    let Refusal {
        pool,
        reserve,
        floors,
        reserved,
        asked,
    } = *refusal;
    let sum = [reserve, floors, reserved, asked]
        .iter()
        .fold(0, |sum: Pages, part| sum.saturating_add(*part));
    format!(
        "the reserve of {} + floors of {} + reservations of {} + {} requested = {}, and the pool has {}",
        size(reserve),
        size(floors),
        size(reserved),
        size(asked),
        size(sum),
        size(pool)
    )
}

/// A VM's state in one or more words.
pub(crate) fn state(account: Option<&Account>) -> &'static str {
    let Some(account) = account else {
        return "unknown";
    };
    match (account.pressed, account.spared) {
        (Some(_), _) => "in need",
        (None, Some(reason)) => spared(reason),
        (None, None) if account.share < account.want => "contended",
        (None, None) => "ok",
    }
}

/// A table of all VMs.
pub(crate) fn top(status: &Status) -> String {
    let mut text = format!(
        "pool {}, reserve {}, charged {}, reserved {}, free {}{}\n",
        size(status.pool),
        size(status.reserve),
        size(status.charged),
        size(status.reserved),
        size(status.pool.saturating_sub(status.charged)),
        match status.observe {
            true => format!(", observing only: would save {}", size(status.saved)),
            false => String::new(),
        }
    );
    let row = |text: &mut String, cells: [&str; 8]| {
        let [name, rest @ .., cause] = cells;
        let _ = write!(text, "{name:<16}");
        for cell in rest {
            let _ = write!(text, " {cell:>10}");
        }
        let _ = write!(text, "  {cause}");
        *text = text.trim_end().to_owned();
        text.push('\n');
    };
    row(
        &mut text,
        [
            "VM", "memory", "grant", "resident", "need", "share", "state", "cause",
        ],
    );
    for vm in &status.vms {
        let Some(account) = &vm.account else {
            row(&mut text, [&vm.name, "", "", "", "", "", &vm.state, ""]);
            continue;
        };
        // The newest change of the target has it.
        let cause = vm.cause.as_deref().unwrap_or_default();
        row(
            &mut text,
            [
                &vm.name,
                &size(account.memory),
                &size(account.grant),
                &vm.resident.map_or_else(String::new, size),
                &size(account.need),
                &size(account.share),
                &vm.state,
                cause,
            ],
        );
    }
    text
}

/// All about a VM.
pub(crate) fn explain(now: u64, vm: &VmStatus, history: &[Past]) -> String {
    let mut text = String::new();
    match &vm.account {
        None => {
            let _ = writeln!(text, "{}: its daemon has not reported a VM", vm.name);
        }
        Some(account) => {
            let _ = writeln!(
                text,
                "{}: {} of {} granted, {} charged, {}",
                vm.name,
                size(account.grant),
                size(account.memory),
                size(account.charge),
                vm.state
            );
            let _ = writeln!(text, "{}", numbers(account));
            let _ = writeln!(text, "without a manager it has {}", size(account.fallback));
        }
    }
    for past in history {
        let ago = now.saturating_sub(past.at) / 1_000;
        let _ = writeln!(text, "{ago:>6} s ago: {}", action(&past.action));
    }
    text
}
