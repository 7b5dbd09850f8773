//! One integration binary.

mod commands;
mod composition;
mod cuda;
mod cuda_groups;
mod data;
mod device;
mod distillation;
mod encoder;
mod experts;
mod faults;
mod graphs;
mod import;
mod importance;
mod kernels;
mod learned_masks;
mod metrics;
mod model;
#[cfg(feature = "mpi")]
mod mpi;
mod pipeline;
mod properties;
mod pruning;
mod pruning_recipes;
mod quantization;
mod report;
mod roads;
mod run_folder;
mod second_order;
mod shaders;
mod staged;
mod stages;
mod structure;
mod structure_recipes;
mod tidy;
mod training;
mod tuning;
