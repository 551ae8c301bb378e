//! A layer of a container image: a tar archive, perhaps a packed one, that becomes a root file system.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dormouse::fuzzing::oci_layer(bytes));
