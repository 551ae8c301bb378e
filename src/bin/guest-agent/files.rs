//! Single files: read, written, listed and removed for the host.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{
    DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::connection::Connection;
use crate::failure::absolute;
use crate::protocol::{
    Bytes, Channel, Entry, Failure, FailureKind, FileKind, MAX_DATA_BYTES, MakeDirectory, Read,
    Remove, Reply, Stat, Write,
};
use crate::sys::{self, DirectoryEntries, open_flags};

/// More than any path leads through: each level is a name and a slash of 4,096 bytes.
pub(crate) const MAX_DEPTH: usize = 2048;

const EPERM: i32 = 1;
const EISDIR: i32 = 21;
const ENAMETOOLONG: i32 = 36;
const ELOOP: i32 = 40;

/// How many links a name may lead through (as the kernel's own limit).
const MAX_LINKS: usize = 40;

/// The longest name: known before its bytes are sent.
const MAX_NAME_BYTES: usize = 255;

const DEFAULT_MODE: u32 = 0o644;

pub(crate) fn stat_of(metadata: &Metadata) -> Stat {
    let file_type = metadata.file_type();
    let kind = match () {
        () if file_type.is_file() => FileKind::File,
        () if file_type.is_dir() => FileKind::Directory,
        () if file_type.is_symlink() => FileKind::Symlink,
        () => FileKind::Other,
    };
    let seconds = metadata.mtime().saturating_mul(1_000_000_000);
    Stat {
        kind,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        size: metadata.size(),
        modified_ns: seconds.saturating_add(metadata.mtime_nsec()),
    }
}

pub(crate) fn stat(path: &Bytes) -> Result<Stat, Failure> {
    let path = absolute(path)?;
    let metadata = fs::symlink_metadata(&path);
    metadata.map(|m| stat_of(&m)).map_err(|e| Failure::of_path("read about", &path, &e))
}

pub(crate) fn make_directory(call: &MakeDirectory) -> Result<(), Failure> {
    let path = absolute(&call.path)?;
    let mut builder = fs::DirBuilder::new();
    builder.mode(0o755);
    let made = (|| {
        if let (true, Some(parent)) = (call.parents, path.parent()) {
            builder.recursive(true).create(parent)?;
        }
        match builder.recursive(false).create(&path) {
            // One that is there stays as it is.
            Err(error)
                if call.parents
                    && error.kind() == io::ErrorKind::AlreadyExists
                    && path.is_dir() =>
            {
                Ok(())
            }
            // Above the new directory the usual mode holds; its own is not for the umask to change.
            made => made
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(call.mode))),
        }
    })();
    made.map_err(|e| Failure::of_path("make the directory", &path, &e))
}

/// Answers with the names in a directory.
pub(crate) fn list(connection: &mut Connection, path: &Bytes) -> io::Result<()> {
    let listed = absolute(path).and_then(|path| {
        let opened = open_directory(&path).map(|file| DirectoryEntries::new(file.into()));
        Ok((opened.map_err(|e| Failure::of_path("list", &path, &e))?, path))
    });
    let (mut entries, path) = match listed {
        Ok(listed) => listed,
        Err(failure) => return connection.answer(Err(failure)),
    };
    loop {
        let name = match entries.next() {
            Ok(Some(name)) => name,
            Ok(None) => return connection.answer(Ok(())),
            Err(e) => return connection.answer(Err(Failure::of_path("list", &path, &e))),
        };
        // One that has gone since is left out.
        if let Ok(metadata) = metadata_at(entries.directory(), OsStr::from_bytes(&name)) {
            let entry = Entry { name: Bytes(name), stat: stat_of(&metadata) };
            connection.queue(&Reply::Entry(entry))?;
        }
    }
}

/// Opens a directory. A pipe, in place of it, is not waited for.
pub(crate) fn open_directory(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(open_flags::DIRECTORY).open(path)
}

/// What a name in a directory is. Links are not followed.
pub(crate) fn metadata_at(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<Metadata> {
    sys::open_at(directory, name, open_flags::PATH | open_flags::NOFOLLOW, 0)?.metadata()
}

pub(crate) fn remove(call: &Remove) -> Result<(), Failure> {
    let path = absolute(&call.path)?;
    let removed = (|| match fs::symlink_metadata(&path)?.is_dir() {
        true if call.recursive => {
            let parent = File::open(path.parent().unwrap_or(Path::new("/")))?;
            let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
            remove_tree(parent.as_fd(), name, None)
        }
        true => fs::remove_dir(&path),
        false => fs::remove_file(&path),
    })();
    removed.map_err(|e| Failure::of_path("remove", &path, &e))
}

/// Removes a directory with all that is in it. Links are not followed, also those that another
/// program puts in a directory's place meanwhile; each level of the tree keeps a descriptor. With a
/// device, what is mounted below is left alone, and an error.
pub(crate) fn remove_tree(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    device: Option<u64>,
) -> io::Result<()> {
    let open = |parent: BorrowedFd<'_>, name: &OsStr| -> io::Result<DirectoryEntries> {
        let directory = File::from(open_directory_at(parent, name)?);
        match device {
            Some(device) if directory.metadata()?.dev() != device => {
                Err(io::ErrorKind::CrossesDevices.into())
            }
            _ => Ok(DirectoryEntries::new(directory.into())),
        }
    };
    let mut levels = vec![(open(parent, name)?, name.to_owned())];
    loop {
        let depth = levels.len();
        let Some((entries, _)) = levels.last_mut() else { return Ok(()) };
        if depth > MAX_DEPTH {
            return Err(io::Error::from_raw_os_error(ENAMETOOLONG));
        }
        let Some(name) = entries.next()? else {
            let Some((_, name)) = levels.pop() else { return Ok(()) };
            let above = levels.last().map_or(parent, |(entries, _)| entries.directory());
            sys::remove_at(above, &name, true)?;
            continue;
        };
        let name = OsString::from_vec(name);
        match sys::remove_at(entries.directory(), &name, false) {
            Err(error) if matches!(error.raw_os_error(), Some(EISDIR | EPERM)) => {
                let opened = open(entries.directory(), &name)?;
                levels.push((opened, name));
            }
            // Somebody else was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result?,
        }
    }
}

pub(crate) fn open_directory_at(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = open_flags::READ | open_flags::DIRECTORY | open_flags::NOFOLLOW;
    sys::open_at(parent, name, flags, 0).map(OwnedFd::from)
}

/// Answers with what is in a file.
pub(crate) fn read(connection: &mut Connection, call: &Read) -> io::Result<()> {
    let (mut file, stat, path) = match open_to_read(call) {
        Ok(opened) => opened,
        Err(failure) => return connection.answer(Err(failure)),
    };
    connection.queue(&Reply::Stat(stat))?;
    let mut left = call.length.unwrap_or(u64::MAX);
    while left > 0 {
        let max = usize::try_from(left).unwrap_or(usize::MAX).min(MAX_DATA_BYTES);
        match connection.queue_data(max, |bytes| io::Read::read(&mut file, bytes))? {
            Ok(0) => break,
            Ok(count) => left -= count as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return connection.answer(Err(Failure::of_path("read", &path, &e))),
        }
    }
    connection.queue_end()?;
    connection.flush()
}

fn open_to_read(call: &Read) -> Result<(File, Stat, PathBuf), Failure> {
    let path = absolute(&call.path)?;
    let opened = (|| {
        // A pipe that nobody writes to is not waited for.
        let options = OpenOptions::new().read(true).custom_flags(open_flags::NONBLOCK).open(&path);
        let mut file = options?;
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(io::Error::from_raw_os_error(EISDIR));
        }
        if call.offset > 0 {
            file.seek(SeekFrom::Start(call.offset))?;
        }
        Ok((file, stat_of(&metadata)))
    })();
    let (file, stat) = opened.map_err(|e| Failure::of_path("read", &path, &e))?;
    Ok((file, stat, path))
}

/// Takes the bytes of a file from the host.
pub(crate) fn write(connection: &mut Connection, call: &Write) -> io::Result<()> {
    let mut target = match absolute(&call.path).and_then(|path| Target::open(&path, call)) {
        Ok(target) => target,
        Err(failure) => return connection.answer(Err(failure)),
    };
    connection.answer(Ok(()))?;
    let mut result = Ok(());
    loop {
        let frame = connection.receive()?;
        if frame.channel != Channel::Data {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if frame.bytes.is_empty() {
            break;
        }
        if result.is_ok() {
            result = target.file.write_all(frame.bytes);
            // The host need not send the rest; what comes of it is thrown away.
            if let Err(error) = &result {
                let failure = target.failure(error);
                // Gone when the host hears of it.
                target.temporary = None;
                connection.answer(Err(failure))?;
            }
        }
    }
    match result {
        Ok(()) => connection.answer(target.finish(call.sync)),
        Err(_) => Ok(()),
    }
}

/// A file that is written: under another name until it is whole.
struct Target {
    file: File,
    path: PathBuf,
    /// None where the file itself is written, since it is a device or nothing can be beside it.
    temporary: Option<Temporary>,
}

impl Target {
    fn open(path: &Path, call: &Write) -> Result<Self, Failure> {
        let failed = |e: &io::Error| Failure::of_path("write", path, e);
        let path = follow(path).map_err(|e| failed(&e))?;
        let old = match fs::symlink_metadata(&path) {
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(&error)),
        };
        match &old {
            Some(old) if old.is_dir() => return Err(failed(&io::Error::from_raw_os_error(EISDIR))),
            Some(old) if !old.is_file() => return Self::open_itself(path, old),
            _ => {}
        }
        match Self::open_beside(&path, old.as_ref(), call) {
            // A file of the kernel's, or a mount: EPERM, ENOENT, EACCES, ENOSYS, EOPNOTSUPP.
            Err(error) if matches!(error.raw_os_error(), Some(1 | 2 | 13 | 38 | 95)) => {
                match &old {
                    Some(old) => Self::open_itself(path, old),
                    None => Err(failed(&error)),
                }
            }
            opened => opened.map_err(|error| failed(&error)),
        }
    }

    fn open_beside(path: &Path, old: Option<&Metadata>, call: &Write) -> io::Result<Self> {
        let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        if name.len() > MAX_NAME_BYTES {
            return Err(io::Error::from_raw_os_error(ENAMETOOLONG));
        }
        let temporary = Temporary::in_directory(File::open(parent)?.into());
        let file = temporary.create()?;
        let target = Self { file, path: path.into(), temporary: Some(temporary) };
        let owner = call.owner.or_else(|| old.map(|old| (old.uid(), old.gid())));
        if let Some((uid, gid)) = owner {
            fchown(&target.file, Some(uid), Some(gid))?;
        }
        let mode = call.mode.unwrap_or_else(|| old.map_or(DEFAULT_MODE, |old| old.mode() & 0o7777));
        target.file.set_permissions(fs::Permissions::from_mode(mode))?;
        Ok(target)
    }

    fn open_itself(path: PathBuf, old: &Metadata) -> Result<Self, Failure> {
        let mut options = OpenOptions::new();
        options.write(true).truncate(old.is_file()).custom_flags(open_flags::NONBLOCK);
        match options.open(&path) {
            Ok(file) if !old.file_type().is_fifo() => Ok(Self { file, path, temporary: None }),
            Ok(_) => Err(Failure::new(FailureKind::Invalid, "write to a pipe")),
            Err(error) => Err(Failure::of_path("write", &path, &error)),
        }
    }

    fn failure(&self, error: &io::Error) -> Failure {
        Failure::of_path("write", &self.path, error)
    }

    fn finish(mut self, sync: bool) -> Result<(), Failure> {
        let finished = (|| {
            if sync {
                self.file.sync_all()?;
            }
            let name = self.path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
            let Some(temporary) = self.temporary.take() else { return Ok(()) };
            let directory = temporary.rename(name)?;
            if sync { File::from(directory).sync_all() } else { Ok(()) }
        })();
        finished.map_err(|error| self.failure(&error))
    }
}

/// A name for a file that is not whole yet. Removed, if the file does not get its own.
pub(crate) struct Temporary {
    /// None when it has its own name.
    directory: Option<OwnedFd>,
    name: OsString,
}

impl Temporary {
    pub(crate) fn in_directory(directory: OwnedFd) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!(".dormouse.{}.{count}", std::process::id());
        Self { directory: Some(directory), name: name.into() }
    }

    fn directory(&self) -> io::Result<BorrowedFd<'_>> {
        Ok(self.directory.as_ref().ok_or(io::ErrorKind::NotFound)?.as_fd())
    }

    pub(crate) fn create(&self) -> io::Result<File> {
        let flags = open_flags::WRITE | open_flags::CREATE_NEW | open_flags::NOFOLLOW;
        match sys::open_at(self.directory()?, &self.name, flags, 0o600) {
            // Of an agent before this one.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                sys::remove_at(self.directory()?, &self.name, false)?;
                sys::open_at(self.directory()?, &self.name, flags, 0o600)
            }
            result => result,
        }
    }

    pub(crate) fn create_symlink(&self, target: &OsStr) -> io::Result<()> {
        let _ = sys::remove_at(self.directory()?, &self.name, false);
        sys::make_symlink_at(target, self.directory()?, &self.name)
    }

    /// Puts the file into the place of what has this name. Gives the directory back.
    pub(crate) fn rename(mut self, name: &OsStr) -> io::Result<OwnedFd> {
        sys::rename_at(self.directory()?, &self.name, name)?;
        self.directory.take().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Ok(directory) = self.directory() {
            let _ = sys::remove_at(directory, &self.name, false);
        }
    }
}

/// Where a name leads, if it is a link: also to a file that is not there yet.
pub(crate) fn follow(path: &Path) -> io::Result<PathBuf> {
    // Without a slash at the end: with one the kernel goes through the link by itself.
    let mut path: PathBuf = path.components().collect();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&path) {
            Ok(target) => {
                let parent = path.parent().unwrap_or(Path::new("/"));
                path = parent.join(target).components().collect();
            }
            // EINVAL: no link. What else is wrong shows when it is opened.
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::from_raw_os_error(ELOOP))
}

#[cfg(test)]
#[path = "tests/files.rs"]
mod tests;
