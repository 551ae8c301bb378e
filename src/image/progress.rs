//! How far the work on an image is.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ImageError;
use super::layer::LayerFault;

/// How far the work on an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageProgress {
    /// What is being done.
    pub stage: ImageStage,
    /// Bytes of this stage that are done.
    pub bytes: u64,
    /// Bytes that there are in this stage, where that is known before.
    pub total_bytes: Option<u64>,
}

/// A step on the way from an image to a root file system. Layers are counted from 0, the lowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageStage {
    /// Looking what there is.
    Find,
    /// Bringing a layer from its registry. Several are brought at once.
    Download(usize),
    /// Unpacking a layer: bytes are those of the layer as it is packed.
    Layer(usize),
    /// Copying the files of a directory.
    Copy,
    /// Writing names and attributes, and waiting for the disk.
    Write,
    /// It is there: made now, or before.
    Ready,
}

pub(super) type OnProgress = dyn Fn(ImageProgress) -> ControlFlow<()> + Send + Sync;

/// Who wants to know, and whether the caller still waits.
#[derive(Clone)]
pub(super) struct Reporter {
    listener: Option<Arc<OnProgress>>,
    is_over: Arc<AtomicBool>,
}

impl Reporter {
    /// For work that ends when the second value is dropped.
    pub(super) fn new(listener: Option<Arc<OnProgress>>) -> (Self, EndOnDrop) {
        let is_over = Arc::new(AtomicBool::new(false));
        (Self { listener, is_over: Arc::clone(&is_over) }, EndOnDrop(is_over))
    }

    pub(super) fn report(
        &self,
        stage: ImageStage,
        bytes: u64,
        total_bytes: Option<u64>,
    ) -> Result<(), ImageError> {
        let flow = match &self.listener {
            Some(listener) => listener(ImageProgress { stage, bytes, total_bytes }),
            None => ControlFlow::Continue(()),
        };
        match flow {
            ControlFlow::Continue(()) if !self.is_over.load(Ordering::Relaxed) => Ok(()),
            _ => Err(ImageError::Interrupted),
        }
    }

    /// The same, for the work on a layer or a directory of this size.
    pub(super) fn part(&self, stage: ImageStage, bytes: u64, size: u64) -> Result<(), LayerFault> {
        self.report(stage, bytes, Some(size)).map_err(|_| LayerFault::Interrupted)
    }
}

/// Ends the work when nobody waits for it any more.
pub(super) struct EndOnDrop(Arc<AtomicBool>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
