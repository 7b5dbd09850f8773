//! What a run leaves for people and programs to read: plain data first ([`model`], [`bench`]), then its renderings.
//!
//! Names in a report come from files and command lines. The data keeps them as they are; every rendering cleans and
//! escapes them for its own output.

pub mod bench;
mod chart;
pub mod compare;
mod csv;
mod html;
mod markdown;
pub mod model;
mod plain;
mod quantity;
mod sections;
mod table;

use std::path::{Path, PathBuf};

use crate::atomic::write_atomic;
use crate::error::Result;

pub use csv::to_csv;
pub use html::to_html;
pub use markdown::to_markdown;
pub use model::RunReport;
pub use plain::{csv_text, markdown_text, terminal_text};
pub use quantity::{bytes, count, duration, milliseconds, number, percent};
pub use table::{Alignment, Table};

/// Writes report.json, report.md, report.html and report.csv into `directory`, each whole or not at all, and returns
/// their paths in this order. The JSON comes first: from it the others can be made again.
///
/// # Errors
/// `Error::Io`; what was written before stays.
pub fn write(directory: impl AsRef<Path>, report: &RunReport) -> Result<[PathBuf; 4]> {
    let paths = ["report.json", "report.md", "report.html", "report.csv"].map(|name| directory.as_ref().join(name));
    let [json, markdown, html, csv] = &paths;
    write_atomic(json, &report.to_json()?)?;
    write_atomic(markdown, to_markdown(report).as_bytes())?;
    write_atomic(html, to_html(report)?.as_bytes())?;
    write_atomic(csv, &to_csv(report)?)?;
    Ok(paths)
}

/// Reads a report.json.
///
/// # Errors
/// `Error::Io`, or `Error::File` naming the key that is wrong.
pub fn read(path: impl AsRef<Path>) -> Result<RunReport> {
    let path = path.as_ref();
    let text = std::fs::read(path).map_err(|source| crate::Error::io(path, source))?;
    RunReport::from_json(path, &text)
}
