//! Templates: booted once, tried, kept; and every VM of one has the application up.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use dormouse::{
    AgentConfig, Entrypoint, Error, ErrorKind, Hook, HookName, Ready, RestoreOptions, Template,
    TemplateOptions, TemplateStage, VmConfig,
};

use super::{block_on, busybox, config_of, sh};
use crate::{PATIENCE, Release, Scratch, Transcript};

/// A server whose state is in its memory, in files in memory, and in a file that it has open; its
/// child counts, and writes to that file when it is asked to.
const APPLICATION: &str = r#"
mkdir -p /www /dev/shm; echo up > /www/index.html; echo kept > /dev/shm/note; echo kept > /tmp/note
exec 7> /tmp/open; echo first >&7
(n=0; while true; do n=$((n + 1)); echo $n > /tmp/count; sleep 0.1
    test -e /tmp/say && echo second >&7 && rm /tmp/say; done) &
echo $! > /tmp/child; echo $$ > /tmp/server
sleep 1; echo the server is up
exec httpd -f -p 8080 -h /www
"#;

fn config(release: Release) -> VmConfig {
    let application = Entrypoint::new(["sh", "-c", APPLICATION]);
    let validate = Hook::command(["sh", "-c", "echo tried > /tmp/tried"]);
    let agent = AgentConfig::new().entrypoint(application).hook(HookName::Validate, validate);
    config_of(release, busybox(), agent)
}

fn options(scratch: &Scratch) -> TemplateOptions {
    TemplateOptions::new(scratch.0.join("templates")).timeout(PATIENCE).ready(Ready::Port(8080))
}

async fn built_and_started(release: Release) -> Result<(), Error> {
    let scratch = Scratch::new("template");
    let stages = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&stages);
    let watched = options(&scratch).progress(move |progress| {
        let mut seen = seen.lock().unwrap();
        if seen.last() != Some(&progress.stage) {
            seen.push(progress.stage);
        }
    });
    // Two want it at once, and one builds it.
    let others = options(&scratch);
    let (one, two) = tokio::join!(
        Template::build(config(release), &watched),
        Template::build(config(release), &others),
    );
    let (one, two) = (one?, two?);
    assert!(one.was_built() != two.was_built());
    assert_eq!(one.id(), two.id());
    if one.was_built() {
        use TemplateStage::{Boot, Ready, Save, Validate};
        assert_eq!(*stages.lock().unwrap(), [Boot, Ready, Save, Validate]);
    }
    assert!(!Template::build(config(release), &options(&scratch)).await?.was_built());
    assert_eq!(Template::list(scratch.0.join("templates"))?, [one.id()]);
    // The pages that the VM wrote that was tried: a VM gets them at once.
    let written = std::fs::metadata(scratch.0.join("templates").join(one.id()).join("written"));
    assert!(written.unwrap().len() > 100);
    // Each VM has the same application, and is another machine.
    let mut machines = BTreeSet::new();
    for name in ["first", "second"] {
        let vm = one.start_with(RestoreOptions::new().hostname(name)).await?;
        let agent = vm.agent().await?;
        let page = agent.exec("busybox", ["wget", "-qO-", "http://127.0.0.1:8080/"]).await?;
        assert_eq!(page.check()?.text(), "up\n");
        let state = "cat /dev/shm/note /tmp/note /tmp/open; kill -0 $(cat /tmp/child) && \
            echo alive; ls /tmp/tried 2>/dev/null; cat /proc/sys/kernel/hostname";
        let state = sh(&agent, state).await?;
        assert_eq!(state, format!("kept\nkept\nfirst\nalive\n{name}\n"));
        let open_file = "echo > /tmp/say; while test -e /tmp/say; do sleep 0.1; done; cat /tmp/open; \
            busybox readlink /proc/$(cat /tmp/child)/fd/7";
        assert_eq!(sh(&agent, open_file).await?, "first\nsecond\n/tmp/open\n");
        let goes_on = "n=$(cat /tmp/count); until [ $(cat /tmp/count) -gt $n ]; do sleep 0.1; done; \
            cat /proc/sys/kernel/random/uuid";
        assert!(machines.insert(sh(&agent, goes_on).await?));
        drop(vm.terminate());
    }
    // Elsewhere, by its name.
    let again = Template::open(scratch.0.join("templates"), &one.id())?;
    assert_eq!(again.snapshot().facts(), one.snapshot().facts());
    again.deactivate()?;
    assert_eq!(one.start().await.unwrap_err().kind(), &ErrorKind::Template);
    let refused = Template::build(config(release), &options(&scratch)).await.unwrap_err();
    assert_eq!(refused.kind(), &ErrorKind::Template);
    again.activate()?;
    drop(one.start().await?.terminate());
    one.remove();
    assert_eq!(Template::list(scratch.0.join("templates"))?, [""; 0]);
    Ok(())
}

#[test]
fn a_template_has_its_application_up_under_linux_6_1() {
    block_on(built_and_started(Release::Linux6_1)).unwrap();
}

#[test]
fn a_template_has_its_application_up_under_linux_6_12() {
    block_on(built_and_started(Release::Linux6_12)).unwrap();
}

#[test]
fn a_template_waits_for_a_line_or_a_command_and_says_what_never_came() {
    block_on(async {
        let scratch = Scratch::new("template-ready");
        let transcript = Transcript::default();
        let config = || config(Release::Linux6_12).console(transcript.clone());
        let log = options(&scratch).ready(Ready::Log("the server is up".to_owned()));
        let began = Instant::now();
        let template = Template::build(config(), &log).await.unwrap();
        let mut enough = 2 * began.elapsed();
        assert!(transcript.text().contains("the server is up"));
        let command = ["sh", "-c", "test $(cat /tmp/count) -gt 3"].map(str::to_owned);
        let command = options(&scratch).ready(Ready::Command(command.into()));
        let other = Template::build(config(), &command).await.unwrap();
        assert_ne!(template.id(), other.id());
        // What never comes, in a time in which a guest boots here: in more, where it was too little this time.
        loop {
            let never = options(&scratch).ready(Ready::Port(9)).timeout(enough);
            let error = Template::build(config(), &never).await.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Timeout);
            let text = format!("{error:?}");
            assert!(text.contains("port 9"), "{text}");
            if text.contains("the server is up") {
                break;
            }
            assert!(enough < PATIENCE, "{text}");
            enough *= 2;
        }
        // A hook that says "not yet", and then is ready; and one that fails in the VM that is tried.
        let server = Entrypoint::new(["sh", "-c", "mkdir -p /www; exec httpd -f -p 8080 -h /www"]);
        let not_yet = "#!/bin/sh\nif test -e /tmp/asked; then echo 'Status: 200 OK'; \
            else echo 'Status: 503 Later'; fi\necho >/tmp/asked; echo; echo\n";
        let fails = Hook::command(["sh", "-c", "cat /tmp/asked && echo no luck >&2; exit 3"]);
        let agent = AgentConfig::new()
            .entrypoint(server)
            .hook(HookName::Ready, Hook::http_at(8080, "/cgi-bin/ready").timeout(PATIENCE / 2))
            .hook(HookName::Validate, fails);
        let files = busybox().file("www/cgi-bin/ready", 0o755, not_yet);
        let config = config_of(Release::Linux6_12, files, agent);
        let hook = options(&scratch).ready(Ready::Hook);
        let error = Template::build(config, &hook).await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Template);
        assert!(format!("{error:?}").contains("no luck"), "{error:?}");
        // One that is given up while it is saved.
        let (saving, mut is_saved) = tokio::sync::mpsc::unbounded_channel();
        let given_up = Ready::Command(vec!["true".to_owned()]);
        let given_up = options(&scratch).ready(given_up).progress(move |progress| {
            if progress.stage == TemplateStage::Save {
                let _ = saving.send(());
            }
        });
        tokio::select! {
            built = Template::build(self::config(Release::Linux6_12), &given_up) => panic!("{built:?}"),
            _ = is_saved.recv() => {}
        }
        let templates = scratch.0.join("templates");
        let is_locked = |path: &Path| std::fs::File::open(path).unwrap().try_lock().is_err();
        let paths = || std::fs::read_dir(&templates).unwrap().map(|entry| entry.unwrap().path());
        while paths().any(|path| path.extension() == Some("lock".as_ref()) && is_locked(&path)) {
            tokio::time::sleep(PATIENCE / 1000).await;
        }
        assert_eq!(Template::list(&templates).unwrap().len(), 2);
        let is_hidden = |path: &PathBuf| path.file_name().unwrap().as_encoded_bytes()[0] == b'.';
        let left: Vec<_> = paths().filter(is_hidden).collect();
        assert!(left.is_empty(), "{left:?}");
    });
}
