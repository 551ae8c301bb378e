//! The agent: the first process of a guest. It boots it, and does there what the host asks for.
//!
//! build.rs compiles it into one static program for the guest, by rustc alone: it is built of the
//! standard library and of src/protocol, which it shares with the host. As a binary of this package
//! it is only checked and tested, on the host, as an ordinary process.
//!
//! Nothing that goes wrong in the guest ends it, as the kernel would panic with it: there are no
//! panics, and what fails is told to the host and on the console.

#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod accounts;
mod boot;
mod calls;
mod cgroup;
mod children;
mod connection;
mod console;
mod control;
mod drain;
mod entrypoint;
mod exec;
mod failure;
mod files;
mod identity;
mod mounts;
mod network;
mod output;
mod ports;
mod program;
#[path = "../../protocol/mod.rs"]
mod protocol;
mod shutdown;
mod sys;
mod threads;
mod tree;

#[cfg(test)]
#[path = "tests/host.rs"]
mod host;
#[cfg(test)]
#[path = "tests/scratch.rs"]
mod scratch;

use std::env;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use crate::boot::Booted;
use crate::control::Control;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        console::say("the agent is for a guest, whose first process it is");
        return ExitCode::FAILURE;
    }
    begin_without_kept_stacks();
    sys::keep_memory_small();
    // Before there is another thread.
    sys::hold_child_signals();
    let Booted { setup, fault, listener } = boot::boot();
    if let Err(error) = threads::spawn(move || calls::accept(&listener)) {
        console::say(&format!("cannot take calls: {error}"));
    }
    if let Err(error) = threads::spawn(move || Control::new(fault, setup.interfaces).run()) {
        console::say(&format!("cannot call the host: {error}"));
    }
    children::reap_orphans()
}

/// Begins again, once, with a C library that does not keep the stacks of threads that are over, up to 40 MiB of
/// them. It is told so by the environment alone, which what the agent starts does not get.
fn begin_without_kept_stacks() {
    const TUNABLES: &str = "GLIBC_TUNABLES";
    if env::var_os(TUNABLES).is_some() {
        return;
    }
    if let Some(program) = env::args_os().next() {
        let mut again = Command::new(program);
        again.args(env::args_os().skip(1)).env(TUNABLES, "glibc.pthread.stack_cache_size=0");
        // Comes back with an error alone, and then all is as it would be without.
        console::say(&format!("cannot begin again: {}", again.exec()));
    }
}
