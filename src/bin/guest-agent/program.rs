//! A program as the host describes it, made into one that can be started.

use std::ffi::{CString, OsStr};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::accounts::{Account, ROOTS_HOME};
use crate::cgroup;
use crate::children::Child;
use crate::protocol::{Bytes, Failure, FailureKind, Program};
use crate::sys::{self, LaunchFault, LaunchStep};

/// Where programs are looked for if the environment has no PATH.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Finds who a program runs as: before its streams are made, since a terminal belongs to that user.
pub(crate) fn account(program: &Program) -> Result<Option<Account>, Failure> {
    program.user.as_deref().map(Account::find).transpose()
}

/// Starts a program with these streams.
pub(crate) fn start(
    program: &Program,
    account: Option<Account>,
    streams: [OwnedFd; 3],
    terminal: bool,
) -> Result<Child, Failure> {
    let name = program.argv.first().filter(|name| !name.0.is_empty());
    let name = name.ok_or_else(|| Failure::new(FailureKind::NotFound, "run an empty name"))?;
    let (uid, gid, groups, home) = match account {
        Some(account) => (account.uid, account.gid, Some(account.groups), account.home),
        None => (0, 0, None, ROOTS_HOME.to_owned()),
    };
    let has_home = program.env.iter().any(|(name, _)| name.0 == b"HOME");
    let home = (program.home && !has_home).then(|| text(format!("HOME={home}").into_bytes()));
    let env = program.env.iter().map(|(name, value)| text([&name.0, &b"="[..], &value.0].concat()));
    let env = env.chain(home);
    let argv = program.argv.iter().map(|word| text(word.0.clone()));
    let cwd = program.cwd.as_ref().map_or_else(|| b"/".to_vec(), |cwd| cwd.0.clone());
    let launch = sys::Program {
        candidates: candidates(program, name)?,
        argv: argv.collect::<Result<_, _>>()?,
        env: env.collect::<Result<_, _>>()?,
        cwd: text(cwd)?,
        uid,
        gid,
        groups,
        streams,
        terminal,
    };
    let candidates = launch.candidates.clone();
    let Some(_start) = cgroup::begin_start() else {
        let what = "the guest's processes are frozen, to be saved";
        return Err(Failure::new(FailureKind::Frozen, what));
    };
    Child::start(launch).map_err(|fault| failure(program, name, &candidates, &fault))
}

fn text(bytes: Vec<u8>) -> Result<CString, Failure> {
    CString::new(bytes).map_err(|_| Failure::new(FailureKind::Invalid, "pass a NUL to a program"))
}

/// The paths that the program may have: as it is, or in each directory of PATH.
fn candidates(program: &Program, name: &Bytes) -> Result<Vec<CString>, Failure> {
    if name.0.contains(&b'/') {
        return Ok(vec![text(name.0.clone())?]);
    }
    let path = program.env.iter().rfind(|(name, _)| name.0 == b"PATH");
    let path = path.map_or(DEFAULT_PATH, |(_, value)| &value.0[..]);
    let directories = path.split(|&byte| byte == b':');
    directories
        .map(|directory| match directory {
            // As execvp: the working directory.
            b"" => text(name.0.clone()),
            _ => text([directory, b"/", &name.0].concat()),
        })
        .collect()
}

fn failure(
    program: &Program,
    name: &Bytes,
    candidates: &[CString],
    fault: &LaunchFault,
) -> Failure {
    let run = format!("run {}", name.0.escape_ascii());
    let cwd = program.cwd.as_ref().map_or(&b"/"[..], |cwd| &cwd.0);
    let (what, kind) = match (fault.step, fault.source.raw_os_error()) {
        (LaunchStep::Directory, _) => {
            (format!("enter {}", cwd.escape_ascii()), FailureKind::BadDirectory)
        }
        // ENOENT: it is there, but not the interpreter that it names.
        (LaunchStep::Execute, Some(2)) if candidates.iter().any(|path| is_file(cwd, path)) => {
            (format!("{run}, or find its interpreter"), FailureKind::NotExecutable)
        }
        (LaunchStep::Execute, Some(2)) => (run, FailureKind::NotFound),
        // EACCES, ENOEXEC, EISDIR, ETXTBSY, ELIBBAD.
        (LaunchStep::Execute, Some(13 | 8 | 21 | 26 | 80)) => (run, FailureKind::NotExecutable),
        (LaunchStep::User, _) => return Failure::of(format!("{run} as its user"), &fault.source),
        (LaunchStep::Fork, _) => {
            return Failure::of(format!("{run} in a new process"), &fault.source);
        }
        (LaunchStep::Setup | LaunchStep::Execute, _) => return Failure::of(run, &fault.source),
    };
    Failure { kind, ..Failure::of(what, &fault.source) }
}

fn is_file(cwd: &[u8], path: &CString) -> bool {
    let path = Path::new(OsStr::from_bytes(cwd)).join(OsStr::from_bytes(path.to_bytes()));
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file())
}
