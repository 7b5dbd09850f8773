//! One integration binary.

mod cuda;
mod commands;
mod data;
mod device;
mod kernels;
mod metrics;
mod model;
mod report;
mod run_folder;
mod shaders;
mod tidy;
mod training;
