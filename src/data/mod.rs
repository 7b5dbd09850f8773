//! Text in, training batches out. Everything here is bytes to `Result`; nothing knows a device.
//!
//! ```text
//! catalog ─► clean ─► collect ─► TSV ─► table ┐
//! datasets/ (embedded) ─────────► terms ──────┴─► tokenizer ─► batch (GLM prefix-LM), tagging (encoder)
//! package, split, card, persist, order: what several of them need
//! ```

pub mod card;
pub mod catalog;
pub mod clean;
pub mod collect;
pub mod frame;
mod json_line;
pub mod order;
pub mod package;
pub mod persist;
pub mod split;
pub mod table;
pub mod terms;
pub mod tokenizer;

/// One sentence in two languages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    pub source: String,
    pub target: String,
}
