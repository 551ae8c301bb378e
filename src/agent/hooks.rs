//! Hooks: what a program in the guest does when its VM is made, run, suspended, resumed, ended.

use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::time::sleep;

use super::patience::within;
use super::{Agent, AgentError};
use crate::config::{Hook, HookAction, HookName};
use crate::error::{Error, ErrorKind};

/// How long a hook that is not ready is left alone.
const AGAIN: Duration = Duration::from_millis(100);
/// As much of an answer as is looked at.
const ANSWER_BYTES: usize = 64 << 10;

impl Agent {
    /// Runs a hook of the configuration, with this payload: the body of the request, or the
    /// command's standard input. Nothing happens where the configuration has none of this name.
    ///
    /// A command has to exit with 0; a request has to be answered by 200. `ready` and `validate`
    /// may say "not yet", a command by the exit code 75 (EX_TEMPFAIL), a request by 503 or by
    /// not being accepted: then it is asked again until its deadline.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Hook`] where it failed, or its deadline has passed; else as
    /// [every call](crate::Agent#errors-of-every-call).
    pub async fn run_hook(&self, name: HookName, payload: impl AsRef<[u8]>) -> Result<(), Error> {
        let Some(hook) = self.link.config().hooks.get(&name) else { return Ok(()) };
        // They are run because the VM changes, not because somebody needs it.
        let uncounted = self.uncounted();
        let mut refusal = None;
        let done = async {
            loop {
                match uncounted.attempt(name, hook, payload.as_ref()).await? {
                    Outcome::Done => return Ok(()),
                    Outcome::NotYet(how) if name.may_wait() => refusal = Some(how),
                    Outcome::NotYet(how) | Outcome::Failed(how) => return Err(failed(name, how)),
                }
                sleep(AGAIN).await;
                refusal = None;
            }
        };
        match within(hook.deadline, done).await {
            Some(done) => done,
            None => {
                let refusal = refusal.as_deref().unwrap_or("has not answered");
                let seconds = hook.deadline.as_secs_f64();
                Err(failed(name, format!("{refusal} within {seconds} s")))
            }
        }
    }

    async fn attempt(&self, name: HookName, hook: &Hook, payload: &[u8]) -> Result<Outcome, Error> {
        match &hook.action {
            HookAction::Command(argv) => self.command_hook(argv, payload).await,
            HookAction::Http { port, .. } => {
                let path = hook.action.http_path(name).unwrap_or_default();
                self.http_hook(*port, &path, payload).await
            }
        }
    }

    async fn command_hook(&self, argv: &[String], payload: &[u8]) -> Result<Outcome, Error> {
        let Some((program, args)) = argv.split_first() else { return Ok(Outcome::Done) };
        let output = self.command(program).args(args).stdin(payload).output().await?;
        Ok(match output.status.code() {
            Some(0) => Outcome::Done,
            Some(75) => Outcome::NotYet("was not ready".to_owned()),
            _ => match output.check() {
                Ok(_) => Outcome::Done,
                Err(error) => Outcome::Failed(format!("failed: {error}")),
            },
        })
    }

    async fn http_hook(&self, port: u16, path: &str, payload: &[u8]) -> Result<Outcome, Error> {
        let stream = match self.connect_tcp(port).await {
            Ok(stream) => stream,
            Err(error) if *error.kind() == ErrorKind::Refused => {
                return Ok(Outcome::NotYet(format!("found nobody at port {port}")));
            }
            Err(error) => return Err(error),
        };
        match post(TokioIo::new(stream), path, payload).await {
            Ok(StatusCode::OK) => Ok(Outcome::Done),
            Ok(status @ StatusCode::SERVICE_UNAVAILABLE) => {
                Ok(Outcome::NotYet(format!("was answered {status}")))
            }
            Ok(status) => Ok(Outcome::Failed(format!("was answered {status}"))),
            Err(error) => Ok(Outcome::Failed(format!("was not answered: {error}"))),
        }
    }
}

enum Outcome {
    Done,
    NotYet(String),
    Failed(String),
}

fn failed(name: HookName, how: String) -> Error {
    AgentError::Hook { name: name.as_str(), how }.into()
}

/// One request, and the status of its answer.
async fn post(
    stream: TokioIo<super::GuestStream>,
    path: &str,
    payload: &[u8],
) -> Result<StatusCode, Box<dyn std::error::Error + Send + Sync>> {
    let (mut sender, connection) = http1::handshake(stream).await?;
    let body = Full::new(Bytes::copy_from_slice(payload));
    let request = Request::post(path)
        .header("host", "localhost")
        .header("content-type", "application/json")
        .body(body)?;
    let answered = async {
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        Limited::new(answer.into_body(), ANSWER_BYTES).collect().await?;
        Ok(status)
    };
    tokio::pin!(answered);
    tokio::select! {
        status = &mut answered => status,
        // The connection carries the request on; its end is not the answer's.
        _ = connection => answered.await,
    }
}

#[cfg(test)]
mod tests;
