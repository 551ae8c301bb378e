//! A kernel command line: what is taken is what the kernel will take, and reads back as itself.

#![no_main]

use dormouse::Cmdline;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(cmdline) = text.parse::<Cmdline>() {
        assert_eq!(cmdline.as_str(), text.trim());
        check(&cmdline);
    }
    if let Ok(cmdline) = Cmdline::default().push(text) {
        check(&cmdline);
    }
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if let Ok(cmdline) = Cmdline::empty().set(key, value) {
        check(&cmdline);
    }
});

fn check(cmdline: &Cmdline) {
    let text = cmdline.as_str();
    assert!(text.len() < 2048, "{} bytes", text.len());
    assert!(text.bytes().all(|byte| matches!(byte, b' '..=b'~')), "{text:?}");
    assert_eq!(&text.parse::<Cmdline>().expect("it was taken before"), cmdline);

    let json = serde_json::to_string(cmdline).expect("a command line serializes");
    assert_eq!(&serde_json::from_str::<Cmdline>(&json).expect("it was just written"), cmdline);
}
