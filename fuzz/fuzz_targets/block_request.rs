//! Requests to a disk, most of them nearly right: each gets a status, and none leaves the disk.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dormouse::fuzzing::block_request(bytes));
