//! Synthetic kernels in every wrapping, whole, truncated and flipped.

use super::*;
use std::io::Write;

/// A 64-byte "kernel" at 16 MiB: headers, then one segment.
fn elf() -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0x100_0000u64, 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    image.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for word in [120u64, 0x100_0000, 0x100_0000, 64, 4096, 4096] {
        image.extend(word.to_le_bytes());
    }
    image.extend((0..64).map(|n: u8| n.wrapping_mul(37)));
    image
}

/// A bzImage of boot protocol 2.15 with one setup sector and this payload.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    image[0x236] = 1;
    image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    image.extend([0x90; 16]);
    image.extend(payload);
    image
}

/// The same kernel packed in each way that Linux knows, with the size that its build appends.
fn packed() -> Vec<(&'static str, Vec<u8>)> {
    let elf = elf();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), Default::default());
    gzip.write_all(&elf).unwrap();
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 6);
    xz.write_all(&elf).unwrap();
    let lz4 = |legacy| {
        let info = lz4_flex::frame::FrameInfo::new().legacy_frame(legacy);
        let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(info, Vec::new());
        encoder.write_all(&elf).unwrap();
        encoder.finish().unwrap()
    };
    let size = (elf.len() as u32).to_le_bytes();
    let with_size = |mut bytes: Vec<u8>| {
        bytes.extend(size);
        bytes
    };
    vec![
        // gzip ends with the size by itself.
        ("gzip", gzip.finish().unwrap()),
        ("xz", with_size(xz.finish().unwrap())),
        ("zstd", with_size(zstd::encode_all(&elf[..], 3).unwrap())),
        ("lz4", with_size(lz4(false))),
        ("lz4 (legacy frame)", with_size(lz4(true))),
        ("nothing", elf),
    ]
}

#[test]
fn every_packing_of_a_kernel_gives_the_same_kernel() {
    for (name, payload) in packed() {
        let vmlinux = parse(bzimage(&payload)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(vmlinux.image(), elf(), "{name}");
        assert_eq!(vmlinux.end_address(), 0x100_1000);
    }
}

#[test]
fn a_bzimage_truncated_at_any_byte_is_refused() {
    for (name, payload) in packed() {
        let whole = bzimage(&payload);
        for len in 0..whole.len() {
            assert!(parse(whole[..len].to_vec()).is_err(), "{name} cut at {len}");
        }
    }
}

#[test]
fn a_payload_truncated_inside_its_bzimage_is_refused_unless_the_kernel_is_whole() {
    for (name, payload) in packed() {
        for len in 0..payload.len() {
            // What is cut off may be the appended size or an end mark.
            if let Ok(vmlinux) = parse(bzimage(&payload[..len])) {
                assert_eq!(vmlinux.image(), elf(), "{name} cut at {len}");
                assert!(len + 8 >= payload.len(), "{name} cut at {len}");
            }
        }
    }
}

#[test]
fn a_flipped_byte_anywhere_never_panics() {
    for (_, payload) in packed() {
        let whole = bzimage(&payload);
        for at in 0..whole.len() {
            for flip in [1, 0x80, 0xff] {
                let mut image = whole.clone();
                image[at] ^= flip;
                let _ = parse(image);
            }
        }
    }
}

#[test]
fn a_payload_that_unpacks_to_something_else_is_refused() {
    let packed = zstd::encode_all(&b"no ELF image at all"[..], 1).unwrap();
    let error = parse(bzimage(&packed)).unwrap_err().to_string();
    assert!(error.starts_with("neither an ELF image nor a bzImage"), "{error}");
}

#[test]
fn an_xz_payload_that_wants_gigabytes_of_dictionary_is_refused() {
    let mut options = liblzma::stream::LzmaOptions::new_preset(0).unwrap();
    options.dict_size(1 << 30);
    let mut filters = liblzma::stream::Filters::new();
    filters.lzma2(&options);
    let stream =
        liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc32);
    let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream.unwrap());
    encoder.write_all(&elf()).unwrap();
    let error = parse(bzimage(&encoder.finish().unwrap())).unwrap_err().to_string();
    assert!(error.contains("cannot unpack the bzImage's xz payload"), "{error}");
}

#[test]
fn headers_that_would_cost_hours_are_refused() {
    let patched = |at: usize, bytes: &[u8]| {
        let mut image = elf();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        parse(image).unwrap_err().to_string()
    };
    assert!(patched(56, &u16::MAX.to_le_bytes()).contains("more than 64 program headers"));
    assert!(patched(24, &0x200_0000u64.to_le_bytes()).contains("entry point lies in no segment"));

    // Two headers, each for the whole file.
    let mut image = elf();
    let header = image[64..120].to_vec();
    image.splice(120..120, header);
    image[56] = 2;
    let len = image.len() as u64;
    for at in [64, 120] {
        image[at + 8..at + 16].copy_from_slice(&0u64.to_le_bytes());
        image[at + 32..at + 40].copy_from_slice(&len.to_le_bytes());
    }
    assert!(parse(image.clone()).unwrap_err().to_string().contains("overlap in the file"));
    image[64] = 4;
    image[64 + 32..64 + 40].copy_from_slice(&(1u64 << 20).to_le_bytes());
    assert!(parse(image).unwrap_err().to_string().contains("a note is larger"));
}

#[test]
fn bzimages_that_cannot_be_unpacked_say_why() {
    let text = |image: Vec<u8>| parse(image).unwrap_err().to_string();
    let good = bzimage(&elf());
    let mut old = good.clone();
    old[0x206..0x208].copy_from_slice(&0x0207u16.to_le_bytes());
    assert!(text(old).contains("boot protocol 2.7"));
    let mut narrow = good;
    narrow[0x236] = 0;
    assert!(text(narrow).contains("not 64-bit"));
    assert!(text(bzimage(b"????")).contains("compressed in an unknown way"));
    assert!(text(bzimage(b"")).contains("compressed in an unknown way"));
}

mod deb {
    use vmm_sys_util::tempfile::TempFile;

    use super::*;
    use crate::deb::tests::{ar_header, scratch};

    fn package(member: &str, pack: impl Fn(Vec<u8>) -> Vec<u8>, file: &str) -> TempFile {
        let content = elf();
        let files = [("./usr/share/doc/copyright", &content[..]), (file, &content)];
        crate::deb::tests::package(member, member, &files, pack)
    }

    #[test]
    fn archive_members_of_absurd_names_and_sizes_are_refused() {
        let table = [&b"!<arch>\n"[..], &ar_header("//", 9_999_999_999)].concat();
        let outside = [&b"!<arch>\n"[..], &ar_header("//", 0), &ar_header("/4096", 0)].concat();
        let number = [&b"!<arch>\n"[..], &[b'x'; 60]].concat();
        for (name, archive) in [("table", table), ("outside", outside), ("number", number)] {
            let file = scratch(name, &archive);
            let error = Kernel::deb(file.as_path()).check().unwrap_err();
            assert!(error.to_string().contains("not a Debian package"), "{name}: {error}");
        }
    }

    fn xz(bytes: Vec<u8>) -> Vec<u8> {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(&bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn a_kernel_is_found_in_packages_of_every_compression() {
        let zstd = |bytes: Vec<u8>| zstd::encode_all(&bytes[..], 1).unwrap();
        let kernel = "./boot/vmlinuz-6.1.0-1-test";
        let packages = [
            package("data.tar", |bytes| bytes, kernel),
            package("data.tar.xz", xz, kernel),
            package("data.tar.zst", zstd, kernel),
        ];
        for path in packages.iter().map(TempFile::as_path) {
            assert_eq!(Kernel::deb(path).vmlinux().unwrap(), elf(), "{}", path.display());
        }
    }

    #[test]
    fn packages_without_a_kernel_or_cut_short_are_refused() {
        let none = package("data.tar.none", |bytes| bytes, "./boot/vmlinuz-6.1");
        let error = Kernel::deb(none.as_path()).check().unwrap_err();
        assert!(error.to_string().contains("compressed as"), "{error}");

        let file = package(
            "data.tar.gz",
            |bytes| {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
                encoder.write_all(&bytes).unwrap();
                encoder.finish().unwrap()
            },
            "./boot/config-6.1",
        );
        let path = file.as_path();
        let error = Kernel::deb(path).check().unwrap_err();
        assert!(error.to_string().contains("holds no boot/vmlinuz-*"), "{error}");
        let whole = std::fs::read(path).unwrap();
        for len in 0..whole.len() {
            std::fs::write(path, &whole[..len]).unwrap();
            assert!(Kernel::deb(path).check().is_err());
        }
    }
}
