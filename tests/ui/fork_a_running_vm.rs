use dormouse::{Error, MicroVm, Running};

fn main() {}

fn fork(vm: MicroVm<Running>) -> Result<(), Error> {
    drop(vm.fork(2)?);
    Ok(())
}
