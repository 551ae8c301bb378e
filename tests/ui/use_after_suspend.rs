use dormouse::{Error, MicroVm, Paused};

fn main() {}

fn suspend(vm: MicroVm<Paused>) -> Result<(), Error> {
    let asleep = vm.suspend("vm.d")?;
    drop(vm.snapshot("base")?);
    drop(asleep);
    Ok(())
}
