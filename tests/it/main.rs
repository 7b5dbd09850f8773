//! One integration binary.

mod data;
mod device;
mod kernels;
mod metrics;
mod report;
mod shaders;
mod tidy;
