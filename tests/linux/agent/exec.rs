use std::sync::Arc;
use std::time::{Duration, Instant};

use dormouse::{AgentConfig, ErrorKind, ExecFailure, ProcessStatus};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Barrier, Semaphore};

use super::{Guest, block_on, busybox, config, config_of};
use crate::{PATIENCE, Release};

#[test]
fn programs_run_as_they_are_told_under_linux_6_1() {
    block_on(programs(Release::Linux6_1));
}

#[test]
fn programs_run_as_they_are_told_under_linux_6_12() {
    block_on(programs(Release::Linux6_12));
}

async fn programs(release: Release) {
    let guest = Guest::boot(config_of(release, busybox(), AgentConfig::new())).await;
    let agent = &guest.agent;
    let kernel = agent.exec("busybox", ["uname", "-r"]).await.unwrap().check().unwrap();
    assert!(kernel.text().starts_with(release.prefix()), "{kernel:?}");
    // Both streams, the exit code, arguments that are no words of a shell.
    let script = "echo out; echo err >&2; printf '%s|' \"$@\"; exit 7";
    let output = agent.exec("sh", ["-c", script, "sh", "a b", "", "\u{e4}"]).await.unwrap();
    assert_eq!((output.status, &output.stderr[..]), (ProcessStatus::Code(7), &b"err\n"[..]));
    assert_eq!(output.text(), "out\na b||\u{e4}|");
    let failed = output.check().unwrap_err();
    assert_eq!(failed.kind(), &ErrorKind::ProcessFailed(ProcessStatus::Code(7)));
    assert_eq!(failed.to_string(), "sh failed: exit code 7: err");
    let killed = agent.exec("sh", ["-c", "kill -TERM $$"]).await.unwrap();
    assert_eq!(killed.status.signal(), Some(15));
    // Input, environment, directory, user.
    let echoed = agent.command("cat").stdin(vec![b'x'; 1 << 20]).output().await.unwrap();
    assert!(echoed.stdout == vec![b'x'; 1 << 20] && echoed.status.success());
    let command = agent.command("sh").args(["-c", "echo $A $PWD $HOME; id -u; id -g; id -G; cat"]);
    let output = command.env("A", "b c").current_dir("/tmp").user("user").output().await.unwrap();
    assert_eq!(output.check().unwrap().text(), "b c /tmp /tmp\n1000\n1000\n1000 1234\n");
    let output = agent.command("/bin/env").env_clear().env("ONLY", "1").output().await.unwrap();
    assert_eq!(output.text(), "ONLY=1\n");
    // What cannot be run is no exit code.
    let refused = |failure| ErrorKind::ExecFailed(failure);
    let error = agent.exec("no-such-program", [""; 0]).await.unwrap_err();
    assert_eq!(error.kind(), &refused(ExecFailure::NotFound), "{error}");
    let said = "cannot run no-such-program in the guest: No such file or directory";
    assert!(error.to_string().starts_with(said), "{error}");
    assert!(error.how_to_fix().unwrap().contains("PATH"), "{error:?}");
    let error = agent.exec("/etc/passwd", [""; 0]).await.unwrap_err();
    assert_eq!(error.kind(), &refused(ExecFailure::NotExecutable), "{error}");
    let error = agent.command("true").current_dir("/nowhere").output().await.unwrap_err();
    assert_eq!(error.kind(), &refused(ExecFailure::BadDirectory), "{error}");
    let error = agent.command("true").user("nobody-here").output().await.unwrap_err();
    assert_eq!(error.kind(), &refused(ExecFailure::NotFound), "{error}");
    assert!(error.to_string().contains("no user \"nobody-here\" in"), "{error}");
    let resident = agent.memory_bytes().await.unwrap();
    assert!((1..=4 << 20).contains(&resident), "{resident} bytes");
}

#[test]
fn time_that_is_over_kills_the_whole_group_and_the_background_holds_up_nobody() {
    block_on(async {
        let guest = Guest::boot(config(AgentConfig::new())).await;
        let script = "sleep 1000 & echo $!; sleep 1000";
        let mut said = String::new();
        // Where the guest stands still it may be killed before it says anything.
        for seconds in [2, 30] {
            let command = guest.agent.command("sh").args(["-c", script]);
            let output = command.timeout(Duration::from_secs(seconds)).output().await.unwrap();
            assert_eq!(output.status, ProcessStatus::TimedOut);
            said = output.text().trim().to_owned();
            if !said.is_empty() {
                break;
            }
        }
        let child: u32 = said.parse().unwrap();
        let gone = format!("while test -d /proc/{child}; do sleep 0.1; done");
        guest.sh(&gone).await;
        // A child that keeps the output open.
        let output = guest.agent.exec("sh", ["-c", "sleep 1000 & echo done"]).await.unwrap();
        assert_eq!((output.status.success(), &output.text()[..]), (true, "done\n"));
        // It lives on, although nobody reads what it says.
        let script = "echo $$; (while true; do echo line; sleep 0.01; done) & echo";
        let said = guest.sh(script).await;
        let group = said.lines().next().unwrap();
        guest.sh(&format!("sleep 1; kill -0 -{group}")).await;
        // A dropped process goes with its group.
        let mut process =
            guest.agent.command("sh").args(["-c", "echo $$; sleep 1000"]).spawn().await.unwrap();
        let mut line = [0; 16];
        let read = process.stdout.as_mut().unwrap().read(&mut line).await.unwrap();
        let id = std::str::from_utf8(&line[..read]).unwrap().trim().to_owned();
        assert_eq!(id, process.id().to_string());
        drop(process);
        guest.sh(&format!("while test -d /proc/{id}; do sleep 0.1; done")).await;
        // Also where output waits that nobody has read, which resets the connection.
        let script = "while true; do echo endless; done";
        let process = guest.agent.command("sh").args(["-c", script]).spawn().await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let id = process.id();
        drop(process);
        guest.sh(&format!("while test -d /proc/{id}; do sleep 0.1; done")).await;
    });
}

#[test]
fn output_is_whole_waits_for_its_reader_and_is_bounded() {
    block_on(async {
        let guest = Guest::boot(config(AgentConfig::new())).await;
        // Nothing is lost at the end of a program.
        let script = "head -c 3000000 /dev/zero | tr '\\0' x; printf end >&2";
        let output = guest.agent.exec("sh", ["-c", script]).await.unwrap();
        assert_eq!((output.stdout.len(), &output.stderr[..]), (3_000_000, &b"end"[..]));
        // Endless output nobody reads makes its program wait, and one stream does not hold up the other.
        let script =
            "while true; do echo endless; done & while true; do read a; echo \"got $a\" >&2; done";
        let command = guest.agent.command("sh").args(["-c", script]).stdin_piped();
        let mut process = command.spawn().await.unwrap();
        let mut stdin = process.stdin.take().unwrap();
        let mut stderr = process.stderr.take().unwrap();
        for round in 0..3 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            stdin.write_all(format!("{round}\n").as_bytes()).await.unwrap();
            let mut answer = [0; 6];
            stderr.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, format!("got {round}\n").as_bytes());
        }
        process.signal(9);
        assert_eq!(process.wait().await.unwrap(), ProcessStatus::Signal(9));
        // Also where there is far more than anybody has room for.
        let command = guest.agent.command("cat").args(["/dev/zero"]);
        let mut process = command.spawn().await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        process.kill();
        assert_eq!(process.wait().await.unwrap(), ProcessStatus::Signal(9));
        let command = guest.agent.command("cat").args(["/dev/zero"]).output_limit(1 << 20);
        let error = command.output().await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Resources, "{error}");
    });
}

#[test]
fn hundreds_of_programs_run_at_once() {
    const COUNT: usize = 300;
    block_on(async {
        let guest = Guest::boot(config(AgentConfig::new()).memory_mib(512)).await;
        let all_run = Arc::new(Barrier::new(COUNT));
        // One processor starts them all, and has a minute for each call.
        let starting = Arc::new(Semaphore::new(30));
        let mut tasks = tokio::task::JoinSet::new();
        for at in 0..COUNT {
            let (agent, all_run) = (guest.agent.clone(), Arc::clone(&all_run));
            let starting = Arc::clone(&starting);
            tasks.spawn(async move {
                let script = format!("read a; echo $a; exit {}", at % 100);
                let command = agent.command("sh").args(["-c", &script]).stdin_piped();
                let permit = starting.acquire().await.unwrap();
                let mut process = command.spawn().await.unwrap();
                drop(permit);
                // None has had its input before the last has started.
                all_run.wait().await;
                let input = format!("input {at}\n");
                process.stdin.take().unwrap().write_all(input.as_bytes()).await.unwrap();
                let mut output = String::new();
                process.stdout.as_mut().unwrap().read_to_string(&mut output).await.unwrap();
                assert_eq!(output, input);
                let status = process.wait().await.unwrap();
                assert_eq!(status, ProcessStatus::Code(at as i32 % 100));
            });
        }
        while let Some(task) = tasks.join_next().await {
            task.unwrap();
        }
        // Their threads end one after the other, and leave nothing of what they took.
        let end = Instant::now() + PATIENCE / 2;
        let mut resident = guest.agent.memory_bytes().await.unwrap();
        while resident > 4 << 20 {
            assert!(Instant::now() < end, "{resident} bytes");
            tokio::time::sleep(Duration::from_millis(200)).await;
            resident = guest.agent.memory_bytes().await.unwrap();
        }
    });
}

#[test]
fn a_terminal_is_one_and_has_the_size_that_it_is_told() {
    block_on(async {
        let guest = Guest::boot(config(AgentConfig::new())).await;
        let mut shell = guest.agent.command("sh").terminal(24, 80).spawn().await.unwrap();
        let (mut stdin, mut stdout) = (shell.stdin.take().unwrap(), shell.stdout.take().unwrap());
        let mut text = String::new();
        let mut piece = [0; 1024];
        shell.resize(50, 132);
        stdin.write_all(b"tty; stty size; echo $((6*7))\n").await.unwrap();
        while !(text.contains("50 132") && text.contains("\n42")) {
            let read = stdout.read(&mut piece).await.unwrap();
            assert!(read > 0, "{text}");
            text.push_str(std::str::from_utf8(&piece[..read]).unwrap());
        }
        assert!(text.contains("/dev/pts/"), "{text}");
        // ^C interrupts what runs in the foreground, and the shell goes on.
        stdin.write_all(b"busybox sleep 1000\n").await.unwrap();
        // Before that its shell, which edits lines, would take the key for one of a line.
        let begun = "until busybox ps | grep -q '[s]leep 1000'; do busybox usleep 100000; done";
        guest.sh(begun).await;
        stdin.write_all(b"\x03").await.unwrap();
        stdin.write_all(b"exit 3\n").await.unwrap();
        assert_eq!(shell.wait().await.unwrap(), ProcessStatus::Code(3));
        let mut rest = Vec::new();
        stdout.read_to_end(&mut rest).await.unwrap();
    });
}

#[test]
fn a_guest_without_memory_keeps_its_agent() {
    block_on(async {
        let guest = Guest::boot(config(AgentConfig::new())).await;
        // Little by little, so that nothing but the kernel can refuse it.
        let hog = "BEGIN { while (1) kept[n++] = n \" and some more of what is kept\" }";
        let command = guest.agent.command("busybox").args(["awk", hog]);
        let status = command.status().await.unwrap();
        assert_eq!(status, ProcessStatus::Signal(9));
        let killed = guest.sh("busybox dmesg | busybox grep 'Killed process'").await;
        assert!(killed.contains("busybox") && !killed.contains("init"), "{killed}");
        // The agent is not killed, but what it starts is no better than others.
        assert_eq!(
            guest.sh("cat /proc/1/oom_score_adj /proc/self/oom_score_adj").await,
            "-1000\n0\n"
        );
    });
}

#[test]
fn orphans_leave_no_zombies() {
    block_on(async {
        let guest = Guest::boot(config(AgentConfig::new())).await;
        let script = "for at in 1 2 3 4 5 6 7 8; do (setsid sleep 0.1 &); done; sleep 0.5";
        guest.sh(script).await;
        let gone = "while busybox grep -q '^State:.Z' /proc/[0-9]*/status 2>/dev/null || busybox ps | grep -q '[s]leep 0.1'; \
            do busybox usleep 100000; done; echo gone";
        assert!(guest.sh(gone).await.ends_with("gone\n"));
    });
}
