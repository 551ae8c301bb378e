//! A Debian package: an `ar` archive with a `tar`, perhaps a compressed one, with a kernel in it.
//!
//! Packages are read from files, so each input becomes one, in the folder for temporary files.

#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;
use std::{env, fs, process};

use dormouse::{ErrorKind, Kernel};
use libfuzzer_sys::fuzz_target;

/// One file for the whole run: libFuzzer tries one input at a time in a process.
static FILE: LazyLock<PathBuf> =
    LazyLock::new(|| env::temp_dir().join(format!("dormouse-fuzz-{}.deb", process::id())));

fuzz_target!(|package: &[u8]| {
    fs::write(&*FILE, package).expect("the folder for temporary files can be written");
    if let Err(error) = Kernel::deb(&*FILE).check() {
        assert_eq!(error.kind(), &ErrorKind::Kernel);
        // The text quotes the package.
        let _ = error.to_string();
    }
});
