//! `espalier kernels`: the kernel engineer's side, all of it loops over the one table of cases.

mod bench;
mod break_even;
mod compare;
mod cuda_check;
mod growth;
mod list;
mod measure;
mod sampled;
mod serve;
mod tune;
mod verify;
mod whole;

use clap::Subcommand;

use super::Global;
use crate::error::Result;

#[derive(Subcommand)]
pub enum Kernels {
    /// Which op runs on which device for which storage types, from the kernel records; also as --format markdown
    List(list::Args),
    /// Every kernel record against the op's f64 reference, on poisoned and guarded memory
    Verify(verify::Args),
    /// Times the table's real-model sizes: checked results, cold inputs, share of this run's measured ceiling
    Bench(bench::Args),
    /// Times the records that fit the table's real-model sizes and keeps which is fastest, for this device and driver
    Tune(tune::Args),
    /// Two benchmark files case by case, decided by interval; also as --format markdown
    Compare(compare::Args),
    /// Compiles every CUDA kernel for GPUs this machine need not have: registers, shared memory, spills, instructions
    CudaCheck(cuda_check::Args),
}

impl Kernels {
    /// Whether `--device` has a meaning for it.
    pub fn runs_on_a_device(&self) -> bool {
        matches!(self, Self::Verify(_) | Self::Bench(_) | Self::Tune(_))
    }

    /// Whether the command can print Markdown.
    pub fn speaks_markdown(&self) -> bool {
        matches!(self, Self::List(_) | Self::Compare(_))
    }
}

pub fn run(global: &Global, command: Kernels) -> Result<()> {
    match command {
        Kernels::List(args) => list::run(global, &args),
        Kernels::Verify(args) => verify::run(global, &args),
        Kernels::Bench(args) => bench::run(global, &args),
        Kernels::Tune(args) => tune::run(global, &args),
        Kernels::Compare(args) => compare::run(global, &args),
        Kernels::CudaCheck(args) => cuda_check::run(global, &args),
    }
}
