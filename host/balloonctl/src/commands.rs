// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The commands: each sends requests, and prints the results.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use balloon_control::{Answer, Begun, Client, HintAction, Info, Metrics, Progress, Request};
use clap::CommandFactory;
use clap_complete::Shell;
use indicatif::{HumanBytes, HumanCount};

use crate::amount::{Amount, PAGE};
use crate::cli::{Cli, Command, Hints, Limit, Patience, Place, Target};
use crate::failure::Failure;
use crate::output;
use crate::{info, man, manager, request, stats, top, unused, wait};

/// Executes the command line.
pub(crate) fn run(cli: Cli) -> Result<(), Failure> {
    let session = Session {
        socket: cli.socket(),
        json: cli.json,
    };
    match cli.command {
        Command::Info => session.info(),
        Command::Set { target, wait } => session.set(&target, &wait),
        Command::Stats { fresh, watch } => session.stats(fresh, watch),
        Command::Top { sockets, interval } => session.top(sockets, interval),
        Command::Interval { seconds } => session.interval(seconds),
        Command::Inhibit { seconds, owner } => session.inhibit(seconds, owner),
        Command::Resume { owner } => session.resume(owner),
        Command::Hints { action } => session.hints(&action),
        Command::Unused {
            min_order,
            place,
            out,
            limit,
        } => session.unused(min_order, &place, &out, &limit),
        Command::Reclaim {
            min_order,
            place,
            limit,
        } => session.reclaim(min_order, &place, &limit),
        Command::DropCaches { pages, slab, limit } => session.drop_caches(pages, slab, &limit),
        Command::Metrics => session.metrics(),
        Command::Auto { arguments } => Err(manager::run(&arguments, cli.json)),
        Command::Completions { shell } => completions(shell),
        Command::Man { directory } => man::generate(&directory),
    }
}

/// The options of all commands.
struct Session {
    socket: Option<PathBuf>,
    json: bool,
}

impl Session {
    fn connect(&self) -> Result<Client, Failure> {
        let socket = self.socket.as_deref().ok_or(Failure::NoVm)?;
        Ok(Client::connect(socket)?)
    }

    /// Sends one request on a connection of its own.
    fn call(&self, request: &Request) -> Result<Answer, Failure> {
        Ok(self.connect()?.call(request)?)
    }

    fn show(
        &self,
        answer: &Answer,
        human: impl FnOnce() -> Result<String, Failure>,
    ) -> Result<(), Failure> {
        output::show(self.json, answer, human)
    }

    fn info(&self) -> Result<(), Failure> {
        let answer = self.call(&Request::Info {})?;
        self.show(&answer, || Ok(info::table(&answer.parse()?)))
    }

    fn set(&self, target: &Target, patience: &Patience) -> Result<(), Failure> {
        let mut client = self.connect()?;
        if target.is_relative() {
            // The guest's statistics contain the size of its memory. Without them, the daemon knows only
            // the memory that the VMM shares.
            let _ = client.call(&Request::Stats { fresh: true });
        }
        let before: Info = client.call(&Request::Info {})?.parse()?;
        let bytes = target.size.of(before.memory)?;
        let of = |size: Option<Amount>| size.map(|size| size.of(before.memory)).transpose();
        let answer = client.call(&Request::Set {
            bytes,
            expected: of(target.expect)?,
            lease: target.lease.map(|seconds| u64::from(seconds) * 1000),
            fallback: of(target.fallback)?,
            owner: target.owner.clone(),
            release: of(target.release)?,
        })?;
        if patience.wait {
            let (answer, took) = wait::wait(client, before.size, patience.timeout())?;
            return self.show(&answer, || {
                let info: Info = answer.parse()?;
                Ok(format!(
                    "The balloon has {}, after {:.1} s.",
                    HumanBytes(info.size),
                    took.as_secs_f64()
                ))
            });
        }
        self.show(&answer, || {
            Ok(format!(
                "The target is {} now, and the balloon has {}.",
                HumanBytes(bytes),
                HumanBytes(before.size)
            ))
        })
    }

    fn stats(&self, fresh: bool, watch: Option<u32>) -> Result<(), Failure> {
        let mut client = self.connect()?;
        if let Some(interval) = watch {
            return stats::watch(client, fresh, interval, self.json);
        }
        let answer = client.call(&Request::Stats { fresh })?;
        self.show(&answer, || Ok(stats::table(&answer.parse()?, None)))
    }

    fn top(&self, sockets: Vec<PathBuf>, interval: u32) -> Result<(), Failure> {
        let sockets = match sockets.is_empty() {
            true => vec![self.socket.clone().ok_or(Failure::NoVm)?],
            false => sockets,
        };
        top::run(&sockets, Duration::from_secs(interval.into()))
    }

    fn interval(&self, seconds: u32) -> Result<(), Failure> {
        let answer = self.call(&Request::SetStatsInterval { seconds })?;
        self.show(&answer, || {
            Ok(match seconds {
                0 => "The device no longer requests statistics.".to_owned(),
                _ => format!("The device requests statistics every {seconds} s."),
            })
        })
    }

    fn inhibit(&self, seconds: u32, owner: Option<String>) -> Result<(), Failure> {
        let seconds = seconds.into();
        let answer = self.call(&Request::Inhibit { seconds, owner })?;
        self.show(&answer, || {
            Ok(format!(
                "No memory is returned to the host for {seconds} s."
            ))
        })
    }

    fn resume(&self, owner: Option<String>) -> Result<(), Failure> {
        let mut client = self.connect()?;
        let answer = client.call(&Request::Resume { owner })?;
        self.show(&answer, || {
            let info: Info = client.call(&Request::Info {})?.parse()?;
            Ok(match info::withheld(&info) {
                None => "Memory is returned to the host again.".to_owned(),
                Some(reasons) => {
                    format!("Memory is not returned to the host for another reason: {reasons}.")
                }
            })
        })
    }

    fn hints(&self, action: &Hints) -> Result<(), Failure> {
        let (action, done) = match action {
            Hints::Start { out, limit } => return self.start_hints(out.as_deref(), limit),
            Hints::Stop => (HintAction::Stop, "The guest is asked to stop hinting."),
            Hints::Done => (
                HintAction::Done,
                "The hinted pages are returned to the guest.",
            ),
        };
        let answer = self.call(&Request::Hints { action })?;
        self.show(&answer, || Ok(done.to_owned()))
    }

    fn start_hints(&self, out: Option<&Path>, limit: &Limit) -> Result<(), Failure> {
        let request = Request::Hints {
            action: HintAction::Start,
        };
        if let Some(out) = out {
            return self.list(&request, "hinted", out, limit);
        }
        let answer = self.call(&request)?;
        self.show(&answer, || {
            let Begun { id } = answer.parse()?;
            Ok(format!("The device requests hints with the id {id}."))
        })
    }

    /// Makes a request of the guest, and waits until the guest has completed it.
    fn ask(
        &self,
        client: &mut Client,
        request: &Request,
        limit: &Limit,
    ) -> Result<(Answer, Progress, Duration), Failure> {
        let events = self.connect()?.subscribe(None)?;
        request::ask(client, events, request, limit.timeout())
    }

    /// Makes a request for a list of memory, and writes a bitmap of the pages in that list to a file.
    fn list(
        &self,
        request: &Request,
        what: &str,
        out: &Path,
        limit: &Limit,
    ) -> Result<(), Failure> {
        let mut client = self.connect()?;
        let (answer, progress, took) = self.ask(&mut client, request, limit)?;
        let pages = unused::save(&mut client, progress.id, out)?;
        self.show(&answer, || {
            Ok(format!(
                "{} of the guest are {what}, in {} pages, found in {:.1} s. See {}.",
                HumanBytes(progress.named),
                HumanCount(pages),
                took.as_secs_f64(),
                out.display()
            ))
        })
    }

    fn unused(
        &self,
        min_order: u8,
        place: &Place,
        out: &Path,
        limit: &Limit,
    ) -> Result<(), Failure> {
        let request = Request::Unused {
            block: PAGE << min_order,
            start: place.start,
            end: place.end,
        };
        self.list(&request, "unused", out, limit)
    }

    fn reclaim(&self, min_order: u8, place: &Place, limit: &Limit) -> Result<(), Failure> {
        let request = Request::Reclaim {
            block: PAGE << min_order,
            start: place.start,
            end: place.end,
        };
        let (answer, progress, took) = self.ask(&mut self.connect()?, &request, limit)?;
        self.show(&answer, || {
            Ok(format!(
                "The host got {} back, of {} unused, after {:.1} s.",
                HumanBytes(progress.discarded),
                HumanBytes(progress.named),
                took.as_secs_f64()
            ))
        })
    }

    fn drop_caches(&self, pages: bool, slab: bool, limit: &Limit) -> Result<(), Failure> {
        let request = Request::DropCaches {
            pages: pages || !slab,
            slab: slab || !pages,
        };
        let (answer, _, took) = self.ask(&mut self.connect()?, &request, limit)?;
        self.show(&answer, || {
            Ok(format!(
                "The guest has dropped its caches, after {:.1} s.",
                took.as_secs_f64()
            ))
        })
    }

    fn metrics(&self) -> Result<(), Failure> {
        let answer = self.call(&Request::Metrics {})?;
        self.show(&answer, || {
            Ok(answer.parse::<Metrics>()?.text.trim_end().to_owned())
        })
    }
}

fn completions(shell: Shell) -> Result<(), Failure> {
    // The generator panics when it cannot write, so it writes to memory.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "balloonctl", &mut script);
    Ok(io::stdout().write_all(&script)?)
}
