// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's memory statistics, once or repeatedly.

use std::time::Duration;

use balloon_control::{Client, News, Request, Stat, Stats, Unit};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use console::Term;
use indicatif::{HumanBytes, HumanCount};

use crate::failure::Failure;
use crate::info::duration;
use crate::output::print;

/// A sample as a table, with the changes since the previous one.
pub(crate) fn table(stats: &Stats, before: Option<&Stats>) -> String {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED);
    let mut header = vec!["Statistic", "Value"];
    header.extend(before.map(|_| "Change"));
    table.set_header(header);
    for (&stat, &value) in &stats.values {
        let mut row = vec![stat.to_string(), amount(stat.unit(), value)];
        row.extend(before.map(|before| change(stat, before.values.get(&stat), value)));
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!(
        "{table}\nSample {}, {} old",
        HumanCount(stats.sequence),
        duration(stats.age)
    )
}

/// Shows each new sample until it is interrupted. A terminal shows the newest one, other outputs get all.
///
/// # Errors
///
/// The guest or its driver goes away.
pub(crate) fn watch(
    mut client: Client,
    fresh: bool,
    interval: u32,
    json: bool,
) -> Result<(), Failure> {
    // Without statistics there would be no event, and no reason for that.
    client.call(&Request::Stats { fresh })?;
    let mut events = client.subscribe(Some(Duration::from_secs(interval.into())))?;
    let terminal = Term::stdout();
    let redraw = terminal.is_term() && !json;
    let mut shown = 0;
    let mut before: Option<Stats> = None;
    loop {
        let answer = match events.next(Duration::MAX)? {
            Some(News::Stats(answer)) => answer,
            Some(News::Info(answer)) => {
                Failure::check(&answer.parse()?)?;
                continue;
            }
            Some(News::Alive) | None => continue,
        };
        if json {
            print(answer.json())?;
            continue;
        }
        let stats: Stats = answer.parse()?;
        let table = table(&stats, Some(before.as_ref().unwrap_or(&stats)));
        if redraw {
            terminal.clear_last_lines(shown)?;
            shown = table.lines().count();
        }
        print(&table)?;
        before = Some(stats);
    }
}

/// A number with its unit.
pub(crate) fn amount(unit: Unit, value: u64) -> String {
    match unit {
        Unit::Bytes => HumanBytes(value).to_string(),
        Unit::Times => HumanCount(value).to_string(),
    }
}

/// The difference from the previous value, or nothing if there is none.
fn change(stat: Stat, before: Option<&u64>, now: u64) -> String {
    let before = before.copied().unwrap_or(now);
    let difference = amount(stat.unit(), now.abs_diff(before));
    match now.cmp(&before) {
        std::cmp::Ordering::Less => format!("-{difference}"),
        std::cmp::Ordering::Equal => String::new(),
        std::cmp::Ordering::Greater => format!("+{difference}"),
    }
}
