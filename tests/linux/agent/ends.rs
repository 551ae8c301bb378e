use std::time::Duration;

use dormouse::{
    AgentConfig, BlockConfig, Entrypoint, ErrorKind, ExitStatus, Hook, HookName, Kernel, MicroVm,
    RootDisk, VmConfig,
};

use tokio::io::AsyncReadExt;

use super::{Guest, block_on, busybox, config};
use crate::devices::Image;
use crate::{Release, Transcript};

#[test]
fn a_guest_that_dies_before_it_is_ready_says_how() {
    block_on(async {
        // The kernel panics: its first process is no program.
        let archive = busybox().file("init", 0o755, "not a program");
        let config = VmConfig::new(Release::Linux6_12.kernel())
            .initramfs(archive.build().unwrap())
            .agent(AgentConfig::new());
        // Ours wins; so let the guest die in another way: by its command line.
        let cmdline = dormouse::Cmdline::default().push("rdinit=/nowhere").unwrap();
        let vm = MicroVm::create(config.cmdline(cmdline)).unwrap().start().unwrap();
        let error = vm.agent().await.unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::GuestEnded(ExitStatus::Panicked { .. })),
            "{error:?}"
        );
        assert!(error.console_tail().unwrap().contains("Kernel panic"), "{error:?}");
    });
}

#[test]
fn an_agent_that_cannot_make_the_guest_ready_says_why() {
    block_on(async {
        let image = Image::new("no-file-system", 8);
        let agent = AgentConfig::new().root(RootDisk::new(0).fs_type("ext4"));
        let config = config(agent).block(BlockConfig::new(&image.0));
        let vm = MicroVm::create(config).unwrap().start().unwrap();
        let error = vm.agent().await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Agent, "{error:?}");
        assert!(error.to_string().contains("vda"), "{error}");
    });
}

#[test]
fn a_kernel_without_the_modules_that_the_agent_needs_ends_and_says_which() {
    block_on(async {
        // As one that its user has unpacked, and that knows no modules.
        let kernel = Kernel::bytes(Release::Linux6_12.kernel().vmlinux().unwrap());
        let config = VmConfig::new(kernel).agent(AgentConfig::new());
        let vm = MicroVm::create(config).unwrap().start().unwrap();
        let error = vm.agent().await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::GuestEnded(ExitStatus::PoweredOff), "{error:?}");
        let tail = error.console_tail().unwrap();
        assert!(tail.contains("AgentConfig::modules_dir"), "{error:?}");
    });
}

/// There is vsock, and even a way to port 1000 of the host, which ends in the guest itself.
#[test]
fn a_kernel_whose_vsock_does_not_reach_the_host_ends_and_says_what_is_missing() {
    block_on(async {
        let folder = Release::Linux6_1.modules_dir().join("kernel/net/vmw_vsock");
        // In the order in which they need one another.
        let names = ["vsock", "vmw_vsock_virtio_transport_common", "vsock_loopback"];
        let archive = names.iter().enumerate().fold(busybox(), |archive, (at, name)| {
            let module = format!("dormouse/modules/{at:02}-{name}.ko");
            archive.host_file(&module, folder.join(name).with_extension("ko"))
        });
        let config = VmConfig::new(Kernel::bytes(Release::Linux6_1.kernel().vmlinux().unwrap()))
            .initramfs(archive.build().unwrap())
            .agent(AgentConfig::new());
        let vm = MicroVm::create(config).unwrap().start().unwrap();
        let error = vm.agent().await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::GuestEnded(ExitStatus::PoweredOff), "{error:?}");
        let tail = error.console_tail().unwrap();
        assert!(tail.contains("none over virtio"), "{error:?}");
        assert!(tail.contains("AgentConfig::modules_dir"), "{error:?}");
    });
}

#[test]
fn a_vm_without_an_agent_says_how_to_get_one() {
    block_on(async {
        let config = crate::config(Release::Linux6_12.kernel(), "sleep 1000");
        let vm = MicroVm::create(config).unwrap().start().unwrap();
        let error = vm.agent().await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Config);
        assert!(error.how_to_fix().unwrap().contains("AgentConfig"), "{error}");
    });
}

#[test]
fn a_shutdown_lets_programs_end_and_a_dead_guest_says_that_it_is_dead() {
    block_on(async {
        let entrypoint = "trap 'echo goodbye >/dev/console; exit' TERM; echo started; while true; do sleep 0.1; done";
        let hook = Hook::command(["sh", "-c", "echo the hook was run >/dev/console"]);
        let agent = AgentConfig::new()
            .entrypoint(Entrypoint::new(["sh", "-c", entrypoint]))
            .hook(HookName::Terminate, hook);
        let guest = Guest::boot(config(agent)).await;
        let Guest { vm, agent, transcript } = guest;
        transcript.wait_for("started\n");
        let waiting = agent.clone();
        let waiting = tokio::spawn(async move { waiting.exec("sleep", ["1000"]).await });
        // One that does not want to end is killed, when it has had its time.
        let stubborn = "trap '' TERM; echo; while true; do sleep 0.1; done";
        let mut stubborn = agent.command("sh").args(["-c", stubborn]).spawn().await.unwrap();
        stubborn.stdout.as_mut().unwrap().read_exact(&mut [0]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let vm = vm.shutdown(Duration::from_secs(10)).await;
        assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff, "{}", transcript.text());
        let text = transcript.text();
        let (hook, goodbye) = (text.find("the hook was run"), text.find("goodbye"));
        assert!(hook.is_some() && hook < goodbye, "{text}");
        // The program was ended, or its call was: either way nobody waits.
        let _ = waiting.await.unwrap();
        let error = agent.exec("true", [""; 0]).await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::GuestEnded(ExitStatus::PoweredOff), "{error}");
    });
}

#[test]
fn an_entrypoint_is_stopped_by_its_own_signal_and_ends_what_it_has_started_itself() {
    block_on(async {
        // Its worker ends well only if nobody but the entrypoint tells it to.
        let script = "exec >/dev/console; trap 'echo worker ends; exit' USR2; trap 'echo worker was cut off; exit' TERM; \
             while true; do sleep 0.1; done";
        let worker = format!("sh -c \"{script}\" & worker=$!");
        let entrypoint = format!(
            "{worker}; trap 'echo quits >/dev/console; kill -USR2 $worker; wait $worker; exit' QUIT; \
             trap 'echo the wrong signal >/dev/console; exit' TERM; echo started; while true; do sleep 0.1; done"
        );
        let entrypoint = Entrypoint::new(["sh", "-c", &entrypoint]).stop_signal("SIGQUIT");
        let guest = Guest::boot(config(AgentConfig::new().entrypoint(entrypoint))).await;
        let Guest { vm, agent, transcript } = guest;
        transcript.wait_for("started\n");
        // All others are asked by SIGTERM as ever.
        let other =
            "trap 'echo other ends >/dev/console; exit' TERM; echo; while true; do sleep 0.1; done";
        let mut other = agent.command("sh").args(["-c", other]).spawn().await.unwrap();
        let mut line = [0];
        other.stdout.as_mut().unwrap().read_exact(&mut line).await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let vm = vm.shutdown(Duration::from_secs(30)).await;
        assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff, "{}", transcript.text());
        let text = transcript.text();
        for said in ["quits", "worker ends", "other ends"] {
            assert!(text.contains(said), "{said} in {text}");
        }
        assert!(!text.contains("wrong") && !text.contains("cut off"), "{text}");
    });
}

#[test]
fn a_guest_ends_with_its_entrypoint_if_it_shall() {
    block_on(async {
        let entrypoint = Entrypoint::new(["sh", "-c", "echo worked as $(id -u) in $PWD with $A"]);
        let entrypoint = entrypoint.env("A", "b").current_dir("/tmp").user("user");
        let agent = AgentConfig::new().entrypoint(entrypoint).end_with_entrypoint(true);
        let transcript = Transcript::default();
        let vm = MicroVm::create(config(agent).console(transcript.clone())).unwrap();
        let vm = transcript.end_of(vm.start().unwrap());
        assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff);
        assert!(
            transcript.text().contains("worked as 1000 in /tmp with b"),
            "{}",
            transcript.text()
        );
    });
}
