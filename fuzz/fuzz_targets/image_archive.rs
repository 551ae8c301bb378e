//! An archive of a container image: what `docker save` writes, or a layout.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dormouse::fuzzing::image_archive(bytes));
