//! What a restored VM has of this host in place of what was saved, at work: each kind of back end.

use std::fs;
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};

use dormouse::{BlockConfig, MicroVm, NetConfig, Paused, RestoreOptions, VmConfig, VsockConfig};

use crate::guest::Program;
use crate::scratch::Scratch;
use crate::snapshot::Guest;
use crate::virtio_guest::{Driver, Order, Work};
use crate::{config, output, vsock_guest};

/// A driver's guest, which has done a batch where `warm` says so.
fn guest(image: Vec<u8>, warm: bool, with: impl FnOnce(VmConfig) -> VmConfig) -> MicroVm<Paused> {
    let (writer, output) = output();
    let config = with(config(&Program::Driver(image)).memory_mib(64).console(writer));
    let vm = MicroVm::create(config).unwrap().start().unwrap();
    assert_eq!(output.next(), b'B');
    let guest = Guest { vm, output };
    if warm {
        batch(&guest);
    }
    guest.pause().0
}

fn batch(guest: &Guest) {
    guest.vm.console_input(b".").unwrap();
    assert_eq!([guest.output.next(), guest.output.next()], *b"()");
}

/// A VM of the snapshot in `base`, which does a batch.
fn batch_of(scratch: &Scratch, options: RestoreOptions) -> Guest {
    let (writer, output) = output();
    let snapshot = dormouse::Snapshot::open(scratch.join("base")).unwrap();
    let vm = snapshot.restore_with(&options.console(writer)).unwrap();
    let guest = Guest::resumed(vm, output);
    batch(&guest);
    guest
}

#[test]
fn a_disk_has_the_delta_and_stands_on_the_file_that_a_restore_gives_it() {
    let scratch = Scratch::new();
    let (image, moved) = (scratch.join("image"), scratch.join("moved"));
    let content = vec![7; 64 << 10];
    fs::write(&image, &content).unwrap();
    let work = Work::BlockWrite { sectors: 128, order: Order::Sequential };
    let driver = Driver { device: 0, work, buffer_bytes: 4096, depth: 4, batch: 4 };
    let block = BlockConfig::new(&image).delta(scratch.join("first"));
    let vm = guest(driver.image(), true, |config| config.block(block));
    drop(vm.snapshot(scratch.join("base")).unwrap());
    drop(vm);
    fs::rename(&image, &moved).unwrap();
    for name in ["one", "two"] {
        let delta = scratch.join(name);
        drop(batch_of(&scratch, RestoreOptions::new().disk_base(0, &moved).disk_delta(0, &delta)));
        let bits = fs::read(delta).unwrap()[4096..8192].to_vec();
        let written: u32 = bits.iter().map(|byte| byte.count_ones()).sum();
        assert_eq!(written, 32, "sectors of a batch");
    }
    // One that a clone has written to is not of the time that another begins with.
    let used = RestoreOptions::new().disk_base(0, &moved).disk_delta(0, scratch.join("one"));
    let base = dormouse::Snapshot::open(scratch.join("base")).unwrap();
    let refused = base.restore_with(&used.outside_paths(true)).unwrap_err();
    assert!(refused.to_string().contains("another VM has written"), "{refused}");
    assert!(fs::read(&moved).unwrap() == content);
    dormouse::Snapshot::open(scratch.join("base")).unwrap().verify().unwrap();
}

#[test]
fn an_interface_is_connected_to_what_a_restore_gives_it() {
    const FRAME: u32 = 256;
    let scratch = Scratch::new();
    let work = Work::Send { queue: 1, header: &[0; 12] };
    let driver = Driver { device: 0, work, buffer_bytes: FRAME, depth: 4, batch: 4 };
    let pair = || {
        let (device, peer) = UnixStream::pair().unwrap();
        (NetConfig::socket(device), peer)
    };
    let read_batch = |peer: &mut UnixStream| {
        let mut frames = vec![0; 4 * (4 + FRAME as usize)];
        peer.read_exact(&mut frames).unwrap();
        assert_eq!(frames[..4], FRAME.to_be_bytes());
    };
    let (network, mut first) = pair();
    let vm = guest(driver.image(), true, |config| config.network(network));
    read_batch(&mut first);
    drop(vm.snapshot(scratch.join("base")).unwrap());
    drop(vm);
    for _ in 0..2 {
        let (network, mut peer) = pair();
        let options = RestoreOptions::new().network(0, network.mac([2, 0, 0, 0, 0, 9]));
        let guest = batch_of(&scratch, options);
        read_batch(&mut peer);
        drop(guest);
        assert_eq!(peer.read(&mut [0]).unwrap(), 0, "its end is the end of the connection");
    }
    assert_eq!(first.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_vsock_device_has_the_path_that_a_restore_gives_it() {
    let scratch = Scratch::new();
    let path = |name: &str| scratch.join(name);
    let image = vsock_guest::image(vsock_guest::Work::Send, 1);
    let vsock = VsockConfig::default().unix_socket(path("first"));
    let vm = guest(image, false, |config| config.vsock(vsock));
    drop(vm.snapshot(path("base")).unwrap());
    assert!(path("first").exists());
    drop(vm);
    assert!(!path("first").exists());
    for name in ["one", "two"] {
        let port = path(&format!("{name}_{}", vsock_guest::PORT));
        let listener = UnixListener::bind(&port).unwrap();
        // It connects to that port.
        let guest = batch_of(&scratch, RestoreOptions::new().vsock_unix_socket(path(name)));
        let (mut stream, _) = listener.accept().unwrap();
        batch(&guest);
        stream.read_exact(&mut [0; vsock_guest::MESSAGE as usize]).unwrap();
        assert!(path(name).exists() && !path("first").exists());
        drop(guest);
        assert!(!path(name).exists());
    }
}
