//! `kernels compare`: two files of benchmark records, decided by interval.

use std::path::PathBuf;

use crate::cli::{Format, Global, say, say_json};
use crate::error::Result;
use crate::report::{bench, compare};

#[derive(clap::Args)]
pub struct Args {
    /// JSON lines that `kernels bench --format json` wrote
    a: PathBuf,
    b: PathBuf,
}

pub fn run(global: &Global, args: &Args) -> Result<()> {
    let comparisons = compare::compare(&bench::read(&args.a)?, &bench::read(&args.b)?);
    match global.format {
        Format::Json => comparisons.iter().for_each(say_json),
        Format::Markdown => say(compare::to_markdown(&comparisons).trim_end()),
        Format::Text => say(compare::to_terminal(&comparisons).trim_end()),
    }
    Ok(())
}
