//! What a run leaves for people and programs to read: plain data first ([`model`], [`bench`]), then its renderings.

pub mod bench;
pub mod compare;
pub mod model;
mod plain;
mod quantity;
mod table;

pub use plain::{csv_text, markdown_text, terminal_text};
pub use quantity::{bytes, count, duration, milliseconds, number, percent};
pub use table::{Alignment, Table};
