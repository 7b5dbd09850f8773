//! `espalier kernels`: the kernel engineer's side, all of it loops over the one table of cases.

mod list;
mod verify;

use clap::Subcommand;

use super::Global;
use crate::error::Result;

#[derive(Subcommand)]
pub enum Kernels {
    /// Which op runs on which device for which storage types, from the kernel records
    List(list::Args),
    /// Every kernel record against the op's f64 reference, on poisoned and guarded memory
    Verify(verify::Args),
}

pub fn run(global: &Global, command: Kernels) -> Result<()> {
    match command {
        Kernels::List(args) => {
            list::run(global, &args);
            Ok(())
        }
        Kernels::Verify(args) => verify::run(global, &args),
    }
}
