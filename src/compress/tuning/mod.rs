//! Parameter-efficient tuning: a few parameters are added beside a model's own (see `nn::tuning`), and they alone learn.

pub mod adapter;
pub mod lora;
pub mod prefix;

pub use adapter::Adapter;
pub use lora::{Lora, Merged};
pub use prefix::Prefix;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::nn::Model;
use crate::nn::tuning::TUNING;
use crate::rng::Stream;
use crate::tensor::Tensor;

/// A way of tuning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum Tuning {
    Lora(Lora),
    Adapter(Adapter),
    Prefix(Prefix),
}

impl Tuning {
    /// Adds its parameters. The model computes what it did: every way starts from no change but prefixes, which are keys
    /// more to attend to.
    ///
    /// # Errors
    /// `Parameter` for sizes of 0 or too large, for linears that are not there, and where parameters were added before.
    pub fn add(&self, model: &mut Model, seed: u64) -> Result<()> {
        if model.tuned() {
            return refuse("model", "one with added parameters".into(), "a model that has none, or whose are merged");
        }
        match self {
            Tuning::Lora(lora) => lora.add(model, seed),
            Tuning::Adapter(adapter) => adapter.add(model, seed),
            Tuning::Prefix(prefix) => prefix.add(model, seed),
        }
    }
}

/// Parameters that were added and learn.
pub fn parameter_count(model: &Model) -> usize {
    let learned =
        model.tensors.iter().filter(|(name, t)| name.starts_with(TUNING) && t.dtype().is_float() && model.learns(name));
    learned.map(|(_, tensor)| tensor.count()).sum()
}

/// Takes all added parameters away again.
pub fn remove(model: &mut Model) {
    model.tensors.retain(|name, _| !name.starts_with(TUNING));
}

fn refuse<T>(parameter: &'static str, value: String, allowed: &'static str) -> Result<T> {
    Err(Error::Parameter { op: "tuning", parameter, value, allowed })
}

fn put(model: &mut Model, name: String, dims: &[usize], values: &[f32]) -> Result<()> {
    let tensor = Tensor::from_slice(model.device(), dims, values)?;
    model.tensors.insert(format!("{TUNING}{name}"), tensor);
    Ok(())
}

/// Uniform draws in +-1 / sqrt(inputs) (He et al. 2015 with a = sqrt 5, as linear layers are initialised in PyTorch and
/// PEFT). Each tensor has its own stream.
fn uniform(seed: u64, site: u32, [rows, inputs]: [usize; 2]) -> Vec<f32> {
    let mut stream = Stream::new(seed, 0x70e_0000 + site);
    let bound = 1.0 / (inputs as f64).sqrt();
    (0..rows * inputs).map(|_| (bound * (2.0 * stream.uniform() - 1.0)) as f32).collect()
}
