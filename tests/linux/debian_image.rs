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

/// Where they are unpacked once for all tests, since an emulated processor takes its time for it. It stays there,
/// in the folder for temporary files.
pub fn cache() -> PathBuf {
    env::temp_dir().join("dormouse-test-images")
}

/// The image with this tag.
pub async fn unpacked(tag: &str) -> Image {
    let cache = ImageCache::open(cache()).unwrap();
    Image::open(layout()).name(tag).unpack(&cache).await.unwrap()
}
