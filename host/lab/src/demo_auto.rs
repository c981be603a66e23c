// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The manager at work: three guests take turns in using much memory, first without it and then with it.

use std::io::{IsTerminal, stderr};
use std::iter;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use indicatif::{ProgressBar, ProgressStyle};
use vm::{
    Artifacts, Config, Device, Driver, Guest, Kernel, Load, Manager, MemoryFile, Offer, Samples,
    Size,
};

use crate::cli::Guests;
use crate::demo::check_memory;
use crate::kernel;
use crate::places::Places;
use crate::progress::{BARS, Phase};
use crate::setup;

/// The VMs, and the memory of each.
const VMS: [&str; 3] = ["web", "db", "build"];
const MEMORY: Size = Size::gib(2);

/// What the VMs may have together when there is a manager.
const POOL: Size = Size::mib(3584);

/// The manager's settings. With the default profile, guests keep memory for minutes if no other guest needs it.
const SETTINGS: &str = r#"
profile = "density"
[host]
pool = "3584MiB"
"#;

/// What a job uses and for how long, and how long it takes until the next one.
const JOB: Size = Size::mib(1400);
const WORK: Duration = Duration::from_secs(4);
const PAUSE: Duration = Duration::from_secs(2);

/// How many jobs each guest has.
const ROUNDS: usize = 2;

/// How often the host's memory is measured, and how often the terminal shows the guests.
const SAMPLING: Duration = Duration::from_millis(20);
const DRAWING: Duration = Duration::from_millis(200);

/// The width of a bar.
const WIDTH: u64 = 40;

/// What was seen with a manager, or without.
struct Outcome {
    /// What the host gave to all guests, in bytes, from the first job on.
    given: Samples,
    /// How long each job took to use its memory, in seconds.
    jobs: Samples,
}

/// Runs the demonstration and prints its table.
pub(crate) fn run(guests: Guests) -> Result<bool> {
    let places = Places::find()?;
    let _lock = kernel::lock_checkout(&places)?;
    check_memory(MEMORY * VMS.len() as u64)?;
    let artifacts = setup::prepare(&places, Kernel::Test)?;
    let alone = measure(&artifacts, guests, None)?;
    let managed = measure(&artifacts, guests, Some(SETTINGS))?;
    let most = managed.given.max();
    println!("\n{}", table(&alone, &managed));
    println!(
        "{} guests of {MEMORY} take turns: each in turn uses {JOB} for {} s. The manager may use {POOL}.\n\
         With it, the host needed {:.0} % less memory at the peak, and {:.0} % less on average.",
        VMS.len(),
        WORK.as_secs(),
        less(most, alone.given.max()),
        less(managed.given.mean(), alone.given.mean()),
    );
    ensure!(
        most <= as_f64(POOL),
        "the guests had {} with a pool of {POOL}",
        size(most)
    );
    Ok(true)
}

/// By how much `value` is less than `other`, in percent.
fn less(value: f64, other: f64) -> f64 {
    (1.0 - value / other) * 100.0
}

/// Boots the guests, and has each do its jobs.
fn measure(artifacts: &Artifacts, guests: Guests, settings: Option<&str>) -> Result<Outcome> {
    let directory = match settings {
        Some(_) => "demo-auto/managed",
        None => "demo-auto/alone",
    };
    let configs = VMS.map(|name| {
        Config::new(artifacts, &format!("{directory}/{name}"))
            .device(Device::Extended)
            .offer(&[Offer::DeflateOnOom])
            .memory(MEMORY)
            .accel(guests.accel())
            .verbose(guests.verbose)
            .using_memory()
    });
    let booting = Phase::start("booting three guests", None);
    vm::run_all(&configs, |guests| {
        for guest in guests {
            guest.insmod(Driver::Rust, &[])?;
            guest.balloon().poll_statistics(1)?;
        }
        booting.finish();
        let named: Vec<_> = iter::zip(VMS, guests.iter().copied()).collect();
        let program = artifacts.tools.join("balloon-manager");
        let logs = artifacts.logs.join(directory);
        let manager = settings
            .map(|settings| Manager::start(&program, &logs, &named, settings))
            .transpose()?;
        if let Some(manager) = &manager {
            wait_divided(guests, manager)?;
            BARS.suspend(|| {
                eprintln!(
                    "with the manager, whose reasons are in {}/manager.log:",
                    logs.display()
                );
            });
        } else {
            BARS.suspend(|| eprintln!("without a manager:"));
        }
        work(&named)
    })
    .with_context(|| {
        format!(
            "a guest of the demo fails; the logs are in {}/{directory}",
            artifacts.logs.display()
        )
    })
}

/// Waits until the manager has divided the pool between guests that began with more.
fn wait_divided(guests: &[&Guest], manager: &Manager) -> Result<()> {
    let phase = Phase::start("the manager divides the pool", None);
    let (first, _) = guests.split_first().context("there are guests")?;
    first
        .wait_until(
            "the guests give memory to the pool",
            Duration::from_secs(60),
            || {
                let sizes = guests.iter().map(|guest| guest.balloon().size());
                let balloons: Size = sizes.sum::<Result<_>>()?;
                phase.say(&format!("{balloons} so far"));
                Ok(MEMORY * guests.len() as u64 <= balloons + POOL)
            },
        )
        .with_context(|| format!("its log: {}", manager.log().unwrap_or_default()))?;
    phase.finish();
    Ok(())
}

/// Has each guest do its jobs, and shows all of them.
fn work(guests: &[(&str, &Guest)]) -> Result<Outcome> {
    let view = View::new(guests)?;
    let given = Mutex::new(Samples::default());
    let mut jobs = Samples::default();
    thread::scope(|scope| {
        let (end, ended) = mpsc::channel();
        let (view, given) = (&view, &given);
        let watcher = scope.spawn(move || view.watch(&ended, given));
        for _ in 0..ROUNDS {
            for (index, (name, guest)) in guests.iter().enumerate() {
                view.say(index, "a job begins");
                let start = Instant::now();
                let job = guest.load(Load::Hold {
                    mib: JOB.as_mib().try_into()?,
                    threads: 1,
                })?;
                let took = start.elapsed();
                jobs.add_time(took);
                view.say(index, "works");
                view.print(&format!(
                    "{name:>8}: a job uses its {JOB} after {:.1} s",
                    took.as_secs_f64()
                ));
                thread::sleep(WORK);
                job.stop()?;
                view.say(index, "");
                thread::sleep(PAUSE);
            }
        }
        drop(end);
        watcher.join().expect("it does not panic")
    })?;
    let given = given.into_inner().expect("a lock");
    Ok(Outcome { given, jobs })
}

/// A guest as the terminal shows it.
struct Row<'a> {
    guest: &'a Guest,
    memory: MemoryFile,
    bar: ProgressBar,
    /// What the guest does.
    says: Mutex<&'static str>,
}

/// What the terminal shows: a bar for each guest, and one for the host.
struct View<'a> {
    rows: Vec<Row<'a>>,
    host: ProgressBar,
}

impl<'a> View<'a> {
    fn new(guests: &[(&str, &'a Guest)]) -> Result<Self> {
        let bar = |name: &str| {
            let style = ProgressStyle::with_template("{prefix:>8} {msg}");
            let bar = BARS.add(ProgressBar::new_spinner());
            bar.set_style(style.expect("the template is valid"));
            bar.set_prefix(name.to_owned());
            bar
        };
        let rows = guests.iter().map(|(name, guest)| {
            Ok(Row {
                guest,
                memory: guest.memory_file()?,
                bar: bar(name),
                says: Mutex::new(""),
            })
        });
        Ok(Self {
            rows: rows.collect::<Result<_>>()?,
            host: bar("host"),
        })
    }

    fn say(&self, index: usize, words: &'static str) {
        if let Some(row) = self.rows.get(index) {
            *row.says.lock().expect("a lock") = words;
        }
    }

    /// Leaves a line above the bars.
    fn print(&self, line: &str) {
        BARS.suspend(|| eprintln!("{line}"));
    }

    /// Measures the host's memory, and draws, until the jobs end.
    fn watch(&self, ended: &Receiver<()>, given: &Mutex<Samples>) -> Result<()> {
        let mut drawn = Instant::now();
        while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(SAMPLING) {
            let resident = self.rows.iter().map(|row| row.memory.resident());
            let resident: Vec<Size> = resident.collect::<Result<_>>()?;
            let sum: Size = resident.iter().copied().sum();
            given.lock().expect("a lock").add(as_f64(sum));
            if drawn.elapsed() >= DRAWING && stderr().is_terminal() {
                drawn = Instant::now();
                self.draw(&resident, sum)?;
            }
        }
        Ok(())
    }

    fn draw(&self, resident: &[Size], sum: Size) -> Result<()> {
        for (row, &resident) in iter::zip(&self.rows, resident) {
            let usable = MEMORY.saturating_sub(row.guest.balloon().size()?);
            let says = *row.says.lock().expect("a lock");
            row.bar.set_message(format!(
                "{} has {resident} of the host's memory, and may have {usable}  {says}",
                picture(resident, usable, MEMORY)
            ));
            row.bar.tick();
        }
        let all = MEMORY * self.rows.len() as u64;
        self.host.set_message(format!(
            "{} gives {sum} of {all}",
            picture(sum, POOL.max(sum), all)
        ));
        self.host.tick();
        Ok(())
    }
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        for row in &self.rows {
            row.bar.finish_and_clear();
        }
        self.host.finish_and_clear();
    }
}

/// A bar: what is in use, what may be used, and the rest.
fn picture(used: Size, usable: Size, all: Size) -> String {
    let column = all.as_bytes().div_ceil(WIDTH);
    let symbol = |start: Size| match () {
        () if start < used => '█',
        () if start < usable => '░',
        () => '·',
    };
    (0..WIDTH)
        .map(|number| symbol(Size::bytes(number * column)))
        .collect()
}

fn as_f64(size: Size) -> f64 {
    size.as_bytes() as f64
}

fn size(bytes: f64) -> String {
    format!("{:.2} GiB", bytes / as_f64(Size::gib(1)))
}

fn table(alone: &Outcome, managed: &Outcome) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_header([
        "",
        "without a manager",
        "with balloon-manager",
    ]);
    let mut row = |what: &str, show: &dyn Fn(&Outcome) -> String| {
        table.add_row([what.to_owned(), show(alone), show(managed)]);
    };
    let all = MEMORY * VMS.len() as u64;
    row("memory of the guests", &|_| all.to_string());
    row("the host gives at most", &|outcome| {
        size(outcome.given.max())
    });
    row("on average", &|outcome| size(outcome.given.mean()));
    row("a job has its memory after (median)", &|outcome| {
        format!("{:.1} s", outcome.jobs.median())
    });
    row("at most", &|outcome| format!("{:.1} s", outcome.jobs.max()));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_has_three_parts() {
        let bar = picture(Size::gib(1), Size::gib(2), Size::gib(4));
        assert_eq!(bar, "█".repeat(10) + &"░".repeat(10) + &"·".repeat(20));
        assert_eq!(
            picture(Size::gib(4), Size::gib(1), Size::gib(4)),
            "█".repeat(40)
        );
    }
}
