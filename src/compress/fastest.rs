//! Which way each layer of a deployed model takes on its device, measured: compressed weights run on dense kernels where those
//! are faster, and the model says so.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::device::turns::{median, take_turns};
use crate::dispatch;
use crate::error::{Error, Result};
use crate::json;
use crate::nn::ways::{Way, Ways, dense_levels, dense_weight};
use crate::nn::{Model, Pass};
use crate::ops::layout::Permute;
use crate::rng::Stream;
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::store;

/// Rounds of a comparison.
const ROUNDS: usize = 7;
/// What another way must save before the stored form is left: less is the measurement's own noise.
const GAIN: f64 = 0.05;

/// What was measured of one layer for one number of rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    pub layer: String,
    /// How it is stored: `2:4`, `2:4 int8`, `int8`, `int4`, `experts`.
    pub form: String,
    pub rows: usize,
    /// [`Way::name`] of the way that is taken.
    pub way: String,
    /// Microseconds on the stored form's kernels and on the way that is taken, medians of one comparison.
    pub stored_us: f64,
    pub taken_us: f64,
}

/// The model with the fastest way of each layer for so many rows (tokens at once), and what was measured. Layers of one
/// form and shape are measured once. A dense weight stays in memory beside the stored one where it is taken.
///
/// # Errors
/// Those of the device.
pub fn fastest(model: &Model, rows: &[usize]) -> Result<(Model, Vec<Choice>)> {
    let (mut fast, mut choices) = (model.as_stored(), Vec::new());
    let mut measured: BTreeMap<String, Vec<Choice>> = BTreeMap::new();
    for (layer, form) in layers(model) {
        let signature = signature(model, &layer);
        let of_layer = match measured.get(&signature) {
            Some(same) => same.iter().map(|choice| Choice { layer: layer.clone(), ..choice.clone() }).collect(),
            None => {
                let own = measure(model, (&layer, form), rows)?;
                measured.insert(signature, own.clone());
                own
            }
        };
        take(&mut fast, &layer, &of_layer)?;
        choices.extend(of_layer);
    }
    Ok((fast, choices))
}

/// A model that takes the ways of earlier choices.
///
/// # Errors
/// Those of the device; a choice for a layer that the model has not stored so.
pub fn chosen(model: &Model, choices: &[Choice]) -> Result<Model> {
    let mut fast = model.as_stored();
    for (layer, form) in layers(model) {
        let own: Vec<Choice> = choices.iter().filter(|c| c.layer == layer && c.form == form).cloned().collect();
        take(&mut fast, &layer, &own)?;
    }
    Ok(fast)
}

/// One line for each form and number of rows that is not computed as it is stored everywhere.
pub fn notes(choices: &[Choice]) -> Vec<String> {
    let mut groups: BTreeMap<(&str, usize), Vec<&Choice>> = BTreeMap::new();
    for choice in choices {
        groups.entry((&choice.form, choice.rows)).or_default().push(choice);
    }
    let note = |((form, rows), all): ((&str, usize), Vec<&Choice>)| {
        let others: Vec<&&Choice> = all.iter().filter(|c| c.way != STORED).collect();
        let first = others.first()?;
        let gains = others.iter().map(|c| c.stored_us / c.taken_us);
        let (least, most) = gains.fold((f64::INFINITY, 0.0f64), |(l, m), gain| (l.min(gain), m.max(gain)));
        let tokens = if rows == 1 { "token" } else { "tokens" };
        let gain = if most - least < 0.01 { format!("{most:.2}") } else { format!("{least:.2} to {most:.2}") };
        let (some, way) = (others.len(), &first.way);
        Some(format!("at {rows} {tokens} {some} of {} {form} layers run as {way} here, {gain} x as fast", all.len()))
    };
    groups.into_iter().filter_map(note).collect()
}

/// The file that says beside a saved model what its layers run on.
pub const FILE: &str = "fastest.json";

/// Choices and the device that they were measured on.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Measured {
    device: String,
    choices: Vec<Choice>,
}

/// The file for a saved model; `None` where nothing was to be chosen.
///
/// # Errors
/// Where it cannot be written as JSON.
pub fn file(device: &Arc<dyn Device>, choices: &[Choice]) -> Result<Option<(&'static str, Vec<u8>)>> {
    if choices.is_empty() {
        return Ok(None);
    }
    let measured = Measured { device: device.info().name.clone(), choices: choices.to_vec() };
    let text = serde_json::to_vec_pretty(&measured).map_err(|e| Error::io(FILE, e.into()))?;
    Ok(Some((FILE, text)))
}

/// Reads a model directory. Layers take the ways that were measured when it was saved, where that was on a device of the same
/// name; else those of their stored forms.
///
/// # Errors
/// As [`store::load_model`]; a damaged file of choices.
pub fn load(path: &Path, device: &Arc<dyn Device>) -> Result<(Model, Vec<Choice>)> {
    let (_, files) = store::load(path)?;
    let model = store::model_from(path, &files, device)?;
    let Some(bytes) = files.get(FILE) else { return Ok((model, Vec::new())) };
    let measured: Measured = json::read(&path.join(FILE), bytes)?;
    if measured.device != device.info().name {
        return Ok((model, Vec::new()));
    }
    Ok((chosen(&model, &measured.choices)?, measured.choices))
}

const STORED: &str = "stored";

/// Layers that have more than one way, and their forms.
fn layers(model: &Model) -> Vec<(String, &'static str)> {
    let has = |layer: &str, part: &str| model.tensors.contains_key(&format!("{layer}.{part}"));
    let mut all = Vec::new();
    for name in model.tensors.keys() {
        let Some((layer, part)) = name.rsplit_once('.') else { continue };
        let form = match part {
            "values" if has(layer, "scale") => "2:4 int8",
            "values" => "2:4",
            "int8" => "int8",
            "int4" => "int4",
            _ => continue,
        };
        if !layer.contains(".experts.") {
            all.push((layer.to_string(), form));
        }
    }
    for (i, _) in model.config.blocks.iter().enumerate().filter(|(_, block)| block.experts.is_some()) {
        all.push((format!("blocks.{i}.ffn"), "experts"));
    }
    all
}

/// What decides a layer's speed: its tensors' parts, types and shapes.
fn signature(model: &Model, layer: &str) -> String {
    let prefix = format!("{layer}.");
    let own = model.tensors.range(prefix.clone()..).take_while(|(name, _)| name.starts_with(&prefix));
    own.map(|(name, tensor)| format!("{} {} ", &name[prefix.len()..], tensor.meta())).collect()
}

/// All ways of a layer (`blocks.0.attention.query`, or of experts `blocks.0.ffn`), the stored one first.
///
/// # Errors
/// Those of the device; a tensor that is missing.
pub fn ways(model: &Model, layer: &str) -> Result<Vec<Way>> {
    if layer.ends_with(".ffn") {
        return ways_of_experts(model, layer);
    }
    let mut all = vec![Way::Stored];
    let integers =
        model.tensors.get(&format!("{layer}.scale")).filter(|_| model.tensors.contains_key(&format!("{layer}.values")));
    if let Some(scale) = integers {
        all.push(Way::Int8 { weight: dense_levels(model, layer)?, scale: scale.clone() });
    }
    all.push(Way::Float { weight: dense_weight(model, layer)? });
    Ok(all)
}

/// Those of a block's experts; what a threshold leaves out, dense products would have to compute.
fn ways_of_experts(model: &Model, layer: &str) -> Result<Vec<Way>> {
    let mut all = vec![Way::Stored, Way::Sorted];
    let block = model.config.blocks.iter().enumerate().find(|(i, _)| layer == format!("blocks.{i}.ffn"));
    if block.and_then(|(_, block)| block.experts).is_some_and(|experts| experts.threshold.is_none()) {
        let [inner, outer] = ["in", "out"].map(|part| dense_weight(model, &format!("{layer}.experts.{part}")));
        let (inner, outer) = (inner?, outer?);
        let &[e, d, n] = outer.dims() else {
            return Err(Error::Shape { op: "experts", rule: "out [E, d, n]", got: outer.meta().to_string() });
        };
        let outer = dispatch::run_one(&Permute { order: vec![1, 0, 2] }, &[&outer])?.reshape(&[d, e * n])?;
        all.push(Way::AllExperts { inner: inner.reshape(&[e * n, d])?, outer });
    }
    Ok(all)
}

fn measure(model: &Model, (layer, form): (&str, &str), rows: &[usize]) -> Result<Vec<Choice>> {
    let device: &Arc<dyn Device> = model.device();
    let all = ways(model, layer)?;
    let width = width(model, layer)?;
    // A model for each way, which takes it for any number of rows.
    let models: Vec<Model> = (0..all.len())
        .map(|way| {
            let mut only = model.as_stored();
            only.set_ways(layer, Ways { all: all.clone(), taken: vec![(1, way)] });
            only
        })
        .collect();
    let mut choices = Vec::new();
    for &rows in rows {
        let mut stream = Stream::new(0, rows as u32);
        let values: Vec<f32> = (0..rows * width).map(|_| stream.normal() as f32).collect();
        let x = Var::constant(Tensor::from_slice(device, &[rows, width], &values)?);
        let works: Vec<_> = models
            .iter()
            .map(|model| {
                let x = &x;
                move || run(model, layer, x)
            })
            .collect();
        let works: Vec<&dyn Fn() -> Result<()>> = works.iter().map(|work| work as &dyn Fn() -> Result<()>).collect();
        let times: Vec<f64> = take_turns(device, &works, ROUNDS)?.iter().map(|t| 1e6 * median(t)).collect();
        let best = (1..times.len()).min_by(|&a, &b| times[a].total_cmp(&times[b])).unwrap_or(0);
        let way = if times[best] < (1.0 - GAIN) * times[0] { best } else { 0 };
        choices.push(Choice {
            layer: layer.into(),
            form: form.into(),
            rows,
            way: all[way].name().into(),
            stored_us: times[0],
            taken_us: times[way],
        });
    }
    Ok(choices)
}

fn run(model: &Model, layer: &str, x: &Var) -> Result<()> {
    let mut pass = Pass::inference(model);
    let block = layer.strip_prefix("blocks.").and_then(|l| l.strip_suffix(".ffn")).and_then(|i| i.parse().ok());
    match block {
        Some(i) => pass.ffn(i, x)?,
        None => pass.linear(layer, x)?,
    };
    Ok(())
}

/// Elements of a row of a layer's input.
fn width(model: &Model, layer: &str) -> Result<usize> {
    if layer.ends_with(".ffn") { Ok(model.config.width) } else { Ok(dense_weight(model, layer)?.shape().last()) }
}

/// Gives a layer the ways of its choices; none where the stored form is best throughout.
fn take(model: &mut Model, layer: &str, choices: &[Choice]) -> Result<()> {
    if choices.iter().all(|c| c.way == STORED) {
        return Ok(());
    }
    let mut all = ways(model, layer)?;
    // Only what is taken stays in memory.
    all.retain(|way| way.name() == STORED || choices.iter().any(|c| c.way == way.name()));
    let at = |c: &Choice| (c.rows, all.iter().position(|way| way.name() == c.way).unwrap_or(0));
    let taken = choices.iter().map(at).collect();
    model.set_ways(layer, Ways { all, taken });
    Ok(())
}
