//! Models in stages: schedules as data, their price, their plan, and an executor that overlaps the stages' work.

pub mod choose;
pub mod csv;
pub mod cut;
pub mod direct;
pub mod executor;
pub mod fault;
pub mod life;
pub mod measure;
pub mod message;
pub mod mpi;
pub mod packet;
pub mod part;
pub mod plan;
pub mod post;
pub mod predict;
pub mod profile;
pub mod rank;
pub mod reads;
pub mod remote;
pub mod route;
pub mod schedule;
pub mod simulate;
pub mod teacher;
#[cfg(test)]
mod tests;
pub mod trace;
pub mod train;
pub mod transport;
mod v_shape;
pub mod validate;
pub mod watch;
pub mod words;
pub mod worker;

pub use schedule::{Event, Kind, Schedule, Work};
pub use simulate::{ChunkCost, Costs, Link, Timeline, simulate};
pub use validate::validate;
