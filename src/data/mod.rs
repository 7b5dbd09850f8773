//! Text in, training batches out. Everything here is bytes to `Result`; nothing knows a device.
//!
//! ```text
//! catalog ─► clean ─► collect ─► TSV ─► table ──┐                ┌─► batch ─► mixture   (GLM prefix-LM)
//! datasets/ ─► frame ─► terms ──────────────────┴─► tokenizer ───┴─► tagging            (encoder)
//!
//! package  who owns a catalog, its licence      split   parts without leaks
//! card     what was read and dropped            order   deterministic choices      persist  files and caps
//! ```

pub mod batch;
mod bucket;
pub mod card;
pub mod catalog;
pub mod clean;
pub mod collect;
pub mod frame;
mod json_line;
pub mod layout;
pub mod mixture;
pub mod order;
pub mod package;
pub mod persist;
pub mod split;
pub mod table;
pub mod tagging;
pub mod terms;
pub mod tokenizer;
pub mod vocabulary;

/// One sentence in two languages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    pub source: String,
    pub target: String,
}
