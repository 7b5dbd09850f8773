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

/// A value as a recipe writes it, for messages; "nothing" where it is absent.
pub fn written(value: &impl serde::Serialize) -> String {
    toml::Value::try_from(value).map_or_else(|_| "nothing".into(), |value| value.to_string())
}
