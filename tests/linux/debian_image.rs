//! Images of what Debian packages: busybox, and over it nginx, Python and its modules websockets and grpc. The
//! testbed makes them (tests/testbed/images), with a tag for each program.

use std::env;
use std::path::PathBuf;

use dormouse::{Image, ImageCache};

use crate::guest_root;

/// The OCI layout that has them, with the tags `nginx`, `python` and `busybox`.
pub fn layout() -> PathBuf {
    guest_root().join("images")
}

/// The image with this tag. It is unpacked once for all tests, since an emulated processor takes its time for it:
/// the cache stays where it is, in the folder for temporary files.
pub async fn unpacked(tag: &str) -> Image {
    let cache = ImageCache::open(env::temp_dir().join("dormouse-test-images")).unwrap();
    Image::open(layout()).name(tag).unpack(&cache).await.unwrap()
}
