//! What container images say of themselves: configurations, manifests, indexes.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dormouse::fuzzing::image_config(bytes));
