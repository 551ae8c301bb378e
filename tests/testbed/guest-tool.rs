//! What tests and examples do in a guest that busybox does not. Built by `run`, of the standard
//! library alone and linked statically, so that an initramfs needs no more than this one file.
//!
//! ```text
//! guest-tool vsock-echo PORT COUNT         echoes COUNT connections to its port, all at once
//! guest-tool vsock-connect PORT COUNT      makes COUNT connections to the host's port, all at
//!                                          once, and checks that what it says comes back
//! guest-tool vsock-run PORT PROGRAM        connects to the host's port, and runs a program whose
//!                                          input and output that connection is
//! guest-tool vsock-cat PORT                connects to the host's port; its input and output
//! guest-tool vsock-sink PORT FILE          connects to the host's port, and writes what comes to
//!                                          a file; its end says that the file is whole
//! guest-tool vsock-source PORT FILE        connects to the host's port, waits for a byte, and
//!                                          sends a file
//! guest-tool set-xattr FILE NAME HEX       gives a file an extended attribute
//! guest-tool xattrs DIRECTORY SKIP…        lists the extended attributes of all files below a
//!                                          directory, but those below the names SKIP in it
//! guest-tool random                        prints 16 bytes of getrandom(2)
//! guest-tool identities FILE               writes its machine's id and name to a file, ten lines at a
//!                                          time, before any other program has the processor
//! ```

use std::env;
use std::ffi::{CStr, CString, c_char, c_int};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

const AF_VSOCK: c_int = 40;
const SOCK_STREAM: c_int = 1;
const SHUT_WR: c_int = 1;
const SO_VM_SOCKETS_CONNECT_TIMEOUT: c_int = 6;
const CID_ANY: u32 = u32::MAX;
const CID_HOST: u32 = 2;
const SCHED_FIFO: c_int = 1;

/// `struct sockaddr_vm` (vsock(7)).
#[repr(C)]
struct SockaddrVm {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(socket: c_int, address: *const SockaddrVm, len: u32) -> c_int;
    fn connect(socket: c_int, address: *const SockaddrVm, len: u32) -> c_int;
    fn listen(socket: c_int, backlog: c_int) -> c_int;
    fn accept(socket: c_int, address: *mut SockaddrVm, len: *mut u32) -> c_int;
    fn shutdown(socket: c_int, how: c_int) -> c_int;
    fn getrandom(bytes: *mut u8, len: usize, flags: u32) -> isize;
    fn sched_setscheduler(process: c_int, policy: c_int, priority: *const c_int) -> c_int;
    fn setsockopt(
        socket: c_int,
        level: c_int,
        name: c_int,
        value: *const [i64; 2],
        len: u32,
    ) -> c_int;
    fn llistxattr(path: *const c_char, names: *mut u8, size: usize) -> isize;
    fn lgetxattr(path: *const c_char, name: *const c_char, value: *mut u8, size: usize) -> isize;
    fn lsetxattr(
        path: *const c_char,
        name: *const c_char,
        value: *const u8,
        size: usize,
        flags: c_int,
    ) -> c_int;
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["vsock-echo", port, count] => vsock_echo(number(port), number(count)),
        ["vsock-connect", port, count] => vsock_connect(number(port), number(count)),
        ["vsock-run", port, program] => vsock_run(number(port), program),
        ["vsock-cat", port] => vsock_cat(number(port)),
        ["vsock-sink", port, file] => vsock_sink(number(port), file),
        ["vsock-source", port, file] => vsock_source(number(port), file),
        ["set-xattr", file, name, hex] => set_xattr(file, name, hex),
        ["xattrs", directory, ref skip @ ..] => xattrs(Path::new(directory), skip),
        ["random"] => random(),
        ["identities", file] => identities(file),
        _ => Err(io::Error::other("see the top of tests/testbed/guest-tool.rs")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("guest-tool {}: {error}", args.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn number(text: &str) -> u32 {
    text.parse().expect("a number")
}

fn vsock_echo(port: u32, count: u32) -> io::Result<()> {
    let listener = vsock_socket()?;
    let address = address(CID_ANY, port);
    check(unsafe { bind(listener.as_raw_fd(), &address, size_of::<SockaddrVm>() as u32) })?;
    check(unsafe { listen(listener.as_raw_fd(), 128) })?;
    println!("vsock-echo: port {port}");
    let no_address = (std::ptr::null_mut(), std::ptr::null_mut());
    let mut threads = Vec::new();
    for at in 0..count {
        let socket = check(unsafe { accept(listener.as_raw_fd(), no_address.0, no_address.1) })?;
        let stream = unsafe { File::from_raw_fd(socket) };
        threads.push(spawn(move || echo(stream, at))?);
    }
    join(threads)?;
    println!("vsock-echo: {count} connections have ended");
    Ok(())
}

/// Sends back what comes, until it ends.
fn echo(mut stream: File, at: u32) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    let mut reads = 0;
    loop {
        // Every tenth one takes its time: its peer has to wait.
        if at % 10 == 0 && reads < 10 {
            thread::sleep(Duration::from_millis(100));
        }
        reads += 1;
        match stream.read(&mut buffer)? {
            0 => return check(unsafe { shutdown(stream.as_raw_fd(), SHUT_WR) }).map(|_| ()),
            len => stream.write_all(&buffer[..len])?,
        }
    }
}

fn vsock_connect(port: u32, count: u32) -> io::Result<()> {
    let streams = (0..count).map(|_| vsock_to_host(port)).collect::<io::Result<Vec<_>>>()?;
    println!("vsock-connect: {count} connections");
    let threads =
        (0..count).zip(streams).map(|(seed, stream)| spawn(move || check_echo(stream, seed)));
    join(threads.collect::<io::Result<_>>()?)?;
    println!("vsock-connect: {count} connections have ended");
    Ok(())
}

/// Writes noise and checks that it comes back. Every tenth has more than all buffers on the way
/// take, and waits before it reads.
fn check_echo(stream: File, seed: u32) -> io::Result<()> {
    let len = if seed % 10 == 0 { 768 << 10 } else { 24 << 10 };
    let mut writer = stream.try_clone()?;
    let writing = spawn(move || {
        writer.write_all(&noise(seed, len))?;
        check(unsafe { shutdown(writer.as_raw_fd(), SHUT_WR) }).map(|_| ())
    })?;
    if seed % 10 == 0 {
        thread::sleep(Duration::from_millis(1000));
    }
    let mut received = Vec::new();
    (&stream).read_to_end(&mut received)?;
    join(vec![writing])?;
    match received == noise(seed, len) {
        true => Ok(()),
        false => Err(io::Error::other(format!("{} of {len} bytes came back", received.len()))),
    }
}

/// The same bytes for the same seed; the host's side has this too.
fn noise(seed: u32, len: usize) -> Vec<u8> {
    let mut state = u64::from(seed);
    let next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn vsock_run(port: u32, program: &str) -> io::Result<()> {
    let stream = vsock_to_host(port)?;
    let status = Command::new(program).stdin(stream.try_clone()?).stdout(stream).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) }
}

fn vsock_cat(port: u32) -> io::Result<()> {
    let mut stream = vsock_to_host(port)?;
    let mut writer = stream.try_clone()?;
    let writing = spawn(move || {
        io::copy(&mut io::stdin(), &mut writer)?;
        check(unsafe { shutdown(writer.as_raw_fd(), SHUT_WR) }).map(|_| ())
    })?;
    io::copy(&mut stream, &mut io::stdout())?;
    join(vec![writing])
}

fn vsock_sink(port: u32, file: &str) -> io::Result<()> {
    let stream = vsock_to_host(port)?;
    copy_pieces(&stream, &File::create(file)?)?;
    check(unsafe { shutdown(stream.as_raw_fd(), SHUT_WR) }).map(|_| ())
}

fn vsock_source(port: u32, file: &str) -> io::Result<()> {
    let stream = vsock_to_host(port)?;
    (&stream).read_exact(&mut [0])?;
    copy_pieces(&File::open(file)?, &stream)?;
    check(unsafe { shutdown(stream.as_raw_fd(), SHUT_WR) }).map(|_| ())
}

/// Copies all that comes, in pieces as large as the agent's frames. `io::copy` would let the kernel do it.
fn copy_pieces(mut from: &File, mut to: &File) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            len => to.write_all(&buffer[..len])?,
        }
    }
}

fn random() -> io::Result<()> {
    let mut bytes = [0; 16];
    let filled = unsafe { getrandom(bytes.as_mut_ptr(), bytes.len(), 0) };
    check(filled as c_int)?;
    println!("{:032x}", u128::from_be_bytes(bytes));
    Ok(())
}

/// Notes who this machine is, for ever.
fn identities(file: &str) -> io::Result<()> {
    // A `struct sched_param`: of this policy the least is more than all of the usual one.
    let priority = 1;
    check(unsafe { sched_setscheduler(0, SCHED_FIFO, &priority) })?;
    let mut file = File::options().append(true).create(true).open(file)?;
    loop {
        for _ in 0..10 {
            let id = fs::read_to_string("/etc/machine-id")?;
            let name = fs::read_to_string("/proc/sys/kernel/hostname")?;
            file.write_all(format!("{} {}\n", id.trim(), name.trim()).as_bytes())?;
        }
        // All others have their time, too.
        thread::sleep(Duration::from_millis(10));
    }
}

fn vsock_to_host(port: u32) -> io::Result<File> {
    let socket = vsock_socket()?;
    // A `struct timeval`. Two seconds unless set, which a busy emulated machine may need.
    let patience = [120, 0];
    let (fd, len) = (socket.as_raw_fd(), size_of_val(&patience) as u32);
    check(unsafe { setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &patience, len) })?;
    let address = address(CID_HOST, port);
    check(unsafe { connect(socket.as_raw_fd(), &address, size_of::<SockaddrVm>() as u32) })?;
    Ok(socket)
}

fn vsock_socket() -> io::Result<File> {
    let socket = check(unsafe { socket(AF_VSOCK, SOCK_STREAM, 0) })?;
    Ok(unsafe { File::from_raw_fd(socket) })
}

fn address(cid: u32, port: u32) -> SockaddrVm {
    SockaddrVm { family: AF_VSOCK as u16, reserved: 0, port, cid, zero: [0; 4] }
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn set_xattr(file: &str, name: &str, hex: &str) -> io::Result<()> {
    let digits: Vec<u8> = hex.bytes().filter_map(|c| char::from(c).to_digit(16)).map(|d| d as u8).collect();
    let value: Vec<u8> = digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    let (file, name) = (CString::new(file)?, CString::new(name)?);
    check(unsafe { lsetxattr(file.as_ptr(), name.as_ptr(), value.as_ptr(), value.len(), 0) }).map(|_| ())
}

/// One line for each attribute, in the order of names: the file, the attribute, and its bytes.
fn xattrs(root: &Path, skip: &[&str]) -> io::Result<()> {
    let mut lines = Vec::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let name = path.strip_prefix(root).map_err(io::Error::other)?;
        if skip.iter().any(|skip| name == Path::new(skip)) {
            continue;
        }
        let file = CString::new(path.as_os_str().as_bytes())?;
        for attribute in names(&file)?.split_inclusive(|byte| *byte == 0) {
            let attribute = CStr::from_bytes_with_nul(attribute).map_err(io::Error::other)?;
            let mut value = vec![0; 64 << 10];
            let len = check_len(unsafe {
                lgetxattr(file.as_ptr(), attribute.as_ptr(), value.as_mut_ptr(), value.len())
            })?;
            let hex: String = value[..len].iter().map(|byte| format!("{byte:02x}")).collect();
            lines.push(format!("{} {} {hex}", name.display(), attribute.to_string_lossy()));
        }
        if fs::symlink_metadata(&path)?.is_dir() {
            left.extend(fs::read_dir(&path)?.collect::<io::Result<Vec<_>>>()?.iter().map(|entry| entry.path()));
        }
    }
    lines.sort();
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

fn names(file: &CStr) -> io::Result<Vec<u8>> {
    let mut names = vec![0; 64 << 10];
    let len = check_len(unsafe { llistxattr(file.as_ptr(), names.as_mut_ptr(), names.len()) })?;
    names.truncate(len);
    Ok(names)
}

fn check_len(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

type Thread = thread::JoinHandle<io::Result<()>>;

/// A thread with a small stack: there are hundreds of them.
fn spawn(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<Thread> {
    thread::Builder::new().stack_size(64 << 10).spawn(work)
}

fn join(threads: Vec<Thread>) -> io::Result<()> {
    threads.into_iter().try_for_each(|thread| thread.join().expect("a thread that does not panic"))
}
