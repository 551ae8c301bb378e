use dormouse::{Error, MicroVm, Running};

fn main() {}

fn snapshot(vm: MicroVm<Running>) -> Result<(), Error> {
    drop(vm.snapshot("base")?);
    Ok(())
}
