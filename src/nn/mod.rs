//! The model as data: a config with per-layer shapes, and named tensors in one of several representations.

pub mod config;
mod encoder;
mod experts;
mod forward;
pub mod generate;
mod linear;
pub mod model;
mod norm;
mod parts;
pub mod pieces;
mod shapes;
mod taps;
pub mod tuning;
pub mod ways;

pub use config::{Activation, AttentionKind, Block, Config, Experts, Head, NormKind, Positions, Residual};
pub use forward::{Batch, OutputHook, Pass, Place, Source, States};
pub use model::Model;
pub use taps::{Heads, Tap};
