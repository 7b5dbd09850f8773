//! Compression methods: hooks on the training life-cycle, and functions model -> model with what they promise.

pub mod curvature;
pub mod distillation;
pub mod experts;
pub mod fastest;
pub mod freeze;
pub mod gates;
pub mod hybrid;
pub mod inputs;
pub mod pruning;
pub mod quantization;
pub mod structure;
pub mod tuning;
