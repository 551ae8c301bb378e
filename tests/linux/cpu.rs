//! What a guest sees of its processors.

use dormouse::{CpuTemplate, CpuidRegister};

use crate::{Release, config, run};

#[test]
fn a_guest_sees_one_package_of_as_many_cores_as_it_has_vcpus() {
    let script = "cat /proc/cpuinfo; poweroff -f";
    let (_, text) = run(config(Release::Linux6_12.kernel(), script).vcpus(4).memory_mib(256));
    let count = |line: &str| text.lines().filter(|l| l.replace(['\t', ' '], "") == line).count();
    assert_eq!(count("physicalid:0"), 4, "{text}");
    assert_eq!(count("siblings:4"), 4, "{text}");
    assert_eq!(count("cpucores:4"), 4, "{text}");
    for core in 0..4 {
        assert_eq!(count(&format!("apicid:{core}")), 1, "{text}");
        assert_eq!(count(&format!("coreid:{core}")), 1, "{text}");
    }
}

#[test]
fn a_template_hides_a_feature_from_the_guest() {
    // Leaf 1, ECX bit 20 is SSE4.2, which user programs look for and the kernel does not need.
    let hidden = CpuTemplate::default().clear(1, 0, CpuidRegister::Ecx, 1 << 20);
    let script = "grep -m1 flags /proc/cpuinfo; poweroff -f";
    let flags = |template| {
        let (_, text) = run(config(Release::Linux6_1.kernel(), script).cpu(template));
        text.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let all = flags(CpuTemplate::default());
    let some = flags(hidden);
    assert!(all.contains(&"sse4_2".to_owned()) && all.contains(&"hypervisor".to_owned()));
    // A snapshot would not have their state.
    assert!(["svm", "vmx", "user_shstk"].iter().all(|flag| !all.contains(&flag.to_string())));
    assert!(some.contains(&"sse4_1".to_owned()) && !some.contains(&"sse4_2".to_owned()));
}
