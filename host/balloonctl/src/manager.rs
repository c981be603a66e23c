// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! balloon-manager: its commands, and what it knows of the VMs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use balloon_control::{Client, ClientError};
use indicatif::HumanBytes;
use serde::{Deserialize, Serialize};

use crate::amount::PAGE;
use crate::failure::Failure;

/// Where it listens.
pub(crate) const SOCKET: &str = "/run/balloon-manager/control.sock";

/// The time between two questions.
const INTERVAL: Duration = Duration::from_secs(1);

/// Its numbers of a VM, in pages of 4 KiB.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Account {
    grant: u64,
    need: u64,
}

/// A VM that it manages.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Managed {
    name: String,
    account: Option<Account>,
    pub(crate) state: String,
    /// Why it has set the last target.
    pub(crate) cause: Option<String>,
}

impl Managed {
    /// What the VM may have.
    pub(crate) fn grant(&self) -> Option<HumanBytes> {
        self.account.map(|account| HumanBytes(account.grant * PAGE))
    }

    /// What the guest needs.
    pub(crate) fn demand(&self) -> Option<HumanBytes> {
        self.account.map(|account| HumanBytes(account.need * PAGE))
    }
}

/// VMs by their names.
pub(crate) type ByName = BTreeMap<String, Managed>;

/// Asks the manager with this socket for its VMs.
fn ask(socket: &Path) -> Result<ByName, ClientError> {
    #[derive(Serialize)]
    #[serde(tag = "command", rename_all = "kebab-case")]
    enum Request {
        Status {},
    }
    #[derive(Deserialize)]
    struct Status {
        vms: Vec<Managed>,
    }
    let status: Status = Client::connect(socket)?
        .call(&Request::Status {})?
        .parse()?;
    let by_name = |vm: Managed| (vm.name.clone(), vm);
    Ok(status.vms.into_iter().map(by_name).collect())
}

/// Follows the manager's VMs, as long as the receiver exists. There are none while it does not run, or if the user must not
/// ask it.
pub(crate) fn watch(socket: &Path, mut tell: impl FnMut(ByName) -> bool) {
    while tell(ask(socket).unwrap_or_default()) {
        thread::sleep(INTERVAL);
    }
}

/// A VM with this name that is short of memory.
#[cfg(test)]
pub(crate) fn example(name: &str) -> ByName {
    let account = Account {
        grant: (3 << 30) / PAGE,
        need: (2 << 30) / PAGE,
    };
    let vm = Managed {
        name: name.to_owned(),
        account: Some(account),
        state: "contended".to_owned(),
        cause: Some("others need the memory".to_owned()),
    };
    ByName::from([(name.to_owned(), vm)])
}

/// Becomes balloon-manager. Returns only if that fails.
pub(crate) fn run(arguments: &[OsString], json: bool) -> Failure {
    // The option belongs to the command. At the end it might be an argument.
    let (command, others) = arguments.split_at(arguments.len().min(1));
    let error = Command::new("balloon-manager")
        .args(command)
        .args(json.then_some("--json"))
        .args(others)
        .exec();
    Failure::NoManager(error)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn vms_have_what_the_manager_reports() {
        const ANSWER: &str = r#"{"ok":{"now":1,"vms":[
            {"name":"web","account":{"vm":0,"grant":262144,"need":256},"state":"ok","cause":null},
            {"name":"db","account":null,"state":"unknown","cause":"it does not use the memory"}]}}"#;
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let manager = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).unwrap();
            let answer = ANSWER.replace('\n', "") + "\n";
            stream.get_mut().write_all(answer.as_bytes()).unwrap();
            line
        });
        let vms = ask(&socket).unwrap();
        assert_eq!(manager.join().unwrap(), "{\"command\":\"status\"}\n");
        let text = |bytes: Option<HumanBytes>| bytes.map(|bytes| bytes.to_string());
        let [web, db] = ["web", "db"].map(|name| &vms[name]);
        assert_eq!(text(web.grant()).as_deref(), Some("1.00 GiB"));
        assert_eq!(text(web.demand()).as_deref(), Some("1.00 MiB"));
        assert_eq!((web.state.as_str(), &web.cause), ("ok", &None));
        assert_eq!(text(db.grant()), None);
        assert_eq!(db.cause.as_deref(), Some("it does not use the memory"));
        assert!(ask(&directory.path().join("none")).is_err());
    }
}
