// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Results as plots, each as SVG and as PNG.

use std::path::Path;
use std::sync::Once;

use anyhow::{Result, anyhow};
use benchmarks::{By, Record};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};
use vm::{Samples, Zeroing};

/// Measures in pixels.
pub(super) const WIDTH: u32 = 960;
const ROW: u32 = 28;
const HEAD: u32 = 44;
const FOOT: u32 = 34;
const LABELS: u32 = 370;
const SCALE_HEIGHT: u32 = 440;
/// Room for the labels at the ends of lines.
const LINE_LABELS: u32 = 300;
pub(super) const TEXT: i32 = 16;
pub(super) const TITLE: i32 = 20;
/// How far a text is moved down to centre its letters.
const SINK: i32 = 3;

pub(super) const FONT: &str = "sans-serif";
pub(super) const INK: RGBColor = RGBColor(40, 40, 40);
pub(super) const FAINT: RGBColor = RGBColor(215, 215, 215);

/// The unit of an axis.
#[derive(Clone, Copy)]
enum Unit {
    Seconds,
    Milliseconds,
    Mebibytes,
    Percent,
}

impl Unit {
    /// A logarithmic axis.
    fn is_logarithmic(self) -> bool {
        !matches!(self, Self::Percent)
    }

    /// A value, as short as possible.
    fn text(self, value: f64) -> String {
        match self {
            Self::Seconds if value < 0.9995 => Self::Milliseconds.text(value * 1e3),
            Self::Seconds => format!("{} s", short(value)),
            Self::Milliseconds if value >= 999.5 => Self::Seconds.text(value / 1e3),
            Self::Milliseconds => format!("{} ms", short(value)),
            Self::Mebibytes => format!("{value:.0} MiB"),
            Self::Percent => format!("{value:.0} %"),
        }
    }
}

/// A number with two digits or all before the point.
fn short(value: f64) -> String {
    let digits = match value {
        ..0.995 => 2,
        ..9.95 => 1,
        _ => 0,
    };
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// The measurements of one contestant.
struct Row {
    label: String,
    colour: RGBColor,
    samples: Samples,
}

/// Rows with a title.
struct Group {
    title: &'static str,
    rows: Vec<Row>,
}

/// A plot with a row for each contestant: a dot for each run, a line at the median, and its value.
pub(super) struct Plot {
    /// The file's name, without its extension.
    pub(super) name: &'static str,
    /// The title.
    pub(super) shows: &'static str,
    unit: Unit,
    /// Its groups of rows: their title, the name of the records, and the shown value of each record, if there is
    /// one.
    parts: &'static [Part],
}

type Part = (&'static str, &'static str, fn(&Record) -> Option<Samples>);

/// All plots except [`SCALE`].
pub(super) const PLOTS: &[Plot] = &[
    Plot {
        name: "idle",
        shows: "Time to inflate and to deflate by 7 GiB, idle guest of 8 GiB",
        unit: Unit::Seconds,
        parts: &[
            ("inflate", "inflate-idle", times),
            ("deflate", "deflate-idle", times),
        ],
    },
    Plot {
        name: "stages",
        shows: "Where the time goes: inflating by 7 GiB, idle guest of 8 GiB",
        unit: Unit::Seconds,
        parts: &[
            ("allocate", "inflate-idle", |record| {
                one(record.stages?.allocate)
            }),
            ("send", "inflate-idle", |record| one(record.stages?.send)),
            ("translate", "inflate-idle", |record| {
                one(record.stages?.translate)
            }),
            ("return", "inflate-idle", |record| {
                one(record.stages?.give_back)
            }),
        ],
    },
    Plot {
        name: "touched",
        shows: "Time to inflate and to deflate by 4 GiB that the guest has used, of 8 GiB",
        unit: Unit::Seconds,
        parts: &[
            ("inflate", "inflate-touched", times),
            ("deflate", "deflate-touched", times),
        ],
    },
    Plot {
        name: "fragmented",
        shows: "Time to inflate by 3 GiB in isolated pages, guest of 8 GiB",
        unit: Unit::Seconds,
        parts: &[("inflate", "inflate-fragmented", times)],
    },
    Plot {
        name: "reaction",
        shows: "Time from a new target to its effect, changes by 256 MiB",
        unit: Unit::Seconds,
        parts: &[
            ("first memory at the host", "react-inflate", plain_times),
            ("memory free in the guest", "react-deflate", plain_times),
        ],
    },
    Plot {
        name: "migration",
        shows: "Time to migrate a guest of 8 GiB, without hints and with them",
        unit: Unit::Seconds,
        parts: &[
            ("idle", "migrate-idle", times),
            ("5 GiB written and freed", "migrate-dirty", times),
        ],
    },
    Plot {
        name: "snapshot",
        shows: "Size of a snapshot of a guest of 8 GiB, as it is and without unused memory",
        unit: Unit::Mebibytes,
        parts: &[
            ("idle", "snapshot-idle", transferred),
            ("5 GiB written and freed", "snapshot-dirty", transferred),
        ],
    },
    Plot {
        name: "load",
        shows: "Throughput of a load meanwhile, relative to before",
        unit: Unit::Percent,
        parts: &[("pace", "guest-load", |record| {
            let parts = record.throughput.as_ref()?.values().iter();
            Some(parts.map(|part| part * 100.0).collect())
        })],
    },
    Plot {
        name: "stalls",
        shows: "Longest stall of a 1 kHz task meanwhile",
        unit: Unit::Milliseconds,
        parts: &[("stall", "guest-load", |record| record.stall_ms.clone())],
    },
];

/// The plot of the time by the guest's size: its name, its title, and the name of its records.
pub(super) const SCALE: (&str, &str, &str) = (
    "scale",
    "Time to inflate by seven eighths of an idle guest's memory",
    "inflate-scale",
);

fn times(record: &Record) -> Option<Samples> {
    record.stages.is_none().then(|| record.seconds.clone())
}

/// The times of a contestant without a variant.
fn plain_times(record: &Record) -> Option<Samples> {
    record.detail.is_none().then(|| record.seconds.clone())
}

fn transferred(record: &Record) -> Option<Samples> {
    one(record.transferred_mib? as f64)
}

/// A value with a median only.
fn one(value: f64) -> Option<Samples> {
    Some([value].into_iter().collect())
}

/// Draws all plots for which there are records, into files in a directory.
///
/// # Errors
///
/// A file cannot be written.
pub(super) fn draw(directory: &Path, records: &[Record]) -> Result<()> {
    static FONT_READY: Once = Once::new();
    FONT_READY.call_once(|| {
        // It fails only for an unreadable font, and this one is readable.
        let _ = register_font(FONT, FontStyle::Normal, dejavu::sans::regular());
    });

    let file = |name: &str, extension: &str| directory.join(format!("{name}.{extension}"));
    for plot in PLOTS {
        let groups = plot.groups(records);
        if groups.is_empty() {
            continue;
        }
        let size = (WIDTH, height(&groups));
        let svg = file(plot.name, "svg");
        plot.draw(&groups, &SVGBackend::new(&svg, size).into_drawing_area())?;
        let png = file(plot.name, "png");
        plot.draw(&groups, &BitMapBackend::new(&png, size).into_drawing_area())?;
    }
    let (name, _, of) = SCALE;
    if records.iter().any(|record| record.name == of) {
        let size = (WIDTH, SCALE_HEIGHT);
        let svg = file(name, "svg");
        draw_scale(records, &SVGBackend::new(&svg, size).into_drawing_area())?;
        let png = file(name, "png");
        draw_scale(records, &BitMapBackend::new(&png, size).into_drawing_area())?;
    }
    Ok(())
}

/// The label of a record's row or line.
fn label(record: &Record) -> String {
    let detail = match &record.detail {
        Some(detail) if record.stages.is_none() => format!(", {detail}"),
        _ => String::new(),
    };
    let zeroing = match record.zeroing {
        Zeroing::On => ", zeroing",
        Zeroing::Off | Zeroing::Own => "",
    };
    format!("{}{detail}{zeroing}", record.contestant())
}

/// The height of a plot of these.
fn height(groups: &[Group]) -> u32 {
    let rows: usize = groups.iter().map(|group| group.rows.len() + 1).sum();
    let rows = u32::try_from(rows).expect("there are some dozens at most");
    HEAD + rows * ROW + FOOT
}

impl Plot {
    /// The names of its records.
    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.parts.iter().map(|(_, name, _)| *name)
    }

    /// The groups with rows.
    fn groups(&self, records: &[Record]) -> Vec<Group> {
        let group = |(title, name, values): &Part| {
            let row = |record: &Record| {
                Some(Row {
                    label: label(record),
                    colour: colour(record.driver),
                    samples: values(record)?,
                })
            };
            let of_name = records.iter().filter(|record| record.name == *name);
            let rows: Vec<_> = of_name.filter_map(row).collect();
            (!rows.is_empty()).then_some(Group { title, rows })
        };
        self.parts.iter().filter_map(group).collect()
    }

    fn draw<D: DrawingBackend>(
        &self,
        groups: &[Group],
        area: &DrawingArea<D, Shift>,
    ) -> Result<()> {
        let values = groups.iter().flat_map(|group| &group.rows);
        let values: Samples = values
            .flat_map(|row| row.samples.values())
            .copied()
            .collect();
        match self.unit.is_logarithmic() {
            // From a power of ten, which has a label, to a value that leaves room for the text next
            // to the last dot.
            true => {
                let decade = 10_f64.powf((values.min() * 0.8).log10().floor());
                let range = decade..values.max() * 4.0;
                self.draw_on(groups, area, range.log_scale())
            }
            false => self.draw_on(groups, area, 0.0..values.max() * 1.25),
        }
        .map_err(|error| anyhow!("drawing {}: {error}", self.name))
    }

    /// Draws on an axis.
    fn draw_on<'a, D: DrawingBackend + 'a, X: AsRangedCoord<Value = f64>>(
        &self,
        groups: &[Group],
        area: &DrawingArea<D, Shift>,
        axis: X,
    ) -> Result<(), DrawingAreaErrorKind<D::ErrorType>>
    where
        X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        area.fill(&WHITE)?;
        let ink = (FONT, TEXT).into_font().color(&INK);
        let title = (FONT, TITLE).into_font().color(&INK);
        area.draw(&Text::new(self.shows, (12, 10), title))?;

        let rows: usize = groups.iter().map(|group| group.rows.len() + 1).sum();
        let mut chart = ChartBuilder::on(area)
            .margin_top(HEAD)
            .margin_right(16)
            .set_label_area_size(LabelAreaPosition::Left, LABELS)
            .set_label_area_size(LabelAreaPosition::Bottom, FOOT)
            .build_cartesian_2d(axis, rows as f64..0.0)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .x_labels(8)
            .light_line_style(TRANSPARENT)
            .bold_line_style(FAINT)
            .axis_style(FAINT)
            .x_label_style(ink.clone())
            .x_label_formatter(&|value| self.unit.text(*value))
            .draw()?;

        let mut y = 0.5;
        let label = ink.pos(Pos::new(HPos::Right, VPos::Center));
        let value = ink.pos(Pos::new(HPos::Left, VPos::Center));
        for group in groups {
            let (_, place) = chart.backend_coord(&(1.0, y));
            area.draw(&Text::new(group.title, (12, place + SINK), value.clone()))?;
            y += 1.0;
            for row in &group.rows {
                let (_, place) = chart.backend_coord(&(1.0, y));
                let left = i32::try_from(LABELS).unwrap_or(i32::MAX) - 10;
                area.draw(&Text::new(
                    row.label.as_str(),
                    (left, place + SINK),
                    label.clone(),
                ))?;
                chart.draw_series(dots(row, y))?;
                chart.draw_series([median_bar(row, y)])?;
                let text = self.unit.text(row.samples.median());
                let text = Text::new(text, (10, SINK), value.clone());
                chart.draw_series([EmptyElement::at((row.samples.max(), y)) + text])?;
                y += 1.0;
            }
        }
        area.present()
    }
}

/// A dot for each sample of a row at height `y`.
fn dots(row: &Row, y: f64) -> impl Iterator<Item = Circle<(f64, f64), i32>> {
    let style = row.colour.mix(0.45).filled();
    row.samples
        .values()
        .iter()
        .map(move |&x| Circle::new((x, y), 5, style))
}

/// A bar at the median of a row at height `y`.
fn median_bar(row: &Row, y: f64) -> PathElement<(f64, f64)> {
    let median = row.samples.median();
    let ends = [(median, y - 0.32), (median, y + 0.32)];
    PathElement::new(ends, row.colour.stroke_width(3))
}

/// Draws the time by the guest's size, with a line for each contestant.
fn draw_scale<D: DrawingBackend>(records: &[Record], area: &DrawingArea<D, Shift>) -> Result<()> {
    let (name, shows, of) = SCALE;
    let records: Vec<_> = records.iter().filter(|record| record.name == of).collect();
    try_draw_scale(&records, shows, area).map_err(|error| anyhow!("drawing {name}: {error}"))
}

fn try_draw_scale<D: DrawingBackend>(
    records: &[&Record],
    shows: &str,
    area: &DrawingArea<D, Shift>,
) -> Result<(), DrawingAreaErrorKind<D::ErrorType>> {
    area.fill(&WHITE)?;
    let ink = (FONT, TEXT).into_font().color(&INK);
    let title = (FONT, TITLE).into_font().color(&INK);
    area.draw(&Text::new(shows, (12, 10), title))?;
    let gib = |record: &Record| record.guest_mib as f64 / 1024.0;
    let sizes: Samples = records.iter().map(|record| gib(record)).collect();
    let times = records.iter().flat_map(|record| record.seconds.values());
    let times: Samples = times.copied().collect();
    let mut chart = ChartBuilder::on(area)
        .margin_top(HEAD)
        .margin_right(LINE_LABELS)
        .set_label_area_size(LabelAreaPosition::Left, 80)
        .set_label_area_size(LabelAreaPosition::Bottom, FOOT)
        .build_cartesian_2d(
            (sizes.min() * 0.8..sizes.max() * 1.1).log_scale().base(2.0),
            (times.min() * 0.6..times.max() * 1.6).log_scale(),
        )?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(FAINT)
        .x_label_style(ink.clone())
        .y_label_style(ink.clone())
        .x_label_formatter(&|gib| format!("{gib:.0} GiB"))
        .y_label_formatter(&|value| Unit::Seconds.text(*value))
        .draw()?;
    let mut firsts: Vec<&Record> = Vec::new();
    for record in records {
        if firsts.iter().all(|first| label(first) != label(record)) {
            firsts.push(record);
        }
    }
    for first in firsts {
        let (name, colour) = (label(first), colour(first.driver));
        let of = || {
            let mut records = records.iter().filter(|record| label(record) == name);
            std::iter::from_fn(move || records.next())
        };
        chart.draw_series(of().flat_map(|record| {
            let dot = |&time: &f64| Circle::new((gib(record), time), 5, colour.mix(0.45).filled());
            record.seconds.values().iter().map(dot).collect::<Vec<_>>()
        }))?;
        let medians = || of().map(|record| (gib(record), record.seconds.median()));
        chart.draw_series(LineSeries::new(medians(), colour.stroke_width(2)))?;
        if let Some(last) = medians().last() {
            let style = ink.pos(Pos::new(HPos::Left, VPos::Center));
            let text = format!("{name}: {}", Unit::Seconds.text(last.1));
            chart.draw_series([EmptyElement::at(last) + Text::new(text, (12, SINK), style)])?;
        }
    }
    area.present()
}

/// Colours that colour-blind readers can distinguish (Okabe and Ito).
fn colour(driver: By) -> RGBColor {
    match driver {
        By::Rs => RGBColor(0, 114, 178),
        By::C => RGBColor(213, 94, 0),
        By::VirtioMem => RGBColor(0, 158, 115),
        By::Reporting => RGBColor(204, 121, 167),
        By::None => RGBColor(110, 110, 110),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_short() {
        let texts = [0.000_45, 0.001, 0.0284, 0.5, 0.9999, 3.512, 41.0]
            .map(|time| Unit::Seconds.text(time));
        assert_eq!(
            texts,
            ["0.45 ms", "1 ms", "28 ms", "500 ms", "1 s", "3.5 s", "41 s"]
        );
    }
}
