//! Lines for the person who watches, on standard error.

use std::fmt::Display;
use std::io::Write;

/// Writes one line to standard error. A reader that has gone away (`2>&1 | head`) must not end a training run, which is
/// what `eprintln!` does then: it panics.
pub fn tell(line: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// As [`tell`], marked as a warning.
pub fn warn(line: impl Display) {
    tell(format_args!("warning: {line}"));
}

/// Variables in which launchers such as `mpirun` tell a process how many were started.
pub const LAUNCHERS: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"];

/// Whether the terminal moves its cursor and knows styles: `TERM=dumb` says that it does neither. A launcher gives each of
/// its processes a terminal, and passes on what they write to wherever its own output goes.
pub fn moves_cursor() -> bool {
    std::env::var_os("TERM").is_none_or(|term| term != "dumb")
        && LAUNCHERS.iter().all(|variable| std::env::var_os(variable).is_none())
}
