//! Programs of the testbed for guests: a binary with the libraries that it is linked to.

use std::path::{Path, PathBuf};
use std::process::Command;

use dormouse::InitramfsBuilder;

use crate::guest_root;

/// Where a program of the testbed is on this machine.
pub fn program(name: &str) -> PathBuf {
    let folders = ["usr/bin", "usr/sbin", "bin", "sbin"].map(|folder| guest_root().join(folder));
    let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("the testbed has no {name}"))
}

/// A command for it here, which finds the libraries that came with it.
pub fn command(name: &str) -> Command {
    let mut command = Command::new(program(name));
    command.env("LD_LIBRARY_PATH", libraries());
    command
}

/// Puts a program into a guest's `/bin`, and its libraries where its loader finds them.
pub fn add(archive: InitramfsBuilder, name: &str) -> InitramfsBuilder {
    let path = program(name);
    let output = Command::new("ldd").arg(&path).env("LD_LIBRARY_PATH", libraries()).output();
    let text = String::from_utf8(output.expect("ldd").stdout).unwrap();
    let archive = archive.host_file(&format!("bin/{name}"), path);
    // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`; the loader has no arrow.
    let files = text.lines().filter_map(|line| {
        line.split_whitespace().find(|word| word.starts_with('/')).map(Path::new)
    });
    files.fold(archive, |archive, file| {
        let name = file.file_name().unwrap().to_str().unwrap();
        let folder = if name.starts_with("ld-") { "lib64" } else { "lib" };
        archive.host_file(&format!("{folder}/{name}"), file)
    })
}

fn libraries() -> String {
    let folders =
        ["usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph", "lib/x86_64-linux-gnu"];
    folders.map(|folder| guest_root().join(folder).to_str().unwrap().to_owned()).join(":")
}
