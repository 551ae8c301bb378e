//! Says what this machine can do for VMs, and how to mend what it cannot.

use std::process::ExitCode;

use dormouse::{Host, KvmStatus};

fn main() -> ExitCode {
    let host = Host::check();
    println!("host     Linux {}, {} x {}", host.release, host.cpus, host.cpu);
    println!("ring 0   {:?}", host.virtualization);
    match &host.kvm {
        KvmStatus::Usable { api_version, max_vcpus, capabilities } => {
            println!("KVM      API {api_version}, up to {max_vcpus} vCPUs");
            println!("         {}", capabilities.join(" "));
        }
        KvmStatus::Unusable { what, .. } => println!("KVM      {what}"),
        other => println!("KVM      {other:?}"),
    }
    for kernel in &host.kernels {
        println!("kernel   {}", kernel.kernel.path().display());
    }

    let problems = host.problems();
    for problem in &problems {
        println!("\n  ✗ {}\n    {}", problem.what, problem.fix);
    }
    if host.can_run_linux() {
        println!("\n  ✓ Linux guests boot here");
    }
    if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
