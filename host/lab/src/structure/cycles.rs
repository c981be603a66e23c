// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! No two files of a crate import each other, directly or through others, and no two of its folders do.
//!
//! A file imports another one if a path in it names an item that the other file defines or re-exports. `mod`
//! declarations are not imports. So a file may add methods to the type of its parent. The check ignores unit tests.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Item, ItemMod, ItemUse, Lit, Macro, Meta, UseTree};
use toml::Table;

use super::{checkout, is_test};

/// The root file of the driver, and those of the crates in the host's workspace.
fn roots() -> Result<Vec<PathBuf>> {
    let mut roots = vec![checkout().join("virtio_balloon_rs.rs")];
    let workspace = checkout().join("host");
    let manifest: Table = fs::read_to_string(workspace.join("Cargo.toml"))?.parse()?;
    let members = manifest["workspace"]["members"].as_array();
    for member in members.context("a workspace has members")? {
        let member = member.as_str().context("a member is a path")?;
        let sources = workspace.join(member).join("src");
        let files = ["lib.rs", "main.rs"].map(|name| sources.join(name));
        let before = roots.len();
        roots.extend(files.into_iter().filter(|file| file.exists()));
        ensure!(roots.len() > before, "{member} has no root");
    }
    Ok(roots)
}

/// The path of a module in its crate.
type Module = Vec<String>;

/// The files of a crate, by module.
#[derive(Default)]
struct Sources {
    files: BTreeMap<Module, (PathBuf, syn::File)>,
    /// Inline modules are part of the file around them.
    inline: BTreeSet<Module>,
}

impl Sources {
    /// Reads the file at `path`, and those of its modules.
    fn read(&mut self, module: &Module, path: &Path, is_root: bool) -> Result<()> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let file = syn::parse_file(&text).with_context(|| path.display().to_string())?;
        let folder = path.parent().context("a file is in a folder")?;
        let inner = match is_root || path.ends_with("mod.rs") {
            true => folder.to_owned(),
            false => path.with_extension(""),
        };

        let items = file.items.clone();
        self.files.insert(module.clone(), (path.to_owned(), file));
        for item in items {
            match item {
                Item::Mod(item) if !is_test(&item.attrs) => {
                    self.read_module(module, folder, &inner, &item)?;
                }
                _ => (),
            }
        }
        Ok(())
    }

    fn read_module(
        &mut self,
        parent: &Module,
        folder: &Path,
        inner: &Path,
        item: &ItemMod,
    ) -> Result<()> {
        let name = item.ident.to_string();
        let module = [&parent[..], std::slice::from_ref(&name)].concat();
        if item.content.is_some() {
            self.inline.insert(module);
            return Ok(());
        }
        let named = item.attrs.iter().find_map(|attr| match &attr.meta {
            Meta::NameValue(meta) if meta.path.is_ident("path") => match &meta.value {
                syn::Expr::Lit(value) => match &value.lit {
                    Lit::Str(path) => Some(folder.join(path.value())),
                    _ => None,
                },
                _ => None,
            },
            _ => None,
        });
        let path = named.unwrap_or_else(|| {
            let file = inner.join(format!("{name}.rs"));
            match file.exists() {
                true => file,
                false => inner.join(&name).join("mod.rs"),
            }
        });
        self.read(&module, &path, false)
    }

    /// The files that each file imports.
    fn imports(&self) -> BTreeMap<&Path, BTreeSet<&Path>> {
        self.files
            .iter()
            .map(|(module, (path, file))| {
                let mut paths = Paths {
                    module: module.clone(),
                    found: Vec::new(),
                };
                paths.visit_file(file);
                let imported = paths
                    .found
                    .iter()
                    .filter_map(|(from, path)| self.file_of(from, path))
                    .filter(|imported| imported != path)
                    .collect();
                (path.as_path(), imported)
            })
            .collect()
    }

    /// The file of a path in the module `from`, if it belongs to this crate.
    fn file_of(&self, from: &Module, path: &[String]) -> Option<&Path> {
        let mut module = from.clone();
        let mut rest = path;
        match rest.first()?.as_str() {
            "crate" => {
                module.clear();
                rest = &rest[1..];
            }
            "self" => rest = &rest[1..],
            "super" => {
                while let Some("super") = rest.first().map(String::as_str) {
                    module.pop();
                    rest = &rest[1..];
                }
            }
            child => {
                let child = [&module[..], &[child.to_owned()]].concat();
                self.files.get(&child)?;
            }
        }
        for name in rest {
            let inner = [&module[..], std::slice::from_ref(name)].concat();
            if !self.files.contains_key(&inner) && !self.inline.contains(&inner) {
                break;
            }
            module = inner;
        }
        while self.inline.contains(&module) {
            module.pop();
        }
        self.files.get(&module).map(|(path, _)| path.as_path())
    }
}

/// Collects the paths in a file that may name items of other files, each with its module.
struct Paths {
    module: Module,
    found: Vec<(Module, Vec<String>)>,
}

impl Paths {
    fn add_tree(&mut self, prefix: &[String], tree: &UseTree) {
        let with = |name: &syn::Ident| [prefix, &[name.to_string()]].concat();
        match tree {
            UseTree::Path(path) => self.add_tree(&with(&path.ident), &path.tree),
            UseTree::Name(name) => self.found.push((self.module.clone(), with(&name.ident))),
            UseTree::Rename(name) => self.found.push((self.module.clone(), with(&name.ident))),
            UseTree::Glob(_) => self.found.push((self.module.clone(), prefix.to_vec())),
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.add_tree(prefix, tree);
                }
            }
        }
    }

    /// Paths in the tokens of a macro, which need not be Rust.
    fn add_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(name) if path.is_empty() || colons == 2 => {
                    path.push(name.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' && !path.is_empty() => {
                    colons += 1;
                }
                other => {
                    self.end_path(&mut path);
                    colons = 0;
                    match other {
                        TokenTree::Group(group) => self.add_tokens(group.stream()),
                        TokenTree::Ident(name) => path.push(name.to_string()),
                        TokenTree::Punct(_) | TokenTree::Literal(_) => (),
                    }
                }
            }
        }
        self.end_path(&mut path);
    }

    fn end_path(&mut self, path: &mut Vec<String>) {
        let path = std::mem::take(path);
        if path.len() > 1 {
            self.found.push((self.module.clone(), path));
        }
    }
}

impl<'a> Visit<'a> for Paths {
    fn visit_item_use(&mut self, item: &'a ItemUse) {
        self.add_tree(&[], &item.tree);
    }

    fn visit_item_mod(&mut self, item: &'a ItemMod) {
        if is_test(&item.attrs) {
            return;
        }
        self.module.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.module.pop();
    }

    /// Where something may be used is no import.
    fn visit_visibility(&mut self, _: &'a syn::Visibility) {}

    fn visit_path(&mut self, path: &'a syn::Path) {
        if path.segments.len() > 1 {
            let names = path
                .segments
                .iter()
                .map(|segment| segment.ident.to_string());
            self.found.push((self.module.clone(), names.collect()));
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, this: &'a Macro) {
        self.add_tokens(this.tokens.clone());
        visit::visit_macro(self, this);
    }
}

/// The imports between the modules of each folder. A folder, with the file next to it that has its name, is one
/// module for the folder that it is in.
fn between_modules(
    imports: &BTreeMap<&Path, BTreeSet<&Path>>,
) -> Vec<BTreeMap<PathBuf, BTreeSet<PathBuf>>> {
    let mut folders: BTreeMap<&Path, BTreeMap<PathBuf, BTreeSet<PathBuf>>> = BTreeMap::new();
    for (&from, to) in imports {
        for &to in to {
            let both = |folder: &&Path| to.starts_with(folder);
            let Some(folder) = from.ancestors().skip(1).find(both) else {
                continue;
            };
            let modules = [from, to].map(|file| {
                let inside = file.strip_prefix(folder).unwrap_or(file).components();
                folder
                    .join(inside.take(1).collect::<PathBuf>())
                    .with_extension("")
            });
            let [from, to] = modules;
            let imports = folders.entry(folder).or_default();
            imports.entry(to.clone()).or_default();
            if from != to {
                imports.entry(from).or_default().insert(to);
            }
        }
    }
    folders.into_values().collect()
}

/// Returns the files, or modules, of a cycle, in its order, if there is one.
fn cycle<T: AsRef<Path> + Ord>(imports: &BTreeMap<T, BTreeSet<T>>) -> Option<Vec<&Path>> {
    fn follow<'a, T: AsRef<Path> + Ord>(
        file: &'a T,
        imports: &'a BTreeMap<T, BTreeSet<T>>,
        way: &mut Vec<&'a T>,
        done: &mut BTreeSet<&'a T>,
    ) -> Option<Vec<&'a Path>> {
        if let Some(start) = way.iter().position(|&this| this == file) {
            return Some(way[start..].iter().map(|&this| this.as_ref()).collect());
        }
        if done.contains(file) {
            return None;
        }
        way.push(file);
        let found = imports
            .get(file)?
            .iter()
            .find_map(|next| follow(next, imports, way, done));
        way.pop();
        done.insert(file);
        found
    }
    let mut done = BTreeSet::new();
    imports
        .keys()
        .find_map(|file| follow(file, imports, &mut Vec::new(), &mut done))
}

/// The cycle of the crate whose root is at `path`, as text.
fn check(path: &Path) -> Result<Option<String>> {
    let mut sources = Sources::default();
    sources.read(&Module::new(), path, true)?;
    let folder = path.parent().context("a file is in a folder")?;
    let imports = sources.imports();
    let modules = between_modules(&imports);
    let found = cycle(&imports).or_else(|| modules.iter().find_map(cycle));
    Ok(found.map(|files| {
        let names = files.iter().map(|file| {
            let name = file.strip_prefix(folder).unwrap_or(file);
            name.display().to_string()
        });
        names.collect::<Vec<_>>().join(" imports ") + " imports the first"
    }))
}

#[test]
fn no_files_import_each_other() {
    for root in roots().unwrap() {
        assert_eq!(check(&root).unwrap(), None, "{}", root.display());
    }
}

#[test]
fn a_cycle_is_found() {
    let folder = std::env::temp_dir().join(format!("cycles-{}", std::process::id()));
    fs::create_dir_all(folder.join("b")).unwrap();
    let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
    write("root.rs", "mod a; mod b; mod c; use a::A;");
    write("a.rs", "use crate::b::{inner::Inner, B};");
    write("b/mod.rs", "pub mod inner; pub struct B;");
    write(
        "c.rs",
        "macro_rules! m { () => { $crate::a::A } } pub struct C;",
    );
    write("b/inner.rs", "pub struct Inner;");
    let check = || check(&folder.join("root.rs")).unwrap();
    assert_eq!(check(), None);

    // Methods of the parent's type, and unit tests.
    write(
        "a.rs",
        "use crate::b::B; #[cfg(test)] mod tests { use crate::c::C; }",
    );
    write("b/inner.rs", "use super::B; impl B { fn f() {} }");
    assert_eq!(check(), None);

    // A path in a function, and one in a macro.
    write("a.rs", "use crate::b::{inner::Inner, B};");
    write("b/inner.rs", "pub fn f() { crate::c::f() }");
    assert_eq!(
        check().as_deref(),
        Some("a.rs imports b/inner.rs imports c.rs imports the first")
    );
    // A module that re-exports, and one that uses that.
    write("c.rs", "");
    write("b/mod.rs", "pub mod inner; pub use inner::Inner;");
    write("b/inner.rs", "use super::B; pub struct Inner;");
    assert_eq!(
        check().as_deref(),
        Some("b/inner.rs imports b/mod.rs imports the first")
    );
    // Two folders, no files of which import each other.
    write("b/mod.rs", "pub mod inner;");
    write("b/inner.rs", "pub struct Inner; pub struct Other;");
    write("a.rs", "use crate::b::inner::Inner;");
    fs::create_dir_all(folder.join("c")).unwrap();
    write(
        "c.rs",
        "pub mod first; pub mod second; use crate::b::inner::Inner;",
    );
    write("c/first.rs", "use crate::b::inner::Other;");
    write("c/second.rs", "pub struct Second;");
    assert_eq!(check(), None);
    write("b/mod.rs", "pub mod inner; pub mod outer;");
    write("b/outer.rs", "use crate::c::second::Second;");
    assert_eq!(check().as_deref(), Some("b imports c imports the first"));
    fs::remove_dir_all(folder).unwrap();
}
