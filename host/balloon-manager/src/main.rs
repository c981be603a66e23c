// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program: its command line, its signals, and the loop of the manager.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use balloon_policy::VmId;
use clap::{CommandFactory, Parser, Subcommand};
use log::LevelFilter;
use sd_notify::NotifyState;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use systemd_journal_logger::{JournalLog, connected_to_journal};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, Receiver, UnboundedReceiver};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use crate::config::Config;
use crate::control::{Call, Request, SOCKET};
use crate::daemon::{Connection, Failure};
use crate::manager::Manager;
use crate::record::Record;
use crate::state::State;
use crate::status::{Past, Reserved, Status, VmStatus};

mod balloon;
mod config;
mod control;
mod daemon;
mod doubt;
mod host;
mod known;
mod lines;
mod link;
mod man;
mod manager;
mod metrics;
mod qemu;
mod qemu_target;
mod record;
mod reservations;
mod resident;
mod savings;
mod state;
mod status;
mod text;
mod vm;
mod waits;

/// Where help lists the options of all commands: after those of a command.
const COMMON: usize = 100;

/// Moves memory between the VMs of a host
///
/// Each VM has a vhost-user-balloon daemon, or QEMU's own balloon device and a monitor for the manager. The manager sets
/// the targets of their balloons. It inflates the balloons of guests with unused memory, and deflates those of guests that
/// need memory. The memory that all guests can touch stays within the pool.
///
/// SIGHUP reloads the configuration, and SIGTERM ends the manager. A minute later each daemon sets the target with which the
/// VM has its share of the pool if all VMs want all of their memory.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    client: Client,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Manage the VMs of this host
    Run {
        /// Read this file, and neither /etc/balloon-manager/config.toml nor drop-ins
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Set no target, and report what would be done and saved
        #[arg(long)]
        observe: bool,
        /// Write each decision to this file
        #[arg(long, value_name = "FILE")]
        record: Option<PathBuf>,
        /// The log level: off, error, warn, info, debug or trace
        #[arg(long, value_name = "LEVEL", default_value = "info")]
        log: LevelFilter,
    },
    /// Check the configuration
    Check {
        /// Check this file, and neither /etc/balloon-manager/config.toml nor drop-ins
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Check a recording: decide again, and compare the decisions
    Replay {
        /// The recording
        file: PathBuf,
    },
    /// Show the host and its VMs
    Top {
        /// Repeat every second
        #[arg(long)]
        watch: bool,
    },
    /// Show why a VM has the memory that it has
    Explain {
        /// The VM
        vm: String,
    },
    /// Reserve memory for a VM that is about to start, and wait until it is free
    Reserve {
        /// All of the VM's memory, such as 8GiB
        size: String,
        /// The VM that uses the reservation when it starts. By default the first VM that starts does
        #[arg(long, value_name = "NAME")]
        vm: Option<String>,
        /// How long to wait for the memory, and how long it stays free then
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        seconds: u64,
    },
    /// End a reservation before its time
    Release {
        /// The number that `reserve` has printed
        id: u32,
    },
    /// Leave a VM alone: its target stays, also when the manager ends
    Pause {
        /// The VM
        vm: String,
    },
    /// Manage a VM again that was left alone with `pause`
    Resume {
        /// The VM
        vm: String,
    },
    /// Print metrics for Prometheus
    Metrics,
    /// Write the man page to a directory
    #[command(hide = true)]
    Man {
        /// The directory
        directory: PathBuf,
    },
}

#[derive(clap::Args, Debug)]
struct Client {
    /// The manager's socket (mode 0600)
    #[arg(long, global = true, display_order = COMMON, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// Print the manager's response as JSON
    #[arg(long, global = true, display_order = COMMON)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = match &cli.command {
        Command::Run { log, .. } => *log,
        _ => LevelFilter::Info,
    };
    start_log(level);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = runtime
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(execute(cli.command, &cli.client)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Logs to systemd's journal, with fields, if that reads standard error, and else to standard error.
fn start_log(level: LevelFilter) {
    let is_installed =
        connected_to_journal() && JournalLog::new().is_ok_and(|journal| journal.install().is_ok());
    match is_installed {
        true => log::set_max_level(level),
        false => env_logger::Builder::new()
            .filter_level(level)
            .format_timestamp(None)
            .init(),
    }
}

async fn execute(command: Command, client: &Client) -> Result<()> {
    match command {
        Command::Run {
            config,
            observe,
            record,
            ..
        } => {
            run(
                config.as_deref(),
                observe,
                record.as_deref(),
                &client.socket,
            )
            .await
        }
        Command::Check { config } => {
            print!("{}", Config::load(config.as_deref())?.to_toml()?);
            Ok(())
        }
        Command::Replay { file } => {
            let count = record::replay(&file)?;
            println!("{count} decisions are as recorded");
            Ok(())
        }
        Command::Man { directory } => man::generate(Cli::command(), &directory),
        Command::Top { watch } => top(client, watch).await,
        Command::Explain { vm } => explain(client, vm).await,
        Command::Reserve { size, vm, seconds } => reserve(client, &size, vm, seconds).await,
        Command::Release { id } => {
            ask::<serde_json::Value>(client, &Request::Release { id }).await?;
            Ok(())
        }
        Command::Pause { vm } => pause(client, vm, true).await,
        Command::Resume { vm } => pause(client, vm, false).await,
        Command::Metrics => {
            let metrics: Option<balloon_control::Metrics> =
                ask(client, &Request::Metrics {}).await?;
            print!(
                "{}",
                metrics.map(|metrics| metrics.text).unwrap_or_default()
            );
            Ok(())
        }
    }
}

async fn top(client: &Client, watch: bool) -> Result<()> {
    loop {
        if let Some(status) = ask::<Status>(client, &Request::Status {}).await? {
            print!("{}", text::top(&status));
        }
        if !watch {
            return Ok(());
        }
        sleep(Duration::from_secs(1)).await;
    }
}

async fn explain(client: &Client, vm: String) -> Result<()> {
    #[derive(Deserialize)]
    struct Explanation {
        vm: VmStatus,
        history: Vec<Past>,
    }
    let request = Request::Explain { vm };
    if let Some(Explanation { vm, history }) = ask(client, &request).await? {
        let now = ask::<Status>(client, &Request::Status {}).await?;
        let now = now.map_or(0, |status| status.now);
        print!("{}", text::explain(now, &vm, &history));
    }
    Ok(())
}

async fn pause(client: &Client, vm: String, paused: bool) -> Result<()> {
    ask::<serde_json::Value>(client, &Request::Pause { vm, paused }).await?;
    Ok(())
}

/// Manages the VMs until a signal ends it.
async fn run(
    path: Option<&Path>,
    observe: bool,
    record: Option<&Path>,
    socket: &Path,
) -> Result<()> {
    let config = Config::load(path)?;
    let record = record.map(Record::create).transpose()?;
    let (reports, reported) = mpsc::unbounded_channel();
    let (calls, called) = mpsc::channel(16);
    let _socket = control::serve(socket, calls)
        .with_context(|| format!("cannot listen on {}", socket.display()))?;
    let mut manager = Manager::new(config, observe, record, reports);
    log::info!(
        "managing with the profile {}",
        toml::Value::try_from(manager.profile())?
    );
    manage(&mut manager, path, reported, called).await?;
    notify(&[NotifyState::Stopping]);
    match manager.savings() {
        Some(savings) => log::info!("the host would have saved {savings}"),
        None => log::info!("ending; targets stay until their leases run out"),
    }
    Ok(())
}

/// Serves VMs, clients and signals, until one of these ends it.
async fn manage(
    manager: &mut Manager,
    path: Option<&Path>,
    mut reported: UnboundedReceiver<(VmId, State)>,
    mut called: Receiver<Call>,
) -> Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut seconds = interval(Duration::from_secs(1));
    seconds.set_missed_tick_behavior(MissedTickBehavior::Skip);
    // Reports of several VMs are for one decision.
    let mut decide = None;
    let mut is_ready = false;
    loop {
        let due = async {
            match decide {
                Some(time) => tokio::time::sleep_until(time).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            report = reported.recv() => {
                if let Some((id, state)) = report {
                    if manager.report(id, state) {
                        decide = decide.or(Some(Instant::now() + Duration::from_millis(10)));
                    }
                }
            }
            // Clients wait until then: there would be no room for any reservation.
            call = called.recv(), if is_ready => {
                if let Some((request, response)) = call {
                    // The client may have gone.
                    let _ = response.send(control::handle(manager, request));
                }
            }
            () = due => {
                decide = None;
                if let Err(error) = manager.step() {
                    log::error!("no decision: {error:#}");
                }
                if manager.has_begun() && !std::mem::replace(&mut is_ready, true) {
                    notify(&[NotifyState::Ready]);
                }
            }
            _ = seconds.tick() => {
                manager.discover();
                decide = decide.or(Some(Instant::now()));
                notify(&[NotifyState::Watchdog]);
            }
            _ = hangup.recv() => reload(manager, path),
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
    }
}

/// Without systemd this has no effect.
fn notify(states: &[NotifyState<'_>]) {
    let _ = sd_notify::notify(states);
}

fn reload(manager: &mut Manager, path: Option<&Path>) {
    match Config::load(path).and_then(|config| manager.reload(config)) {
        Ok(differences) if differences.is_empty() => log::info!("the configuration is unchanged"),
        Ok(differences) => {
            for line in differences {
                log::info!("configuration: {line}");
            }
        }
        Err(error) => log::error!("{error:#}"),
    }
}

async fn reserve(client: &Client, size: &str, vm: Option<String>, seconds: u64) -> Result<()> {
    let bytes = balloon_control::parse_size(size)
        .map_err(|error| anyhow::anyhow!("'{size}' is no size: {error}"))?;
    let quiet = Client {
        socket: client.socket.clone(),
        json: false,
    };
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let request = Request::Reserve { bytes, seconds, vm };
    let Some(reserved) = ask::<Reserved>(&quiet, &request).await? else {
        return Ok(());
    };
    let id = reserved.id;
    let ended = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let reserved = tokio::select! {
        reserved = admission(&quiet, reserved, seconds) => reserved?,
        () = ended => {
            ask::<serde_json::Value>(&quiet, &Request::Release { id }).await?;
            bail!("interrupted: reservation {id} has ended");
        }
    };
    match client.json {
        true => println!("{}", serde_json::to_string(&reserved)?),
        false => println!("reservation {id}: the memory is free for {seconds} s"),
    }
    Ok(())
}

/// Waits until a reservation has its memory.
async fn admission(client: &Client, mut reserved: Reserved, seconds: u64) -> Result<Reserved> {
    let id = reserved.id;
    while !reserved.admitted {
        sleep(Duration::from_millis(100)).await;
        match ask(client, &Request::Reservation { id }).await {
            Ok(Some(now)) => reserved = now,
            Ok(None) | Err(_) => {
                bail!("the memory was not free within {seconds} s; reserve for longer")
            }
        }
    }
    Ok(reserved)
}

/// Asks the manager. Prints the response, and returns nothing, if it is wanted as JSON.
async fn ask<T: DeserializeOwned>(client: &Client, request: &Request) -> Result<Option<T>> {
    let mut connection = Connection::open(&client.socket)
        .await
        .context("is the manager running? systemctl start balloon-manager")?;
    let answer = connection
        .call::<serde_json::Value>(request, Duration::from_secs(5))
        .await;
    match answer {
        Ok(answer) if client.json => {
            println!("{answer}");
            Ok(None)
        }
        Ok(answer) => Ok(Some(serde_json::from_value(answer)?)),
        Err(Failure::Refused(error)) => bail!("{error}; {}", error.advice),
        Err(Failure::Broken(error)) => Err(error),
    }
}
