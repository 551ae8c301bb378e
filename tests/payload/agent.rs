//! VMs that are configured with an agent, as far as they can be without one that runs.

use std::fs;
use std::path::PathBuf;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use dormouse::{
    AgentConfig, ErrorKind, ExitStatus, HostService, MicroVm, RestoreOptions, VmConfig, VsockConfig,
};

use crate::blocking::blocking;
use crate::guest::Program;
use crate::scratch::Scratch;
use crate::{PATIENCE, config, resources};

/// The port of the host at which agents call.
const AGENT_PORT: u32 = 1000;

/// What passes for an agent where none is run. It goes with the test.
struct Binary(PathBuf);

impl Binary {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("dormouse-{}-agent-{name}", std::process::id()));
        let mut binary = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0".to_vec();
        binary.resize(4096, 0);
        fs::write(&path, binary).unwrap();
        Self(path)
    }

    fn config(&self) -> VmConfig {
        config(&Program::Heartbeat).agent(AgentConfig::new().binary(&self.0))
    }
}

impl Drop for Binary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn the_agents_port_is_taken_in_a_vm_that_is_made_and_in_its_clones() {
    let binary = Binary::new("port");
    for config in [
        binary.config(),
        binary.config().vsock(VsockConfig::default().guest_cid(9)),
        config(&Program::Heartbeat)
            .vsock(VsockConfig::default())
            .agent(AgentConfig::new().binary(&binary.0)),
    ] {
        let vm = MicroVm::create(config).unwrap();
        assert_eq!(vm.listen(AGENT_PORT).unwrap_err().kind(), &ErrorKind::PortInUse);
        drop(vm.listen(AGENT_PORT + 1).unwrap());
        let mut vm = vm.start().unwrap().pause().unwrap();
        let clone = vm.fork(1).unwrap().remove(0).resume().unwrap();
        assert_eq!(clone.listen(AGENT_PORT).unwrap_err().kind(), &ErrorKind::PortInUse);
        let woken = vm.suspend_in_memory().unwrap().resume().unwrap();
        assert_eq!(woken.listen(AGENT_PORT).unwrap_err().kind(), &ErrorKind::PortInUse);
    }
}

#[test]
fn without_a_runtime_an_agent_cannot_be_had_and_says_why() {
    let binary = Binary::new("runtime");
    let vm = MicroVm::create(binary.config()).unwrap().start().unwrap();
    let context = &mut Context::from_waker(Waker::noop());
    for polled in [pin!(vm.agent()).poll(context), pin!(vm.agent_timeout(PATIENCE)).poll(context)] {
        let Poll::Ready(Err(error)) = polled else { panic!("{polled:?}") };
        assert_eq!(error.kind(), &ErrorKind::Config);
        assert!(error.how_to_fix().unwrap().contains("tokio::main"), "{error}");
    }
    // It ends all the same.
    let Poll::Ready(vm) = pin!(vm.shutdown(PATIENCE)).poll(context) else { panic!("it waits") };
    assert_eq!(vm.exit_status(), &ExitStatus::Terminated);
}

#[test]
fn what_is_said_of_a_clones_agent_is_checked() {
    let binary = Binary::new("clones");
    let mut vm = MicroVm::create(binary.config()).unwrap().start().unwrap().pause().unwrap();
    let mut refusal = |options: RestoreOptions| {
        let error = vm.fork_with(1, |_| options.clone()).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Config, "{error}");
        error.to_string()
    };
    assert!(refusal(RestoreOptions::new().hostname("a b")).contains("RFC 1123"));
    let elsewhere = HostService::Unix("/run/x".into());
    assert!(refusal(RestoreOptions::new().service("db", elsewhere)).contains("no service \"db\""));
    vm.fork_with(2, |at| RestoreOptions::new().hostname(format!("clone-{at}"))).unwrap();

    let mut other =
        MicroVm::create(config(&Program::Heartbeat)).unwrap().start().unwrap().pause().unwrap();
    let error = other.fork_with(1, |_| RestoreOptions::new().hostname("x")).unwrap_err();
    assert!(error.to_string().contains("no agent"), "{error}");
}

#[test]
fn a_snapshot_of_somebody_else_does_not_connect_its_guest_to_the_host() {
    let binary = Binary::new("outside");
    let agent = AgentConfig::new().binary(&binary.0);
    let agent = agent.service("ssh", 22, HostService::Tcp(([127, 0, 0, 1], 22).into()));
    let vm = MicroVm::create(config(&Program::Heartbeat).agent(agent)).unwrap();
    let vm = vm.start().unwrap().pause().unwrap();
    let scratch = Scratch::new();
    let snapshot = vm.snapshot(scratch.join("services")).unwrap();
    let error = snapshot.restore().unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Snapshot);
    assert!(error.how_to_fix().unwrap().contains("RestoreOptions::service"), "{error}");
    drop(snapshot.restore_with(&RestoreOptions::new().outside_paths(true)).unwrap());
    let own = RestoreOptions::new().service("ssh", HostService::Unix("/run/ssh".into()));
    drop(snapshot.restore_with(&own).unwrap());
}

#[test]
fn vms_with_agents_leave_nothing_behind() {
    if !resources::alone("vms_with_agents_leave_nothing_behind") {
        return;
    }
    let binary = Binary::new("leak");
    let round = || {
        let vm = MicroVm::create(binary.config()).unwrap().start().unwrap();
        let mut vm = vm.pause().unwrap();
        drop(vm.fork(1).unwrap());
        drop(vm.resume().unwrap().terminate());
    };
    for _ in 0..10 {
        round();
    }
    let before = resources::settled();
    for _ in 0..50 {
        round();
    }
    resources::assert_back_to(&before);
}

#[test]
fn the_end_of_a_shutdown_holds_up_no_thread_of_its_runtime() {
    let (writer, mut gate) = blocking();
    let vm = MicroVm::create(config(&Program::Heartbeat).console(writer)).unwrap().start().unwrap();
    gate.until_begun();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // The end waits for the console's writer, and that for another task of the only thread.
    let ended = runtime.block_on(async {
        let other = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            gate.open();
        };
        tokio::join!(vm.shutdown(Duration::ZERO), other).0
    });
    assert_eq!(ended.exit_status(), &ExitStatus::Terminated);
    assert_eq!(gate.was_let_go(), Some(true));
}
