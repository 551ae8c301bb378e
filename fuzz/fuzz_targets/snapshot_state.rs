//! The state of a snapshot that anybody may have written: refused, or the same when written again,
//! and a configuration that chooses nothing of the host.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dormouse::fuzzing::snapshot_state(bytes));
