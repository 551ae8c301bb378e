use dormouse::{Error, MicroVm, Running};

fn main() {}

fn end(vm: MicroVm<Running>) -> Result<(), Error> {
    let ended = vm.terminate();
    vm.console_input("hello")?;
    println!("{}", ended.exit_status());
    Ok(())
}
