//! One integration binary.

mod cuda;
mod cuda_groups;
mod data;
mod device;
mod kernels;
mod metrics;
mod model;
mod report;
mod shaders;
mod tidy;
mod training;
