// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory of guests over time, a plot for each rule: a panel for all guests together, and one for each guest.

use std::path::Path;

use anyhow::{Result, anyhow};
use benchmarks::{Division, Record, Timeline, Track};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::plots::{FAINT, FONT, INK, TEXT, TITLE, WIDTH};

/// Measures in pixels.
const HEAD: u32 = 64;
const PANEL: u32 = 110;
const SUM: u32 = 220;
const LABELS: u32 = 80;

/// The top of a panel, relative to its largest value. Its name is above that.
const HEADROOM: f64 = 1.3;

const USED: RGBColor = RGBColor(200, 200, 200);
const GRANTED: RGBColor = RGBColor(0, 114, 178);
const RESIDENT: RGBColor = RGBColor(213, 94, 0);

/// A line of a panel: its values in MiB, and how it is drawn.
type Line<'a> = (&'a [f64], ShapeStyle);

/// A plot: the name of its file, its title, and what it shows.
pub(super) struct Plot<'a> {
    pub(super) name: String,
    pub(super) shows: String,
    division: &'a Division,
    timeline: &'a Timeline,
}

/// The plots of these records.
pub(super) fn plots<'a>(records: impl Iterator<Item = &'a Record>) -> Vec<Plot<'a>> {
    let plot = |record: &'a Record| {
        let division = record.division.as_ref()?;
        let rule = record.detail.as_deref()?;
        Some(Plot {
            name: format!("{}-{}", record.name, rule.to_lowercase()),
            shows: format!(
                "{}: memory of the guests over time with {rule}",
                record.name
            ),
            division,
            timeline: division.timeline.as_ref()?,
        })
    };
    records.filter_map(plot).collect()
}

/// Draws the plots of all records into files in a directory. The font is registered before.
///
/// # Errors
///
/// A file cannot be written.
pub(super) fn draw(directory: &Path, records: &[Record]) -> Result<()> {
    for plot in plots(records.iter()) {
        let guests = u32::try_from(plot.timeline.guests.len())?;
        let size = (WIDTH, HEAD + SUM + guests * PANEL);
        let svg = directory.join(format!("{}.svg", plot.name));
        let area = SVGBackend::new(&svg, size).into_drawing_area();
        let result = plot.draw(&area);
        result.map_err(|error| anyhow!("drawing {}: {error}", plot.name))?;
    }
    Ok(())
}

impl Plot<'_> {
    fn draw<D: DrawingBackend>(
        &self,
        area: &DrawingArea<D, Shift>,
    ) -> Result<(), DrawingAreaErrorKind<D::ErrorType>> {
        area.fill(&WHITE)?;
        self.legend(area)?;
        let (_, panels) = area.split_vertically(HEAD);
        let (sum, guests) = panels.split_vertically(SUM);
        let timeline = self.timeline;
        let sums = |of: fn(&Track) -> &[f64]| -> Vec<f64> {
            let at = |point| timeline.guests.iter().map(|track| of(track)[point]).sum();
            (0..timeline.all.len()).map(at).collect()
        };
        let (used, granted) = (sums(|track| &track.used), sums(|track| &track.granted));
        let pool = vec![self.division.pool; used.len()];
        let lines = [
            (&*granted, GRANTED.stroke_width(2)),
            (&*timeline.all, RESIDENT.stroke_width(2)),
            (&*pool, INK.stroke_width(2)),
        ];
        self.panel(&sum, "all guests", &used, &lines, true)?;
        let guests = guests.split_evenly((timeline.guests.len(), 1));
        for ((track, panel), number) in timeline.guests.iter().zip(&guests).zip(1..) {
            let lines = [
                (&*track.granted, GRANTED.stroke_width(2)),
                (&*track.resident, RESIDENT.stroke_width(2)),
            ];
            self.panel(
                panel,
                &format!("guest {number}"),
                &track.used,
                &lines,
                false,
            )?;
        }
        area.present()
    }

    /// The title, and what the colours mean.
    fn legend<D: DrawingBackend>(
        &self,
        area: &DrawingArea<D, Shift>,
    ) -> Result<(), DrawingAreaErrorKind<D::ErrorType>> {
        let ink = (FONT, TEXT).into_font().color(&INK);
        let title = (FONT, TITLE).into_font().color(&INK);
        area.draw(&Text::new(self.shows.as_str(), (12, 10), title))?;
        let keys = [
            ("used", USED),
            ("may be used", GRANTED),
            ("resident at the host", RESIDENT),
            ("pool (time in seconds)", INK),
        ];
        for ((key, colour), x) in keys.into_iter().zip([12, 100, 250, 460]) {
            area.draw(&Rectangle::new([(x, 42), (x + 14, 54)], colour.filled()))?;
            area.draw(&Text::new(key, (x + 20, 40), ink.clone()))?;
        }
        Ok(())
    }

    /// A panel: an area for what is used, and lines.
    fn panel<D: DrawingBackend>(
        &self,
        area: &DrawingArea<D, Shift>,
        name: &str,
        used: &[f64],
        lines: &[Line<'_>],
        names_phases: bool,
    ) -> Result<(), DrawingAreaErrorKind<D::ErrorType>> {
        let step = self.timeline.step;
        let points = |values: &[f64]| -> Vec<(f64, f64)> {
            let points = (0..).zip(values);
            let point = |(number, mib): (u32, &f64)| (f64::from(number) * step, mib / 1024.0);
            points.map(point).collect()
        };
        let all = lines
            .iter()
            .flat_map(|(values, _)| values.iter())
            .chain(used);
        let most = all.copied().fold(0.0, f64::max) / 1024.0 * HEADROOM;
        let end = used.len() as f64 * step;
        let ink = (FONT, TEXT - 2).into_font().color(&INK);
        let mut chart = ChartBuilder::on(area)
            .margin_right(16)
            .margin_top(if names_phases { 24 } else { 6 })
            .set_label_area_size(LabelAreaPosition::Left, LABELS)
            .set_label_area_size(LabelAreaPosition::Bottom, 18)
            .build_cartesian_2d(0.0..end, 0.0..most)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(FAINT)
            .axis_style(FAINT)
            .y_labels(4)
            .x_labels(12)
            .x_label_style(ink.clone())
            .y_label_style(ink.clone())
            .x_label_formatter(&|seconds| format!("{seconds:.0}"))
            .y_label_formatter(&|gib| format!("{gib:.1} GiB"))
            .draw()?;
        let mut area_of_used = points(used);
        area_of_used.extend([(end - step, 0.0), (0.0, 0.0)]);
        chart.draw_series([Polygon::new(area_of_used, USED.filled())])?;
        for (at, phase) in &self.timeline.phases {
            chart.draw_series([PathElement::new([(*at, 0.0), (*at, most)], INK)])?;
            if names_phases {
                let text = Text::new(phase.clone(), (2, -18), ink.clone());
                chart.draw_series([EmptyElement::at((*at, most)) + text])?;
            }
        }
        for (values, style) in lines {
            chart.draw_series(LineSeries::new(points(values), *style))?;
        }
        let text = Text::new(name.to_owned(), (8, 4), ink.clone());
        chart.draw_series([EmptyElement::at((0.0, most)) + text])?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record of two guests with jobs of a GiB that alternate.
    fn record() -> Record {
        let points = 0..240_u32;
        let track = |turn: bool| {
            let busy = move |point: u32| (point / 20 % 2 == 0) == turn;
            let used = points
                .clone()
                .map(|point| if busy(point) { 1_400 } else { 400 });
            let used: Vec<_> = used.collect();
            let more = |by: u32| used.iter().map(|used| used + by).collect::<Vec<_>>();
            serde_json::json!({ "used": used, "granted": more(300), "resident": more(100) })
        };
        serde_json::from_value(serde_json::json!({
            "name": "rotate", "driver": "rs", "device": "vhost-user", "detail": "MoM", "guest_mib": 4096,
            "amount_mib": 1024, "seconds": [1.0],
            "division": {
                "pool": 2560.0, "most": 2000.0, "mean": 2000.0, "needed": 1900.0, "above": 0.0, "kills": 0,
                "stalled": 0.0, "changes": 0.0,
                "timeline": {
                    "step": 0.5, "phases": [[10.0, "rotate"], [80.0, "rotate-storm"]],
                    "guests": [track(true), track(false)], "all": vec![2_000; 240],
                },
            },
        }))
        .unwrap()
    }

    #[test]
    fn a_plot_has_a_panel_for_each_guest() {
        let directory = tempfile::tempdir().unwrap();
        let records = [record()];
        super::super::plots::draw(directory.path(), &records).unwrap();
        draw(directory.path(), &records).unwrap();
        let text = std::fs::read_to_string(directory.path().join("rotate-mom.svg")).unwrap();
        for part in [
            "all guests",
            "guest 1",
            "guest 2",
            "rotate-storm",
            "with MoM",
        ] {
            assert!(text.contains(part), "{part}");
        }
        assert!(!text.contains("guest 3"));
    }
}
