use super::block::Writes;
use super::*;

fn config() -> VmConfig {
    VmConfig::new(Kernel::file("/vmlinux"))
}

fn refusal(config: VmConfig) -> String {
    Error::from(config.machine.check().unwrap_err()).to_string()
}

#[test]
fn memory_sizes_that_no_machine_has_are_refused() {
    for bytes in [0, 1, 4096, (128 << 20) + 1, (2 << 20) - 4096, (1 << 40) + 4096, u64::MAX] {
        assert!(refusal(config().memory(bytes)).contains(&bytes.to_string()));
    }
    for bytes in [2 << 20, (128 << 20) + 4096, 1 << 40] {
        config().memory(bytes).machine.check().unwrap();
    }
}

#[test]
fn vcpu_counts_from_1_to_32_are_taken() {
    assert_eq!(refusal(config().vcpus(0)), "0 vCPUs: it takes 1 to 32");
    assert_eq!(refusal(config().vcpus(33)), "33 vCPUs: it takes 1 to 32");
    config().vcpus(32).machine.check().unwrap();
}

#[test]
fn vsock_addresses_and_counts_that_no_guest_has_are_refused() {
    let with = |vsock| config().vsock(vsock);
    for cid in [0, 1, 2, u32::MAX] {
        let refused = refusal(with(VsockConfig::default().guest_cid(cid)));
        assert!(refused.contains(&cid.to_string()), "{refused}");
    }
    for count in [0, 65_537] {
        refusal(with(VsockConfig::default().max_connections(count)));
    }
    with(VsockConfig::default().guest_cid(u32::MAX - 1)).machine.check().unwrap();
    let json = r#"{"kernel": {"source": {"file": "/k"}}, "vsock": {"guest_cid": 9}}"#;
    let written: VmConfig = serde_json::from_str(json).unwrap();
    assert_eq!(written.machine.vsock, Some(VsockConfig::default().guest_cid(9)));
}

#[test]
fn writes_below_a_delta_and_too_many_deltas_are_refused() {
    let over = |count| (0..count).fold(BlockConfig::new("/d"), |block, _| block.over("/delta"));
    let refused = refusal(config().block(over(1)));
    assert_eq!(refused, "writes to the disk /d would go below its deltas");
    let refused = refusal(config().block(over(17).discard_writes()));
    assert_eq!(refused, "17 frozen deltas of a disk: it takes up to 16");
    config().block(over(16).delta("/own")).machine.check().unwrap();
    config().block(over(1).read_only()).machine.check().unwrap();
    let old: BlockConfig = serde_json::from_str(r#"{"path": "/d"}"#).unwrap();
    assert_eq!(old, BlockConfig::new("/d"));
}

#[test]
fn a_written_configuration_needs_only_the_kernel() {
    let config: VmConfig =
        serde_json::from_str(r#"{"kernel": {"source": {"file": "/vmlinux"}}}"#).unwrap();
    assert_eq!(config.machine.vcpus, 1);
    assert_eq!(config.cmdline, Cmdline::default());
    let in_memory = VmConfig::new(Kernel::bytes(vec![1]));
    assert!(serde_json::to_string(&in_memory).is_err());
}

#[test]
fn a_configuration_may_say_where_its_files_are_from_anywhere() {
    let vsock = VsockConfig::default().unix_socket("vm.sock");
    let block = BlockConfig::new("disk").over("frozen").delta("delta");
    let mut absolute = config().vsock(vsock).block(block).machine.with_absolute_paths();
    absolute.make_socket_absolute();
    let here = std::env::current_dir().unwrap();
    assert_eq!(absolute.vsock.unwrap().unix_socket.unwrap(), here.join("vm.sock"));
    let [block] = &absolute.blocks[..] else { panic!("{:?}", absolute.blocks) };
    assert_eq!((&block.path, &block.frozen[..]), (&here.join("disk"), &[here.join("frozen")][..]));
    assert_eq!(block.writes, Writes::ToDelta(here.join("delta")));
    assert_eq!(absolute.kvm_device, PathBuf::from("/dev/kvm"));
}

#[test]
fn a_name_that_there_is_not_is_refused_by_name() {
    let with = |name: &str| {
        let json =
            format!(r#"{{"{name}": 2, "kernel": {{"source": {{"file": "/k"}}}}, "vcpus": 2}}"#);
        serde_json::from_str::<VmConfig>(&json)
    };
    let error = with("memory_mib").unwrap_err().to_string();
    assert!(error.starts_with("unknown field `memory_mib`"), "{error}");
    assert!(with("memory_bytes").is_ok());
    let twice = with("vcpus").unwrap_err().to_string();
    assert!(twice.starts_with("duplicate field `vcpus`"), "{twice}");
    let disk = serde_json::from_str::<BlockConfig>(r#"{"path": "/d", "readonly": true}"#);
    let error = disk.unwrap_err().to_string();
    assert!(error.starts_with("unknown field `readonly`, expected one of `path`"), "{error}");
    let kernel = r#"{"release": "6.1", "path": "/k", "modules_dirs": "/m"}"#;
    let error = serde_json::from_str::<crate::InstalledKernel>(kernel).unwrap_err().to_string();
    assert!(error.starts_with("unknown field `modules_dirs`"), "{error}");
    let facts = r#"{"bytes": 1, "modifed": null}"#;
    assert!(serde_json::from_str::<FileFacts>(facts).is_err());
    // What is written is read.
    let json = serde_json::to_string(&config().vcpus(3).block(BlockConfig::new("/d"))).unwrap();
    assert_eq!(serde_json::from_str::<VmConfig>(&json).unwrap().machine.vcpus, 3);
}

/// Readers of this version refuse any other name in a part. What is added is written only where it is not its default
/// (docs/snapshot-format.md, "Compatibility"), and so never comes into this list.
#[test]
fn a_plain_part_is_written_with_the_names_that_each_reader_of_this_version_knows() {
    let config = config()
        .block(BlockConfig::new("/d"))
        .network(NetConfig::tap("tap0"))
        .vsock(VsockConfig::default())
        .balloon(BalloonConfig::default());
    let written = serde_json::to_value(&config).unwrap();
    for (part, known) in [
        ("/blocks/0", "direct id path queues rate_limit writes"),
        (
            "/blocks/0/rate_limit",
            "burst_bytes burst_operations bytes_per_second operations_per_second",
        ),
        ("/networks/0", "backend"),
        ("/vsock", "guest_cid max_connections unix_socket"),
        ("/balloon", "deflate_on_oom free_page_reporting"),
        ("/kernel", "protocol source"),
    ] {
        let names = written.pointer(part).unwrap().as_object().unwrap().keys();
        assert!(names.eq(known.split(' ')), "{part}: {written:#}");
    }
}
