use dormouse::{Error, MicroVm, Terminated};

fn main() {}

fn pause(vm: MicroVm<Terminated>) -> Result<(), Error> {
    drop(vm.pause()?);
    Ok(())
}
