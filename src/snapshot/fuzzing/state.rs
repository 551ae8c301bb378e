//! The way in for the fuzz target `snapshot_state`: all of a restore that needs no KVM.

use std::fs::{self, File};
use std::sync::{Arc, OnceLock};

use vmm_sys_util::eventfd::EventFd;

use super::super::directory::{OpenDirectory, disk_name, memory_name};
use super::super::restore::lies_in;
use super::super::{Inner, Place, Purpose, Snapshot, State, Temporary, format};
use crate::arch::layout;
use crate::config::{MachineConfig, NetBackend, RestoreOptions, Writes};
use crate::console::{Console, ConsoleSink};
use crate::devices::Serial;
use crate::machine::MachineState;
use crate::memory::{GuestRam, MemoryImage};
use crate::virtio::fuzzing::saved_state;

/// Guest RAM is mapped up to this size: more takes longer, and does nothing else.
const MAX_MAPPED_BYTES: u64 = 64 << 20;

/// The file `state`, whole, or but for its header and checksum, which no fuzzer guesses.
pub fn snapshot_state(bytes: &[u8]) {
    let whole = format::decode::<State>(bytes);
    let Ok(state) = whole.or_else(|_| format::decode(&format::framed(bytes.to_vec()))) else {
        return;
    };
    let written = format::encode(&state).expect("what was read can be written");
    let again: State = format::decode(&written).expect("what was written can be read");
    assert_eq!(format::encode(&again).expect("the same again"), written);
    if state.check().is_err() {
        return;
    }
    devices(&state.machine);
    let temporary = Temporary::new().expect("a directory");
    let Some(image) = image(&state, &temporary) else { return };
    let open = OpenDirectory::open(&temporary.path).expect("a directory");
    let (written, fresh) = (OnceLock::new(), OnceLock::new());
    let inner = Inner { place: Place::Directory(open), state, image, written, fresh };
    let snapshot = Snapshot(Arc::new(inner));
    let facts = snapshot.facts();
    assert_eq!(usize::from(facts.vcpus), snapshot.0.state.host.cpuid().expect("tables").len());
    let options = RestoreOptions::new();
    if let Ok(config) = snapshot.config(&options, Purpose::Clones)
        && config.check().is_ok()
    {
        chooses_nothing(&config, &temporary);
    }
    let trusting = options.outside_paths(true);
    for purpose in [Purpose::Clones, Purpose::Sleep] {
        let _ = snapshot.config(&trusting, purpose);
    }
}

/// A configuration has nothing of the host but what is in the snapshot's directory.
fn chooses_nothing(config: &MachineConfig, temporary: &Temporary) {
    for block in &config.blocks {
        for path in block.frozen.iter().chain([&block.path]) {
            assert!(lies_in(path, &temporary.path), "{}", path.display());
        }
        let writes = &block.writes;
        assert!(matches!(writes, Writes::Discarded | Writes::Refused), "{writes:?}");
    }
    for network in &config.networks {
        let backend = &network.backend;
        assert!(!matches!(backend, NetBackend::Tap(_) | NetBackend::User(_)), "{backend:?}");
    }
    let socket = config.vsock.as_ref().and_then(|vsock| vsock.unix_socket.as_ref());
    assert!(socket.is_none_or(|socket| lies_in(socket, &temporary.path)), "{socket:?}");
    let services = config.agent.as_ref().map_or(0, |agent| agent.services.len());
    assert_eq!(services, 0, "a snapshot connects its guest to the host");
    assert!(config.seccomp, "a snapshot lifts the confinement");
    assert_eq!(config.kvm_device, MachineConfig::default().kvm_device);
}

/// The memory, whose files have the length that they should.
fn image(state: &State, temporary: &Temporary) -> Option<MemoryImage> {
    let mut layers = Vec::new();
    for (index, saved) in state.memory.iter().enumerate().take(20) {
        let file = File::create_new(temporary.path.join(memory_name(index))).expect("a file");
        // Some file systems have no files of such a length.
        file.set_len(saved.file_bytes()).ok()?;
        layers.push((file, saved.clone()));
    }
    for index in 0..state.disks.len() {
        fs::write(temporary.path.join(disk_name(index)), []).expect("a file");
    }
    let ranges = layout::ram_ranges(state.config.memory_bytes);
    let image = MemoryImage::open(&ranges, layers).ok()?;
    if state.config.memory_bytes <= MAX_MAPPED_BYTES {
        let ram = GuestRam::reserve(&ranges).expect("addresses");
        ram.map_image(&image).expect("an image that was checked");
    }
    Some(image)
}

/// The devices on some RAM of their own.
fn devices(machine: &MachineState) {
    let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).expect("an eventfd");
    let serial = Serial::new(interrupt, ConsoleSink::new(Console::new(0), None)).input();
    if serial.restore(&machine.devices().legacy().serial).is_ok() {
        let taken = serial.state();
        assert!(serial.restore(&taken).is_ok(), "{taken:?} is refused");
    }
    for device in machine.devices().virtio().iter().take(20) {
        saved_state(device);
    }
}
