use std::collections::HashSet;
use std::time::{Duration, Instant, SystemTime};

use dormouse::{
    Agent, AgentConfig, Error, ErrorKind, ExecFailure, ExitStatus, Hook, HookName, MicroVm,
    RestoreOptions, Snapshot, Suspended, WriteOptions,
};

use super::{Guest, block_on, busybox, config, config_of, sh};
use crate::{PATIENCE, Release, Scratch, Transcript, guest_tool};

#[test]
fn clones_are_others_before_their_programs_go_on_and_their_agents_answer_at_once() {
    clones_are_others(Release::Linux6_12);
}

/// Its kernel has no driver for VMGenID: random numbers that differ are the agent's work alone.
#[test]
fn clones_of_linux_6_1_are_others_before_their_programs_go_on() {
    clones_are_others(Release::Linux6_1);
}

fn clones_are_others(release: Release) {
    block_on(async {
        let archive = busybox().host_file("bin/guest-tool", guest_tool());
        let config = config_of(release, archive, AgentConfig::new().hostname("base"));
        // A program that notes who it is. It comes before the agent, and so goes on as soon as that lets it.
        let guest = Guest::boot(config.memory_mib(256).vcpus(1)).await;
        let watching = "guest-tool identities /seen >/dev/null 2>&1 & \
            until test -s /seen; do sleep 0.1; done";
        guest.sh(watching).await;
        guest.agent.freeze().await.unwrap();
        // Nothing new runs while it is frozen; the agent itself answers.
        let error = guest.agent.exec("true", [""; 0]).await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::ExecFailed(ExecFailure::Frozen), "{error}");
        assert!(error.how_to_fix().unwrap().contains("thaw"), "{error}");
        let known = noted(&guest.agent, 0).await;
        // The program's pause is over in the clones: there it waits for nothing but the agent.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut parent = guest.vm.pause().unwrap();
        let mut names = 0..;
        let options =
            |_| RestoreOptions::new().hostname(format!("clone-{}", names.next().unwrap()));
        let clones = parent.fork_with(4, options).unwrap();
        let vm = parent.resume().unwrap();
        guest.agent.thaw().await.unwrap();
        assert_eq!(sh(&vm.agent().await.unwrap(), "busybox hostname").await.unwrap(), "base\n");
        // Its program would have what time there is.
        drop(vm);
        let mut ids = HashSet::new();
        for (at, clone) in clones.into_iter().enumerate() {
            let clone = clone.resume().unwrap();
            let agent = clone.agent().await.unwrap();
            assert_eq!(sh(&agent, "busybox hostname").await.unwrap(), format!("clone-{at}\n"));
            let id = sh(&agent, "cat /etc/machine-id").await.unwrap();
            assert_eq!(id.trim().len(), 32);
            assert!(ids.insert(id.clone()), "{id} twice");
            knows_only(&agent, &format!("{} clone-{at}", id.trim()), &known).await;
            let uuid = sh(&agent, "cat /proc/sys/kernel/random/uuid").await.unwrap();
            assert!(ids.insert(uuid));
        }
    });
}

/// What the program has noted, from this line on.
async fn noted(agent: &Agent, from: usize) -> Vec<String> {
    let seen = String::from_utf8(agent.read("/seen").await.unwrap()).unwrap();
    // One that is being written has no end yet.
    let lines = seen.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    lines.skip(from).map(str::to_owned).collect()
}

/// A clone's program has noted nobody but this one since it went on. It had noted the lines `known` before.
async fn knows_only(agent: &Agent, this: &str, known: &[String]) {
    let begin = Instant::now();
    let mut seen = noted(agent, known.len()).await;
    while seen.len() < 2 {
        assert!(begin.elapsed() < PATIENCE, "{seen:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
        seen = noted(agent, known.len()).await;
    }
    // One that has run for a second, as on a host that stood still, has to let others run: it was stopped in a line.
    let (id, _) = known[0].split_once(' ').unwrap();
    if seen[0].starts_with(id) {
        seen.remove(0);
    }
    assert!(seen.iter().all(|line| line == this), "not only {this} in {seen:#?}");
}

/// As above: what is random in 32 of them, the agent has made so.
#[test]
fn thirty_two_clones_of_linux_6_1_on_2_vcpus_share_no_random_bytes() {
    block_on(async {
        let archive = busybox().host_file("bin/guest-tool", guest_tool());
        let config = config_of(Release::Linux6_1, archive, AgentConfig::new());
        let guest = Guest::boot(config.memory_mib(160).vcpus(2)).await;
        let random = "guest-tool random; cat /proc/sys/kernel/random/uuid; \
            head -c 16 /dev/urandom | sha256sum; head -c 4 /dev/urandom | sha256sum";
        let mut seen: HashSet<_> = guest.sh(random).await.lines().map(str::to_owned).collect();
        guest.agent.freeze().await.unwrap();
        let mut parent = guest.vm.pause().unwrap();
        for (at, clone) in parent.fork(32).unwrap().into_iter().enumerate() {
            let clone = clone.resume().unwrap();
            let answer = sh(&clone.agent().await.unwrap(), random).await.unwrap();
            assert_eq!(answer.lines().count(), 4, "{answer}");
            for line in answer.lines() {
                assert!(seen.insert(line.to_owned()), "clone {at} has {line} like another");
            }
        }
    });
}

/// A guest's clock says what ours does, however long it takes to ask it. It is late by what passes between the host's
/// look at its own and the guest's setting of it: seconds, where the machine stands still just then.
async fn assert_right(agent: &Agent) {
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let before = now();
    let date = sh(agent, "date +%s").await.unwrap();
    let date: u64 = date.trim().parse().unwrap();
    let right = before - 10..=now() + 2;
    assert!(right.contains(&date), "{date} is not in {right:?}");
}

#[test]
fn a_sleeper_wakes_as_itself_with_the_right_time_and_hooks_have_run() {
    block_on(async {
        let scratch = Scratch::new("sleeper");
        let dir = scratch.0.join("asleep");
        let agent = AgentConfig::new()
            .hostname("sleeper")
            .hook(HookName::Suspend, Hook::command(["sh", "-c", "echo suspend >>/hooks"]))
            .hook(HookName::Resume, Hook::command(["sh", "-c", "echo resume >>/hooks"]))
            .hook(HookName::Terminate, Hook::command(["sh", "-c", "echo last hook >/dev/console"]));
        let guest = Guest::boot(config(agent)).await;
        let id =
            guest.sh("cat /etc/machine-id /proc/sys/kernel/random/boot_id; busybox hostname").await;
        let waiting = guest.agent.clone();
        let call = tokio::spawn(async move { waiting.exec("sleep", ["1000"]).await });
        tokio::time::sleep(Duration::from_millis(500)).await;
        guest.agent.freeze().await.unwrap();
        drop(guest.vm.suspend(&dir).unwrap());
        // A call that was under way, and one that comes too late, say what became of them.
        let error: Error = call.await.unwrap().unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Agent | ErrorKind::GuestEnded(_)), "{error}");
        let said = error.to_string();
        assert!(said.contains("in the middle of a call") || said.contains("suspended"), "{said}");
        let error = guest.agent.exec("true", [""; 0]).await.unwrap_err();
        assert!(error.to_string().contains("suspended"), "{error}");
        let slept_at = Instant::now();
        // Found again as by another process, which has the files alone.
        let vm = MicroVm::<Suspended>::open(&dir).unwrap().resume().unwrap();
        let agent = vm.agent().await.unwrap();
        let same =
            sh(&agent, "cat /etc/machine-id /proc/sys/kernel/random/boot_id; busybox hostname")
                .await
                .unwrap();
        assert_eq!(same, id);
        assert_right(&agent).await;
        assert_eq!(sh(&agent, "cat /hooks").await.unwrap(), "suspend\nresume\n");
        // The program goes on without its caller.
        assert!(sh(&agent, "busybox ps").await.unwrap().contains("sleep 1000"));
        // Files are enough: another VM comes of them.
        drop(vm);
        let snapshot = Snapshot::open(&dir).unwrap();
        // Its clocks stood still, and the agent sets the one that has to be right. Time has to pass for that to show.
        tokio::time::sleep(Duration::from_secs(15).saturating_sub(slept_at.elapsed())).await;
        let transcript = Transcript::default();
        let options = RestoreOptions::new().console(transcript.clone());
        let vm = snapshot.restore_with(&options).unwrap().resume().unwrap();
        let agent = vm.agent().await.unwrap();
        let other = sh(&agent, "cat /etc/machine-id").await.unwrap();
        assert!(!id.starts_with(other.trim()));
        assert_right(&agent).await;
        // One that stands still ends as any other does, its hook first.
        agent.freeze().await.unwrap();
        let error = agent.exec("true", [""; 0]).await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::ExecFailed(ExecFailure::Frozen), "{error}");
        let vm = vm.shutdown(Duration::from_secs(10)).await;
        assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff, "{}", transcript.text());
        assert!(transcript.text().contains("last hook"), "{}", transcript.text());
    });
}

#[test]
fn a_hook_that_fails_leaves_the_guest_running_and_says_what_it_said() {
    block_on(async {
        let failing = Hook::command(["sh", "-c", "echo not now >&2; exit 1"]);
        let slow = Hook::command(["sleep", "1000"]).timeout(Duration::from_secs(1));
        let agent = AgentConfig::new()
            .hook(HookName::Suspend, failing)
            .hook(HookName::Run, slow)
            .hook(HookName::Ready, Hook::http_at(9000, "/cgi-bin/ready").timeout(PATIENCE / 2));
        let guest = Guest::boot(config(agent)).await;
        let error = guest.agent.freeze().await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Hook, "{error}");
        assert!(error.to_string().contains("not now"), "{error}");
        let error = guest.agent.run_hook(HookName::Run, "{}").await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Hook, "{error}");
        // Somebody who is not there, says "not yet", and then is ready.
        let ready = "#!/bin/sh\ncat >/payload\n\
            if test -e /asked; then echo 'Status: 200 OK'; else echo 'Status: 503 Later'; fi\n\
            echo >/asked; echo; echo\n";
        guest.agent.create_dir_all("/www/cgi-bin").await.unwrap();
        let options = WriteOptions::new().mode(0o755);
        guest.agent.write_from("/www/cgi-bin/ready", ready.as_bytes(), &options).await.unwrap();
        guest.sh("(sleep 1; httpd -p 9000 -h /www) >/dev/null 2>&1 &").await;
        guest.agent.run_hook(HookName::Ready, "{\"a\": 1}").await.unwrap();
        assert_eq!(guest.sh("cat /payload").await, "{\"a\": 1}");
    });
}
