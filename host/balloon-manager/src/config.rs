// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The configuration: a file and drop-ins, in systemd's order.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context, Result, bail};
use balloon_policy::{MIB, Pages, Profile, Settings};
use glob::Pattern;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

/// The bytes of a page.
pub(crate) const PAGE: u64 = 4096;

/// Where drop-ins are. A file hides those of the same name in later directories.
const DROP_INS: [&str; 3] = [
    "/etc/balloon-manager/config.d",
    "/run/balloon-manager/config.d",
    "/usr/lib/balloon-manager/config.d",
];

/// The shortest lease, which is renewed each second, and the longest that a daemon has, in seconds.
const LEASES: RangeInclusive<u32> = 3..=86_400;

/// What is set.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// For how long VMs keep memory that they do not use.
    pub(crate) profile: Profile,
    pub(crate) host: Host,
    /// The daemons' control sockets, as a pattern.
    pub(crate) sockets: String,
    /// The sockets of monitors of QEMU's that are for the manager alone, as a pattern.
    pub(crate) qmp: Option<String>,
    /// For how many seconds targets stay when the manager has ended.
    pub(crate) lease: u32,
    /// By patterns of names. Longer patterns override shorter ones.
    pub(crate) vm: BTreeMap<String, Vm>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            profile: Profile::default(),
            host: Host::default(),
            sockets: "/run/vhost-user-balloon/*/control.sock".to_owned(),
            qmp: None,
            lease: 60,
            vm: BTreeMap::new(),
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Host {
    /// The memory for all VMs. By default it is measured.
    pub(crate) pool: Option<Size>,
    /// The cgroup whose limit is the pool.
    pub(crate) cgroup: Option<PathBuf>,
    /// The part of the pool that stays free.
    pub(crate) reserve: Option<Size>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Vm {
    floor: Option<Size>,
    ceiling: Option<Size>,
    /// 0 leaves the VM alone.
    weight: Option<u16>,
}

/// A number of bytes, or a fraction.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum Size {
    Bytes(u64),
    Percent(u64),
}

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong =
            || format!("'{text}' is no size; write it as in \"2GiB\", \"512MiB\" or \"25%\"");
        match text.strip_suffix('%') {
            Some(percent) => match percent.trim().parse() {
                Ok(percent) if percent <= 100 => Ok(Self::Percent(percent)),
                _ => Err(wrong()),
            },
            None => balloon_control::parse_size(&text)
                .map(Self::Bytes)
                .map_err(|_| wrong()),
        }
    }
}

impl From<Size> for String {
    fn from(size: Size) -> Self {
        match size {
            Size::Bytes(bytes) => {
                let units = [(30, "GiB"), (20, "MiB"), (10, "KiB"), (0, "B")];
                let (shift, unit) = units
                    .into_iter()
                    .find(|(shift, _)| bytes >> shift << shift == bytes)
                    .unwrap_or_default();
                format!("{}{unit}", bytes >> shift)
            }
            Size::Percent(percent) => format!("{percent}%"),
        }
    }
}

impl Size {
    /// In pages, of a whole of so many.
    pub(crate) fn of(self, whole: Pages) -> Pages {
        match self {
            Self::Bytes(bytes) => bytes / PAGE,
            Self::Percent(percent) => whole / 100 * percent + whole % 100 * percent / 100,
        }
    }
}

impl Config {
    /// Reads the file and the drop-ins. A file that was not asked for by name may be missing.
    pub(crate) fn load(path: Option<&Path>) -> Result<Self> {
        match path {
            Some(path) => Self::merge(&[path.to_owned()]),
            None => {
                let main = PathBuf::from("/etc/balloon-manager/config.toml");
                let main = Some(main).filter(|main| main.exists());
                let drop_ins = drop_ins(&DROP_INS.map(PathBuf::from))?;
                Self::merge(&main.into_iter().chain(drop_ins).collect::<Vec<_>>())
            }
        }
    }

    /// Reads files. Later ones override the settings of earlier ones.
    fn merge(paths: &[PathBuf]) -> Result<Self> {
        let mut all = Table::new();
        for path in paths {
            let text = fs::read_to_string(path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            // By itself, so that an error names the file and the line.
            toml::from_str::<Self>(&text)
                .with_context(|| format!("{} is not valid", path.display()))?;
            overlay(&mut all, toml::from_str(&text)?);
        }
        let config: Self = all.try_into()?;
        for pattern in config.vm.keys().chain([&config.sockets]).chain(&config.qmp) {
            if let Err(error) = Pattern::new(pattern) {
                bail!("'{pattern}' is no pattern: {error}");
            }
        }
        if config.host.pool.is_some() && config.host.cgroup.is_some() {
            bail!("host.pool and host.cgroup both set the pool: remove one of them");
        }
        if !LEASES.contains(&config.lease) {
            bail!(
                "lease is a time from {} to {} seconds",
                LEASES.start(),
                LEASES.end()
            );
        }
        if let Some(Size::Percent(_)) = config.host.pool {
            bail!("host.pool is a part of nothing: set a size such as \"24GiB\"");
        }
        Ok(config)
    }

    /// The settings of a VM, or nothing if the manager must leave it alone. The guest must keep
    /// `least`.
    pub(crate) fn settings(&self, name: &str, memory: Pages, least: Pages) -> Option<Settings> {
        let mut patterns: Vec<_> = self
            .vm
            .iter()
            .filter(|(pattern, _)| Pattern::new(pattern).is_ok_and(|pattern| pattern.matches(name)))
            .collect();
        patterns.sort_by_key(|(pattern, _)| pattern.len());
        let (mut floor, mut ceiling, mut weight) = (None, None, 1_000);
        for (_, vm) in patterns {
            floor = vm.floor.or(floor);
            ceiling = vm.ceiling.or(ceiling);
            weight = vm.weight.unwrap_or(weight);
        }
        let ceiling = ceiling
            .map_or(memory, |ceiling| ceiling.of(memory))
            .max(least)
            .min(memory);
        let default = (memory / 8).max(512 * MIB);
        let floor = floor.map_or(default, |floor| floor.of(memory));
        (weight > 0).then_some(Settings {
            floor: floor.max(least).min(ceiling),
            ceiling,
            weight,
        })
    }

    /// For how long targets stay when the manager has ended.
    pub(crate) fn lease(&self) -> Duration {
        Duration::from_secs(self.lease.into())
    }

    /// As a file.
    pub(crate) fn to_toml(&self) -> Result<String> {
        Ok(toml::to_string(self)?)
    }

    /// The settings, one line each.
    fn lines(&self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        flatten("", &Table::try_from(self)?, &mut lines);
        Ok(lines)
    }

    /// The differences from an earlier configuration, one line each.
    pub(crate) fn differences(&self, old: &Self) -> Result<Vec<String>> {
        let (old, new) = (old.lines()?, self.lines()?);
        let gone = old.iter().filter(|line| !new.contains(line));
        let come = new.iter().filter(|line| !old.contains(line));
        Ok(gone
            .map(|line| format!("- {line}"))
            .chain(come.map(|line| format!("+ {line}")))
            .collect())
    }
}

/// Adds the values of a table, each with all of its keys.
fn flatten(path: &str, table: &Table, lines: &mut Vec<String>) {
    for (key, value) in table {
        match value {
            Value::Table(table) => flatten(&format!("{path}{key}."), table, lines),
            value => lines.push(format!("{path}{key} = {value}")),
        }
    }
}

/// The drop-ins, in the order of their names. Of several with a name the one in the first directory counts, and an
/// empty one, or a link to /dev/null, hides the others.
fn drop_ins(directories: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut found: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for directory in directories {
        let entries = match fs::read_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.with_context(|| format!("cannot read {}", directory.display()))?,
        };
        for entry in entries {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "toml")
            {
                let name = path.file_name().unwrap_or_default().to_owned();
                found.entry(name).or_insert(path);
            }
        }
    }
    Ok(found.into_values().collect())
}

/// Puts `new` over `old`, key by key.
fn overlay(old: &mut Table, new: Table) {
    for (key, value) in new {
        match (old.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => overlay(old, new),
            (_, value) => {
                old.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use balloon_policy::GIB;

    use super::*;

    fn load(text: &str) -> Result<Config> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("config.toml");
        fs::write(&path, text)?;
        Config::load(Some(&path))
    }

    /// Without that setting systemd removes the directory when it stops the service.
    #[test]
    fn drop_ins_in_run_outlive_the_service() {
        let unit = include_str!("../systemd/balloon-manager.service");
        assert!(DROP_INS.contains(&"/run/balloon-manager/config.d"));
        for line in [
            "RuntimeDirectory=balloon-manager",
            "RuntimeDirectoryPreserve=yes",
        ] {
            assert!(unit.lines().any(|one| one == line), "{line}");
        }
    }

    #[test]
    fn an_empty_file_is_a_configuration() {
        assert_eq!(load("").unwrap(), Config::default());
        let settings = Config::default().settings("vm", 8 * GIB, 0).unwrap();
        assert_eq!((settings.floor, settings.ceiling), (GIB, 8 * GIB));
    }

    #[test]
    fn longer_patterns_override_shorter_ones() {
        let config = load(
            "[vm.'*']\nfloor = '25%'\nweight = 10\n[vm.'db*']\nfloor = '6GiB'\n[vm.'db-old']\nweight = 0",
        )
        .unwrap();
        let settings = |name| config.settings(name, 8 * GIB, 0);
        assert_eq!(settings("web").unwrap().floor, 2 * GIB);
        let db = settings("db1").unwrap();
        assert_eq!((db.floor, db.weight), (6 * GIB, 10));
        assert_eq!(settings("db-old"), None);
        assert_eq!(
            config.settings("web", 8 * GIB, 3 * GIB).unwrap().floor,
            3 * GIB
        );
    }

    /// The device refuses a target that leaves the guest less.
    #[test]
    fn a_ceiling_is_never_below_what_the_guest_must_keep() {
        let config = load("[vm.web]\nceiling = '1GiB'").unwrap();
        let bounds = |least| {
            let settings = config.settings("web", 8 * GIB, least).unwrap();
            (settings.floor, settings.ceiling)
        };
        assert_eq!(bounds(0), (GIB, GIB));
        assert_eq!(bounds(2 * GIB), (2 * GIB, 2 * GIB));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("polcy = 1", "unknown field `polcy`"),
            ("[host]\nresrve = '1GiB'", "unknown field `resrve`"),
            ("[vm.a]\nfloor = '12 apples'", "'12 apples' is no size"),
            ("[vm.a]\nfloor = '101%'", "'101%' is no size"),
            ("profile = 'fast'", "unknown variant `fast`"),
            ("sockets = '['", "'[' is no pattern"),
            ("[host]\npool = '5%'", "a part of nothing"),
            ("lease = 2", "lease is a time from 3 to 86400 seconds"),
            ("[host]\npool = '5GiB'\ncgroup = '/a'", "both set the pool"),
        ] {
            let error = format!("{:#}", load(text).unwrap_err());
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn drop_ins_follow_each_other_by_name_and_hide_each_other() {
        let directory = tempfile::tempdir().unwrap();
        let [etc, usr] = ["etc", "usr"].map(|name| directory.path().join(name));
        for (place, name, text) in [
            (&usr, "10-a.toml", "profile = 'density'\n[vm.a]\nweight = 1"),
            (&usr, "30-c.toml", "profile = 'performance'"),
            (&etc, "20-b.toml", "[vm.a]\nfloor = '1GiB'"),
            (&etc, "note.txt", "not read"),
        ] {
            fs::create_dir_all(place).unwrap();
            fs::write(place.join(name), text).unwrap();
        }
        symlink("/dev/null", etc.join("30-c.toml")).unwrap();
        let missing = directory.path().join("run");
        let files = drop_ins(&[etc, missing, usr]).unwrap();
        let config = Config::merge(&files).unwrap();
        assert_eq!(config.profile, Profile::Density);
        let vm = &config.vm["a"];
        assert_eq!((vm.weight, vm.floor), (Some(1), Some(Size::Bytes(1 << 30))));
    }

    #[test]
    fn a_reload_shows_the_differences() {
        let old = load("[vm.a]\nweight = 1").unwrap();
        let new = load("profile = 'density'\n[vm.a]\nweight = 1\nfloor = '1GiB'").unwrap();
        assert_eq!(
            new.differences(&old).unwrap(),
            [
                "- profile = \"balanced\"",
                "+ profile = \"density\"",
                "+ vm.a.floor = \"1GiB\"",
            ]
        );
    }

    #[test]
    fn a_configuration_is_printed_as_a_file() {
        for text in [
            "",
            "qmp = '/a'\n[host]\npool = '24GiB'\nreserve = '5%'",
            "[host]\npool = '1025KiB'\n[vm.'*']\nfloor = '1535MiB'\n[vm.'db*']\nweight = 0\nceiling = '17B'",
        ] {
            let config = load(text).unwrap();
            assert_eq!(load(&config.to_toml().unwrap()).unwrap(), config, "{text}");
        }
    }
}
