//! One integration binary.

mod commands;
mod cuda;
mod cuda_groups;
mod data;
mod device;
mod kernels;
mod metrics;
mod model;
mod pipeline;
mod report;
mod run_folder;
mod shaders;
mod tidy;
mod training;
