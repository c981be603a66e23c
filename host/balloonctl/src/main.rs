// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! balloonctl: the client of vhost-user-balloon's control socket.

use std::process::ExitCode;

use clap::Parser;

mod amount;
mod cli;
mod columns;
mod commands;
mod failure;
mod info;
mod man;
mod manager;
mod output;
mod request;
mod stats;
mod top;
mod unused;
mod wait;

use cli::Cli;

fn main() -> ExitCode {
    match commands::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
