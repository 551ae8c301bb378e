//! A kernel image from anywhere: an ELF image or a bzImage in each of its compressions.
//!
//! It is taken or refused; it never panics, and libFuzzer's limits on memory hold for it. What is taken
//! is an ELF image, and stays one when it is read again.

#![no_main]

use dormouse::{ErrorKind, Kernel};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|image: &[u8]| {
    let kernel = Kernel::bytes(image);
    if let Err(error) = kernel.check() {
        assert_eq!(error.kind(), &ErrorKind::Kernel);
        // The text quotes the image.
        let _ = error.to_string();
        return;
    }
    let vmlinux = kernel.vmlinux().expect("a checked kernel is loaded");
    assert!(vmlinux.starts_with(b"\x7fELF"));
    let again = Kernel::bytes(vmlinux.clone()).vmlinux().expect("an unpacked kernel is a kernel");
    assert_eq!(again, vmlinux);
});
