//! Models in stages: schedules as data, their price, their plan, and an executor that overlaps the stages' work.

pub mod csv;
pub mod plan;
pub mod profile;
pub mod schedule;
pub mod simulate;
#[cfg(test)]
mod tests;
pub mod trace;
pub mod validate;

pub use schedule::{Event, Kind, Schedule, Work};
pub use simulate::{ChunkCost, Costs, Link, Timeline, simulate};
pub use validate::validate;
