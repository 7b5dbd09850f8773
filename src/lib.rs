//! Espalier: GPU-kernel-first compression and fine-tuning of transformer language models.

pub mod atomic;
pub mod dtype;
pub mod error;
pub mod shape;

pub use dtype::DType;
pub use error::{Error, Result};
pub use shape::{Meta, Shape};
