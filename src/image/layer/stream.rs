//! The bytes of a layer: read, unpacked and hashed, on a thread beside the one that takes them.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, Scope, ScopedJoinHandle};

use sha2::{Digest as _, Sha256};

use super::LayerFault;
use crate::image::blob::Blob;
use crate::image::digest::Digest;
use crate::image::skip::Skip;

/// What passes from one thread to the other at once.
const CHUNK_BYTES: usize = 256 << 10;
/// So many chunks are between the two: 2 MiB.
const CHUNKS: usize = 8;
/// The window of zstd that a layer may ask for, as a power of two: 8 MiB is what RFC 8878 has decoders
/// support, 128 MiB what zstd itself takes. It is memory.
const MAX_ZSTD_WINDOW_LOG: u32 = 25;
/// A stream that is smaller than this is no bomb, however well it is packed.
const FREE_BYTES: u64 = 256 << 20;

/// A layer as it lies in its image.
#[derive(Clone, Debug)]
pub(in crate::image) struct Packed {
    pub(in crate::image) blob: Blob,
    /// Of the blob, where the image says so.
    pub(in crate::image) digest: Option<Digest>,
    /// Unpacked bytes for each packed one, at most.
    pub(in crate::image) max_ratio: u64,
}

/// The unpacked bytes of a layer.
pub(in crate::image) struct LayerStream {
    chunks: Receiver<Result<Vec<u8>, LayerFault>>,
    /// Chunks go back, so that no memory is asked for.
    empty: Sender<Vec<u8>>,
    chunk: Vec<u8>,
    at: usize,
    unpacked: Sha256,
    count: u64,
    /// Packed bytes that the thread has read.
    packed: Arc<AtomicU64>,
    max_bytes: u64,
    fault: Option<LayerFault>,
}

impl LayerStream {
    /// Starts the thread. It ends with the layer, with an error, or when the stream is dropped. It is to be joined:
    /// a scope does not wait for the end of what its threads have for themselves.
    pub(in crate::image) fn start<'s>(
        scope: &'s Scope<'s, '_>,
        packed: Packed,
        max_bytes: u64,
    ) -> Result<(Self, ScopedJoinHandle<'s, ()>), LayerFault> {
        let (sender, chunks) = sync_channel(CHUNKS);
        let (empty, returned) = channel();
        let read = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&read);
        let thread = thread::Builder::new()
            .name("dormouse-image".to_owned())
            .spawn_scoped(scope, move || {
                if let Err(fault) = unpack(packed, &count, &sender, &returned) {
                    // Nobody hears it where the stream was dropped.
                    let _ = sender.send(Err(fault));
                }
            })
            .map_err(LayerFault::Thread)?;
        let stream = Self {
            chunks,
            empty,
            chunk: Vec::new(),
            at: 0,
            unpacked: Sha256::new(),
            count: 0,
            packed: read,
            max_bytes,
            fault: None,
        };
        Ok((stream, thread))
    }

    /// Unpacked bytes up to here.
    pub(in crate::image) fn count(&self) -> u64 {
        self.count
    }

    /// Packed bytes that were read: somewhat ahead.
    pub(in crate::image) fn packed(&self) -> u64 {
        self.packed.load(Ordering::Relaxed)
    }

    /// What went wrong where `read` failed.
    pub(in crate::image) fn take_fault(&mut self) -> Option<LayerFault> {
        self.fault.take()
    }

    /// Reads to the end, which checks the packed bytes. Returns the digest of all unpacked ones, and their
    /// number.
    pub(in crate::image) fn finish(mut self) -> Result<(Digest, u64), LayerFault> {
        while self.next_chunk()? {}
        Ok((Digest::end(self.unpacked), self.count))
    }

    /// Why an archive is wrong: because it is not the one that is meant, or because of what was found in it.
    pub(in crate::image) fn explain(self, fault: LayerFault) -> LayerFault {
        match fault {
            LayerFault::Tar(_) | LayerFault::Truncated | LayerFault::Type(_) => {
                match self.finish() {
                    Err(digest @ LayerFault::Digest { .. }) => digest,
                    _ => fault,
                }
            }
            fault => fault,
        }
    }

    /// Whether there is one more.
    fn next_chunk(&mut self) -> Result<bool, LayerFault> {
        let Ok(chunk) = self.chunks.recv() else {
            return Ok(false);
        };
        let old = std::mem::replace(&mut self.chunk, chunk?);
        let _ = self.empty.send(old);
        self.at = 0;
        self.unpacked.update(&self.chunk);
        self.count += self.chunk.len() as u64;
        if self.count > self.max_bytes {
            return Err(LayerFault::Limit {
                what: "bytes left for a layer",
                limit: self.max_bytes,
            });
        }
        Ok(true)
    }

    /// The bytes that are there; none at the end.
    fn fill(&mut self) -> io::Result<&[u8]> {
        while self.at == self.chunk.len() {
            match self.next_chunk() {
                Ok(true) => {}
                Ok(false) => return Ok(&[]),
                Err(fault) => {
                    self.fault = Some(fault);
                    return Err(io::Error::other("the layer's stream failed"));
                }
            }
        }
        Ok(&self.chunk[self.at..])
    }
}

impl Read for LayerStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill()?;
        let read = bytes.len().min(buffer.len());
        buffer[..read].copy_from_slice(&bytes[..read]);
        self.at += read;
        Ok(read)
    }
}

impl Skip for LayerStream {
    fn skip(&mut self, mut bytes: u64) -> io::Result<()> {
        while bytes > 0 {
            let available = self.fill()?.len();
            if available == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let skipped = usize::try_from(bytes).unwrap_or(usize::MAX).min(available);
            self.at += skipped;
            bytes -= skipped as u64;
        }
        Ok(())
    }
}

/// Sends the unpacked bytes of a blob, until all are sent or nobody takes them.
fn unpack(
    packed: Packed,
    count: &AtomicU64,
    sender: &SyncSender<Result<Vec<u8>, LayerFault>>,
    returned: &Receiver<Vec<u8>>,
) -> Result<(), LayerFault> {
    let (size, max_ratio) = (packed.blob.len(), packed.max_ratio);
    let mut head = packed.blob.clone();
    let mut magic = Vec::new();
    Read::by_ref(&mut head).take(6).read_to_end(&mut magic)?;
    let hasher = packed.digest.map(|_| Sha256::new());
    let mut source = Hashed { blob: packed.blob, hasher, count };
    let allowed = FREE_BYTES.max(size.saturating_mul(max_ratio));
    let budget = Budget { allowed, max_ratio };
    let pumped = match magic[..] {
        [0x1f, 0x8b, ..] => {
            let reader = io::BufReader::with_capacity(CHUNK_BYTES, &mut source);
            pump(flate2::bufread::MultiGzDecoder::new(reader), sender, returned, budget)
        }
        // A frame, or one that is to be skipped.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let reader = io::BufReader::with_capacity(CHUNK_BYTES, &mut source);
            let mut decoder = zstd::stream::read::Decoder::with_buffer(reader)?;
            decoder.window_log_max(MAX_ZSTD_WINDOW_LOG)?;
            pump(decoder, sender, returned, budget)
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0] | [b'B', b'Z', b'h', ..] => {
            return Err(LayerFault::Tar(
                "it is packed with xz or bzip2, which the OCI specification does not have",
            ));
        }
        _ => pump(&mut source, sender, returned, budget),
    };
    let pumped = match pumped {
        Err(LayerFault::Limit { what, limit }) => return Err(LayerFault::Limit { what, limit }),
        // Nobody wants the rest.
        Ok(Pumped::GivenUp) => return Ok(()),
        pumped => pumped.map(drop),
    };
    // What the decoder did not need is part of the blob too; and that a blob is not the one that is meant says
    // more than what is wrong in it.
    io::copy(&mut source, &mut io::sink())?;
    let found = source.hasher.map(Digest::end);
    match (packed.digest, found) {
        (Some(expected), Some(found)) if expected != found => {
            let (expected, found) = (expected.to_string(), found.to_string());
            Err(LayerFault::Digest { expected, found })
        }
        _ => pumped,
    }
}

#[derive(Clone, Copy)]
struct Budget {
    allowed: u64,
    max_ratio: u64,
}

/// How far it came.
enum Pumped {
    All,
    GivenUp,
}

fn pump(
    mut reader: impl Read,
    sender: &SyncSender<Result<Vec<u8>, LayerFault>>,
    returned: &Receiver<Vec<u8>>,
    budget: Budget,
) -> Result<Pumped, LayerFault> {
    let mut sum = 0;
    loop {
        let mut chunk = returned.try_recv().unwrap_or_default();
        chunk.resize(CHUNK_BYTES, 0);
        let mut filled = 0;
        while filled < CHUNK_BYTES {
            match reader.read(&mut chunk[filled..])? {
                0 => break,
                read => filled += read,
            }
        }
        sum += filled as u64;
        if sum > budget.allowed {
            let limit = budget.max_ratio;
            return Err(LayerFault::Limit { what: "unpacked bytes for each packed one", limit });
        }
        chunk.truncate(filled);
        if filled == 0 {
            return Ok(Pumped::All);
        }
        if sender.send(Ok(chunk)).is_err() {
            return Ok(Pumped::GivenUp);
        }
    }
}

/// A blob that is hashed while it is read, and how far that is.
struct Hashed<'c> {
    blob: Blob,
    hasher: Option<Sha256>,
    count: &'c AtomicU64,
}

impl Read for Hashed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.blob.read(buffer)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..read]);
        }
        self.count.store(self.blob.position(), Ordering::Relaxed);
        Ok(read)
    }
}
