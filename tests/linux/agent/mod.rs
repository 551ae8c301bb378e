//! Guests with the agent as their first process.

mod ends;
mod exec;
mod files;
mod identity;
mod network;
mod ports;
mod root;
mod template;

use std::time::{Duration, Instant};

use dormouse::{
    Agent, AgentConfig, Cmdline, Error, GuestStream, Initramfs, InitramfsBuilder, MicroVm, Running,
    VmConfig,
};

use crate::{PATIENCE, Release, Transcript, guest_root};

/// Runs what a test awaits: a boot and many waits, each of which may take as long as one has patience for. Ends only what hangs.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(5 * PATIENCE, future).await.unwrap() })
}

/// Files for the guest: busybox, under the names of all that it does.
pub(crate) fn busybox() -> InitramfsBuilder {
    let links = [
        "sh",
        "cat",
        "ls",
        "sleep",
        "stty",
        "id",
        "nc",
        "httpd",
        "ps",
        "mount",
        "true",
        "ping",
        "dd",
        "rm",
        "date",
        "env",
        "kill",
        "test",
        "wc",
        "mkdir",
        "sha256sum",
        "head",
        "tr",
        "stat",
        "tty",
        "setsid",
        "nslookup",
        "ip",
        "df",
    ];
    let archive = Initramfs::builder()
        .host_file("bin/busybox", guest_root().join("bin/busybox"))
        .file("etc/passwd", 0o644, "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")
        .file("etc/group", 0o644, "root:x:0:\nuser:x:1000:\nextra:x:1234:other,user\n")
        .directory("tmp", 0o1777)
        .directory("root", 0o700);
    links
        .into_iter()
        .fold(archive, |archive, name| archive.symlink(&format!("bin/{name}"), "busybox"))
}

pub(crate) fn config_of(
    release: Release,
    archive: InitramfsBuilder,
    agent: AgentConfig,
) -> VmConfig {
    VmConfig::new(release.kernel())
        .initramfs(archive.build().unwrap())
        .cmdline(Cmdline::default().push("quiet").unwrap())
        .agent(agent)
}

fn config(agent: AgentConfig) -> VmConfig {
    config_of(Release::Linux6_12, busybox(), agent)
}

/// A guest whose agent is ready.
pub(crate) struct Guest {
    vm: MicroVm<Running>,
    agent: Agent,
    transcript: Transcript,
}

impl Guest {
    pub(crate) async fn boot(config: VmConfig) -> Self {
        let transcript = Transcript::default();
        let vm = MicroVm::create(config.console(transcript.clone())).unwrap().start().unwrap();
        match vm.agent_timeout(PATIENCE / 2).await {
            Ok(agent) => Self { vm, agent, transcript },
            Err(error) => panic!("{error:?}\n{}", transcript.text()),
        }
    }

    /// One that runs already.
    pub(crate) async fn of(vm: MicroVm<Running>) -> Self {
        let agent = vm.agent_timeout(PATIENCE / 2).await.unwrap();
        Self { vm, agent, transcript: Transcript::default() }
    }

    /// A stream to this port of the guest's loopback, as soon as something listens there.
    pub(crate) async fn connect(&self, port: u16) -> GuestStream {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.agent.connect_tcp(port).await {
                Ok(stream) => return stream,
                Err(error) if Instant::now() > end => panic!("{error}\n{}", self.transcript.text()),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Ends it in the middle of what it does.
    pub(crate) fn kill(self) {
        drop(self.vm.terminate());
    }

    /// What a shell writes that does this.
    pub(crate) async fn sh(&self, script: &str) -> String {
        sh(&self.agent, script).await.unwrap_or_else(|error| {
            panic!("{script}: {error}\n{}", self.transcript.text());
        })
    }
}

async fn sh(agent: &Agent, script: &str) -> Result<String, Error> {
    let command = agent.command("sh").args(["-c", script]).timeout(Duration::from_secs(60));
    Ok(command.output().await?.check()?.text())
}
