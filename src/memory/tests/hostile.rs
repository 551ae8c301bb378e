//! Files of memory that are not what they were, or never were.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;

use super::super::pages::PAGE_BYTES;
use super::super::saved::ChunkChecksum;
use super::super::{GuestRam, MemoryError, MemoryImage, PageRun, Save, SavedMemory};
use super::freezing::{PAGES, RANGES, address, bytes_of, on, temp_file};
use crate::error::{Error, ErrorKind};

/// A full save and a diff over it.
fn saved() -> [(File, SavedMemory); 2] {
    let ram = GuestRam::fresh(&RANGES).unwrap();
    ram.write(&[1; 5 * PAGE_BYTES], address(3)).unwrap();
    ram.write(&[2; 5 * PAGE_BYTES], address(400)).unwrap();
    let image = ram.freeze().unwrap();
    let (full, diff) = (temp_file(), temp_file());
    let go_on = |_| ControlFlow::Continue(());
    let of_full = ram.save(&full, Save::Full, &go_on).unwrap();
    ram.write(&[3; 4], address(401)).unwrap();
    ram.write(&[0; PAGE_BYTES], address(403)).unwrap();
    let of_diff = ram.save(&diff, Save::Diff(&image), &go_on).unwrap();
    [(full, of_full), (diff, of_diff)]
}

fn verify(layers: Vec<(File, SavedMemory)>) -> Result<(), MemoryError> {
    MemoryImage::open(&RANGES, layers)?.verify(&|_| ControlFlow::Continue(()))
}

#[test]
fn files_that_are_too_short_or_too_long_are_refused() {
    for layer in 0..2 {
        for len in [0, 1, 4095, 4096, PAGES * PAGE_BYTES - 1, PAGES * PAGE_BYTES + 1, 1 << 40] {
            let layers = saved();
            layers[layer].0.set_len(len as u64).unwrap();
            let error = MemoryImage::open(&RANGES, layers.into()).unwrap_err();
            assert!(matches!(error, MemoryError::Saved { layer: at, .. } if at == layer), "{len}");
            assert_eq!(Error::from(error).kind(), &ErrorKind::Snapshot);
        }
    }
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let [(_, full), _] = saved();
    for path in ["/dev/zero", "/tmp"] {
        let opened = MemoryImage::open(&RANGES, vec![(File::open(path).unwrap(), full.clone())]);
        assert!(matches!(opened, Err(MemoryError::Saved { layer: 0, .. })), "{path}");
    }
}

#[test]
fn descriptions_that_do_not_fit_are_refused() {
    let run = |first, count| PageRun { first, count };
    let pages = PAGES as u64;
    let changes: &[fn(&mut SavedMemory, u64)] = &[
        |saved, _| saved.pages -= 1,
        |saved, _| saved.pages = u64::MAX,
        |saved, pages| saved.present_pages = pages + 1,
        |saved, _| saved.complete = !saved.complete,
        |saved, _| saved.runs = vec![PageRun { first: 0, count: 0 }],
        |saved, _| saved.runs = vec![PageRun { first: u64::MAX, count: 2 }],
        |saved, pages| saved.runs = vec![PageRun { first: pages, count: 1 }],
        |saved, pages| saved.runs = vec![PageRun { first: 1, count: pages }],
        |saved, _| saved.checksums.push(ChunkChecksum { chunk: 0, crc32: 0 }),
        |saved, _| saved.checksums = vec![ChunkChecksum { chunk: 2, crc32: 0 }],
        |saved, _| saved.checksums = vec![ChunkChecksum { chunk: u32::MAX, crc32: 0 }],
    ];
    for (number, change) in changes.iter().enumerate() {
        for layer in 0..2 {
            let mut layers = saved();
            change(&mut layers[layer].1, pages);
            let opened = MemoryImage::open(&RANGES, layers.into());
            let is_refused =
                matches!(opened, Err(MemoryError::Saved { layer: at, .. }) if at == layer);
            assert!(is_refused, "change {number} of layer {layer}");
        }
    }
    let runs = [vec![run(3, 3), run(5, 1)], vec![run(5, 1), run(3, 1)], vec![run(0, 1); 1025]];
    for runs in runs {
        let mut layers = saved();
        layers[1].1.runs = runs;
        assert!(MemoryImage::open(&RANGES, layers.into()).is_err());
    }
    assert!(matches!(
        MemoryImage::open(&RANGES, Vec::new()),
        Err(MemoryError::Layers { count: 0 })
    ));
    let many = (0..17).map(|_| (temp_file(), saved()[0].1.clone())).collect();
    assert!(matches!(MemoryImage::open(&RANGES, many), Err(MemoryError::Layers { count: 17 })));
}

#[test]
fn any_flipped_bit_is_found_also_where_nothing_was() {
    verify(saved().into()).unwrap();
    for layer in 0..2 {
        // Data, its neighbours, pages of zeros in runs, and holes far away.
        for page in [0, 2, 3, 7, 8, 255, 256, 400, 401, 403, 405, PAGES - 1] {
            for bit in [0, 1 << 14, (PAGE_BYTES << 3) - 1] {
                let layers = saved();
                let at = (page * PAGE_BYTES + bit / 8) as u64;
                let mut byte = [0];
                layers[layer].0.read_exact_at(&mut byte, at).unwrap();
                layers[layer].0.write_all_at(&[byte[0] ^ 1 << (bit % 8)], at).unwrap();
                let Err(MemoryError::Damaged { layer: found, mib }) = verify(layers.into()) else {
                    panic!("page {page} of layer {layer}");
                };
                assert_eq!((found, mib as usize), (layer, page / 256));
            }
        }
    }
}

#[test]
fn holes_that_became_zeros_are_the_same_and_lost_data_is_not() {
    let layers = saved();
    for (file, _) in &layers {
        file.write_all_at(&[0; PAGE_BYTES], 200 * 4096).unwrap();
        file.write_all_at(&[0; PAGE_BYTES], 403 * 4096).unwrap_or_default();
    }
    let [full, diff] = layers;
    full.0.write_all_at(&[2; PAGE_BYTES], 403 * 4096).unwrap();
    verify(vec![full, diff]).unwrap();
    for layer in 0..2 {
        let layers = saved();
        layers[layer].0.set_len(0).unwrap();
        layers[layer].0.set_len((PAGES * PAGE_BYTES) as u64).unwrap();
        let damaged = verify(layers.into());
        assert!(matches!(damaged, Err(MemoryError::Damaged { layer: at, .. }) if at == layer));
    }
}

#[test]
fn what_is_in_a_description_comes_back_from_json_as_it_was() {
    let [(_, full), (_, diff)] = saved();
    for saved in [full, diff] {
        let text = serde_json::to_string(&saved).unwrap();
        assert_eq!(serde_json::from_str::<SavedMemory>(&text).unwrap(), saved);
        for end in 0..text.len() {
            assert!(serde_json::from_str::<SavedMemory>(&text[..end]).is_err());
        }
    }
}

#[test]
fn an_opened_image_is_never_written_to() {
    let layers = saved();
    let again: Vec<_> = layers.iter().map(|(file, _)| file.try_clone().unwrap()).collect();
    let read = |file: &File| {
        let mut bytes = vec![0; PAGES * PAGE_BYTES];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let before: Vec<_> = again.iter().map(read).collect();
    let image = MemoryImage::open(&RANGES, layers.into()).unwrap();
    let (one, other) = (on(&image), on(&image));
    let content = bytes_of(&other);
    for page in 0..PAGES {
        one.write(&[9], address(page)).unwrap();
    }
    one.freeze().unwrap();
    one.discard(address(0), PAGES * PAGE_BYTES);
    assert!(bytes_of(&other) == content);
    assert!(again.iter().map(read).collect::<Vec<_>>() == before);
}
