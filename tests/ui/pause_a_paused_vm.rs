use dormouse::{Error, MicroVm, Paused};

fn main() {}

fn pause(vm: MicroVm<Paused>) -> Result<(), Error> {
    drop(vm.pause()?);
    Ok(())
}
