use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use dormouse::{AgentConfig, ErrorKind, FileType, WriteOptions};
use tokio::io::AsyncReadExt;

use super::{Guest, block_on, config};
use crate::Scratch;

fn kind(error: io::ErrorKind) -> ErrorKind {
    ErrorKind::File(error)
}

#[test]
fn files_are_written_read_listed_and_removed() {
    block_on(async {
        let guest = Guest::boot(config(AgentConfig::new())).await;
        let agent = &guest.agent;
        agent.create_dir_all("/work/a/b").await.unwrap();
        agent.write("/work/text", "hello").await.unwrap();
        assert_eq!(agent.read("/work/text").await.unwrap(), b"hello");
        // The mode of a new file, and that of the old one.
        let options = WriteOptions::new().mode(0o4750).owner(1000, 1234).sync(true);
        agent.write_from("/work/tool", &b"#!/bin/sh\necho ran\n"[..], &options).await.unwrap();
        agent.write("/work/tool", "#!/bin/sh\necho again\n").await.unwrap();
        let tool = agent.metadata("/work/tool").await.unwrap();
        assert_eq!((tool.mode(), tool.uid(), tool.gid(), tool.len()), (0o4750, 1000, 1234, 21));
        assert_eq!(guest.sh("/work/tool").await, "again\n");
        let mut names: Vec<_> = agent.read_dir("/work").await.unwrap();
        names.sort_by(|a, b| a.file_name().cmp(b.file_name()));
        let names: Vec<_> = names
            .iter()
            .map(|entry| (entry.file_name().to_str().unwrap(), entry.metadata().file_type()))
            .collect();
        assert_eq!(
            names,
            [("a", FileType::Directory), ("text", FileType::File), ("tool", FileType::File)]
        );
        assert!(agent.metadata("/proc/self").await.unwrap().file_type() == FileType::Symlink);
        let error = agent.remove("/work/a").await.unwrap_err();
        assert_eq!(error.kind(), &kind(io::ErrorKind::DirectoryNotEmpty), "{error}");
        agent.remove_all("/work").await.unwrap();
        let error = agent.read("/work/text").await.unwrap_err();
        assert_eq!(error.kind(), &kind(io::ErrorKind::NotFound), "{error}");
        assert!(error.to_string().contains("/work/text"), "{error}");
        // What is no path, and what is too long for one.
        for bad in ["", "relative", "/a\0b"] {
            let error = agent.write(bad, "").await.unwrap_err();
            assert_eq!(error.kind(), &kind(io::ErrorKind::InvalidInput), "{bad:?}: {error}");
        }
        let long = format!("/{}", "x".repeat(5000));
        for error in
            [agent.write(&long, "").await.unwrap_err(), agent.read(&long).await.unwrap_err()]
        {
            assert_eq!(error.kind(), &kind(io::ErrorKind::InvalidFilename), "{error}");
        }
        agent.write("/tmp/../tmp/./x", "dots").await.unwrap();
        assert_eq!(guest.sh("cat /tmp/x").await, "dots");
        // A write that nobody finishes leaves nothing.
        let file = agent.create("/tmp/half", &WriteOptions::new()).await.unwrap();
        drop(file);
        guest.sh("while test $(ls -A /tmp | wc -l) != 1; do sleep 0.1; done").await;
    });
}

#[test]
fn a_full_disk_is_said_and_the_old_file_stays() {
    block_on(async {
        let guest = Guest::boot(config(AgentConfig::new())).await;
        guest.sh("mount -t tmpfs -o size=1m full /tmp; echo old >/tmp/file").await;
        let error = guest.agent.write("/tmp/file", vec![1; 4 << 20]).await.unwrap_err();
        assert_eq!(error.kind(), &kind(io::ErrorKind::StorageFull), "{error}");
        assert_eq!(guest.sh("cat /tmp/file; ls -A /tmp").await, "old\nfile\n");
        // A source that has no end, and a tree.
        let endless = tokio::io::repeat(7);
        let options = WriteOptions::new();
        let error = guest.agent.write_from("/tmp/file", endless, &options).await.unwrap_err();
        assert_eq!(error.kind(), &kind(io::ErrorKind::StorageFull), "{error}");
        let scratch = Scratch::new("full");
        fs::write(scratch.0.join("large"), vec![1; 4 << 20]).unwrap();
        let error = guest.agent.copy_in(&scratch.0, "/tmp/tree").await.unwrap_err();
        assert_eq!(error.kind(), &kind(io::ErrorKind::StorageFull), "{error}");
        assert_eq!(
            guest.sh("cat /tmp/file; ls -A /tmp /tmp/tree").await,
            "old\n/tmp:\nfile\ntree\n\n/tmp/tree:\n"
        );
    });
}

#[test]
fn large_files_pass_through_without_being_held() {
    block_on(async {
        let guest = Guest::boot(config(AgentConfig::new()).memory_mib(128)).await;
        let scratch = Scratch::new("large");
        let path = scratch.0.join("large");
        let content: Vec<u8> =
            (0..16u32 << 18).flat_map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        fs::write(&path, &content).unwrap();
        let file = tokio::fs::File::open(&path).await.unwrap();
        guest.agent.write_from("/large", file, &WriteOptions::new()).await.unwrap();
        let mut back = guest.agent.open("/large").await.unwrap();
        assert_eq!(back.metadata().len(), content.len() as u64);
        let mut read = Vec::new();
        back.read_to_end(&mut read).await.unwrap();
        assert!(read == content);
        // More than the guest has memory.
        guest.sh("rm /large; dd if=/dev/zero of=/huge bs=1 count=0 seek=136M 2>/dev/null").await;
        let mut huge = guest.agent.open("/huge").await.unwrap();
        let passed = tokio::io::copy(&mut huge, &mut tokio::io::sink()).await.unwrap();
        assert_eq!(passed, 136 << 20);
        let resident = guest.agent.memory_bytes().await.unwrap();
        assert!(resident <= 4 << 20, "{resident}");
    });
}

#[test]
fn trees_go_in_and_come_out_as_they_are() {
    block_on(async {
        let guest = Guest::boot(config(AgentConfig::new())).await;
        let scratch = Scratch::new("trees");
        let from = scratch.0.join("from");
        fs::create_dir_all(from.join("a/empty")).unwrap();
        for at in 0..100 {
            fs::write(from.join(format!("a/{at}")), vec![at; usize::from(at) * 1000]).unwrap();
        }
        fs::set_permissions(from.join("a/7"), fs::Permissions::from_mode(0o741)).unwrap();
        symlink("../nowhere", from.join("a/link")).unwrap();
        let sparse = fs::File::create(from.join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 1 << 29).unwrap();
        let copied = guest.agent.copy_in(&from, "/tree").await.unwrap();
        assert_eq!(copied.entries, 105);
        let said = guest.sh("stat -c %a /tree/a/7; wc -c </tree/a/99; stat -c %b /tree/sparse; readlink /tree/a/link || ls -l /tree/a/link").await;
        let mut lines = said.lines();
        assert_eq!((lines.next(), lines.next()), (Some("741"), Some("99000")));
        assert!(lines.next().unwrap().parse::<u64>().unwrap() < 1000, "{said}");
        let to = scratch.0.join("to");
        let back = guest.agent.copy_out("/tree", &to).await.unwrap();
        assert_eq!(back.entries, copied.entries);
        for at in 0..100 {
            let content = fs::read(to.join(format!("a/{at}"))).unwrap();
            assert!(content == vec![at; usize::from(at) * 1000], "{at}");
        }
        assert_eq!(fs::metadata(to.join("a/7")).unwrap().mode() & 0o7777, 0o741);
        assert_eq!(fs::read_link(to.join("a/link")).unwrap(), PathBuf::from("../nowhere"));
        let sparse = fs::metadata(to.join("sparse")).unwrap();
        assert!(sparse.len() == 1 << 30 && sparse.blocks() < 1000);
        assert!(to.join("a/empty").is_dir());
        // One file alone, and what is not there.
        guest.agent.copy_out("/tree/a/9", scratch.0.join("nine")).await.unwrap();
        assert_eq!(fs::read(scratch.0.join("nine")).unwrap().len(), 9000);
        let error = guest.agent.copy_out("/nowhere", scratch.0.join("x")).await.unwrap_err();
        assert_eq!(error.kind(), &kind(io::ErrorKind::NotFound), "{error}");
        let error = guest.agent.copy_in(scratch.0.join("nowhere"), "/x").await.unwrap_err();
        assert_eq!(error.kind(), &kind(io::ErrorKind::NotFound), "{error}");
    });
}
