//! `kernels compare`: two files of benchmark records, decided by interval.

use std::path::PathBuf;

use crate::cli::{Format, Global, say, say_json};
use crate::error::{Error, Result};
use crate::report::{bench, compare};

#[derive(clap::Args)]
pub struct Args {
    /// JSON lines that `kernels bench --format json` wrote: the times before
    a: PathBuf,
    /// The same of another run: the times after
    b: PathBuf,
}

pub fn run(global: &Global, args: &Args) -> Result<()> {
    let (before, after) = (bench::read(&args.a)?, bench::read(&args.b)?);
    let comparisons = compare::compare(&before, &after);
    if !comparisons.iter().any(compare::Comparison::is_paired) {
        let counts = format!("{} records here, {} in {}", after.len(), before.len(), args.a.display());
        return Err(Error::file(&args.b, "records", format!("no case in common: {counts}")));
    }
    match global.format {
        Format::Json => comparisons.iter().for_each(say_json),
        Format::Markdown => say(compare::to_markdown(&comparisons).trim_end()),
        Format::Text => say(compare::to_terminal(&comparisons).trim_end()),
    }
    Ok(())
}
