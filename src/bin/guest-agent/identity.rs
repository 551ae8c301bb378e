//! Who this guest is: names and addresses, the time, random numbers.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::mounts::replace_file;
use crate::network;
use crate::protocol::{Failure, Identity, Interface, Renewal};
use crate::sys;

/// By how much the clock may be off. Setting it is not for nothing: timers are looked at again.
const CLOCK_TOLERANCE: Duration = Duration::from_millis(1);

/// Makes the guest who it is now; `interfaces` are the addresses that it has, and becomes those that
/// it gets. All of it is tried; the first error is given.
pub(crate) fn apply(identity: &Identity, interfaces: &mut Vec<Interface>) -> Result<(), Failure> {
    // First of all, as everything else takes time.
    let clock = set_clock(Duration::from_nanos(identity.wall_clock_ns));
    let random = sys::add_entropy(identity.seed);
    let random = random.map_err(|error| Failure::of("seed the random number generator", &error));
    let renewed = match &identity.renewal {
        Some(renewal) => renew(renewal, interfaces),
        None => first_machine_id(),
    };
    clock.and(random).and(renewed)
}

fn set_clock(time: Duration) -> Result<(), Failure> {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    match now.abs_diff(time) > CLOCK_TOLERANCE {
        true => sys::set_wall_clock(time).map_err(|error| Failure::of("set the clock", &error)),
        false => Ok(()),
    }
}

fn renew(renewal: &Renewal, interfaces: &mut Vec<Interface>) -> Result<(), Failure> {
    let machine_id = set_machine_id(renewal.machine_id);
    let hostname = renewal.hostname.as_deref().map_or(Ok(()), set_hostname);
    let network = network::configure(&renewal.interfaces, interfaces);
    for (old, new) in interfaces.iter_mut().zip(&renewal.interfaces) {
        old.clone_from(new);
    }
    let known = interfaces.len();
    interfaces.extend(renewal.interfaces.iter().skip(known).cloned());
    machine_id.and(hostname).and(network)
}

/// A machine that has none, as one of an image that many start from, gets one at its first boot.
fn first_machine_id() -> Result<(), Failure> {
    let path = Path::new("/etc/machine-id");
    let known = fs::read_to_string(path).is_ok_and(|id| id.trim().len() == 32);
    if known {
        return Ok(());
    }
    let random = "/proc/sys/kernel/random/uuid";
    let id = fs::read_to_string(random).map(|uuid| uuid.trim().replace('-', ""));
    let id = id.map_err(|error| Failure::of_path("read", Path::new(random), &error))?;
    // A root file system that cannot be written keeps what it has.
    let _ = write_machine_id(&format!("{id}\n"));
    Ok(())
}

/// machine-id(5): for systemd, and for D-Bus where that has its own.
fn set_machine_id(id: [u8; 16]) -> Result<(), Failure> {
    let mut text = String::new();
    for byte in id {
        let _ = write!(text, "{byte:02x}");
    }
    text.push('\n');
    write_machine_id(&text)
}

fn write_machine_id(text: &str) -> Result<(), Failure> {
    let dbus = Path::new("/var/lib/dbus/machine-id");
    let mut paths = vec![Path::new("/etc/machine-id")];
    if fs::symlink_metadata(dbus).is_ok_and(|file| file.is_file()) {
        paths.push(dbus);
    }
    for path in paths.into_iter().filter(|path| path.parent().is_some_and(Path::exists)) {
        let replaced = replace_file(path, text);
        replaced.map_err(|error| Failure::of_path("write", path, &error))?;
    }
    Ok(())
}

/// Gives the guest the name that its file has, if it has one: hostname(5).
pub(crate) fn take_hostname(path: &Path) {
    let text = fs::read_to_string(path).unwrap_or_default();
    let mut lines = text.lines().map(str::trim);
    if let Some(name) = lines.find(|line| !line.is_empty() && !line.starts_with('#')) {
        // One that the kernel does not take is none.
        let _ = sys::set_hostname(name);
    }
}

pub(crate) fn set_hostname(name: &str) -> Result<(), Failure> {
    let set = sys::set_hostname(name);
    set.map_err(|error| Failure::of(format!("name the guest {name}"), &error))?;
    // The kernel knows it; the file is for programs that do not ask it, where there is one.
    let path = Path::new("/etc/hostname");
    if path.parent().is_some_and(Path::exists) {
        let _ = fs::write(path, format!("{name}\n"));
    }
    Ok(())
}
