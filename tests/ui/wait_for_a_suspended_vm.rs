use dormouse::{ExitStatus, MicroVm, Suspended};

fn main() {}

fn wait(vm: MicroVm<Suspended>) -> ExitStatus {
    vm.wait().exit_status().clone()
}
