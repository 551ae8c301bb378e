use dormouse::{Error, MicroVm, Running};

fn main() {}

fn start(vm: MicroVm<Running>) -> Result<(), Error> {
    drop(vm.start()?);
    Ok(())
}
