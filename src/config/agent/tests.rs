//! What is taken, refused, told to the agent and saved.

use super::*;
use crate::config::{BlockConfig, Clock, NetConfig, RestoreOptions};
use crate::protocol::{self, Bytes, Setup, Wire};
use std::time::Duration;

/// A machine with two disks, the second one read-only, and one interface.
fn machine(agent: AgentConfig) -> MachineConfig {
    MachineConfig {
        blocks: vec![BlockConfig::new("/a"), BlockConfig::new("/b").read_only()],
        networks: vec![NetConfig::tap("tap0")],
        agent: Some(agent),
        ..MachineConfig::default()
    }
}

fn refusal(agent: AgentConfig) -> String {
    machine(agent).check().unwrap_err().to_string()
}

#[track_caller]
fn taken(agent: AgentConfig) {
    machine(agent).check().unwrap();
}

fn whole() -> AgentConfig {
    AgentConfig::new()
        .root(RootDisk::new(1).fs_type("squashfs").overlay_memory(0))
        .mount(MountConfig::new(0, "/data"))
        .hostname("worker-7.example")
        .interface(
            InterfaceConfig::new().address("10.0.0.2/24").address("fd00::2/64").gateway("10.0.0.1"),
        )
        .nameserver("fd00::1")
        .service("db", 5432, HostService::Tcp(([127, 0, 0, 1], 5432).into()))
        .service("log", 514, HostService::Unix("/run/log".into()))
        .hook(HookName::Ready, Hook::http(9000))
        .hook(HookName::Suspend, Hook::command(["sync"]).timeout(Duration::from_secs(1)))
        .entrypoint(
            Entrypoint::new(["app", "-x"])
                .env("A", "b")
                .current_dir("/srv")
                .user("app:app")
                .stop_signal("SIGRTMIN+3"),
        )
        .end_with_entrypoint(true)
        .module("nf-tables")
        .modules_dir("/lib/modules/6.1")
        .binary("/agent")
}

#[test]
fn the_agent_is_told_what_is_configured() {
    taken(whole());
    let setup = Setup::from_bytes(&whole().setup().to_bytes()).unwrap();
    let root = setup.root.unwrap();
    assert_eq!((root.disk, root.fs_type.as_deref()), (1, Some("squashfs")));
    assert_eq!(root.overlay, protocol::Overlay::Memory(0));
    assert_eq!(setup.mounts[0].path, Bytes::from("/data"));
    assert_eq!(setup.hostname.as_deref(), Some("worker-7.example"));
    assert_eq!(setup.interfaces[0].addresses, ["10.0.0.2/24", "fd00::2/64"]);
    assert_eq!(setup.interfaces[0].gateways, ["10.0.0.1"]);
    assert_eq!(setup.nameservers, ["fd00::1"]);
    let services: Vec<_> = setup.services.iter().map(|s| (s.name.as_str(), s.port)).collect();
    assert_eq!(services, [("db", 5432), ("log", 514)]);
    let program = setup.entrypoint.unwrap();
    assert_eq!(program.argv, [Bytes::from("app"), Bytes::from("-x")]);
    assert_eq!(program.env[0], (Bytes::from("A"), Bytes::from("b")));
    assert_eq!(program.env[1].0, Bytes::from("PATH"));
    assert_eq!(program.cwd, Some(Bytes::from("/srv")));
    assert_eq!(program.user.as_deref(), Some("app:app"));
    assert_eq!(setup.stop_signal, Some(37));
    assert!(setup.end_with_entrypoint);

    let own = AgentConfig::new().entrypoint(Entrypoint::new(["x"]).env("PATH", "/own"));
    let env = own.setup().entrypoint.unwrap().env;
    assert_eq!(env, [(Bytes::from("PATH"), Bytes::from("/own"))]);
}

#[test]
fn a_vm_with_an_agent_has_a_vsock_device_whatever_was_said_first() {
    assert_eq!(MachineConfig::default().vsock(), None);
    assert_eq!(MachineConfig::default().agent_port(), None);
    let mut machine = machine(AgentConfig::new());
    assert_eq!(machine.vsock(), Some(VsockConfig::default()));
    assert_eq!(machine.agent_port(), Some(protocol::HOST_PORT));
    machine.vsock = Some(VsockConfig::default().guest_cid(9));
    assert_eq!(machine.vsock(), Some(VsockConfig::default().guest_cid(9)));
}

#[test]
fn the_vsock_device_of_an_agent_counts() {
    let disks = vec![BlockConfig::new("/a"); 19];
    let machine = MachineConfig { blocks: disks, ..machine(AgentConfig::new()) };
    assert!(machine.check().is_err());
}

#[test]
fn it_is_written_and_read_again_without_what_only_the_boot_needs() {
    let json = serde_json::to_string(&whole()).unwrap();
    assert_eq!(serde_json::from_str::<AgentConfig>(&json).unwrap(), whole());
    assert_eq!(serde_json::from_str::<AgentConfig>("{}").unwrap(), AgentConfig::new());

    let written = serde_json::to_value(machine(whole())).unwrap();
    let kernel = serde_json::json!({"source": {"file": "/k"}});
    let mut all = serde_json::Map::from_iter([("kernel".to_owned(), kernel)]);
    all.extend(written.as_object().unwrap().clone());
    let config: crate::VmConfig = serde_json::from_value(all.into()).unwrap();
    assert_eq!(config.parts().3.agent, Some(whole()));

    let saved = machine(whole()).to_be_saved();
    let agent = saved.agent.clone().unwrap();
    assert_eq!((agent.binary.clone(), agent.modules_dir.clone()), (None, None));
    let again = agent.binary("/agent").modules_dir("/lib/modules/6.1");
    assert_eq!(again, whole());
    assert_eq!(saved.vsock, Some(VsockConfig::default()));
    let bytes = rmp_serde::to_vec_named(&saved).unwrap();
    let read: MachineConfig = rmp_serde::from_slice(&bytes).unwrap();
    assert_eq!(read.agent, saved.agent);
}

#[test]
fn disks_that_are_not_there_or_used_twice_or_read_only_are_refused() {
    let root = |root| AgentConfig::new().root(root);
    assert_eq!(refusal(root(RootDisk::new(2))), "the root is disk 2, counted from 0: the VM has 2");
    let none: crate::Error = machine(root(RootDisk::new(2))).check().unwrap_err().into();
    assert!(none.how_to_fix().unwrap().contains("VmConfig::block"), "{none}");
    assert!(refusal(root(RootDisk::new(usize::MAX))).contains("18446744073709551615"));
    assert!(refusal(root(RootDisk::new(1))).contains("may only read"));
    taken(root(RootDisk::new(1).read_only()));
    taken(root(RootDisk::new(1).overlay_disk(0)));
    assert!(refusal(root(RootDisk::new(0).overlay_disk(1))).contains("the overlay, disk 1"));
    assert_eq!(refusal(root(RootDisk::new(0).overlay_disk(0))), "disk 0 is mounted twice");
    assert!(refusal(root(RootDisk::new(0).overlay_memory(1 << 40))).contains("overlay of"));
    for bad in ["", "ext 4", "ext4\0", &"x".repeat(33)] {
        assert!(refusal(root(RootDisk::new(0).fs_type(bad))).contains("file system"), "{bad:?}");
    }
}

#[test]
fn mounts_have_paths_of_their_own() {
    let mount = |mount| AgentConfig::new().mount(mount);
    for bad in ["", "data", "/", "//", "/.", "/a/../b", "/a\0", &format!("/{}", "a".repeat(4095))] {
        let refused = refusal(mount(MountConfig::new(0, bad)));
        assert!(refused.contains("absolute one"), "{bad:?}: {refused}");
    }
    let twice = mount(MountConfig::new(0, "/a")).mount(MountConfig::new(1, "/a/").read_only());
    assert_eq!(refusal(twice), "two disks are mounted at /a/");
    assert!(refusal(mount(MountConfig::new(1, "/a"))).contains("may only read"));
    let root = mount(MountConfig::new(0, "/a")).root(RootDisk::new(0));
    assert_eq!(refusal(root), "disk 0 is mounted twice");
}

#[test]
fn hostnames_are_those_of_rfc_1123() {
    let label = "a".repeat(63);
    for good in ["a", "7", "web-1", "a.b.example", &label] {
        taken(AgentConfig::new().hostname(good));
    }
    for bad in ["", "-a", "a-", "a..b", ".a", "a.", "a_b", "ä", "a b", "a\n", &"a".repeat(64)] {
        assert!(refusal(AgentConfig::new().hostname(bad)).contains("RFC 1123"), "{bad:?}");
    }
}

#[test]
fn addresses_are_addresses() {
    let address = |text: &str| AgentConfig::new().interface(InterfaceConfig::new().address(text));
    for good in ["0.0.0.0/0", "10.0.0.2/32", "::/0", "fd00::2/128"] {
        taken(address(good));
    }
    let bad = [
        "",
        "10.0.0.2",
        "10.0.0.2/33",
        "10.0.0/24",
        "fd00::2/129",
        "1.1.1.1/+8",
        "1.1.1.1/08",
        "a/8",
    ];
    for bad in bad {
        assert!(refusal(address(bad)).contains("with a prefix"), "{bad:?}");
    }
    let gateway = AgentConfig::new().interface(InterfaceConfig::new().gateway("10.0.0.1/24"));
    assert!(refusal(gateway).contains("a gateway"));
    assert!(refusal(AgentConfig::new().nameserver("dns")).contains("a name server"));
    let two = address("10.0.0.2/24").interface(InterfaceConfig::new());
    assert_eq!(refusal(two), "addresses of 2 network interfaces: the VM has 1");
}

#[test]
fn services_have_names_and_ports_of_their_own() {
    let to = || HostService::Tcp(([127, 0, 0, 1], 80).into());
    let service = |name: &str, port| AgentConfig::new().service(name, port, to());
    assert!(refusal(service("", 1)).contains("printable"));
    assert!(refusal(service("a\n", 1)).contains("printable"));
    assert!(refusal(service(&"a".repeat(65), 1)).contains("printable"));
    assert_eq!(refusal(service("a", 0)), "port 0 of the service \"a\"");
    assert_eq!(
        refusal(service("a", 1).service("b", 1, to())),
        "two services at port 1 of the guest"
    );
    let nowhere = HostService::Tcp(([127, 0, 0, 1], 0).into());
    assert!(refusal(AgentConfig::new().service("a", 1, nowhere)).contains("port 0"));
    for bad in ["", "run/x", "/a\0", &format!("/{}", "a".repeat(107))] {
        let agent = AgentConfig::new().service("a", 1, HostService::Unix(bad.into()));
        assert!(refusal(agent).contains("absolute path"), "{bad:?}");
    }
}

#[test]
fn hooks_are_programs_or_requests_with_a_deadline() {
    let hook = |hook| AgentConfig::new().hook(HookName::Run, hook);
    assert_eq!(refusal(hook(Hook::command([""; 0]))), "the hook run is no program");
    assert!(refusal(hook(Hook::command(["a", "\0"]))).contains("NUL"));
    assert!(refusal(hook(Hook::command(["a", &"b".repeat(128 << 10)]))).contains("longer"));
    assert_eq!(refusal(hook(Hook::http(0))), "port 0 of the hook run");
    for bad in ["", "x", "/ x", "/ä", "/\r\nx"] {
        assert!(refusal(hook(Hook::http_at(1, bad))).contains("begins with `/`"), "{bad:?}");
    }
    for bad in [0, 999, 86_400_001] {
        let hook = hook(Hook::http(1).timeout(Duration::from_millis(bad)));
        assert!(refusal(hook).contains("1 s to 24 h"), "{bad}");
    }
    let path = Hook::http(1).action.http_path(HookName::Run);
    assert_eq!(path.as_deref(), Some("/aws/lambda-microvms/runtime/v1/run"));
    assert_eq!(Hook::http_at(1, "/x").action.http_path(HookName::Run).as_deref(), Some("/x"));
    assert_eq!(Hook::command(["x"]).action.http_path(HookName::Run), None);
}

#[test]
fn an_entrypoint_that_could_not_be_started_is_refused() {
    let entry = |entry| AgentConfig::new().entrypoint(entry);
    let new = || Entrypoint::new(["a"]);
    assert_eq!(refusal(entry(Entrypoint::new([""]))), "the entrypoint is no program");
    for (name, value) in [("", "x"), ("a=b", "x"), ("a\0", "x"), ("a", "\0")] {
        assert!(refusal(entry(new().env(name, value))).contains("variable"), "{name:?}={value:?}");
    }
    assert!(refusal(entry(new().current_dir("srv"))).contains("working directory"));
    for bad in ["", ":", "a:", ":b", "a:b:c", "a b", "a\n"] {
        assert!(refusal(entry(new().user(bad))).contains("uid:gid"), "{bad:?}");
    }
    taken(entry(new().user("1000:1000")));
    for bad in ["", "SIG", "SIGNOPE", "0", "65"] {
        assert!(refusal(entry(new().stop_signal(bad))).contains("SIGQUIT, QUIT, 3"), "{bad:?}");
    }
    assert_eq!(entry(new()).setup().stop_signal, None);
    let large = (0..9).fold(new(), |entry, at| entry.env(format!("V{at}"), "x".repeat(120 << 10)));
    assert!(refusal(entry(large)).contains("up to 1048576"));
    assert!(refusal(AgentConfig::new().end_with_entrypoint(true)).contains("and has none"));
}

#[test]
fn modules_are_names_and_not_many() {
    for bad in ["", "../x", "a b", &"m".repeat(56)] {
        assert!(refusal(AgentConfig::new().module(bad)).contains("module"), "{bad:?}");
    }
    let many = (0..65).fold(AgentConfig::new(), |agent, at| agent.module(format!("m{at}")));
    assert_eq!(refusal(many), "65 extra modules: it takes up to 64");
}

/// A snapshot of more could not be read.
#[test]
fn lists_are_no_longer_than_a_snapshot_may_have_them() {
    let many = (0..1025).fold(AgentConfig::new(), |agent, _| agent.nameserver("10.0.0.1"));
    assert_eq!(refusal(many), "1025 name servers: it takes up to 1024");
}

#[test]
fn a_clone_has_what_is_said_of_it_in_place_of_what_was_saved() {
    let mut config = machine(whole());
    let elsewhere = HostService::Unix("/run/other".into());
    let mut options = RestoreOptions::new();
    options.hostname = Some("clone".into());
    options.interfaces = vec![InterfaceConfig::new().address("10.0.0.3/24")];
    options.services = [("db".to_owned(), elsewhere.clone())].into();
    options.apply(&mut config).unwrap();
    config.check().unwrap();
    let agent = config.agent.unwrap();
    assert_eq!(agent.hostname.as_deref(), Some("clone"));
    assert_eq!(agent.interfaces[0].addresses, ["10.0.0.3/24"]);
    assert_eq!(agent.services["db"], ServicePort { port: 5432, service: elsewhere.clone() });
    assert_eq!(agent.services["log"], whole().services["log"]);

    let mut none = machine(AgentConfig::new());
    let error = options.apply(&mut none).unwrap_err().to_string();
    assert_eq!(error, "the snapshot's agent has no service \"db\"");
    let error = options.apply(&mut MachineConfig::default()).unwrap_err().to_string();
    assert_eq!(error, "the snapshot has no agent, whose hostname could be another");
}

/// Somebody has to set the wall clock of a guest whose clocks stood still.
#[test]
fn the_clocks_of_a_guest_with_an_agent_stand_still_unless_said_otherwise() {
    let (with, without) = (machine(whole()), MachineConfig::default());
    let options = RestoreOptions::new();
    assert_eq!(options.clock_of(&with), Clock::Freeze);
    assert_eq!(options.clock_of(&without), Clock::Advance);
    for clock in [Clock::Freeze, Clock::Advance] {
        let options = RestoreOptions::new().clock(clock);
        assert_eq!([&with, &without].map(|config| options.clock_of(config)), [clock; 2]);
    }
}

/// As of other parts: what is added is written only where it is not its default.
#[test]
fn a_plain_agent_is_written_with_the_names_that_each_reader_of_this_version_knows() {
    let known = "binary end_with_entrypoint entrypoint hooks hostname interfaces modules modules_dir mounts nameservers \
        root services";
    let written = serde_json::to_value(AgentConfig::default()).unwrap();
    assert!(written.as_object().unwrap().keys().eq(known.split(' ')), "{written:#}");
}
