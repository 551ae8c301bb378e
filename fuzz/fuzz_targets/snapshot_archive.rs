//! A packed snapshot that anybody may have written: it becomes a directory that can be opened, or
//! leaves nothing, and no file appears anywhere else.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dormouse::fuzzing::snapshot_archive(bytes));
