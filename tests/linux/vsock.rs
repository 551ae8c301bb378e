//! Sockets between this process and programs in the guest.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use dormouse::{
    Cmdline, DeviceMetrics, ErrorKind, ExitStatus, MicroVm, Running, VmConfig, Vsock, VsockConfig,
    VsockMetrics, VsockStream,
};

use crate::devices::initramfs_with;
use crate::{PATIENCE, Release, Transcript, guest_tool};

/// Connections each way.
const COUNT: u32 = 250;
const HOST_PORT: u32 = 2000;
const GUEST_PORT: u32 = 1000;

/// A VM with a vsock device whose guest loads its driver and runs `script`.
fn config(release: Release, script: &str) -> VmConfig {
    let initramfs = initramfs_with(release, &["virtio_mmio", "vmw_vsock_virtio_transport"], script)
        .host_file("bin/guest-tool", guest_tool());
    VmConfig::new(release.kernel())
        .initramfs(initramfs.build().unwrap())
        .cmdline(Cmdline::default().push("quiet").unwrap())
        .vsock(VsockConfig::default())
        .memory_mib(256)
        .vcpus(2)
}

/// The same bytes for the same seed; the guest's side has this too.
fn noise(seed: u32, len: usize) -> Vec<u8> {
    let mut state = u64::from(seed);
    let next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Half a thousand connections take twice as many descriptors.
fn raise_the_limit_of_open_files() {
    // SAFETY: the calls read and write the one struct.
    unsafe {
        let mut limit = std::mem::zeroed::<libc::rlimit>();
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = 8192.min(limit.rlim_max).max(limit.rlim_cur);
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
    }
}

/// Connects as soon as somebody listens.
pub fn connect(vsock: &Vsock, port: u32) -> VsockStream {
    let begin = Instant::now();
    loop {
        match vsock.connect_timeout(port, PATIENCE) {
            Ok(stream) => return stream,
            Err(error) if error.kind() == &ErrorKind::Refused && begin.elapsed() < PATIENCE => {
                thread::sleep(Duration::from_millis(50));
            }
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// Sends back what comes. Every tenth takes its time, so that the guest has to wait.
fn echo(mut stream: VsockStream, at: u32) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = vec![0; 16 << 10];
    for reads in 0.. {
        if at.is_multiple_of(10) && reads < 10 {
            thread::sleep(Duration::from_millis(100));
        }
        match stream.read(&mut buffer).unwrap() {
            0 => return,
            len => stream.write_all(&buffer[..len]).unwrap(),
        }
    }
}

/// Writes noise and checks that it comes back, and nothing more.
fn check_echo(stream: &VsockStream, seed: u32) {
    let len = if seed.is_multiple_of(10) { 768 << 10 } else { 24 << 10 };
    let sent = noise(seed, len);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            (&mut &*stream).write_all(&sent).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        if seed.is_multiple_of(10) {
            thread::sleep(Duration::from_secs(1));
        }
        let mut received = Vec::new();
        (&mut &*stream).read_to_end(&mut received).unwrap();
        assert!(received == sent, "{} of {len} bytes came back to {seed}", received.len());
    });
}

fn metrics(vm: &MicroVm<Running>) -> VsockMetrics {
    let all = vm.metrics();
    let mut found = all.iter().filter_map(|metrics| match metrics {
        DeviceMetrics::Vsock(metrics) => Some(*metrics),
        _ => None,
    });
    found.next().unwrap()
}

/// The same when no connection is open any more, or far too late: Linux closes one some time after its program did.
fn last_metrics(vm: &MicroVm<Running>) -> VsockMetrics {
    let begin = Instant::now();
    loop {
        let metrics = metrics(vm);
        if metrics.active == 0 || begin.elapsed() > PATIENCE {
            return metrics;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn hundreds_both_ways(release: Release) {
    raise_the_limit_of_open_files();
    let script = format!(
        "guest-tool vsock-echo {GUEST_PORT} {COUNT} & echo=$!\n\
         guest-tool vsock-connect {HOST_PORT} {COUNT} && echo connected all\n\
         wait $echo && echo echoed all\n\
         cat /proc/meminfo | head -2\n\
         sleep 1000"
    );
    let transcript = Transcript::default();
    let vm = MicroVm::create(config(release, &script).console(transcript.clone())).unwrap();
    let listener = vm.listen(HOST_PORT).unwrap();
    let vm = vm.start().unwrap();
    let vsock = vm.vsock().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            for at in 0..COUNT {
                let stream = listener.accept_timeout(PATIENCE);
                let stream = stream.unwrap_or_else(|error| {
                    panic!("connection {at}: {error}\n{}", transcript.text())
                });
                scope.spawn(move || echo(stream, at));
            }
        });
        // All of them are open before the first one is used.
        let streams: Vec<_> = (0..COUNT).map(|_| connect(&vsock, GUEST_PORT)).collect();
        for (seed, stream) in (0..).zip(streams) {
            scope.spawn(move || check_echo(&stream, seed));
        }
    });
    transcript.wait_for("connected all");
    transcript.wait_for("echoed all");
    let metrics = last_metrics(&vm);
    assert_eq!(metrics.opened_by_guest, u64::from(COUNT), "{metrics:?}");
    assert!(metrics.opened_by_host >= u64::from(COUNT), "{metrics:?}");
    let each_way = u64::from(COUNT / 10) * (768 << 10) + u64::from(COUNT - COUNT / 10) * (24 << 10);
    assert_eq!(metrics.bytes_to_guest, 2 * each_way, "{metrics:?}");
    assert_eq!(metrics.bytes_from_guest, 2 * each_way, "{metrics:?}");
    assert_eq!((metrics.active, metrics.reset), (0, 0), "{metrics:?}\n{}", transcript.text());
    drop(vm);
}

#[test]
fn vsock_echoes_hundreds_of_connections_both_ways_under_linux_6_1() {
    hundreds_both_ways(Release::Linux6_1);
}

#[test]
fn vsock_echoes_hundreds_of_connections_both_ways_under_linux_6_12() {
    hundreds_both_ways(Release::Linux6_12);
}

#[test]
fn vsock_survives_a_pause_and_ends_with_the_guest() {
    let script = "guest-tool vsock-echo 1000 1000 &\n\
                  echo q | guest-tool vsock-cat 7 || echo refused as it should\n\
                  guest-tool vsock-cat 2000 </dev/null\n\
                  poweroff -f";
    let transcript = Transcript::default();
    let config = config(Release::Linux6_12, script).console(transcript.clone());
    let vm = MicroVm::create(config).unwrap();
    let listener = vm.listen(HOST_PORT).unwrap();
    let vm = vm.start().unwrap();
    let mut cat = listener.accept_timeout(PATIENCE).unwrap();
    let vsock = vm.vsock().unwrap();
    let mut stream = connect(&vsock, GUEST_PORT);
    stream.write_all(b"before").unwrap();
    stream.read_exact(&mut [0; 6]).unwrap();
    assert_eq!(vm.connect(4242).unwrap_err().kind(), &ErrorKind::Refused);

    let vm = vm.pause().unwrap();
    stream.write_all(b"during").unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert_eq!(stream.read(&mut [0; 6]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    let error = vsock.connect_timeout(GUEST_PORT, Duration::from_millis(1)).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Timeout);
    let vm = vm.resume().unwrap();
    stream.set_read_timeout(None).unwrap();
    let mut text = [0; 6];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"during");

    // The guest ends while others wait for a connection or bytes, and nobody for its end.
    cat.write_all(b"good night\n").unwrap();
    drop(cat);
    assert_eq!(stream.read(&mut text).unwrap(), 0);
    let ended = ErrorKind::GuestEnded(ExitStatus::PoweredOff);
    assert_eq!(listener.accept().unwrap_err().kind(), &ended);
    assert_eq!(vsock.connect(GUEST_PORT).unwrap_err().kind(), &ended);
    let vm = transcript.end_of(vm);
    assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff);
    let text = transcript.text();
    assert!(text.contains("good night") && text.contains("refused as it should"), "{text}");
}
