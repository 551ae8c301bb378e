//! When a guest's application is up.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::Notify;
use tokio::time::sleep;

use super::error::TemplateError;
use crate::agent::Agent;
use crate::config::{ConsoleOutput, HookName};
use crate::error::{Error, ErrorKind};

/// How long an application that is not up is left alone.
const AGAIN: Duration = Duration::from_millis(50);

/// What shows that the application is up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Ready {
    /// The [hook](crate::AgentConfig::hook) `ready`, which is asked again while it says "not yet". Where
    /// the configuration has none, the guest is ready when the entrypoint was started.
    #[default]
    Hook,
    /// A TCP port of the guest's loopback takes a connection.
    Port(u16),
    /// The console shows this text. What the entrypoint writes goes to the console.
    Log(String),
    /// This program exits with 0. It is run again while it does not.
    Command(Vec<String>),
}

impl Ready {
    /// Refuses what would never be so, or is so at once.
    pub(super) fn check(&self) -> Result<(), TemplateError> {
        let what = match self {
            Self::Port(0) => "port 0, at which nobody listens",
            Self::Log(text) if text.is_empty() => "an empty text on the console",
            Self::Command(argv) if argv.first().is_none_or(String::is_empty) => "no command",
            Self::Hook | Self::Port(_) | Self::Log(_) | Self::Command(_) => return Ok(()),
        };
        Err(TemplateError::Ready { what })
    }

    /// Waits until it is so, for as long as the guest lives. A text on the console appears once, so
    /// `log` is none in a VM that has been restored.
    pub(super) async fn wait(&self, agent: &Agent, log: Option<&LogWatch>) -> Result<(), Error> {
        match self {
            Self::Hook => agent.run_hook(HookName::Ready, "").await,
            Self::Port(port) => loop {
                match agent.connect_tcp(*port).await {
                    Err(error) if error.kind() == &ErrorKind::Refused => sleep(AGAIN).await,
                    connected => return connected.map(drop),
                }
            },
            Self::Log(_) => match log {
                Some(log) => log.seen().await,
                None => Ok(()),
            },
            Self::Command(argv) => loop {
                let (program, args) = argv
                    .split_first()
                    .map_or(("", argv.as_slice()), |(first, rest)| (first.as_str(), rest));
                if agent.command(program).args(args).status().await?.success() {
                    return Ok(());
                }
                sleep(AGAIN).await;
            },
        }
    }

    /// A watch for the console's text, where that is what is waited for.
    pub(super) fn watch(&self) -> Option<LogWatch> {
        let Self::Log(text) = self else { return None };
        Some(LogWatch(Arc::new(Seen {
            text: text.as_bytes().into(),
            is_seen: AtomicBool::new(text.is_empty()),
            notify: Notify::new(),
        })))
    }

    /// What is waited for, in words.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Hook => "the hook `ready` has not said so".to_owned(),
            Self::Port(port) => format!("nobody listens at port {port}"),
            Self::Log(text) => format!("{text:?} is not on the console"),
            Self::Command(argv) => format!("{:?} does not succeed", argv.join(" ")),
        }
    }
}

/// Waits for a text in what a console writer is given.
#[derive(Clone, Debug)]
pub(super) struct LogWatch(Arc<Seen>);

#[derive(Debug)]
struct Seen {
    text: Box<[u8]>,
    is_seen: AtomicBool,
    notify: Notify,
}

impl LogWatch {
    async fn seen(&self) -> Result<(), Error> {
        let notified = self.0.notify.notified();
        if !self.0.is_seen.load(Ordering::Acquire) {
            notified.await;
        }
        Ok(())
    }

    /// A console writer that looks for the text, and hands everything on.
    pub(super) fn writer(&self, next: Option<ConsoleOutput>) -> impl Write + Send + 'static {
        Watched { seen: Arc::clone(&self.0), recent: Vec::new(), next }
    }
}

struct Watched {
    seen: Arc<Seen>,
    /// The end of what came before, shorter than the text by a byte.
    recent: Vec<u8>,
    next: Option<ConsoleOutput>,
}

impl Watched {
    fn look(&mut self, bytes: &[u8]) {
        if self.seen.is_seen.load(Ordering::Relaxed) {
            return;
        }
        self.recent.extend_from_slice(bytes);
        let text = &self.seen.text;
        if self.recent.windows(text.len()).any(|window| window == &**text) {
            self.seen.is_seen.store(true, Ordering::Release);
            self.seen.notify.notify_waiters();
            self.seen.notify.notify_one();
        }
        let keep = self.recent.len().min(text.len().saturating_sub(1));
        self.recent.drain(..self.recent.len() - keep);
    }
}

impl Write for Watched {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match &self.next {
            Some(next) => next.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)?,
            None => bytes.len(),
        };
        self.look(bytes.get(..written).unwrap_or_default());
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        match &self.next {
            Some(next) => next.0.lock().unwrap_or_else(PoisonError::into_inner).flush(),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(text: &str) -> LogWatch {
        Ready::Log(text.to_owned()).watch().unwrap()
    }

    fn is_seen(watch: &LogWatch) -> bool {
        watch.0.is_seen.load(Ordering::Relaxed)
    }

    #[test]
    fn a_text_is_found_however_the_console_cuts_it() {
        for cut in 0..6 {
            let watch = watch("ready");
            let mut writer = watch.writer(None);
            writer.write_all(b"not rea, ").unwrap();
            assert!(!is_seen(&watch));
            writer.write_all(&b"ready"[..cut.min(5)]).unwrap();
            writer.write_all(&b"ready"[cut.min(5)..]).unwrap();
            assert!(is_seen(&watch), "cut at {cut}");
        }
        assert!(is_seen(&watch("")));
    }

    #[test]
    fn what_is_kept_of_the_console_is_shorter_than_the_text() {
        let watch = watch("ready");
        let mut writer = Watched { seen: Arc::clone(&watch.0), recent: Vec::new(), next: None };
        for _ in 0..1000 {
            writer.write_all(&[b'x'; 100]).unwrap();
            assert!(writer.recent.len() < 5);
        }
    }

    #[test]
    fn the_next_writer_has_all() {
        let kept: crate::console::ConsoleWriter = Arc::new(std::sync::Mutex::new(Vec::new()));
        let count = Arc::strong_count(&kept);
        let mut writer = watch("x").writer(Some(ConsoleOutput(Arc::clone(&kept))));
        writer.write_all(b"axb").unwrap();
        writer.flush().unwrap();
        drop(writer);
        assert_eq!(Arc::strong_count(&kept), count);
    }

    #[tokio::test]
    async fn a_waiter_is_woken_by_what_came_before_and_by_what_comes() {
        let watch = watch("up");
        let waiting = tokio::spawn({
            let watch = watch.clone();
            async move { watch.seen().await }
        });
        tokio::task::yield_now().await;
        watch.writer(None).write_all(b"going up").unwrap();
        waiting.await.unwrap().unwrap();
        watch.seen().await.unwrap();
    }
}
