//! Espalier: GPU-kernel-first compression and fine-tuning of transformer language models.

pub mod atomic;
pub mod cli;
pub mod compress;
pub mod console;
pub mod data;
pub mod device;
pub mod dispatch;
pub mod json;
pub mod kernel;
pub mod metrics;
pub mod nn;
pub mod op;
pub mod ops;
pub mod pipeline;
pub mod recipe;
pub mod report;
pub mod tape;
pub mod tensor;
pub mod train;
pub mod tuned;
pub mod verify;

pub use espalier_cpu as cpu;
pub use espalier_cpu::{dtype, error, rng, shape};

pub use dtype::DType;
pub use error::{Error, Result};
pub use shape::{Meta, Shape};
pub use tensor::Tensor;
