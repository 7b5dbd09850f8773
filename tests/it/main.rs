//! One integration binary.

mod data;
mod device;
mod metrics;
mod report;
mod shaders;
mod tidy;
