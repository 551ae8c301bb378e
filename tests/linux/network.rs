//! Network interfaces under the drivers of stock kernels, over taps, passt and between two VMs.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use dormouse::{
    Cmdline, DeviceMetrics, ExitStatus, Initramfs, InitramfsBuilder, MicroVm, NetConfig,
    NetMetrics, Running, UserNetwork, VmConfig,
};

use crate::devices::initramfs_with;
use crate::{PATIENCE, Release, Transcript, guest_root, programs};

const MODULES: &[&str] = &["virtio_mmio", "virtio_net"];

/// A VM whose init runs `script` when the network's driver is there.
fn config(release: Release, script: &str) -> VmConfig {
    finished(release, initramfs_with(release, MODULES, script))
}

fn finished(release: Release, archive: InitramfsBuilder) -> VmConfig {
    let archive: Initramfs = archive.build().unwrap();
    VmConfig::new(release.kernel())
        .initramfs(archive)
        .cmdline(Cmdline::default().push("quiet").unwrap())
        .memory_mib(256)
}

/// Runs the machine's own busybox, which has to succeed.
fn busybox(arguments: &str) {
    let status = Command::new(guest_root().join("bin/busybox"))
        .args(arguments.split_whitespace())
        .status()
        .unwrap();
    assert!(status.success(), "{arguments}");
}

/// Gives an interface of this machine an address.
pub fn set_up(tap: &str, address: &str) {
    busybox(&format!("ip addr add {address} dev {tap}"));
    busybox(&format!("ip link set {tap} up"));
}

/// Removes an interface of this machine (RTM_DELLINK).
fn delete(name: &str) {
    let index: u32 = std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let mut message = Vec::new();
    message.extend(32u32.to_ne_bytes());
    message.extend(libc::RTM_DELLINK.to_ne_bytes());
    message.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    message.extend([0; 12]); // sequence, port, family, type
    message.extend(index.to_ne_bytes());
    message.extend([0; 8]); // flags, change
    // SAFETY: the new descriptor is nobody else's; the message is borrowed for the call.
    let sent = unsafe {
        let socket = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
        assert!(socket >= 0);
        let socket = OwnedFd::from_raw_fd(socket);
        libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0)
    };
    assert_eq!(sent, 32);
    assert!(!Path::new("/sys/class/net").join(name).exists());
}

/// A VM, and what it says.
fn start(config: VmConfig) -> (MicroVm<Running>, Transcript) {
    let transcript = Transcript::default();
    let vm = MicroVm::create(config.console(transcript.clone())).unwrap();
    (vm.start().unwrap(), transcript)
}

fn counters(vm: &MicroVm<Running>) -> NetMetrics {
    match vm.metrics()[0] {
        DeviceMetrics::Net(metrics) => metrics,
        other => panic!("{other:?}"),
    }
}

fn ends(vm: MicroVm<Running>, transcript: &Transcript) -> String {
    let vm = transcript.end_of(vm);
    let text = transcript.text();
    assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff, "{text}");
    text
}

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A counter of /proc/net/snmp: a line of names, and one of values.
fn icmp(text: &str, counter: &str) -> Option<u32> {
    let mut lines = text.lines().filter(|line| line.starts_with("Icmp:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let at = names.split(' ').position(|name| name == counter)?;
    values.split(' ').nth(at)?.parse().ok()
}

fn iperf3_over_a_tap(release: Release, tap: &str, net: &str, pings: u32) {
    // ping -A sends one more at each answer. It sends also when its interval is over, which is a second by default: of one
    // who stands still for that long, there are two on the way from then on, and one too many at the end.
    let part = pings / 10;
    let script = format!(
        r#"
mkdir /tmp
echo "mac=$(cat /sys/class/net/eth0/address) mtu=$(cat /sys/class/net/eth0/mtu)"
ip addr add {net}.2/24 dev eth0; ip link set eth0 up
ping -c 1 -W 10 {net}.1 > /dev/null && echo reached
iperf3 -c {net}.1 -t 3 > /out 2>&1 && echo sent && grep receiver /out || cat /out
iperf3 -c {net}.1 -t 3 -R > /out 2>&1 && echo received && grep receiver /out || cat /out
for round in 1 2 3 4 5 6 7 8 9 10; do
    ping -q -A -i 600 -c {part} {net}.1 | grep -E 'transmitted|round-trip'
done
grep Icmp: /proc/net/snmp; echo counted
poweroff -f"#
    );
    let archive = programs::add(initramfs_with(release, MODULES, &script), "iperf3");
    let network = NetConfig::tap(tap).mac([2, 0, 0, 0xab, 0xcd, 0xef]).mtu(1400);
    let config = finished(release, archive).vcpus(2).network(network);
    let transcript = Transcript::default();
    let vm = MicroVm::create(config.console(transcript.clone())).unwrap();
    set_up(tap, &format!("{net}.1/24"));
    let server = programs::command("iperf3")
        .args(["-s", "-B", &format!("{net}.1")])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let _server = Process(server);
    let vm = vm.start().unwrap();
    transcript.wait_for("counted\n");
    let metrics = counters(&vm);
    let text = ends(vm, &transcript);
    assert!(text.contains("mac=02:00:00:ab:cd:ef mtu=1400\n"), "{text}");
    for word in ["reached", "sent", "received"] {
        assert!(text.contains(&format!("{word}\n")), "{text}");
    }
    // By the kernel's count, one for each ping and the first.
    for counter in ["OutEchos", "InEchoReps"] {
        assert_eq!(icmp(&text, counter), Some(pings + 1), "{counter} in {text}");
    }
    assert!(metrics.rx_bytes > 1 << 20 && metrics.tx_bytes > 1 << 20, "{metrics:?}");
    assert_eq!(metrics.rx_dropped, 0, "{metrics:?}");
    // The VM's own threads close it.
    let begin = Instant::now();
    while Path::new("/sys/class/net").join(tap).exists() {
        assert!(begin.elapsed() < PATIENCE, "the tap outlives its VM");
        std::thread::yield_now();
    }
}

#[test]
fn iperf3_and_pings_over_a_tap_under_linux_6_1() {
    iperf3_over_a_tap(Release::Linux6_1, "dm61", "10.61.0", 1000);
}

#[test]
fn iperf3_and_pings_over_a_tap_under_linux_6_12() {
    iperf3_over_a_tap(Release::Linux6_12, "dm612", "10.62.0", 10_000);
}

#[test]
fn two_machines_ping_one_another_over_a_pair() {
    let script = |own: &str, other: &str, then: &str| {
        format!(
            "ip addr add {own}/24 dev eth0; ip link set eth0 up\n\
             cat /sys/class/net/eth0/address\n\
             until ping -c 1 -W 1 {other} > /dev/null; do true; done\n\
             ping -q -A -i 600 -c 1000 -s 1400 {other} | grep transmitted\n\
             {then}\npoweroff -f"
        )
    };
    // The first one leaves when the other's end of the cable is gone.
    let first = "while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done";
    let (one, other) = NetConfig::pair().unwrap();
    let first = config(Release::Linux6_1, &script("10.9.0.1", "10.9.0.2", first)).network(one);
    let second =
        config(Release::Linux6_12, &script("10.9.0.2", "10.9.0.1", "read line < /dev/ttyS0"))
            .network(other);
    let (first, first_said) = start(first);
    let (second, second_said) = start(second);
    // The second answers until the first has asked all.
    first_said.wait_for("packets transmitted");
    second.console_input(b"go\n").unwrap();
    let second = ends(second, &second_said);
    let first = ends(first, &first_said);
    for text in [&first, &second] {
        let lossless = "1000 packets transmitted, 1000 packets received, 0% packet loss";
        assert!(text.contains(lossless), "{text}");
    }
    let mac = |text: &str| text.lines().next().unwrap().to_owned();
    assert_ne!(mac(&first), mac(&second), "random addresses differ");
}

#[test]
fn a_second_interface_works_and_a_tap_may_be_removed_under_the_guest() {
    let script = r#"
ip addr add 10.70.0.2/24 dev eth0; ip link set eth0 up
ip addr add 10.71.0.2/24 dev eth1; ip link set eth1 up
ping -c 3 -W 10 -q 10.70.0.1 | grep transmitted; ping -c 3 -q 10.71.0.1 | grep transmitted
echo remove it
while [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do sleep 0.1; done
echo "carriers $(cat /sys/class/net/eth0/carrier) $(cat /sys/class/net/eth1/carrier)"
ping -c 3 -q 10.71.0.1 | grep transmitted; ping -c 1 -W 1 10.70.0.1 > /dev/null || echo gone
poweroff -f"#;
    let config = config(Release::Linux6_12, script)
        .network(NetConfig::tap("dm70"))
        .network(NetConfig::tap("dm71"));
    let transcript = Transcript::default();
    let vm = MicroVm::create(config.console(transcript.clone())).unwrap();
    set_up("dm70", "10.70.0.1/24");
    set_up("dm71", "10.71.0.1/24");
    let vm = vm.start().unwrap();
    transcript.wait_for("remove it");
    delete("dm70");
    transcript.wait_for("gone");
    let text = ends(vm, &transcript);
    assert_eq!(text.matches("3 packets received, 0% packet loss").count(), 3, "{text}");
    assert!(text.contains("carriers 0 1"), "{text}");
}

#[test]
fn a_guest_reaches_the_loopback_of_the_host_through_passt() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        // What is not read by the end resets the connection.
        assert!(connection.read(&mut [0; 1024]).unwrap() > 0);
        let body = vec![b'.'; 1 << 20];
        write!(connection, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).unwrap();
        connection.write_all(&body).unwrap();
    });
    let script = format!(
        r#"
ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ip route add default via 10.0.2.2
wget -q -O /page http://10.0.2.2:{port}/ && echo "page of $(wc -c < /page)"
echo "mtu=$(cat /sys/class/net/eth0/mtu)"
poweroff -f"#
    );
    let network = UserNetwork::new()
        .program(programs::program("passt"))
        .address([10, 0, 2, 15])
        .gateway([10, 0, 2, 2])
        .host_loopback(true);
    let config = config(Release::Linux6_12, &script).network(NetConfig::user(network));
    let (vm, transcript) = start(config);
    let text = ends(vm, &transcript);
    assert!(text.contains("page of 1048576"), "{text}");
    server.join().unwrap();
}
