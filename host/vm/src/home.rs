// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The QEMU of a guest, and the connections to it.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::agent::Agent;
use crate::config::Config;
use crate::control::{Control, QemuDevice};
use crate::daemon::Daemon;
use crate::qemu::Qemu;
use crate::qmp::Qmp;
use crate::size::Size;

/// The QEMU of a guest, and the connections to it. A guest that migrates gets another one.
#[derive(Debug)]
pub(crate) struct Home {
    pub(crate) qemu: Qemu,
    /// The file that holds the guest's memory, if it has a name.
    pub(crate) memory_file: Option<PathBuf>,
    pub(crate) qmp: Arc<Qmp>,
    pub(crate) agent: Agent,
    pub(crate) daemon: Option<Arc<Daemon>>,
}

impl Home {
    /// Starts a QEMU; `agent` makes the connection to the agent from its stream.
    pub(crate) fn start(
        config: &Config,
        agent: impl FnOnce(UnixStream) -> Result<Agent>,
    ) -> Result<Self> {
        let daemon = match &config.daemon {
            None if config.has_daemon() => Some(Arc::new(config.start_daemon()?)),
            daemon => daemon.clone(),
        };
        let socket = daemon.as_ref().map(|daemon| daemon.socket());
        let (qemu, streams) = Qemu::start(config, socket.as_deref())?;
        let qmp = Qmp::new(streams.qmp, qemu.id())
            .with_context(|| format!("QEMU does not start: {}", qemu.complaint()))?;
        Ok(Self {
            qemu,
            memory_file: config.memory_file.clone(),
            qmp: Arc::new(qmp),
            agent: agent(streams.agent)?,
            daemon,
        })
    }

    /// The balloon device of a VM with so much `memory`.
    pub(crate) fn control(&self, memory: Size) -> Arc<dyn Control> {
        match &self.daemon {
            Some(daemon) => Arc::clone(daemon) as Arc<dyn Control>,
            None => Arc::new(QemuDevice {
                qmp: Arc::clone(&self.qmp),
                memory,
            }),
        }
    }
}
