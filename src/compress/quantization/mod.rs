//! Quantization: what the weights are trained under, and what they become.

mod training;

pub use training::{QuantizationAware, quantize_weight};
