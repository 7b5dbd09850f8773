//! Named tensors under a config. A linear's representation is told by the names it has:
//! `.weight` dense, `.int8` + `.scale`, `.values` + `.metadata` (2:4, f32, or int8 with `.scale`), `.kept` + `.lists` (unstructured
//! zeros left out, f32, or int8 with `.scale`), `.int4` + `.scale`.
//! Int8 with one scale per output channel multiplies int8 inputs: by `.input_step` where there is one, else by each token's
//! own range; int8 with scales `[n, groups]` and int4 multiply float inputs. `.smooth` multiplies an input first. `.step`,
//! beside a dense weight, is what its integers are steps of.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::config::{Config, Head, NormKind, Positions};
use super::tuning::TUNING;
use super::ways::Ways;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::sparse_bitmap::PADDING;
use crate::ops::{relative, rope};
use crate::rng::Stream;
use crate::tensor::Tensor;

/// How the names of gates end: trained numbers that decide about weights and are none themselves. An optimizer keeps them
/// in a group of their own, without decay and clipping, and methods that add them take them out again.
pub const GATE: &str = ".gate";

/// Rotary tables of one block: cos and sin, `[max_positions, head_size / 2]`.
#[derive(Clone)]
pub struct RotaryTables {
    pub cos: Tensor,
    pub sin: Tensor,
}

#[derive(Clone)]
pub struct Model {
    pub config: Config,
    pub tensors: BTreeMap<String, Tensor>,
    device: Arc<dyn Device>,
    rotary: Vec<RotaryTables>,
    /// Buckets of distances, of both sides and of one, where positions are relative.
    distances: Option<[Tensor; 2]>,
    /// By layer; where there are none, the stored form is what is computed with.
    pub(super) ways: BTreeMap<String, Ways>,
}

/// What to draw a parameter from.
enum Init {
    Normal(f64),
    Ones,
    Zeros,
}

impl Model {
    /// Puts a config and its tensors together.
    pub fn new(config: Config, tensors: BTreeMap<String, Tensor>, device: &Arc<dyn Device>) -> Result<Self> {
        let mut rotary = Vec::new();
        if config.positions.rotary() {
            for block in &config.blocks {
                let (cos, sin) = rope::tables(&block.inverse_frequencies, config.max_positions);
                let dims = [config.max_positions, block.inverse_frequencies.len()];
                rotary.push(RotaryTables {
                    cos: Tensor::from_slice(device, &dims, &cos)?,
                    sin: Tensor::from_slice(device, &dims, &sin)?,
                });
            }
        }
        let distances = match config.positions {
            Positions::Relative { buckets, farthest } => {
                let ids = |count: usize| {
                    let ids = relative::buckets(count, farthest);
                    Tensor::from_slice(device, &[ids.len()], &ids)
                };
                Some([ids(buckets / 2)?, ids(buckets)?])
            }
            _ => None,
        };
        Ok(Self { config, tensors, device: device.clone(), rotary, distances, ways: BTreeMap::new() })
    }

    /// A fresh model: normal weights of deviation 0.02 (GPT-2), output projections scaled down by sqrt(2 L),
    /// norms at 1, biases at 0. Each tensor has its own stream, so adding one changes no other.
    pub fn init(config: Config, device: &Arc<dyn Device>, seed: u64) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (site, (name, dims)) in config.parameters().into_iter().enumerate() {
            let values = match init_of(&name, config.blocks.len()) {
                Init::Ones => vec![1.0; dims.iter().product()],
                Init::Zeros => vec![0.0; dims.iter().product()],
                Init::Normal(deviation) => {
                    let mut stream = Stream::new(seed, site as u32);
                    (0..dims.iter().product()).map(|_| deviation * stream.normal()).collect()
                }
            };
            tensors.insert(name, Tensor::from_f64(device, &dims, DType::F32, &values)?);
        }
        Self::new(config, tensors, device)
    }

    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    pub fn rotary(&self, block: usize) -> Option<&RotaryTables> {
        self.rotary.get(block)
    }

    /// Bucket of each distance, with `both_sides` for half of the buckets.
    pub fn distances(&self, both_sides: bool) -> Option<&Tensor> {
        self.distances.as_ref().map(|[both, one]| if both_sides { both } else { one })
    }

    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| missing(name))
    }

    /// Values of a tensor on the host.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        self.get(name)?.to_vec()
    }

    /// The same model on another device.
    pub fn to_device(&self, device: &Arc<dyn Device>) -> Result<Self> {
        let tensors = self.tensors.iter().map(|(n, t)| Ok((n.clone(), t.to_device(device)?))).collect::<Result<_>>()?;
        Self::new(self.config.clone(), tensors, device)
    }

    /// A copy whose tensors have memory of their own, so that training one leaves the other alone.
    pub fn duplicate(&self) -> Result<Self> {
        let tensors = self.tensors.iter().map(|(n, t)| Ok((n.clone(), t.duplicate()?))).collect::<Result<_>>()?;
        Self::new(self.config.clone(), tensors, &self.device)
    }

    /// Number of stored parameters (2:4 metadata, scales and what multiplies inputs not counted).
    pub fn parameter_count(&self) -> usize {
        let beside = [".metadata", ".lists", ".scale", ".step", ".input_step", ".smooth"];
        let counted = |name: &str| !beside.iter().any(|end| name.ends_with(end));
        let count = |(name, t): (&String, &Tensor)| match name.ends_with(".kept") {
            // Words behind the last hold no weight.
            true => t.count().saturating_sub(PADDING * 4 / t.dtype().size()),
            false => t.count(),
        };
        self.tensors.iter().filter(|(n, _)| counted(n)).map(count).sum()
    }

    /// Bytes of all tensors as stored.
    pub fn total_bytes(&self) -> usize {
        self.tensors.values().map(|t| t.meta().bytes()).sum()
    }

    /// Bytes of attention and FFN tensors that one token touches (BMCook's activated size, in bytes as stored, with
    /// scales, metadata and routers): of experts, the selected ones; an oracle computes all of the in-projection.
    pub fn activated_bytes(&self) -> usize {
        let mut bytes = 0;
        for (i, block) in self.config.blocks.iter().enumerate() {
            // With what tuning added beside them.
            let prefixes = [format!("blocks.{i}."), format!("{TUNING}blocks.{i}.")];
            let all = prefixes.iter().flat_map(|p| {
                let from = self.tensors.range(p.clone()..).take_while(move |(n, _)| n.starts_with(p));
                from.map(move |(name, tensor)| (&name[p.len()..], tensor))
            });
            let routed = ["in", "centre"].map(|part| format!("blocks.{i}.ffn.router.{part}.weight"));
            let oracle = !routed.iter().any(|name| self.tensors.contains_key(name));
            for (part, tensor) in all {
                if !["attention.", "cross.", "ffn.", "prefix."].iter().any(|sublayer| part.starts_with(sublayer)) {
                    continue;
                }
                let all = tensor.meta().bytes();
                bytes += match block.experts {
                    Some(_) if oracle && part.starts_with("ffn.experts.in") => all,
                    Some(e) if part.starts_with("ffn.experts.") => all * e.selected / e.count,
                    _ => all,
                };
            }
        }
        bytes
    }
}

pub(super) fn missing(name: &str) -> Error {
    Error::file("model", name, "a tensor of this name is missing")
}

fn init_of(name: &str, layers: usize) -> Init {
    let last = name.rsplit('.').next().unwrap_or(name);
    if name.contains("norm") {
        return if last == "weight" { Init::Ones } else { Init::Zeros };
    }
    match last {
        "bias" => Init::Zeros,
        _ if ["attention.output.weight", "cross.output.weight", "ffn.out.weight"].iter().any(|n| name.ends_with(n)) => {
            Init::Normal(0.02 / (2.0 * layers as f64).sqrt())
        }
        _ => Init::Normal(0.02),
    }
}

impl Config {
    /// Names and shapes of all parameters of the dense model, in a fixed order.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let d = self.width;
        let mut list = vec![("embedding.tokens".to_string(), vec![self.vocabulary, d])];
        if self.positions == Positions::Learned {
            list.push(("embedding.positions".into(), vec![self.max_positions, d]));
        }
        let norm = |list: &mut Vec<(String, Vec<usize>)>, name: String| {
            list.push((format!("{name}.weight"), vec![d]));
            if self.norm == NormKind::Layer {
                list.push((format!("{name}.bias"), vec![d]));
            }
        };
        for (i, b) in self.blocks.iter().enumerate() {
            let (inner, across) = (b.heads * b.head_size, b.heads_across() * b.head_size);
            norm(&mut list, format!("blocks.{i}.norm_attention"));
            norm(&mut list, format!("blocks.{i}.norm_ffn"));
            let shapes =
                |inner| [[inner, d], [inner, d], [inner, d], [d, inner], [Self::ffn_rows(b), d], [d, b.ffn_width]];
            let linears = Self::linears(i).into_iter().zip(shapes(inner));
            // A sublayer that the block lacks would have empty ones.
            for (name, dims) in linears.filter(|(_, dims)| !dims.contains(&0)) {
                list.push((format!("{name}.weight"), dims.to_vec()));
                list.push((format!("{name}.bias"), vec![dims[0]]));
            }
            if self.decodes(i) {
                norm(&mut list, format!("blocks.{i}.norm_cross"));
            }
            for (name, dims) in self.cross(i).into_iter().flatten().zip(shapes(across)) {
                list.push((format!("{name}.weight"), dims.to_vec()));
                list.push((format!("{name}.bias"), vec![dims[0]]));
            }
            if let Positions::Relative { buckets, .. } = self.positions
                && b.attends()
                && (self.stack(i) == i || b.own_distances)
            {
                list.push((format!("blocks.{i}.attention.distances"), vec![b.heads, buckets]));
            }
        }
        if self.encoder > 0 {
            norm(&mut list, "norm_encoder".into());
        }
        norm(&mut list, "norm_final".into());
        match &self.head {
            Head::Language { tied: true } => {}
            Head::Language { tied: false } => list.push(("head.weight".into(), vec![self.vocabulary, d])),
            Head::Tagging { labels } => {
                list.push(("head.weight".into(), vec![labels.len(), d]));
                list.push(("head.bias".into(), vec![labels.len()]));
            }
        }
        list
    }
}
