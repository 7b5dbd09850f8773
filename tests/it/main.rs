//! One integration binary.

mod data;
mod metrics;
mod report;
