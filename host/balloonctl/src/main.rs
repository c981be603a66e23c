// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! balloonctl: the client of vhost-user-balloon's control socket.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use balloon_control::{Answer, Client, Info, Metrics, Request};
use clap::{CommandFactory, Parser};
use indicatif::{HumanBytes, HumanCount};

mod amount;
mod cli;
mod failure;
mod info;
mod man;
mod request;
mod stats;
mod top;
mod unused;
mod wait;

use amount::PAGE;
use cli::{Cli, Command};
use failure::Failure;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let json = cli.json;
    let socket = cli.socket();
    let connect = || -> Result<Client, Failure> {
        let socket = socket.as_deref().ok_or(Failure::NoVm)?;
        Ok(Client::connect(socket)?)
    };
    match cli.command {
        Command::Info => {
            let answer = connect()?.call(&Request::Info {})?;
            show(json, &answer, || Ok(info::table(&answer.parse()?)))
        }
        Command::Set {
            size,
            wait: patience,
        } => {
            let mut client = connect()?;
            if size.is_relative() {
                // The guest's statistics say how much memory it has. Without an answer, the daemon knows only
                // what the VMM shares.
                let _ = client.call(&Request::Stats { fresh: true });
            }
            let before: Info = client.call(&Request::Info {})?.parse()?;
            let bytes = size.of(before.memory)?;
            let answer = client.call(&Request::Set { bytes })?;
            if patience.wait {
                let (answer, took) = wait::wait(&mut client, before.size, patience.timeout())?;
                return show(json, &answer, || {
                    let info: Info = answer.parse()?;
                    Ok(format!(
                        "The guest has given away {}, after {:.1} s.",
                        HumanBytes(info.size),
                        took.as_secs_f64()
                    ))
                });
            }
            show(json, &answer, || {
                Ok(format!(
                    "The target is {} now, and the guest has given away {}.",
                    HumanBytes(bytes),
                    HumanBytes(before.size)
                ))
            })
        }
        Command::Stats { fresh, watch } => {
            let mut client = connect()?;
            match watch {
                Some(interval) => stats::watch(&mut client, fresh, interval, json),
                None => {
                    let answer = client.call(&Request::Stats { fresh })?;
                    show(json, &answer, || Ok(stats::table(&answer.parse()?, None)))
                }
            }
        }
        Command::Top { sockets, interval } => {
            let sockets = match sockets.is_empty() {
                true => vec![socket.clone().ok_or(Failure::NoVm)?],
                false => sockets,
            };
            top::run(&sockets, Duration::from_secs(interval.into()))
        }
        Command::Interval { seconds } => {
            let answer = connect()?.call(&Request::SetStatsInterval { seconds })?;
            show(json, &answer, || {
                Ok(match seconds {
                    0 => "The guest is no longer asked for statistics.".to_owned(),
                    _ => format!("The guest is asked for statistics every {seconds} s."),
                })
            })
        }
        Command::Inhibit { seconds } => {
            let seconds = seconds.into();
            let answer = connect()?.call(&Request::Inhibit { seconds })?;
            show(json, &answer, || {
                Ok(format!(
                    "No memory is given back to the host for {seconds} s."
                ))
            })
        }
        Command::Resume => {
            let mut client = connect()?;
            let answer = client.call(&Request::Resume {})?;
            show(json, &answer, || {
                let info: Info = client.call(&Request::Info {})?.parse()?;
                Ok(match info.withheld.as_slice() {
                    [] => "Memory is given back to the host again.".to_owned(),
                    reasons => format!(
                        "Memory is not given back to the host for another reason: {}.",
                        reasons.join(", ")
                    ),
                })
            })
        }
        Command::Hints { action } => {
            let answer = connect()?.call(&Request::Hints {
                action: action.into(),
            })?;
            show(json, &answer, || Ok(action.done().to_owned()))
        }
        Command::Unused {
            min_order,
            place,
            out,
            limit,
        } => {
            let mut client = connect()?;
            let request = Request::Unused {
                block: PAGE << min_order,
                start: place.start,
                end: place.end,
            };
            let (answer, progress, took) = request::ask(&mut client, &request, limit.timeout())?;
            let pages = unused::save(&mut client, progress.id, &out)?;
            show(json, &answer, || {
                Ok(format!(
                    "{} of the guest are unused, in {} pages, found in {:.1} s. See {}.",
                    HumanBytes(progress.named),
                    HumanCount(pages),
                    took.as_secs_f64(),
                    out.display()
                ))
            })
        }
        Command::Reclaim {
            min_order,
            place,
            limit,
        } => {
            let request = Request::Reclaim {
                block: PAGE << min_order,
                start: place.start,
                end: place.end,
            };
            let (answer, progress, took) =
                request::ask(&mut connect()?, &request, limit.timeout())?;
            show(json, &answer, || {
                Ok(format!(
                    "The host got {} back, of {} unused, after {:.1} s.",
                    HumanBytes(progress.discarded),
                    HumanBytes(progress.named),
                    took.as_secs_f64()
                ))
            })
        }
        Command::DropCaches { pages, slab, limit } => {
            let request = Request::DropCaches {
                pages: pages || !slab,
                slab: slab || !pages,
            };
            let (answer, _, took) = request::ask(&mut connect()?, &request, limit.timeout())?;
            show(json, &answer, || {
                Ok(format!(
                    "The guest has dropped its caches, after {:.1} s.",
                    took.as_secs_f64()
                ))
            })
        }
        Command::Metrics => {
            let answer = connect()?.call(&Request::Metrics {})?;
            show(json, &answer, || {
                Ok(answer.parse::<Metrics>()?.text.trim_end().to_owned())
            })
        }
        Command::Completions { shell } => {
            // The generator panics when it cannot write, and memory can always be written.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "balloonctl", &mut script);
            Ok(io::stdout().write_all(&script)?)
        }
        Command::Man { directory } => man::generate(&directory),
    }
}

/// Prints an answer as it came, or as people like it.
fn show(
    json: bool,
    answer: &Answer,
    human: impl FnOnce() -> Result<String, Failure>,
) -> Result<(), Failure> {
    if json {
        print(answer.json())
    } else {
        print(&human()?)
    }
}

/// Prints a text. Unlike `println!` it does not panic when nobody reads it.
fn print(text: &str) -> Result<(), Failure> {
    Ok(writeln!(io::stdout(), "{text}")?)
}
