//! Builds the agent that runs in guests, src/bin/guest-agent, which the library carries.
//!
//! It is one static program of the standard library and src/protocol alone. rustc is called
//! directly, once, with flags of our own: no cargo in a cargo, and whatever RUSTFLAGS say of the
//! host's code is not for the guest's.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An agent that somebody has built before.
const GIVEN_AGENT: &str = "DORMOUSE_GUEST_AGENT";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/bin/guest-agent");
    println!("cargo::rerun-if-changed=src/protocol");
    println!("cargo::rerun-if-env-changed={GIVEN_AGENT}");
    if env::var_os("CARGO_FEATURE_AGENT").is_none() {
        return;
    }
    let agent = PathBuf::from(variable("OUT_DIR")).join("guest-agent");
    let built = if env::var_os("DOCS_RS").is_some() {
        // Nobody runs what is built there.
        fs::write(&agent, "").map_err(|error| format!("cannot write {}: {error}", agent.display()))
    } else if let Some(given) = env::var_os(GIVEN_AGENT) {
        println!("cargo::rerun-if-changed={}", Path::new(&given).display());
        copy(Path::new(&given), &agent)
    } else {
        build(&agent)
    };
    if let Err(fault) = built {
        for line in fault.lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

/// What cargo tells each build script.
fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_default()
}

fn copy(given: &Path, agent: &Path) -> Result<(), String> {
    let copied = fs::read(given).and_then(|bytes| fs::write(agent, bytes));
    copied.map_err(|error| format!("{GIVEN_AGENT}={}: {error}", given.display()))
}

/// Builds it with the C library of the target; if that is not there for static programs, with musl, if
/// that is installed.
fn build(agent: &Path) -> Result<(), String> {
    let target = variable("TARGET").to_string_lossy().into_owned();
    let fault = match compile(agent, &target) {
        Ok(()) => return Ok(()),
        Err(fault) => fault,
    };
    // An error in the code is the same for every target.
    if !fault.contains("linking with") && !fault.contains("linker `") {
        return Err(format!("cannot build the agent for guests:\n{fault}"));
    }
    let musl = target.replace("-gnu", "-musl");
    if musl != target && is_installed(&musl) && compile(agent, &musl).is_ok() {
        return Ok(());
    }
    Err(format!(
        "cannot link the agent for guests, a static program; the linker says:\n{}\n\
         Install the C library for static programs (Debian, Ubuntu: `apt install libc6-dev`; Fedora: \
         `dnf install glibc-static`),\n\
         or another one for Rust (`rustup target add {musl}`),\n\
         or set {GIVEN_AGENT} to an agent that was built elsewhere,\n\
         or build without the feature `agent`.",
        last_words(&fault)
    ))
}

/// The linker's own words: its command line alone fills a screen.
fn last_words(fault: &str) -> String {
    let lines = fault.lines().map(str::trim).filter(|line| !line.is_empty() && line.len() < 300);
    let said: Vec<_> = lines.filter(|line| !line.starts_with("error: aborting")).collect();
    said[said.len().saturating_sub(5)..].join("\n")
}

fn is_installed(target: &str) -> bool {
    let sysroot = Command::new(variable("RUSTC")).args(["--print", "sysroot"]).output();
    sysroot.is_ok_and(|output| {
        let sysroot = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Path::new(&sysroot).join("lib/rustlib").join(target).join("lib").is_dir()
    })
}

/// Runs rustc. An error is what it says.
fn compile(agent: &Path, target: &str) -> Result<(), String> {
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--edition", "2024", "--crate-name", "guest_agent", "--crate-type", "bin"]);
    rustc.args(["--cap-lints", "allow", "--target", target]);
    // Small, as every guest has it in its memory; and a panic could not be caught by anybody.
    for option in [
        "opt-level=s",
        "panic=abort",
        "lto=fat",
        "codegen-units=1",
        "strip=symbols",
        "target-feature=+crt-static",
        "relocation-model=static",
    ] {
        rustc.args(["-C", option]);
    }
    if let Some(linker) = env::var_os("RUSTC_LINKER").filter(|_| target == variable("TARGET")) {
        let mut option = OsString::from("linker=");
        option.push(linker);
        rustc.arg("-C").arg(option);
    }
    rustc.arg("-o").arg(agent).arg("src/bin/guest-agent/main.rs");
    let output = rustc.output().map_err(|error| format!("cannot run rustc: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}
