//! Network interfaces: what is refused, and what is left of them.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use dormouse::{DeviceMetrics, ErrorKind, MicroVm, NetConfig, UserNetwork};

use crate::guest::Program;
use crate::scratch::Scratch;
use crate::{config, resources};

/// The child processes of this one, zombies too.
fn children() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists.map(|list| list.split_whitespace().count()).sum()
}

#[test]
fn interfaces_of_every_kind_leave_nothing_behind() {
    if !resources::alone("interfaces_of_every_kind_leave_nothing_behind") {
        return;
    }
    let scratch = Scratch::new();
    let passt = scratch.join("stand-in");
    fs::write(&passt, "#!/bin/sh\nexec sleep 1000\n").unwrap();
    fs::set_permissions(&passt, fs::Permissions::from_mode(0o755)).unwrap();
    let round = || {
        let (one, other) = NetConfig::pair().unwrap();
        let user = NetConfig::user(UserNetwork::new().program(&passt));
        let one = config(&Program::Heartbeat).network(one).network(user);
        let one = MicroVm::create(one).unwrap().start().unwrap();
        let other = MicroVm::create(config(&Program::Halt).network(other)).unwrap();
        assert!(one.metrics().iter().all(|metrics| matches!(metrics, DeviceMetrics::Net(_))));
        assert_eq!(children(), 1);
        drop(one.terminate());
        drop(other);
    };
    let wait = || {
        let begin = std::time::Instant::now();
        while children() > 0 {
            assert!(begin.elapsed() < crate::PATIENCE, "a child lives, or is a zombie");
            std::thread::yield_now();
        }
    };
    for _ in 0..3 {
        round();
        wait();
    }
    let before = resources::settled();
    for _ in 0..50 {
        round();
        wait();
    }
    resources::assert_back_to(&before);
}

#[test]
fn networks_that_cannot_be_are_refused_with_the_fix() {
    let (one, _other) = NetConfig::pair().unwrap();
    let null = fs::File::open("/dev/null").unwrap();
    let no_passt = UserNetwork::new().program("/no/such/passt");
    for (network, kind, words) in [
        (NetConfig::tap("tap0").mtu(67), ErrorKind::Config, "68 to 65535"),
        (one.mac([0x33, 0x33, 0, 0, 0, 1]), ErrorKind::Config, "33:33:00:00:00:01"),
        (NetConfig::tap("a/b"), ErrorKind::Config, "a/b"),
        (NetConfig::tap_fd(null), ErrorKind::Network, "IFF_VNET_HDR"),
        (NetConfig::user(no_passt), ErrorKind::Network, "apt install passt"),
        // The loopback device is there, and no tap; or there is no /dev/net/tun; or no right.
        (NetConfig::tap("lo"), ErrorKind::Network, "cannot"),
    ] {
        let error = MicroVm::create(config(&Program::Halt).network(network)).unwrap_err();
        assert_eq!(error.kind(), &kind, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
}
