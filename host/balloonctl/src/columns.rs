// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The columns of `balloonctl top`.

use ratatui::layout::Constraint;
use ratatui::text::Text;

/// The width of an amount, with its unit and the separator.
pub(crate) const AMOUNT: u16 = 11;

/// What a column shows of a VM.
#[derive(Clone, Copy)]
pub(crate) enum Content {
    Name,
    Memory,
    Balloon,
    Target,
    Available,
    BalloonRate,
    DiscardRate,
    Grant,
    Demand,
    State,
    Cause,
}

/// A column of the table of VMs.
pub(crate) struct Column {
    pub(crate) header: &'static str,
    pub(crate) content: Content,
    pub(crate) width: Constraint,
}

impl Column {
    const fn amount(header: &'static str, content: Content, width: u16) -> Self {
        Self {
            header,
            content,
            width: Constraint::Length(width),
        }
    }

    const fn words(header: &'static str, content: Content, width: Constraint) -> Self {
        Self {
            header,
            content,
            width,
        }
    }

    /// Amounts are on the right.
    pub(crate) fn align(&self, text: String) -> Text<'static> {
        match self.content {
            Content::Name => Text::from(text),
            Content::State | Content::Cause => Text::from(format!(" {text}")),
            _ => Text::from(text).right_aligned(),
        }
    }
}

/// Without a manager.
pub(crate) const COLUMNS: [Column; 7] = [
    Column::words("VM", Content::Name, Constraint::Fill(1)),
    Column::amount("Memory", Content::Memory, AMOUNT),
    Column::amount("Balloon", Content::Balloon, AMOUNT),
    Column::amount("Target", Content::Target, AMOUNT),
    Column::amount("Available", Content::Available, AMOUNT),
    Column::amount("Balloon/s", Content::BalloonRate, AMOUNT + 2),
    Column::amount("Returned/s", Content::DiscardRate, AMOUNT + 2),
];

/// With a manager. What it grants is the memory without the target.
pub(crate) const MANAGED_COLUMNS: [Column; 7] = [
    Column::words("VM", Content::Name, Constraint::Fill(1)),
    Column::amount("Balloon", Content::Balloon, AMOUNT),
    Column::amount("Available", Content::Available, AMOUNT),
    Column::amount("Grant", Content::Grant, AMOUNT),
    Column::amount("Demand", Content::Demand, AMOUNT),
    Column::words("State", Content::State, Constraint::Length(AMOUNT + 2)),
    Column::words("Cause", Content::Cause, Constraint::Fill(2)),
];
