// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Documents say what the daemon has: the number of queues, the size of the configuration space, the encodings of pages.
//! So do the guests of the tests.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use balloon_wire::page_set::Encoding;
use clap::{CommandFactory, ValueEnum};
use vhost_user_balloon::counters::Counters;
use vhost_user_balloon::device::state::State;
use vhost_user_balloon::options::Options;
use vhost_user_balloon::virtio::features::{Feature, config_size, offer};
use vhost_user_balloon::virtio::kind::Kind;

/// The requirements of QEMU's device: the number of queues, and the size of the configuration
/// space.
type Needs = (usize, usize);

/// Its requirements with all features, and with or without `--extensions`.
fn needs(extensions: bool) -> Needs {
    let features = offer(Feature::value_variants(), extensions);
    (Kind::present(features).count(), config_size(features))
}

/// The number that follows a property, as in `num_vqs=6` and `"num_vqs": 6`.
fn number(line: &str, property: &str) -> Option<usize> {
    let (_, value) = line.split_once(property)?;
    let value = value.trim_start_matches(['"', ':', '=', ' ']);
    let end = value.find(|c: char| !c.is_ascii_digit());
    value[..end.unwrap_or(value.len())].parse().ok()
}

/// The requirements of QEMU's device in each line of a text.
fn said(text: &str) -> impl Iterator<Item = (&str, Option<Needs>)> {
    text.lines().filter_map(|line| {
        let queues = number(line, "num_vqs")?;
        Some((line, number(line, "config_size").map(|size| (queues, size))))
    })
}

fn documents(directory: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut documents = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "md") {
            documents.push(path);
        }
    }
    Ok(documents)
}

#[test]
fn documents_name_the_queues_that_there_are() -> Result<(), Box<dyn Error>> {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut texts = vec![(
        "--help".to_owned(),
        Options::command().render_long_help().to_string(),
    )];
    let guests = checkout.join("host/vm/src/device.rs");
    for path in [
        documents(&checkout)?,
        documents(&checkout.join("docs"))?,
        vec![guests],
    ]
    .concat()
    {
        texts.push((path.display().to_string(), fs::read_to_string(&path)?));
    }
    let mut lines = 0;
    for (name, text) in &texts {
        for (line, needs_said) in said(text) {
            assert!(
                [needs(false), needs(true)].map(Some).contains(&needs_said),
                "{name} says '{line}', and it is {:?} or, with --extensions, {:?}",
                needs(false),
                needs(true)
            );
            lines += 1;
        }
    }
    assert!(lines > 5, "only {lines} lines have num_vqs=");
    Ok(())
}

#[test]
fn both_devices_are_explained() -> Result<(), Box<dyn Error>> {
    let [(queues, size), (all_queues, whole_size)] = [needs(false), needs(true)];
    let help = Options::command().render_long_help().to_string();
    let expected = format!(
        "needs num_vqs={all_queues} and config_size={whole_size}; otherwise {queues} and {size} are enough"
    );
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words(&help).contains(&expected), "{help}");
    let howto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/howto-qemu.md");
    let howto = words(&fs::read_to_string(howto)?);
    for expected in [
        format!("`num_vqs={all_queues}`, `config_size={whole_size}` |"),
        format!(
            "`num_vqs={queues}` and `config_size={size}` only; {all_queues} and {whole_size} do no harm"
        ),
        format!("has {queues} queues, and a balloon ... has {all_queues}"),
    ] {
        assert!(
            howto.contains(&expected),
            "docs/howto-qemu.md lacks '{expected}'"
        );
    }
    Ok(())
}

/// The row of a table that begins with this cell.
fn row<'a>(document: &'a str, cell: &str) -> &'a str {
    let mut lines = document.lines();
    lines
        .find(|line| line.starts_with(&format!("| `{cell}` |")))
        .unwrap_or_default()
}

#[test]
fn every_field_of_the_state_file_is_documented() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("state");
    State::new(5).save(&path)?;
    let fields: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&fs::read(&path)?)?;
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let document = fs::read_to_string(docs.join("vhost-user-balloon.md"))?;
    for field in fields.keys() {
        assert_ne!(row(&document, field), "", "{field}");
    }
    Ok(())
}

#[test]
fn every_encoding_is_documented() -> Result<(), Box<dyn Error>> {
    let document = |name: &str| {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
        fs::read_to_string(docs.join(name))
    };
    let (control, metrics) = (document("control.md")?, document("metrics.md")?);
    let encodings = Counters::default().snapshot().encodings;
    assert_eq!(encodings.len(), Encoding::ALL.len() + 1);
    for name in encodings.keys().map(|name| format!("`{name}`")) {
        assert!(row(&control, "encodings").contains(&name), "{name}");
        assert!(row(&metrics, "encoding").contains(&name), "{name}");
    }
    let protocol = document("protocol.md")?;
    let driver = document("reference-driver.md")?;
    // The module's parameter, as modinfo shows it.
    let module = document("../virtio_balloon_rs.rs")?;
    let module = module.lines().find(|line| line.contains("Encoding of"));
    for encoding in Encoding::ALL {
        let value = format!("{} {}", encoding.number(), encoding.name());
        assert!(row(&driver, "encoding").contains(&value), "{value}");
        assert!(module.is_some_and(|line| line.contains(&value)), "{value}");
        let name = format!("{encoding:?}").to_uppercase();
        let value = format!("_{name}` ({})", encoding.number());
        assert!(row(&protocol, "encoding").contains(&value), "{value}");
    }
    Ok(())
}
