//! Training: what a step does, and what it leaves behind.

pub mod events;
pub mod graphs;
pub mod lifecycle;
pub mod metrics_log;
pub mod optimizer;
pub mod precision;
pub mod schedule;
pub mod stepper;
pub mod store;
pub mod trainer;
