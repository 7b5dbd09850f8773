//! Faults to plant on purpose, so that tests see them found.

use serde::{Deserialize, Serialize};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Planted {
    Panic,
    /// The worker is gone without a word.
    Exit,
    Stall,
    /// As a kernel that never ends: it does not stop when told to, either.
    Freeze,
    Slow,
    /// The event's message is not sent, sent twice, or changed on the way.
    Drop,
    Duplicate,
    Corrupt,
}

impl Planted {
    /// All that leave nothing behind: what froze keeps its thread until the program ends.
    pub const ALL: [Planted; 7] = [
        Planted::Panic,
        Planted::Exit,
        Planted::Stall,
        Planted::Slow,
        Planted::Drop,
        Planted::Duplicate,
        Planted::Corrupt,
    ];
}

/// Where and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Injection {
    pub worker: usize,
    pub step: u64,
    /// Index among the worker's events; their number is the update.
    pub position: usize,
    pub what: Planted,
}
