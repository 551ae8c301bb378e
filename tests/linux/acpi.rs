//! The ACPI tables, as the guest has them, checked by the reference compiler.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::{Release, Scratch, config, guest_root, run};

/// Runs iasl in `dir`, and returns what it says.
fn iasl(dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new(guest_root().join("usr/bin/iasl"))
        .args(arguments)
        .current_dir(dir)
        .output()
        .expect("iasl runs");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success(), "{text}");
    text.into_owned()
}

#[test]
fn the_generation_device_has_its_driver_and_the_first_generation_is_no_fork() {
    let script = r#"
cat /sys/bus/acpi/devices/DORM0001:00/path
for driver in /sys/bus/acpi/devices/DORM0001:00/driver \
    /sys/bus/acpi/devices/DORM0001:00/physical_node/driver; do
    [ -e $driver ] && echo "driver $(basename $(readlink $driver))"
done
grep -i ged /proc/interrupts || grep ACPI:Event /proc/interrupts || cat /proc/interrupts
dmesg | grep -i 'virtual machine fork'
poweroff -f"#;
    let (_, text) = run(config(Release::Linux6_12.kernel(), script));
    assert!(text.contains(r"\_SB_.VGEN"), "{text}");
    assert!(text.contains("driver vmgenid"), "{text}");
    assert!(text.contains("ACPI:Ged"), "{text}");
    assert!(!text.contains("virtual machine fork"), "{text}");
}

#[test]
fn iasl_takes_the_tables_apart_and_together_again_without_a_complaint() {
    let script = r#"
cd /sys/firmware/acpi/tables
for table in DSDT FACP APIC; do echo "table $table $(base64 -w0 $table)"; done
dmesg | grep -iE 'acpi.*(error|warn|bios|invalid)'
poweroff -f"#;
    let (_, text) = run(config(Release::Linux6_12.kernel(), script).vcpus(2));
    for complaint in ["ACPI Error", "ACPI BIOS", "ACPI Warning", "checksum"] {
        assert!(!text.contains(complaint), "{text}");
    }

    let scratch = Scratch::new("acpi");
    let dir = &scratch.0;
    for table in ["DSDT", "FACP", "APIC"] {
        let prefix = format!("table {table} ");
        let encoded = text.lines().find_map(|line| line.strip_prefix(&prefix));
        let bytes = decode(encoded.unwrap_or_else(|| panic!("no {table} in:\n{text}")));
        fs::write(dir.join(format!("{table}.aml")), &bytes).unwrap();
        let said = iasl(dir, &["-d", &format!("{table}.aml")]);
        assert!(!said.contains("Invalid checksum"), "{said}");
        let said = iasl(dir, &["-ve", "-we", "-p", "again", &format!("{table}.dsl")]);
        if table == "DSDT" {
            let again = fs::read(dir.join("again.aml")).unwrap();
            // All but the header, which names the compiler.
            assert_eq!(again[36..], bytes[36..], "{said}");
        }
    }
}

/// Decodes base64 (RFC 4648 §4).
fn decode(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for group in text.as_bytes().chunks(4) {
        let mut bits = 0u32;
        for &symbol in group {
            let value = match symbol {
                b'A'..=b'Z' => symbol - b'A',
                b'a'..=b'z' => symbol - b'a' + 26,
                b'0'..=b'9' => symbol - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => 0,
            };
            bits = (bits << 6) | u32::from(value);
        }
        let padding = group.iter().filter(|symbol| **symbol == b'=').count();
        bytes.extend(&bits.to_be_bytes()[1..4 - padding]);
    }
    bytes
}
