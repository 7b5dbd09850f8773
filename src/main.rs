//! Parse, call, print.

use clap::{Parser, Subcommand};
use espalier::verify::{self, Verdict};
use espalier::{Error, Result, device};

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// For kernel people.
    #[command(subcommand)]
    Kernels(Kernels),
}

#[derive(Subcommand)]
enum Kernels {
    /// Every case of the table against the f64 reference.
    Verify {
        #[arg(long, default_value = "cpu")]
        device: String,
        #[arg(long, default_value = "*")]
        op: String,
        #[arg(long)]
        grad: bool,
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
}

fn main() {
    if let Err(e) = run(Cli::parse()) {
        eprintln!("error[{}]: {e}", e.code());
        std::process::exit(e.exit_code());
    }
}

fn run(cli: Cli) -> Result<()> {
    let Command::Kernels(Kernels::Verify { device, op, grad, seed }) = cli.command;
    let device = device::open(&device)?;
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for case in verify::select(&op).into_iter().filter(|c| !grad || c.grad) {
        let outcomes = if grad { vec![verify::gradient(&case, &device, seed)] } else { verify::forward(&case, &device, seed) };
        for o in outcomes {
            match o.verdict {
                Verdict::Passed => passed += 1,
                Verdict::Skipped(_) => skipped += 1,
                Verdict::Failed(reason) => {
                    failed += 1;
                    println!("FAILED {} [{}] {}: {reason}", o.op, o.kernel, o.label);
                }
            }
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed > 0 { Err(Error::Failed { what: "kernel checks", failed, total: passed + failed }) } else { Ok(()) }
}
