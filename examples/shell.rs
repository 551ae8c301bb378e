//! A shell in a guest, at this terminal. `exit`, or ^D, ends it and its VM. Where its input is no terminal, as in the
//! testbed, it is given what comes, line by line.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use dormouse::{Agent, AgentConfig, Cmdline, Initramfs, Kernel, MicroVm, ProcessStatus, VmConfig};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::io::{copy, stdin, stdout};
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() {
    let code = match run().await {
        Ok(status) => {
            eprintln!("{status}");
            status.code().unwrap_or(1)
        }
        Err(error) => {
            eprintln!("Error: {error:?}");
            1
        }
    };
    // A thread of tokio's still waits for a key.
    std::process::exit(code);
}

async fn run() -> Result<ProcessStatus, Box<dyn std::error::Error>> {
    let root = std::env::var_os("DORMOUSE_GUEST_ROOT").map_or("/".into(), PathBuf::from);
    let files = Initramfs::builder()
        .host_file("bin/busybox", root.join("bin/busybox"))
        .file("etc/profile", 0o644, "busybox --install -s /bin\nexport PS1='guest:\\w# '\n")
        .symlink("bin/sh", "busybox")
        .directory("tmp", 0o1777);
    let config = VmConfig::new(Kernel::installed_in(&root)?)
        .initramfs(files.build()?)
        .cmdline(Cmdline::default().push("quiet")?)
        .memory_mib(256)
        .agent(AgentConfig::new().hostname("guest"));
    eprintln!("booting Linux … `exit` ends the shell and its VM");
    let vm = MicroVm::create(config)?.start()?;
    let agent = vm.agent().await?;
    let status = shell(&agent).await?;
    let _ended = vm.shutdown(Duration::from_secs(1)).await;
    Ok(status)
}

/// Connects a shell of the guest with this terminal, to the shell's end.
async fn shell(agent: &Agent) -> Result<ProcessStatus, Box<dyn std::error::Error>> {
    let _raw = Raw::new();
    let size =
        || tcgetwinsize(std::io::stdin()).map_or((24, 80), |size| (size.ws_row, size.ws_col));
    let mut resized = signal(SignalKind::window_change())?;
    let (rows, columns) = size();
    let mut shell = agent.command("sh").arg("-l").terminal(rows, columns).spawn().await?;
    let (mut input, mut output) =
        (shell.stdin.take().ok_or("no input")?, shell.stdout.take().ok_or("no output")?);
    let typing = tokio::spawn(async move { copy(&mut stdin(), &mut input).await });
    let showing = tokio::spawn(async move { copy(&mut output, &mut stdout()).await });
    let status = loop {
        tokio::select! {
            status = shell.wait() => break status?,
            _ = resized.recv() => {
                let (rows, columns) = size();
                shell.resize(rows, columns);
            }
        }
    };
    showing.await??;
    typing.abort();
    Ok(status)
}

/// The terminal passes every key on; as before when dropped.
struct Raw(Option<Termios>);

impl Raw {
    fn new() -> Self {
        let before =
            std::io::stdin().is_terminal().then(|| tcgetattr(std::io::stdin()).ok()).flatten();
        if let Some(mut raw) = before.clone() {
            raw.make_raw();
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &raw);
        }
        Self(before)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}
