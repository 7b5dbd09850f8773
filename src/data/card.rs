//! The data card: what was read, what was dropped and by which rule, and a hash of what was read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Counts of one reader or one collection. `rows == kept + sum of dropped` always holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataCard {
    /// Where the rows came from, as given by the caller.
    pub origin: String,
    pub rows: u64,
    pub kept: u64,
    /// Rule to how many rows broke it first (a row is counted under one rule only).
    pub dropped: BTreeMap<String, Dropped>,
    /// Blake3 of the bytes that were read, hexadecimal.
    pub blake3: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dropped {
    pub count: u64,
    /// Position of the first one.
    pub first: String,
}

impl DataCard {
    pub fn new(origin: impl ToString) -> Self {
        Self { origin: origin.to_string(), ..Self::default() }
    }

    pub fn keep(&mut self) {
        self.rows += 1;
        self.kept += 1;
    }

    pub fn drop_row(&mut self, rule: &str, position: impl FnOnce() -> String) {
        self.rows += 1;
        self.count_drop(rule, position);
    }

    /// Takes back a row that was counted as kept: a later rule (duplicates, leaks) drops it after all.
    pub fn drop_kept(&mut self, rule: &str, position: impl FnOnce() -> String) {
        self.kept -= 1;
        self.count_drop(rule, position);
    }

    /// How many rows a rule dropped.
    pub fn dropped_by(&self, rule: &str) -> u64 {
        self.dropped.get(rule).map_or(0, |d| d.count)
    }

    fn count_drop(&mut self, rule: &str, position: impl FnOnce() -> String) {
        if let Some(dropped) = self.dropped.get_mut(rule) {
            dropped.count += 1;
        } else {
            self.dropped.insert(rule.to_string(), Dropped { count: 1, first: position() });
        }
    }
}
