//! Training: what a step does, and what it leaves behind.

pub mod events;
pub mod metrics_log;
