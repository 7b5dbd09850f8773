//! What a run leaves for people and programs to read: plain data first ([`model`], [`bench`]), then its renderings.
//!
//! Names in a report come from files and command lines. The data keeps them as they are; every rendering cleans and
//! escapes them for its own output.

pub mod bench;
mod chart;
pub mod compare;
pub mod csv;
pub mod html;
pub mod markdown;
pub mod model;
mod plain;
mod quantity;
mod sections;
pub mod table;

use std::path::{Path, PathBuf};

use crate::atomic::write_atomic;
use crate::error::Result;

pub use chart::gantt;
pub use model::RunReport;
pub use plain::{csv_text, markdown_text, plain_text};
pub use quantity::{bytes, count, duration, milliseconds, number, percent};
pub use table::{Alignment, Table};

/// Writes report.json, report.md, report.html and report.csv into `directory`, each whole or not at all, and returns
/// their paths in this order. The JSON comes first: from it the others can be made again.
///
/// # Errors
/// `Error::Io`; what was written before stays.
pub fn write(directory: impl AsRef<Path>, report: &RunReport) -> Result<[PathBuf; 4]> {
    let paths = ["report.json", "report.md", "report.html", "report.csv"].map(|name| directory.as_ref().join(name));
    let [data, text, page, table] = &paths;
    write_atomic(data, &report.to_json()?)?;
    write_atomic(text, markdown::render(report).as_bytes())?;
    write_atomic(page, html::render(report)?.as_bytes())?;
    write_atomic(table, &csv::render(report)?)?;
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
