//! Output that nobody wants any more, of processes that still write it: read to nowhere until its
//! end, lest they die of a broken pipe. One thread does so for all.

use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::sys::{self, POLLIN, PollFd};

/// Files on their way to the thread, and how it is told; none if there is no thread.
static QUEUE: Mutex<Option<Queue>> = Mutex::new(None);

struct Queue {
    files: Vec<File>,
    doorbell: io::PipeWriter,
}

/// Reads from a file, which does not block, until its end.
pub(crate) fn drain(file: File) {
    let mut queue = QUEUE.lock().unwrap_or_else(PoisonError::into_inner);
    if queue.is_none() {
        *queue = start().ok();
    }
    // Without a thread the file is closed: what writes to it may end by that.
    if let Some(queue) = queue.as_mut() {
        queue.files.push(file);
        let _ = queue.doorbell.write_all(&[0]);
    }
}

fn start() -> io::Result<Queue> {
    let (bell, doorbell) = io::pipe()?;
    sys::set_nonblocking(&bell)?;
    sys::set_nonblocking(&doorbell)?;
    thread::Builder::new().stack_size(64 << 10).spawn(move || run(bell))?;
    Ok(Queue { files: Vec::new(), doorbell })
}

fn run(mut bell: PipeReader) {
    let mut files: Vec<File> = Vec::new();
    let mut buffer = vec![0; 16 << 10];
    loop {
        let mut fds: Vec<_> = files.iter().map(|f| PollFd::new(Some(f.as_fd()), POLLIN)).collect();
        fds.push(PollFd::new(Some(bell.as_fd()), POLLIN));
        if sys::poll(&mut fds, None).is_err() {
            continue;
        }
        let mut ready = fds.iter();
        files.retain_mut(|file| {
            !ready.next().is_some_and(PollFd::is_ready) || goes_on(file, &mut buffer)
        });
        while matches!(bell.read(&mut buffer), Ok(count) if count > 0) {}
        if let Some(queue) = QUEUE.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            files.append(&mut queue.files);
        }
    }
}

/// Reads once, and says whether more may come.
fn goes_on(file: &mut File, buffer: &mut [u8]) -> bool {
    match file.read(buffer) {
        Ok(count) => count > 0,
        Err(error) => {
            matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
        }
    }
}
