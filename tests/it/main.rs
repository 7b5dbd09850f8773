//! One integration binary.

mod cuda;
mod data;
mod device;
mod kernels;
mod metrics;
mod model;
mod report;
mod shaders;
mod tidy;
mod training;
