use dormouse::{MicroVm, State};

fn main() {}

struct Hibernating;

impl State for Hibernating {
    const NAME: &'static str = "Hibernating";
}

fn sleep(_: MicroVm<Hibernating>) {}
