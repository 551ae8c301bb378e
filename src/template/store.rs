//! The directory of templates.
//!
//! For a template named KEY there are: KEY, its snapshot's directory, put there when it was tried; KEY.lock,
//! locked by who builds it; KEY.inactive, where nobody shall start it; `.KEY.building` in between.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use tokio::time::sleep;

use super::error::TemplateError;
use crate::error::Error;
use crate::file_lock::{Locked, LockedFile};
use crate::snapshot::Snapshot;

/// How long one that is being built elsewhere is left alone.
const AGAIN: Duration = Duration::from_millis(50);

/// The name of a template: a SHA-256.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Key(pub(super) [u8; 32]);

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Key {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Self, TemplateError> {
        let none = || TemplateError::Name { text: text.chars().take(80).collect() };
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() != 64 || !text.bytes().all(is_digit) {
            return Err(none());
        }
        let mut key = [0; 32];
        for (byte, at) in key.iter_mut().zip((0..).step_by(2)) {
            let digits = text.get(at..at + 2).ok_or_else(none)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| none())?;
        }
        Ok(Self(key))
    }
}

#[derive(Clone, Debug)]
pub(super) struct Store {
    directory: PathBuf,
}

impl Store {
    /// What is in a directory, which need not be there.
    pub(super) fn at(directory: &Path) -> Result<Self, TemplateError> {
        // Absolute, so that it means the same when the process goes elsewhere.
        let absolute = std::path::absolute(directory);
        Ok(Self { directory: absolute.map_err(TemplateError::io("find", directory))? })
    }

    /// The same, of one that is there from then on.
    pub(super) fn create(directory: &Path) -> Result<Self, TemplateError> {
        let store = Self::at(directory)?;
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&store.directory);
        made.map_err(TemplateError::io("make the directory", directory))?;
        Ok(store)
    }

    pub(super) fn entry(&self, key: Key) -> Entry {
        Entry { directory: self.directory.clone(), key }
    }

    pub(super) fn list(&self) -> Result<Vec<String>, Error> {
        let failed = || TemplateError::io("read", &self.directory);
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed())?,
        };
        let names = entries.filter_map(|entry| match entry {
            Ok(entry) => entry.file_name().into_string().ok().map(Ok),
            Err(error) => Some(Err(error)),
        });
        let names = names.collect::<io::Result<Vec<_>>>().map_err(failed())?;
        let mut keys: Vec<_> =
            names.into_iter().filter(|name| name.parse::<Key>().is_ok()).collect();
        keys.sort();
        Ok(keys)
    }
}

/// The place of one template.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    directory: PathBuf,
    key: Key,
}

impl Entry {
    pub(super) fn id(&self) -> String {
        self.key.to_string()
    }

    pub(super) fn path(&self) -> PathBuf {
        self.directory.join(self.id())
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.path().with_extension(extension)
    }

    pub(super) fn is_active(&self) -> bool {
        !self.file("inactive").exists()
    }

    pub(super) fn deactivate(&self) -> Result<(), Error> {
        let path = self.file("inactive");
        let made = File::options().create(true).append(true).mode(0o600).open(&path);
        made.map_err(TemplateError::io("write", &path))?;
        Ok(())
    }

    pub(super) fn activate(&self) -> Result<(), Error> {
        let path = self.file("inactive");
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(TemplateError::io("remove", &path)(error).into())
            }
            _ => Ok(()),
        }
    }

    pub(super) fn remove(&self, snapshot: &Snapshot) {
        Snapshot::remove(&self.path(), snapshot.id());
        // What could not be removed is not to be used again.
        if !self.path().exists() {
            let _ = fs::remove_file(self.file("inactive"));
        }
    }

    /// A place for the snapshot until it was tried. Waits until nobody else builds this one; `waiting` is called where
    /// somebody does.
    pub(super) async fn building(&self, waiting: impl FnOnce()) -> Result<Building, Error> {
        let lock = self.lock(waiting).await?;
        let path = self.directory.join(format!(".{}.building", self.key));
        Ok(Building { entry: self.clone(), path, id: None, _lock: lock })
    }

    /// Whoever has the lock builds; a process that ends has none.
    async fn lock(&self, waiting: impl FnOnce()) -> Result<LockedFile, Error> {
        let path = self.file("lock");
        let mut waiting = Some(waiting);
        loop {
            let file = File::options().create(true).append(true).mode(0o600).open(&path);
            let file = file.map_err(TemplateError::io("open", &path))?;
            match LockedFile::exclusive_now(file).map_err(TemplateError::io("lock", &path))? {
                Locked::Ours(lock) => return Ok(lock),
                Locked::Taken => {}
                Locked::NoLocks(_) => {
                    let error = io::Error::from(io::ErrorKind::Unsupported);
                    return Err(TemplateError::io("lock", &path)(error).into());
                }
            }
            if let Some(waiting) = waiting.take() {
                waiting();
            }
            sleep(AGAIN).await;
        }
    }

    /// Removes what processes that ended have left half-made, of any template. What cannot be removed is left.
    pub(super) fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.directory) else { return };
        for entry in entries.flatten() {
            let Some(key) = entry.file_name().to_str().and_then(half_made) else { continue };
            let lock = File::open(Self { key, ..self.clone() }.file("lock"));
            // Kept until it is removed: nobody builds one meanwhile.
            if let Ok(lock) = lock
                && let Ok(Locked::Ours(_lock)) = LockedFile::exclusive_now(lock)
            {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// The template that a directory of this name was to become: `.KEY.building`, or what that is written as.
fn half_made(name: &str) -> Option<Key> {
    let name = name.strip_prefix('.')?;
    let (key, rest) = name.strip_prefix('.').unwrap_or(name).split_once('.')?;
    rest.starts_with("building").then(|| key.parse().ok())?
}

/// A snapshot that is not a template yet. It goes with this value, and nobody else builds one meanwhile.
pub(super) struct Building {
    entry: Entry,
    pub(super) path: PathBuf,
    pub(super) id: Option<[u8; 16]>,
    /// Let go of when the snapshot is in its place, or gone.
    _lock: LockedFile,
}

impl Building {
    /// Makes it the template, in place of one that could not be opened.
    pub(super) fn commit(mut self) -> Result<Snapshot, Error> {
        let target = self.entry.path();
        if target.exists() {
            fs::remove_dir_all(&target).map_err(TemplateError::io("remove", &target))?;
        }
        fs::rename(&self.path, &target).map_err(TemplateError::io("create", &target))?;
        match self.id.take() {
            Some(id) => Snapshot::open_same(&target, id),
            None => Snapshot::open(target),
        }
    }
}

impl Drop for Building {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            Snapshot::remove(&self.path, id);
        }
    }
}
