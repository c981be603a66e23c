// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All balloons of a host, live, in a terminal.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use balloon_control::{Client, ClientError, Info, News, Stat, Stats, Unit};
use console::Term;
use indicatif::HumanBytes;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{
    Block, Cell, Paragraph, RenderDirection, Row, Sparkline, Table, TableState,
};
use ratatui::{DefaultTerminal, Frame};

use crate::columns::{AMOUNT, COLUMNS, Column, Content, MANAGED_COLUMNS};
use crate::failure::Failure;
use crate::manager::{self, ByName, Managed};
use crate::stats::amount;

/// The longest delay of a key's effect.
const TICK: Duration = Duration::from_millis(100);

/// A daemon sends an event at least once a second.
const SILENCE: Duration = Duration::from_secs(5);

/// The time between two attempts to connect.
const RETRY: Duration = Duration::from_secs(1);

/// The length of a balloon's history.
const HISTORY: usize = 512;

/// How wide the statistics of one VM are: names, values and rates.
const STATISTICS: u16 = 14 + 2 * (AMOUNT + 1);

/// The state of a VM at some moment.
struct Look {
    at: Instant,
    info: Info,
    /// Its latest statistics, if it sends any.
    stats: Option<Stats>,
}

impl Look {
    fn stat(&self, stat: Stat) -> Option<u64> {
        self.stats.as_ref()?.values.get(&stat).copied()
    }
}

/// The rate of a value for each second.
#[derive(Clone, Copy)]
struct Rate {
    change: u64,
    shrinks: bool,
}

impl Rate {
    fn new(before: u64, now: u64, time: Duration) -> Option<Self> {
        let change = u128::from(now.abs_diff(before)) * 1000;
        let change = change.checked_div(time.as_millis())?;
        Some(Self {
            change: change.try_into().ok()?,
            shrinks: now < before,
        })
    }

    /// In this unit. Nothing, if it does not change.
    fn show(self, unit: Unit) -> String {
        let change = amount(unit, self.change);
        match self {
            Self { change: 0, .. } => String::new(),
            Self { shrinks: true, .. } => format!("-{change}"),
            Self { shrinks: false, .. } => format!("+{change}"),
        }
    }
}

/// The displayed state of a VM.
struct Vm {
    name: String,
    /// The latest state, and the one from which rates are taken, or the error.
    looks: Result<(Look, Option<Look>), String>,
    /// The balloon's sizes in bytes after each interval, the newest first.
    history: VecDeque<u64>,
}

impl Vm {
    fn new(socket: &Path) -> Self {
        Self {
            name: name(socket),
            looks: Err("not asked yet".to_owned()),
            history: VecDeque::new(),
        }
    }

    /// Takes a state, or the error. Rates are taken over `interval` at least.
    fn update(&mut self, news: Result<Look, ClientError>, interval: Duration) {
        let look = match news {
            Ok(look) => look,
            Err(error) => {
                self.looks = Err(error.to_string());
                return;
            }
        };
        let looks = std::mem::replace(&mut self.looks, Err(String::new())).ok();
        let ended = |(last, before): &(Look, Option<Look>)| {
            let begun = before.as_ref().map(|before| before.at);
            begun.is_none_or(|begun| last.at.duration_since(begun) >= interval)
        };
        let has_ended = looks.as_ref().is_none_or(ended);
        if !has_ended {
            self.history.pop_front();
        }
        self.history.truncate(HISTORY - 1);
        self.history.push_front(look.info.size);
        let before = looks.and_then(|(last, before)| if has_ended { Some(last) } else { before });
        self.looks = Ok((look, before));
    }

    /// The rate of `value` for each second.
    fn rate(&self, value: impl Fn(&Look) -> Option<u64>) -> Option<Rate> {
        let (now, before) = self.looks.as_ref().ok()?;
        let before = before.as_ref()?;
        let time = now.at.duration_since(before.at);
        Rate::new(value(before)?, value(now)?, time)
    }

    /// The cells of these columns.
    fn row(&self, columns: &[Column], managed: Option<&Managed>) -> Row<'static> {
        let Ok((look, _)) = &self.looks else {
            return Row::new([self.name.clone()]).style(Color::Red);
        };
        let cells = columns.iter().map(|column| {
            let cell = self.cell(column.content, look, managed);
            column.align(cell.unwrap_or_default())
        });
        let row = Row::new(cells.map(Cell::new));
        match look.info.is_reached() {
            true => row,
            false => row.style(Color::Yellow),
        }
    }

    fn cell(&self, content: Content, look: &Look, managed: Option<&Managed>) -> Option<String> {
        let info = &look.info;
        let bytes = |bytes: u64| Some(HumanBytes(bytes).to_string());
        match content {
            Content::Name => Some(self.name.clone()),
            Content::Memory => info.memory.and_then(bytes),
            Content::Balloon => bytes(info.size),
            Content::Target => bytes(info.target),
            Content::Available => look.stat(Stat::AvailableMemory).and_then(bytes),
            Content::BalloonRate => self
                .rate(|look| Some(look.info.size))
                .map(|rate| rate.show(Unit::Bytes)),
            Content::DiscardRate => self
                .rate(|look| Some(look.info.counters.discarded))
                .map(|rate| rate.show(Unit::Bytes)),
            Content::Grant => managed?.grant().map(|bytes| bytes.to_string()),
            Content::Demand => managed?.demand().map(|bytes| bytes.to_string()),
            Content::State => Some(managed?.state.clone()),
            Content::Cause => managed?.cause.clone(),
        }
    }

    /// The state in one line.
    fn state(&self) -> String {
        let info = match &self.looks {
            Ok((look, _)) => &look.info,
            Err(error) => return error.clone(),
        };
        let size = HumanBytes(info.size);
        match info.guest.short_of_target {
            _ if !info.guest.connected => "no VMM is connected".to_owned(),
            _ if !info.guest.driver => "no balloon driver works in the guest".to_owned(),
            _ if info.is_reached() => format!("{size}, as requested"),
            Some(reason) => format!("{size} of {}; {reason}", HumanBytes(info.asked())),
            None => format!("{size} of {}", HumanBytes(info.asked())),
        }
    }

    /// What the guest has sent, a line for each: its name, its value, and how much that changes in a second.
    fn statistics(&self) -> Vec<Line<'static>> {
        let look = self.looks.as_ref().ok().map(|(look, _)| look);
        let line = |stat: Stat| {
            let value = look.and_then(|look| look.stat(stat));
            let value = value.map(|value| amount(stat.unit(), value));
            let rate = self.rate(|look| look.stat(stat));
            let rate = rate.map(|rate| rate.show(stat.unit()));
            let (value, rate) = (value.unwrap_or_default(), rate.unwrap_or_default());
            let width = usize::from(AMOUNT + 1);
            Line::from(format!("{stat:<14}{value:>width$}{rate:>width$}"))
        };
        shown().map(line).collect()
    }
}

/// The statistics that say how a guest is. There is no room for all of them.
fn shown() -> impl Iterator<Item = Stat> {
    Stat::ALL.iter().copied().filter(|stat| match stat {
        Stat::SwapIn
        | Stat::SwapOut
        | Stat::MajorFaults
        | Stat::FreeMemory
        | Stat::DiskCaches
        | Stat::OomKills
        | Stat::AllocStalls => true,
        // The table of all VMs has these.
        Stat::TotalMemory | Stat::AvailableMemory => false,
        Stat::MinorFaults
        | Stat::HugetlbAllocations
        | Stat::HugetlbFailures
        | Stat::AsyncScans
        | Stat::DirectScans
        | Stat::AsyncReclaims
        | Stat::DirectReclaims => false,
    })
}

/// The whole display.
struct Top {
    vms: Vec<Vm>,
    /// The VMs of the manager, if it runs.
    managed: ByName,
    table: TableState,
}

impl Top {
    fn new(sockets: &[PathBuf]) -> Self {
        Self {
            vms: sockets.iter().map(|socket| Vm::new(socket)).collect(),
            managed: ByName::new(),
            table: TableState::new().with_selected(0),
        }
    }

    fn draw(&mut self, frame: &mut Frame<'_>) {
        // With a line above and below.
        let details = u16::try_from(shown().count() + 2).unwrap_or(u16::MAX);
        let [table, details, help] = Layout::vertical([
            Constraint::Min(3),
            Constraint::Length(details),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        self.draw_table(frame, table);
        if let Some(vm) = self.table.selected().and_then(|index| self.vms.get(index)) {
            draw_details(vm, self.managed.get(&vm.name), frame, details);
        }
        frame.render_widget(Line::from(" ↑ ↓ another VM   q quit").dim(), help);
    }

    fn draw_table(&mut self, frame: &mut Frame<'_>, area: Rect) {
        let columns = match self.managed.is_empty() {
            true => &COLUMNS,
            false => &MANAGED_COLUMNS,
        };
        let header = columns
            .iter()
            .map(|column| column.align(column.header.to_owned()));
        let rows = self.vms.iter().map(|vm| {
            let managed = self.managed.get(&vm.name);
            vm.row(columns, managed)
        });
        let table = Table::new(rows, columns.iter().map(|column| column.width))
            .column_spacing(0)
            .header(Row::new(header).style(Modifier::BOLD))
            .row_highlight_style(Modifier::REVERSED);
        frame.render_stateful_widget(table, area, &mut self.table);
    }
}

fn draw_details(vm: &Vm, managed: Option<&Managed>, frame: &mut Frame<'_>, area: Rect) {
    let mut title = format!(" {}: {} ", vm.name, vm.state());
    if let Some(cause) = managed.and_then(|vm| vm.cause.as_ref()) {
        title += &format!("({cause}) ");
    }
    let block = Block::bordered().title(title);
    let inside = block.inner(area);
    frame.render_widget(block, area);
    let [history, statistics] =
        Layout::horizontal([Constraint::Fill(1), Constraint::Length(STATISTICS)])
            .spacing(1)
            .areas(inside);
    let memory = vm
        .looks
        .as_ref()
        .ok()
        .and_then(|(look, _)| look.info.memory);
    let sizes: Vec<u64> = vm
        .history
        .iter()
        .take(history.width.into())
        .copied()
        .collect();
    let mut line = Sparkline::default()
        .block(Block::new().title("the balloon, in all of the memory"))
        .data(sizes)
        // The newest size is on the right, as in other charts.
        .direction(RenderDirection::RightToLeft)
        .style(Style::new().cyan());
    if let Some(memory) = memory {
        line = line.max(memory);
    }
    frame.render_widget(line, history);
    frame.render_widget(Paragraph::new(vm.statistics()), statistics);
}

/// What the threads report.
enum Message {
    /// The state of the VM with this number.
    Look(usize, Box<Result<Look, ClientError>>),
    Managed(ByName),
}

/// Shows the VMs of these control sockets until the user quits.
///
/// # Errors
///
/// There is no terminal.
pub(crate) fn run(sockets: &[PathBuf], interval: Duration) -> Result<(), Failure> {
    if !Term::stdout().is_term() {
        return Err(Failure::NoTerminal);
    }
    let (sender, news) = mpsc::channel();
    for (index, socket) in sockets.iter().cloned().enumerate() {
        let sender = sender.clone();
        // A daemon that hangs does not delay the display of other VMs. The thread ends with the
        // process.
        thread::spawn(move || {
            watch(&socket, |look| {
                sender.send(Message::Look(index, Box::new(look))).is_ok()
            });
        });
    }
    thread::spawn(move || {
        manager::watch(Path::new(manager::SOCKET), |vms| {
            sender.send(Message::Managed(vms)).is_ok()
        });
    });
    let mut terminal = ratatui::try_init()?;
    let result = show(&mut terminal, Top::new(sockets), &news, interval);
    ratatui::try_restore()?;
    Ok(result?)
}

/// Follows a VM, as long as the receiver exists.
fn watch(socket: &Path, mut tell: impl FnMut(Result<Look, ClientError>) -> bool) {
    while let Err(error) = follow(socket, &mut tell) {
        if !tell(Err(error)) {
            return;
        }
        thread::sleep(RETRY);
    }
}

/// Follows a VM until the receiver is gone.
fn follow(
    socket: &Path,
    tell: &mut impl FnMut(Result<Look, ClientError>) -> bool,
) -> Result<(), ClientError> {
    let mut events = Client::connect(socket)?.subscribe(None)?;
    let (mut info, mut stats): (Option<Info>, Option<Stats>) = (None, None);
    loop {
        match events.next(SILENCE)? {
            Some(News::Info(answer)) => info = Some(answer.parse()?),
            Some(News::Stats(answer)) => stats = Some(answer.parse()?),
            Some(News::Alive) => {}
            None => return Err(ClientError::Silent(SILENCE)),
        }
        let Some(info) = info.clone() else {
            continue;
        };
        stats = stats.filter(|_| info.guest.driver);
        let look = Look {
            at: Instant::now(),
            info,
            stats: stats.clone(),
        };
        if !tell(Ok(look)) {
            return Ok(());
        }
    }
}

fn show(
    terminal: &mut DefaultTerminal,
    mut top: Top,
    news: &Receiver<Message>,
    interval: Duration,
) -> io::Result<()> {
    loop {
        for message in news.try_iter() {
            match message {
                Message::Look(index, look) => {
                    if let Some(vm) = top.vms.get_mut(index) {
                        vm.update(*look, interval);
                    }
                }
                Message::Managed(vms) => top.managed = vms,
            }
        }
        terminal.draw(|frame| top.draw(frame))?;
        if !event::poll(TICK)? {
            continue;
        }
        let Event::Key(key) = event::read()? else {
            continue;
        };
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
            KeyCode::Up | KeyCode::Char('k') => top.table.select_previous(),
            KeyCode::Down | KeyCode::Char('j') => top.table.select_next(),
            _ => {}
        }
    }
}

/// The name of the VM with this socket: the directory for sockets of vhost-user-balloon@.service,
/// otherwise the file.
fn name(socket: &Path) -> String {
    let file = socket.file_stem().unwrap_or(socket.as_os_str());
    let directory = socket.parent().and_then(Path::file_name);
    let name = match directory {
        Some(directory) if file == "control" => directory,
        _ => file,
    };
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use balloon_control::{Counters, Guest, Shortfall};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::buffer::Cell;

    use super::*;

    const GIB: u64 = 1 << 30;

    const INTERVAL: Duration = Duration::from_secs(1);

    fn look(seconds: u64, size: u64) -> Look {
        let values = Stat::ALL
            .iter()
            .map(|&stat| (stat, seconds << 20))
            .collect();
        Look {
            at: Instant::now() + Duration::from_secs(seconds),
            info: Info {
                target: 6 * GIB,
                size,
                memory: Some(8 * GIB),
                granule: 4096,
                stats_interval: 1,
                uptime: seconds,
                guest: Guest {
                    connected: true,
                    driver: true,
                    short_of_target: (size == 5 * GIB).then_some(Shortfall::NoMemory),
                    ..Guest::default()
                },
                counters: Counters {
                    discarded: size / 2,
                    ..Counters::default()
                },
                ..Info::default()
            },
            stats: Some(Stats {
                values,
                ..Stats::default()
            }),
        }
    }

    fn screen(top: &mut Top) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(80, 16)).unwrap();
        terminal.draw(|frame| top.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |row: &[Cell]| row.iter().map(Cell::symbol).collect();
        buffer.content.chunks(80).map(line).collect()
    }

    #[test]
    fn vms_are_shown_with_their_rates() {
        let sockets = ["/run/vhost-user-balloon/web/control.sock", "/run/db.sock"];
        let mut top = Top::new(&sockets.map(PathBuf::from));
        for size in 1..=5 {
            top.vms[0].update(Ok(look(2 * size, size * GIB)), INTERVAL);
        }
        top.vms[1].update(Err(ClientError::Gone), INTERVAL);
        let lines = screen(&mut top);
        assert!(lines[1].starts_with("web"), "{lines:#?}");
        for part in [
            "8.00 GiB",
            "5.00 GiB",
            "6.00 GiB",
            "10.00 MiB",
            "+512.00 MiB",
            "+256.00 MiB",
        ] {
            assert!(lines[1].contains(part), "{lines:#?}");
        }
        assert!(lines[2].starts_with("db "), "{lines:#?}");
        assert!(
            lines[6].contains("web: 5.00 GiB of 6.00 GiB; the guest has no free memory"),
            "{lines:#?}"
        );
        assert!(
            lines[7].contains("swap-in          10.00 MiB   +1.00 MiB"),
            "{lines:#?}"
        );

        top.table.select_next();
        let lines = screen(&mut top);
        assert!(
            lines[6].contains("db: the daemon has closed the connection"),
            "{lines:#?}"
        );
    }

    #[test]
    fn a_managed_vm_has_its_grant_and_the_cause() {
        let mut top = Top::new(&["/run/web.sock", "/run/db.sock"].map(PathBuf::from));
        for vm in &mut top.vms {
            vm.update(Ok(look(2, GIB)), INTERVAL);
        }
        assert!(screen(&mut top)[0].contains("Target"));
        top.managed = manager::example("web");
        let lines = screen(&mut top);
        for (line, parts) in [
            (0, &["Balloon", "Grant", "Demand", " State", " Cause"][..]),
            (
                1,
                &[
                    "web",
                    "1.00 GiB",
                    "3.00 GiB",
                    "2.00 GiB",
                    " contended",
                    " others",
                ],
            ),
            (6, &["web: 1.00 GiB of 6.00 GiB (others need the memory)"]),
        ] {
            for part in parts {
                assert!(lines[line].contains(part), "{part}: {lines:#?}");
            }
        }
        // The manager does not know it.
        assert!(lines[2].trim_end().ends_with("2.00 MiB"), "{lines:#?}");
    }

    #[test]
    fn rates_are_taken_over_the_interval() {
        let mut vm = Vm::new(Path::new("/run/db.sock"));
        for second in 1..=9 {
            vm.update(Ok(look(second, second * GIB)), 3 * INTERVAL);
        }
        // From the seventh second on.
        assert_eq!(vm.history, [9 * GIB, 7 * GIB, 4 * GIB, GIB]);
        let before = vm.looks.unwrap().1.unwrap();
        assert_eq!(before.info.size, 7 * GIB);
    }

    #[test]
    fn a_size_is_rounded_up_to_pages_of_the_guest() {
        let mut top = Top::new(&[PathBuf::from("/run/db.sock")]);
        top.vms[0].update(Ok(look(2, 6 * GIB + (60 << 10))), INTERVAL);
        assert_eq!(top.vms[0].state(), "6.00 GiB, as requested");
        let mut limited = look(4, 3 * GIB);
        limited.info.limit = Some(4 * GIB);
        top.vms[0].update(Ok(limited), INTERVAL);
        assert_eq!(top.vms[0].state(), "3.00 GiB of 4.00 GiB");
    }

    #[test]
    fn what_shrinks_has_a_sign() {
        let rate = |before, now| {
            Rate::new(before, now, Duration::from_secs(2))
                .unwrap()
                .show(Unit::Bytes)
        };
        assert_eq!(rate(0, 2 << 20), "+1.00 MiB");
        assert_eq!(rate(2 << 20, 0), "-1.00 MiB");
        assert_eq!(rate(7, 7), "");
        assert!(Rate::new(0, u64::MAX, Duration::from_millis(1)).is_none());
        assert!(Rate::new(0, 1, Duration::ZERO).is_none());
    }

    #[test]
    fn a_vm_is_called_as_its_service() {
        assert_eq!(
            name(Path::new("/run/vhost-user-balloon/web/control.sock")),
            "web"
        );
        assert_eq!(name(Path::new("/run/vm1.sock")), "vm1");
        assert_eq!(name(Path::new("balloon")), "balloon");
    }
}
