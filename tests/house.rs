//! The house rules that no compiler checks: layers, unsafe code, the length of files, dependencies.
//!
//! It reads src/ as tokens, without comments, literals and what is only compiled for tests.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The modules from top to bottom: each imports only from layers below its own.
const LAYERS: &[&[&str]] = &[
    &["lib"],
    &["endpoint"],
    &["session"],
    &["template"],
    &["pool", "image"],
    &["agent"],
    &["microvm", "host"],
    &["snapshot"],
    &["boot", "machine"],
    &["event_loop", "vsock"],
    &["kvm", "devices", "virtio"],
    &["arch", "bus", "tap"],
    &["disk"],
    &["memory"],
    &["config"],
    &["kernel", "initramfs", "cmdline", "console"],
    &["modules"],
    &["deb"],
    &["timings", "compression"],
    &["error"],
    &[
        "phase",
        "exit",
        "metrics",
        "input_file",
        "file_lock",
        "seccomp",
        "protocol",
        "random",
        "bounded",
    ],
];

/// Who may import whom within a layer: (importer, imported). Each is a step towards one module.
const NEIGHBOURS: &[(&str, &str)] = &[];

/// The modules that wrap what is unsafe; all others are safe code.
const UNSAFE: &[&str] = &["kvm", "memory", "tap"];

/// The agent in the guest: a program of its own, which the compiler keeps apart from the layers, since
/// it is built without the library.
const AGENT: &str = "src/bin/guest-agent";

/// Where the agent wraps what is unsafe.
const AGENT_UNSAFE: &str = "src/bin/guest-agent/sys";

/// The largest agent: every guest has it in its memory.
#[cfg(feature = "agent")]
const MAX_AGENT_BYTES: u64 = 1_572_864;

const MAX_LINES: usize = 500;

#[test]
fn every_module_has_a_layer() {
    let sources = sources();
    let modules = sources.iter().filter(|source| !source.path.starts_with(AGENT));
    let modules = modules.filter(|source| layer_of(&source.module()).is_none());
    let faults = modules.map(|source| {
        format!("{source}: `{}` has no layer; add it to LAYERS in {}", source.module(), file!())
    });
    report(faults);
}

#[test]
fn modules_import_only_from_layers_below_their_own() {
    let mut faults = Vec::new();
    for source in sources() {
        for (line, name) in source.imports() {
            if let Some(fault) = import_fault(&source.module(), &name) {
                faults.push(format!("{source}:{line}: {fault}"));
            }
        }
    }
    report(faults);
}

#[test]
fn files_of_a_folder_import_one_another_one_way() {
    let sources = sources();
    let folders: BTreeSet<_> = sources.iter().filter_map(Source::folder).collect();
    let mut faults = Vec::new();
    for folder in folders {
        let mut imports = BTreeMap::<String, BTreeSet<String>>::new();
        for source in &sources {
            if let Some(name) = source.name_in(&folder) {
                let others = source.imports_of(&folder).into_iter().map(|(_, other)| other);
                imports.entry(name.clone()).or_default().extend(others.filter(|o| *o != name));
            }
        }
        // Who imports nobody that is left is part of no circle.
        loop {
            let names: BTreeSet<_> = imports.keys().cloned().collect();
            imports.retain(|_, others| !others.is_disjoint(&names));
            if imports.len() == names.len() {
                break;
            }
        }
        if !imports.is_empty() {
            let names: Vec<_> = imports.into_keys().collect();
            faults.push(format!("src/{}: a circle of {}", folder.join("/"), names.join(", ")));
        }
    }
    report(faults);
}

#[test]
fn unsafe_code_is_in_its_modules_only() {
    let mut faults = Vec::new();
    let is_safe = |source: &&Source| {
        !UNSAFE.contains(&source.module().as_str()) && !source.path.starts_with(AGENT_UNSAFE)
    };
    for source in sources().iter().filter(is_safe) {
        for token in tokens(&source.text).iter().filter(|token| token.text == "unsafe") {
            faults.push(format!("{source}:{}: unsafe code", token.line));
        }
    }
    report(faults);
}

#[test]
fn no_source_file_is_longer_than_500_lines() {
    let sources = sources();
    let lengths = sources.iter().map(|source| (source, source.text.lines().count()));
    let long = lengths.filter(|(_, lines)| *lines > MAX_LINES);
    report(long.map(|(source, lines)| format!("{source}: {lines} lines; split it by noun")));
}

#[test]
#[cfg(feature = "agent")]
fn the_agent_is_small() {
    let agent = Path::new(env!("OUT_DIR")).join("guest-agent");
    let bytes = fs::metadata(&agent).expect("an agent").len();
    assert!(bytes <= MAX_AGENT_BYTES, "{bytes} bytes, of {MAX_AGENT_BYTES} at most");
}

#[test]
fn vm_memory_and_vmm_sys_util_are_there_once() {
    let packages = packages();
    for name in ["vm-memory", "vmm-sys-util"] {
        let named = packages.iter().filter(|package| package["name"] == name);
        let versions: Vec<_> = named.map(|package| text(package, "version")).collect();
        assert_eq!(versions.len(), 1, "{name} {versions:?}: see `cargo tree -i {name}`");
    }
}

#[test]
fn every_dependency_has_a_licence_that_deny_toml_allows() {
    let allowed = allowed_licences();
    let faults = packages().into_iter().filter_map(|package| {
        let licence = package["license"].as_str().unwrap_or("none");
        let name = text(&package, "name");
        (!satisfies(licence, &allowed)).then(|| format!("{name}: licence {licence}"))
    });
    report(faults);
}

#[test]
fn every_fuzz_target_is_run_by_the_scheduled_job() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let workflow = fs::read_to_string(root.join(".github/workflows/ci.yml")).unwrap();
    let matrix = workflow.lines().skip_while(|line| line.trim() != "target:").skip(1);
    let scheduled: Vec<_> = matrix.map_while(|line| line.trim().strip_prefix("- ")).collect();
    let targets = fs::read_dir(root.join("fuzz/fuzz_targets"))
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned());
    let missing = targets.filter(|target| !scheduled.contains(&target.as_str()));
    report(missing.map(|target| format!("{target} is not in the matrix of {scheduled:?}")));
}

#[test]
fn imports_are_found_however_they_are_written() {
    let text = r##"
        use crate::{bus::{Bus, BusError}, exit};
        use super::super::memory::GuestRam;
        use super::vcpu; // crate::comment
        fn f(c: char) -> crate::error::Error { g::<'\''>("crate::string", r#"" crate::raw"#, 'c') }
        #[cfg(test)]
        mod tests { use crate::machine::Machine; }
        /* crate::block */ pub(crate) use crate::*;
    "##;
    let source = Source { path: "src/kvm/vm.rs".into(), text: text.to_owned() };
    let imports = source.imports();
    let imports: Vec<_> = imports.iter().map(|(line, name)| (*line, name.as_str())).collect();
    assert_eq!(imports, [(2, "bus"), (2, "exit"), (3, "memory"), (5, "error"), (8, "*")]);
    let in_folder = source.imports_of(&["kvm".to_owned()]);
    assert!(in_folder.contains(&(4, "vcpu".to_owned())), "{in_folder:?}");
}

#[test]
fn licence_expressions_are_read_as_spdx_says() {
    let allowed = ["MIT", "Zlib", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned);
    for good in ["MIT", "GPL-2.0/MIT", "(MIT OR X) AND Zlib", "Apache-2.0 WITH LLVM-exception"] {
        assert!(satisfies(good, &allowed), "{good}");
    }
    for bad in ["", "MIT AND X", "X OR Zlib AND X", "Apache-2.0", "MIT WITH X", "(MIT", "MIT X"] {
        assert!(!satisfies(bad, &allowed), "{bad}");
    }
}

#[track_caller]
fn report(faults: impl IntoIterator<Item = String>) {
    let faults: Vec<_> = faults.into_iter().collect();
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

/// The module's layer, 0 at the top.
fn layer_of(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// What is wrong with it that `importer` imports `imported`.
fn import_fault(importer: &str, imported: &str) -> Option<String> {
    let own = layer_of(importer)?;
    if importer == imported || NEIGHBOURS.contains(&(importer, imported)) {
        return None;
    }
    match layer_of(imported) {
        None => {
            Some(format!("`{imported}` is no module with a layer; import from the one that has it"))
        }
        Some(layer) if layer < own => {
            Some(format!("`{importer}` imports `{imported}` from above it"))
        }
        Some(layer) if layer == own => {
            Some(format!("`{importer}` imports its neighbour `{imported}`"))
        }
        Some(_) => None,
    }
}

/// A file under src/, its path from the crate's folder.
struct Source {
    path: PathBuf,
    text: String,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

impl Source {
    /// The names below src/ that lead to the module: `["kvm", "vcpu"]`.
    fn names(&self) -> Vec<String> {
        let below = self.path.strip_prefix("src").expect("a file in src").with_extension("");
        let names = below.iter().map(|name| name.to_string_lossy().into_owned());
        names.filter(|name| name != "mod").collect()
    }

    /// The module in the crate's root that the file belongs to.
    fn module(&self) -> String {
        self.names().swap_remove(0)
    }

    /// The folder that the file is in, by names, where that is not src/ itself.
    fn folder(&self) -> Option<Vec<String>> {
        let below = self.path.strip_prefix("src").expect("a file in src").parent()?;
        let names: Vec<_> = below.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        (!names.is_empty()).then_some(names)
    }

    /// The file's name in a folder, or that of the folder in there that it is in.
    fn name_in(&self, folder: &[String]) -> Option<String> {
        self.names().strip_prefix(folder)?.first().cloned()
    }

    /// The names in the crate's root that a path leads to, by `crate::` or by `super::`, with their lines.
    fn imports(&self) -> Vec<(usize, String)> {
        self.imports_of(&[])
    }

    /// The names in a folder above the file that a path leads to, with their lines.
    fn imports_of(&self, folder: &[String]) -> Vec<(usize, String)> {
        let names = self.names();
        if names.iter().any(|name| name == "tests") {
            return Vec::new();
        }
        let tokens = without_tests(tokens(&self.text));
        let in_agent = if self.path.starts_with(AGENT) { 2 } else { 0 };
        let below = folder.iter().skip(in_agent).map(String::as_str);
        let down: Vec<_> =
            ["crate"].into_iter().chain(below).flat_map(|name| [name, ":", ":"]).collect();
        let up = ["super", ":", ":"].repeat(names.len() - folder.len());
        let mut imports = Vec::new();
        for at in 0..tokens.len() {
            let rest = &tokens[at..];
            if let Some(path) = after(rest, &down) {
                imports.extend(first_names(path));
            } else if (at == 0 || tokens[at - 1].text != ":")
                && let Some(path) = after(rest, &up)
            {
                // In a module inside a file this leads only to the file's own names.
                let names = first_names(path).into_iter();
                imports.extend(
                    names.filter(|(_, name)| !folder.is_empty() || layer_of(name).is_some()),
                );
            }
        }
        imports
    }
}

/// What follows `words`, where `tokens` begin with them.
fn after<'a, 't>(tokens: &'a [Token<'t>], words: &[&str]) -> Option<&'a [Token<'t>]> {
    let begins = tokens.len() >= words.len() && tokens.iter().zip(words).all(|(t, w)| t.text == *w);
    begins.then(|| &tokens[words.len()..])
}

/// The first names of a path's rest: `a` of `a::b`, `a` and `c` of `{a::{b, d}, c}`.
fn first_names(path: &[Token]) -> Vec<(usize, String)> {
    let mut names = Vec::new();
    let (mut depth, mut first) = (0, true);
    for token in path {
        match token.text {
            "{" => depth += 1,
            "}" => depth -= 1,
            "," => {}
            name if first => names.push((token.line, name.to_owned())),
            _ => {}
        }
        if depth == 0 {
            break;
        }
        first = depth == 1 && matches!(token.text, "{" | ",");
    }
    names
}

/// Every file under src/.
fn sources() -> Vec<Source> {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut folders, mut sources) = (vec![crate_dir.join("src")], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder of sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                // What is only compiled for tests may do as it needs.
                if !path.ends_with("tests") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("a source file");
                let path = path.strip_prefix(crate_dir).expect("a path in the crate").into();
                sources.push(Source { path, text });
            }
        }
    }
    assert!(!sources.is_empty());
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    sources
}

/// A word or a sign of the code, and the line that it is on.
struct Token<'t> {
    line: usize,
    text: &'t str,
}

/// The code of a file: no spaces, comments, strings or characters.
fn tokens(text: &str) -> Vec<Token<'_>> {
    let (mut rest, mut line, mut tokens) = (text, 1, Vec::new());
    while !rest.is_empty() {
        let (len, is_code) = lexeme(rest);
        let (text, after) = rest.split_at(len);
        if is_code {
            tokens.push(Token { line, text });
        }
        line += text.matches('\n').count();
        rest = after;
    }
    tokens
}

/// How long what `rest` begins with is, and whether it is code.
fn lexeme(rest: &str) -> (usize, bool) {
    let until = |end: &str, from: usize| {
        rest[from..].find(end).map_or(rest.len(), |found| from + found + end.len())
    };
    let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
    let hashes = rest[word..].bytes().take_while(|&byte| byte == b'#').count();
    let quote = word + hashes;
    if matches!(&rest[..word], "r" | "br" | "cr") && rest[quote..].starts_with('"') {
        return (until(&format!("\"{}", "#".repeat(hashes)), quote + 1), false);
    }
    match rest.as_bytes() {
        _ if word > 0 => (word, true),
        [b'/', b'/', ..] => (until("\n", 0), false),
        [b'/', b'*', ..] => (until("*/", 2), false),
        [b'"', ..] => (quoted(rest, '"'), false),
        // A quote that no other one follows is a lifetime's.
        [b'\'', b'\\', ..] => (quoted(rest, '\''), false),
        [b'\'', ..] if rest.chars().nth(2) == Some('\'') => (quoted(rest, '\''), false),
        _ => {
            let sign = rest.chars().next().unwrap_or(' ');
            (sign.len_utf8(), !sign.is_whitespace())
        }
    }
}

/// The length of a literal up to and with the quote that no backslash stands before.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        if c == quote && !escaped {
            return at + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    rest.len()
}

/// Leaves out each item that stands behind `#[cfg(test)]`: up to its semicolon or its closing brace.
fn without_tests(tokens: Vec<Token<'_>>) -> Vec<Token<'_>> {
    let (mut code, mut at) = (Vec::new(), 0);
    while at < tokens.len() {
        let Some(item) = after(&tokens[at..], &["#", "[", "cfg", "(", "test", ")", "]"]) else {
            code.push(Token { ..tokens[at] });
            at += 1;
            continue;
        };
        let mut depth = 0;
        let end = item.iter().position(|token| {
            depth += i32::from(token.text == "{") - i32::from(token.text == "}");
            depth == 0 && matches!(token.text, ";" | "}")
        });
        at = tokens.len() - item.len() + end.map_or(item.len(), |end| end + 1);
    }
    code
}

/// The crate, and everything that it is built and tested with on Linux on x86-64.
fn packages() -> Vec<serde_json::Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // --locked asks no registry: what the lock file names was fetched to build this test.
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--locked", "--all-features"])
        .args(["--filter-platform=x86_64-unknown-linux-gnu", "--manifest-path"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    metadata["packages"].as_array().expect("a list of packages").clone()
}

fn text(package: &serde_json::Value, field: &str) -> String {
    package[field].as_str().expect("a text").to_owned()
}

/// The list `allow` under `[licenses]` in deny.toml.
fn allowed_licences() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deny.toml");
    let text = fs::read_to_string(path).expect("deny.toml");
    let (_, section) = text.split_once("\n[licenses]\n").expect("[licenses] in deny.toml");
    let (_, list) = section.split_once("\nallow = [").expect("a list `allow` in [licenses]");
    let (list, _) = list.split_once("\n]").expect("an end of the list");
    let lines = list.lines().map(|line| line.split('#').next().unwrap_or(line));
    lines.flat_map(|line| line.split('"').skip(1).step_by(2)).map(str::to_owned).collect()
}

/// Whether the licences in `allowed` are enough for an SPDX expression. `MIT/Zlib` is an old way to write OR.
fn satisfies(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().collect::<Vec<_>>();
    words.reverse();
    any_of(&mut words, allowed) && words.is_empty()
}

/// `words` are the rest of the expression, the next one last. AND binds more tightly than OR.
fn any_of(words: &mut Vec<&str>, allowed: &[String]) -> bool {
    let mut any = all_of(words, allowed);
    while words.pop_if(|word| *word == "OR").is_some() {
        any |= all_of(words, allowed);
    }
    any
}

fn all_of(words: &mut Vec<&str>, allowed: &[String]) -> bool {
    let mut all = one(words, allowed);
    while words.pop_if(|word| *word == "AND").is_some() {
        all &= one(words, allowed);
    }
    all
}

fn one(words: &mut Vec<&str>, allowed: &[String]) -> bool {
    let Some(word) = words.pop() else {
        return false;
    };
    if word == "(" {
        return any_of(words, allowed) & (words.pop() == Some(")"));
    }
    let exception = words.pop_if(|word| *word == "WITH").and_then(|_| words.pop());
    let licence = exception.map_or(word.to_owned(), |exception| format!("{word} WITH {exception}"));
    allowed.contains(&licence)
}
