//! The messages.

use super::wire::{Bytes, Input, Malformed, Wire, wire};

/// The first bytes of a [`Hello`] and of a [`Welcome`].
const MAGIC: [u8; 8] = *b"dormouse";

wire! {
    /// What the agent has to do before it is ready. It reads it once, when the guest boots.
    struct Setup {
        /// Where the guest's root file system is; the initramfs if nowhere.
        root: Option<Root>,
        /// Other disks.
        mounts: Vec<Mount>,
        hostname: Option<String>,
        interfaces: Vec<Interface>,
        /// Addresses of name servers, for /etc/resolv.conf; none leaves the file as it is.
        nameservers: Vec<String>,
        services: Vec<Service>,
        /// What the guest is there for, started when everything else is ready.
        entrypoint: Option<Program>,
        /// What asks the entrypoint to end when the guest shall; SIGTERM, as for all others, if not given.
        stop_signal: Option<i32>,
        /// Whether the guest ends, by switching itself off, when the entrypoint does.
        end_with_entrypoint: bool,
    }

    struct Root {
        /// The disk, counted from 0.
        disk: u32,
        /// Its file system, such as `ext4`; each that the kernel knows is tried, if not given.
        fs_type: Option<String>,
        overlay: Overlay,
    }

    /// Where writes to the root file system go.
    enum Overlay {
        /// To the disk itself.
        0 => None,
        /// Nowhere: it is read-only.
        1 => ReadOnly,
        /// To the guest's memory, up to so many bytes; half of the memory if 0.
        2 => Memory(u64),
        /// To another disk, counted from 0, with an ext4 file system.
        3 => Disk(u32),
    }

    struct Mount {
        /// The disk, counted from 0.
        disk: u32,
        path: Bytes,
        fs_type: Option<String>,
        read_only: bool,
    }

    /// A network interface, eth0, eth1, … by its place in the list.
    struct Interface {
        /// Its addresses with their prefixes, such as `10.0.2.15/24`.
        addresses: Vec<String>,
        /// Where what is not on its network goes.
        gateways: Vec<String>,
    }

    /// A service of the host that the guest reaches at a port of its loopback.
    struct Service {
        name: String,
        port: u16,
    }

    /// What begins a connection of the guest to the host.
    enum Opening {
        0 => Hello(Hello),
        /// Somebody in the guest connects to the service of this name. Answered by [`Reply::Done`] or
        /// [`Reply::Failed`]; then come the bytes.
        1 => Service(String),
    }

    /// Who a VM is: what a clone must not share with another.
    struct Identity {
        /// What time it is, in nanoseconds since 1970 (CLOCK_REALTIME).
        wall_clock_ns: u64,
        /// What the kernel's random number generator is seeded with.
        seed: [u8; 32],
        /// Another machine-id, hostname and addresses, where this is a clone and not the same VM.
        renewal: Option<Renewal>,
    }

    struct Renewal {
        machine_id: [u8; 16],
        /// None leaves it as it is.
        hostname: Option<String>,
        /// Addresses in place of those of [`Setup::interfaces`]; none leaves them as they are.
        interfaces: Vec<Interface>,
    }

    /// What the host says on the connection that the agent keeps to it.
    enum Line {
        /// Is the agent alive? Answered by [`Reply::Done`].
        0 => Ping,
    }

    /// What the host asks for: the first frame of a connection to the agent, on
    /// [`Channel::Call`](super::Channel::Call), and the next one when a call is over.
    enum Call {
        /// Runs a program. [`Reply::Started`] or [`Reply::Failed`]; then the program's input as
        /// [`Channel::Data`](super::Channel::Data) and [`Control`] one way, its output as `Stdout` and `Stderr`, and
        /// [`Reply::Credit`] for its input, the other; an empty frame is a stream's end. Last comes [`Reply::Exited`].
        /// Where the host closes before that, the program's process group is killed; where the connection is reset,
        /// as by a restore of the VM, it goes on, and what it writes is thrown away.
        0 => Exec(Exec),
        /// [`Reply::Stat`] or `Failed`; then the file's bytes, and an empty frame or [`Reply::Failed`].
        1 => Read(Read),
        /// `Done` or `Failed` when the file can be written; then its bytes from the host, and an empty frame;
        /// then `Done` when the new file has taken the place of the old one, or `Failed`.
        2 => Write(Write),
        /// As `Write`, with a tree from the host as [`Node`]s in place of bytes.
        3 => CopyIn(Bytes),
        /// `Done` or `Failed`; then the tree as [`Node`]s.
        4 => CopyOut(Bytes),
        /// [`Reply::Stat`] or `Failed`. Links are not followed.
        5 => Stat(Bytes),
        /// [`Reply::Entry`] for each, then `Done`; or `Failed`.
        6 => List(Bytes),
        7 => Remove(Remove),
        8 => MakeDirectory(MakeDirectory),
        /// Connects to a TCP port of the guest's loopback: `Done` or `Failed`; then come the bytes of both,
        /// without frames. Half a connection is closed as half a connection is.
        9 => Connect(u16),
        /// Stops all processes of the agent's cgroup for programs, and writes file systems to their disks: `Done` or `Failed`.
        /// They go on by `Thaw`, or when the agent has said `Done` to a [`Welcome`].
        10 => Freeze,
        11 => Thaw,
        /// Ends the guest: SIGTERM to all processes ([`Setup::stop_signal`] to the entrypoint, and none to what that
        /// has started, if it is given), SIGKILL to those that are left after so many milliseconds, unmounts, and
        /// switches off. Nothing is answered but the end of the connection.
        12 => Shutdown(u32),
        /// How much memory the agent takes: [`Reply::Usage`].
        13 => Usage,
    }

    struct Program {
        /// The program and its arguments, as in execve. Without a `/` it is looked for in PATH.
        argv: Vec<Bytes>,
        /// Names and values: all of the environment, but for HOME.
        env: Vec<(Bytes, Bytes)>,
        /// Whether HOME is the user's home directory, where `env` has none.
        home: bool,
        /// `/` if not given.
        cwd: Option<Bytes>,
        /// `user`, `uid`, `user:group` or `uid:gid`, in names of the guest's /etc/passwd and /etc/group; root if
        /// not given. A user that is given by name has its supplementary groups.
        user: Option<String>,
    }

    struct Exec {
        program: Program,
        /// Whether there is input; /dev/null if not.
        stdin: bool,
        /// A terminal in place of the three streams: all that it shows is `Stdout`.
        terminal: Option<WindowSize>,
        /// After so many milliseconds the process group is killed.
        timeout_ms: Option<u64>,
    }

    struct WindowSize {
        rows: u16,
        columns: u16,
    }

    /// What goes with a program's streams.
    enum Control {
        /// The reader of a stream has taken so many bytes: as many may come again.
        0 => Credit(Credit),
        /// A signal for the process group.
        1 => Signal(i32),
        2 => Resize(WindowSize),
    }

    struct Credit {
        /// The number of the stream's [`Channel`](super::Channel).
        channel: u8,
        bytes: u32,
    }

    struct Read {
        path: Bytes,
        offset: u64,
        /// As much as there is, if not given.
        length: Option<u64>,
    }

    struct Write {
        path: Bytes,
        /// Permissions of a new file; an old one keeps its own, if not given (0644 where there is none).
        mode: Option<u32>,
        /// Its owner and group; likewise (root's where there is none).
        owner: Option<(u32, u32)>,
        /// Whether the file is on its disk before it is done.
        sync: bool,
    }

    struct Remove {
        path: Bytes,
        /// With all that is in it.
        recursive: bool,
    }

    struct MakeDirectory {
        path: Bytes,
        mode: u32,
        /// Makes those above it too, and is content with one that is there.
        parents: bool,
    }

    enum Reply {
        0 => Done,
        1 => Failed(Failure),
        2 => Started(u32),
        3 => Exited(Exit),
        4 => Stat(Stat),
        5 => Entry(Entry),
        6 => Usage(Usage),
        7 => Credit(Credit),
    }

    struct Usage {
        /// Of physical memory (Rss of /proc/self/smaps_rollup), in bytes.
        resident_bytes: u64,
    }

    struct Failure {
        kind: FailureKind,
        /// The system's error number, 0 if it is none.
        errno: i32,
        /// What could not be done.
        what: String,
    }

    enum FailureKind {
        /// There is no such file, program or user.
        0 => NotFound,
        /// It is there, but cannot be run.
        1 => NotExecutable,
        /// The working directory cannot be entered.
        2 => BadDirectory,
        3 => Exists,
        4 => Permission,
        /// Nobody listens at the port.
        5 => Refused,
        /// A disk or the memory is full.
        6 => Full,
        /// What was asked for cannot be: a path with a NUL, a signal that there is not.
        7 => Invalid,
        /// The host does not allow it.
        8 => NotAllowed,
        9 => Other,
        /// The guest's processes stand still, to be saved.
        10 => Frozen,
    }

    struct Exit {
        status: ExitCode,
        /// Whether it was killed since its time was over.
        timed_out: bool,
    }

    enum ExitCode {
        0 => Code(i32),
        1 => Signal(i32),
    }

    struct Stat {
        kind: FileKind,
        /// Permission bits, with those of set-user-id, set-group-id and sticky.
        mode: u32,
        uid: u32,
        gid: u32,
        size: u64,
        /// Of the last change, in nanoseconds since 1970.
        modified_ns: i64,
    }

    enum FileKind {
        0 => File,
        1 => Directory,
        2 => Symlink,
        /// A device, a pipe or a socket.
        3 => Other,
    }

    struct Entry {
        name: Bytes,
        stat: Stat,
    }

    /// A tree, from its root. Names are names, not paths: no `/`, not `.` or `..`, not empty (but the root's is).
    /// A directory's nodes follow it, up to its `Leave`. A file's bytes follow it as frames of
    /// [`Channel::Data`](super::Channel::Data) and `Hole`s, up to an empty frame.
    /// What is neither file, directory nor link is left out. Last of all comes `End`, or, anywhere, `Failed`.
    enum Node {
        0 => Directory(Entry),
        1 => File(Entry),
        2 => Symlink(Symlink),
        /// So many bytes that are zero.
        3 => Hole(u64),
        4 => Leave,
        5 => End,
        /// It cannot be read on: the last node.
        6 => Failed(Failure),
    }

    struct Symlink {
        entry: Entry,
        target: Bytes,
    }
}

/// What the agent says first. Its first two fields are the same in all versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) version: u32,
    /// What of [`Setup`] could not be done: the agent is there, but not ready.
    pub(crate) fault: Option<Failure>,
}

/// What the host answers. Its first two fields are the same in all versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Welcome {
    pub(crate) version: u32,
    pub(crate) identity: Identity,
}

impl Wire for Hello {
    fn encode(&self, out: &mut Vec<u8>) {
        MAGIC.encode(out);
        self.version.encode(out);
        self.fault.encode(out);
    }

    fn decode(input: &mut Input<'_>) -> Result<Self, Malformed> {
        let version = version(input)?;
        if version != super::VERSION {
            input.skip_all();
            return Ok(Self { version, fault: None });
        }
        Ok(Self { version, fault: Wire::decode(input)? })
    }
}

impl Wire for Welcome {
    fn encode(&self, out: &mut Vec<u8>) {
        MAGIC.encode(out);
        self.version.encode(out);
        self.identity.encode(out);
    }

    fn decode(input: &mut Input<'_>) -> Result<Self, Malformed> {
        let version = version(input)?;
        if version != super::VERSION {
            return Err(input.malformed("this version of the protocol"));
        }
        Ok(Self { version, identity: Wire::decode(input)? })
    }
}

fn version(input: &mut Input<'_>) -> Result<u32, Malformed> {
    if <[u8; 8]>::decode(input)? != MAGIC {
        return Err(input.malformed("`dormouse`"));
    }
    u32::decode(input)
}
