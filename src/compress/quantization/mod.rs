//! Quantization: which integers stand for the weights and inputs of the linears, how their steps are found, and training
//! under the rounding that deployment does.
//!
//! A linear's steps are tensors of the model beside its weight: `.step` (one per output channel or group; absent where the
//! weight's own range decides) and `.input_step` (one; only for static inputs). `.smooth` is what its input is multiplied
//! by. Fake quantization in training and the stored integers are made by the same ops from the same tensors, so they agree
//! to the bit: `stored` below against the hook in `training.rs`.

pub mod awq;
pub mod calibrate;
pub mod data_free;
pub mod format;
pub mod gptq;
pub mod learned_step;
pub mod schedule;
pub mod smooth;
pub mod training;

pub use format::{Activations, Format, Levels, stored};
pub use schedule::{BitSchedule, Phase};
pub use training::QuantizationAware;

/// How the names of a linear's steps and of what multiplies its input end.
pub const STEP: &str = "step";
pub const INPUT_STEP: &str = "input_step";
pub const SMOOTH: &str = "smooth";
