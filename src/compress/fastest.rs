//! Which way each layer of a deployed model takes on its device, measured: compressed weights run on dense kernels where those
//! are faster, and the model says so.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::compress::experts::report::{ffn_inputs, repeated};
use crate::console;
use crate::device::turns::{median, take_turns};
use crate::device::{Device, Kind};
use crate::dispatch;
use crate::error::{Error, Result};
use crate::json;
use crate::nn::ways::{Way, Ways, columns, dense_levels, dense_weight};
use crate::nn::{Batch, Model, Pass};
use crate::ops::layout::Permute;
use crate::ops::sparse_bitmap::BLOCK;
use crate::rng::Stream;
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::store;

/// Rounds of a comparison.
const ROUNDS: usize = 7;
/// What another way must save before the stored form is left: less is the measurement's own noise.
const GAIN: f64 = 0.05;
/// The file that says beside a saved model what its layers run on.
pub const FILE: &str = "fastest.json";
const STORED: &str = "stored";

/// What was measured of one layer for one number of rows. Times are microseconds, medians of one comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    pub layer: String,
    /// How it is stored: `2:4`, `unstructured`, either with `int8`, `int8`, `int4`, `experts`.
    pub form: String,
    pub rows: usize,
    /// [`Way::name`] of the way that is taken.
    pub way: String,
    pub stored_us: f64,
    pub taken_us: f64,
    /// The dense f32 layer of the same shape; of experts, all of their neurons without a router.
    pub dense_us: Option<f64>,
}

/// Choices and the device that they were measured on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    pub device: String,
    pub choices: Vec<Choice>,
}

/// The model with the fastest way of each layer for so many rows (tokens at once), and what was measured; of layers whose names
/// start with `within`. Layers of one form and shape are timed together, one after the other, so that their weights are as cold
/// as in the model. Which experts are chosen, and under a threshold how many, follows from `text`. A dense weight stays in
/// memory beside the stored one where it is taken. A way that cannot be made or run on the device is none, which is told;
/// devices whose time says nothing are not timed.
///
/// # Errors
/// Those of the device.
pub fn fastest(model: &Model, rows: &[usize], within: &str, text: &Batch) -> Result<(Model, Measured)> {
    let info = model.device().info();
    let mut measured = Measured { device: info.name.clone(), choices: Vec::new() };
    let mut fast = model.as_stored();
    if matches!(info.kind, Kind::Reference | Kind::Null) || info.id.starts_with("cuda-host") {
        return Ok((fast, measured));
    }
    let mut groups: BTreeMap<(&str, String), Vec<String>> = BTreeMap::new();
    for (layer, form) in layers(model).into_iter().filter(|(layer, _)| layer.starts_with(within)) {
        groups.entry((form, signature(model, &layer))).or_default().push(layer);
    }
    for ((form, _), layers) in groups {
        match measure(model, (form, &layers), rows, text).and_then(|own| take(&mut fast, &own).map(|()| own)) {
            Ok(own) => measured.choices.extend(own),
            Err(e) => {
                layers.iter().for_each(|layer| fast.clear_ways(layer));
                console::warn(format_args!("{form} layers run as they are stored: {e}"));
            }
        }
    }
    Ok((fast, measured))
}

/// The file for a saved model; `None` where nothing was to be chosen.
///
/// # Errors
/// Where it cannot be written as JSON.
pub fn file(measured: &Measured) -> Result<Option<(&'static str, Vec<u8>)>> {
    if measured.choices.is_empty() {
        return Ok(None);
    }
    let text = serde_json::to_vec_pretty(measured).map_err(|e| Error::io(FILE, e.into()))?;
    Ok(Some((FILE, text)))
}

/// Reads a model directory. Layers take the ways that were measured when it was saved, where that was on a device of the same
/// name; else, and where those cannot be had, the ways of their stored forms, or of dense ones (`unmeasured`).
///
/// # Errors
/// As [`store::load_model`]; a damaged file of choices.
pub fn load(path: &Path, device: &Arc<dyn Device>) -> Result<(Model, Vec<Choice>)> {
    let (_, files) = store::load(path)?;
    let model = store::model_from(path, &files, device)?;
    let measured = files.get(FILE).map(|bytes| json::read::<Measured>(&path.join(FILE), bytes)).transpose()?;
    let Some(measured) = measured.filter(|measured| measured.device == device.info().name) else {
        return Ok((unmeasured(model)?, Vec::new()));
    };
    let mut fast = model.clone();
    match take(&mut fast, &measured.choices) {
        Ok(()) => Ok((fast, measured.choices)),
        Err(e) => {
            console::warn(format_args!("{}: not followed: {e}", path.join(FILE).display()));
            Ok((unmeasured(model)?, Vec::new()))
        }
    }
}

/// On GPUs the kernels that skip unstructured zeros are the naive rung, so that only a measurement may choose them: without
/// one such layers run dense there.
fn unmeasured(mut model: Model) -> Result<Model> {
    if model.device().info().kind == Kind::Cpu {
        return Ok(model);
    }
    let bitmaps: Vec<_> = layers(&model).into_iter().filter(|(_, form)| form.starts_with("unstructured")).collect();
    for (layer, _) in &bitmaps {
        // The stored one first, then the nearest to it.
        let dense: Vec<Way> = ways(&model, layer)?.drain(1..2).collect();
        model.set_ways(layer, Ways { all: dense, taken: vec![(1, 0)] });
    }
    if !bitmaps.is_empty() {
        let (count, device) = (bitmaps.len(), &model.device().info().name);
        console::warn(format_args!("{count} unstructured layers run dense: nothing was measured on {device}"));
    }
    Ok(model)
}

/// One line for each form and way that is not the stored form's; and one for each form that is slower than dense all the same:
/// at how many tokens, how many of its layers, by how much.
pub fn notes(choices: &[Choice]) -> Vec<String> {
    let ratios = |of: &dyn Fn(&Choice) -> f64, some: &[&Choice]| {
        let range = some.iter().map(|c| of(c)).fold((f64::INFINITY, 0.0f64), |(l, m), x| (l.min(x), m.max(x)));
        if range.1 - range.0 < 0.01 {
            format!("{:.2} x", range.1)
        } else {
            format!("{:.2} to {:.2} x", range.0, range.1)
        }
    };
    let mut groups: BTreeMap<(&str, usize), Vec<&Choice>> = BTreeMap::new();
    for choice in choices {
        groups.entry((&choice.form, choice.rows)).or_default().push(choice);
    }
    // What is said of a form, and for each number of tokens how.
    let mut lines: BTreeMap<(&str, String), Vec<String>> = BTreeMap::new();
    for ((form, rows), all) in groups {
        let mut ways: BTreeMap<&str, Vec<&Choice>> = BTreeMap::new();
        all.iter().filter(|c| c.way != STORED).for_each(|c| ways.entry(&c.way).or_default().push(c));
        let mut say = |what: String, some: &[&Choice], ratio: String| {
            lines.entry((form, what)).or_default().push(format!("{rows} ({} of {}, {ratio})", some.len(), all.len()));
        };
        for (way, some) in ways {
            let gain = ratios(&|c| c.stored_us / c.taken_us, &some);
            say(format!("run as {way}, faster than as stored"), &some, gain);
        }
        let speed = |c: &Choice| c.dense_us.map_or(1.0, |dense| dense / c.taken_us);
        let slower: Vec<&Choice> = all.iter().copied().filter(|c| speed(c) < 1.0 - GAIN).collect();
        if !slower.is_empty() {
            say("are slower than dense f32 ones".into(), &slower, ratios(&speed, &slower));
        }
    }
    lines.into_iter().map(|((form, what), at)| format!("{form} layers {what}; tokens: {}", at.join(", "))).collect()
}

/// Layers that have more than one way, and their forms.
pub fn layers(model: &Model) -> Vec<(String, &'static str)> {
    let has = |layer: &str, part: &str| model.tensors.contains_key(&format!("{layer}.{part}"));
    let mut all = Vec::new();
    for name in model.tensors.keys() {
        let Some((layer, part)) = name.rsplit_once('.') else { continue };
        let form = match part {
            "values" if has(layer, "scale") => "2:4 int8",
            "values" => "2:4",
            "kept" if has(layer, "scale") => "unstructured int8",
            "kept" => "unstructured",
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

/// What decides a layer's speed: its tensors' parts, types and shapes (of kept words their tenths of all, as no two layers
/// keep as many), and how many experts a token takes.
fn signature(model: &Model, layer: &str) -> String {
    let prefix = format!("{layer}.");
    let own = model.tensors.range(prefix.clone()..).take_while(|(name, _)| name.starts_with(&prefix));
    let parts: String = own
        .map(|(name, tensor)| match &name[prefix.len()..] {
            "kept" => {
                let words = model.tensors.get(&format!("{prefix}lists")).map_or(0, |lists| lists.count() / 3 * BLOCK);
                format!("kept {} {} tenths ", tensor.dtype(), 10 * tensor.meta().bytes() / (4 * words).max(1))
            }
            part => format!("{part} {} ", tensor.meta()),
        })
        .collect();
    format!("{parts}{:?}", block_of(model, layer).and_then(|i| model.config.blocks[i].experts))
}

/// The block whose experts a layer is.
fn block_of(model: &Model, layer: &str) -> Option<usize> {
    (0..model.config.blocks.len()).find(|i| layer == format!("blocks.{i}.ffn"))
}

/// All ways of a layer (`blocks.0.attention.query`, or of experts `blocks.0.ffn`), the stored one first.
///
/// # Errors
/// Those of the device; a tensor that is missing.
pub fn ways(model: &Model, layer: &str) -> Result<Vec<Way>> {
    if block_of(model, layer).is_some() {
        return ways_of_experts(model, layer);
    }
    let mut all = vec![Way::Stored];
    let integers = model
        .tensors
        .get(&format!("{layer}.scale"))
        .filter(|_| ["values", "kept"].iter().any(|part| model.tensors.contains_key(&format!("{layer}.{part}"))));
    if let Some(scale) = integers {
        all.push(Way::Int8 { weight: dense_levels(model, layer)?, scale: scale.clone() });
    }
    all.push(Way::Float { weight: dense_weight(model, layer)? });
    Ok(all)
}

/// Those of a block's experts.
fn ways_of_experts(model: &Model, layer: &str) -> Result<Vec<Way>> {
    let [inner, outer] = ["in", "out"].map(|part| dense_weight(model, &format!("{layer}.experts.{part}")));
    let (inner, outer) = (inner?, outer?);
    let &[e, d, n] = outer.dims() else {
        return Err(Error::Shape { op: "experts", rule: "out [E, d, n]", got: outer.meta().to_string() });
    };
    let outer = dispatch::run_one(&Permute { order: vec![1, 0, 2] }, &[&outer])?.reshape(&[d, e * n])?;
    Ok(vec![Way::Stored, Way::Sorted, Way::AllExperts { inner: inner.reshape(&[e * n, d])?, outer }])
}

/// Times layers of one form and shape on all their ways.
fn measure(model: &Model, (form, layers): (&str, &[String]), rows: &[usize], text: &Batch) -> Result<Vec<Choice>> {
    let device: &Arc<dyn Device> = model.device();
    let mut layers = layers.to_vec();
    // In the order of the model, in which those that share an input round it once.
    layers.sort_by_key(|layer| input(layer).to_string());
    let layers = &layers[..];
    let all: Vec<Vec<Way>> = layers.iter().map(|layer| ways(model, layer)).collect::<Result<_>>()?;
    // A model for each way, which takes it in all of the layers for any number of rows.
    let ways: Vec<(&'static str, Model)> = (0..all[0].len())
        .map(|way| {
            let mut only = model.as_stored();
            layers.iter().zip(&all).for_each(|(layer, all)| {
                only.set_ways(layer, Ways { all: vec![all[way].clone()], taken: vec![(1, 0)] });
            });
            (all[0][way].name(), only)
        })
        .collect();
    let dense = dense(model, layers, &all)?;
    let (width, block) = (width(model, &layers[0])?, block_of(model, &layers[0]));
    let fed = if block.is_some() { ffn_inputs(model, std::slice::from_ref(text))? } else { Vec::new() };
    let mut choices = Vec::new();
    for &rows in rows {
        let mut inputs: BTreeMap<&str, Var> = BTreeMap::new();
        for layer in layers {
            if inputs.contains_key(input(layer)) {
                continue;
            }
            let x = match block_of(model, layer).and_then(|i| fed[i].first()) {
                Some(fed) => repeated(fed, rows)?,
                None => {
                    let mut stream = Stream::new(0, rows as u32);
                    let values: Vec<f32> = (0..rows * width).map(|_| stream.normal() as f32).collect();
                    Tensor::from_slice(device, &[rows, width], &values)?
                }
            };
            inputs.insert(input(layer), Var::constant(x));
        }
        // Sorting is what the stored form does where nothing is gathered.
        let gathers = block.is_some_and(|i| Pass::gathers_tokens(model, i, rows));
        let timed: Vec<&(&str, Model)> =
            ways.iter().filter(|(name, _)| *name != Way::Sorted.name() || gathers).collect();
        let on_ways = timed.iter().map(|(_, model)| {
            let inputs = &inputs;
            Box::new(move || run(model, layers, inputs)) as Box<dyn Fn() -> Result<()>>
        });
        let on_dense: Box<dyn Fn() -> Result<()>> = match &dense {
            Some(dense) => Box::new(|| run(dense, layers, &inputs)),
            None => Box::new(|| Ok(())),
        };
        let works: Vec<Box<dyn Fn() -> Result<()>>> = on_ways.chain([on_dense]).collect();
        let works: Vec<&dyn Fn() -> Result<()>> = works.iter().map(|work| &**work).collect();
        let times = take_turns(device, &works, ROUNDS)?;
        let us = |way: usize| 1e6 * median(&times[way]) / layers.len() as f64;
        let gain = |way: usize| {
            let ratios: Vec<f64> = times[0].iter().zip(&times[way]).map(|(stored, own)| stored / own).collect();
            median(&ratios)
        };
        let best = (1..timed.len()).max_by(|&a, &b| gain(a).total_cmp(&gain(b))).unwrap_or(0);
        let way = if gain(best) * (1.0 - GAIN) > 1.0 { best } else { 0 };
        choices.extend(layers.iter().map(|layer| Choice {
            layer: layer.clone(),
            form: form.into(),
            rows,
            way: timed[way].0.into(),
            stored_us: us(0),
            taken_us: us(way),
            dense_us: dense.is_some().then(|| us(timed.len())),
        }));
    }
    Ok(choices)
}

/// What a layer's input is called: query, key and value have one.
fn input(layer: &str) -> &str {
    ["query", "key", "value"].iter().find_map(|part| layer.strip_suffix(part)).unwrap_or(layer)
}

fn run(model: &Model, layers: &[String], inputs: &BTreeMap<&str, Var>) -> Result<()> {
    let mut pass = Pass::inference(model);
    for layer in layers {
        match block_of(model, layer) {
            Some(i) => pass.ffn(i, &inputs[input(layer)])?,
            None => pass.linear(layer, &inputs[input(layer)])?,
        };
    }
    Ok(())
}

/// The model with dense f32 layers for these, of experts one FFN of all neurons without a router; none where a way does not
/// have their weights.
fn dense(model: &Model, layers: &[String], all: &[Vec<Way>]) -> Result<Option<Model>> {
    let mut dense = model.as_stored();
    for (layer, ways) in layers.iter().zip(all) {
        match (ways.last(), block_of(model, layer)) {
            (Some(Way::Float { weight }), _) => {
                let bias = dense.tensors.get(&format!("{layer}.bias")).cloned();
                dense.tensors.retain(|name, _| !name.starts_with(&format!("{layer}.")));
                dense.tensors.extend(bias.map(|bias| (format!("{layer}.bias"), bias)));
                dense.tensors.insert(format!("{layer}.weight"), weight.clone());
            }
            (Some(Way::AllExperts { inner, outer }), Some(block)) => {
                let bias = model.get(&format!("{layer}.experts.in.bias"))?.reshape(&[inner.dims()[0]])?;
                let parts = [("in.bias", bias), ("in.weight", inner.clone()), ("out.weight", outer.clone())];
                dense.tensors.extend(parts.map(|(part, tensor)| (format!("{layer}.{part}"), tensor)));
                dense.config.blocks[block].experts = None;
            }
            _ => return Ok(None),
        }
    }
    Ok(Some(dense))
}

/// Elements of a row of a layer's input.
fn width(model: &Model, layer: &str) -> Result<usize> {
    if block_of(model, layer).is_some() {
        return Ok(model.config.width);
    }
    let stored = |part: &str, each: usize| Some(each * model.tensors.get(&format!("{layer}.{part}"))?.shape().last());
    let parts = [("int8", 1), ("values", 2), ("int4", 8)];
    let missing = || Error::file("model", layer, "is no compressed layer");
    parts.iter().find_map(|&(part, each)| stored(part, each)).or_else(|| columns(model, layer)).ok_or_else(missing)
}

/// Gives layers the ways of their choices; none to those whose stored form is best throughout.
///
/// # Errors
/// Those of the device; a choice for a layer that is not stored so, or has no such way.
fn take(model: &mut Model, choices: &[Choice]) -> Result<()> {
    let stored: BTreeMap<String, &str> = layers(model).into_iter().collect();
    let mut own: BTreeMap<&str, Vec<&Choice>> = BTreeMap::new();
    for choice in choices {
        if stored.get(&choice.layer) != Some(&choice.form.as_str()) {
            let rule = format!("is not stored as {}, which was measured", choice.form);
            return Err(Error::file(FILE, &choice.layer, rule));
        }
        let times = [Some(choice.stored_us), Some(choice.taken_us), choice.dense_us];
        let own = own.entry(&choice.layer).or_default();
        if choice.rows == 0
            || times.into_iter().flatten().any(|us| !(us.is_finite() && us > 0.0))
            || own.iter().any(|other: &&Choice| other.rows == choice.rows)
        {
            let rule = format!("{choice:?}: one choice for each number of rows from 1, with times above 0, is needed");
            return Err(Error::file(FILE, &choice.layer, rule));
        }
        own.push(choice);
    }
    for (layer, choices) in own.into_iter().filter(|(_, own)| own.iter().any(|c| c.way != STORED)) {
        let mut all = ways(model, layer)?;
        // Only what is taken stays in memory.
        all.retain(|way| choices.iter().any(|c| c.way == way.name()));
        let at = |c: &&Choice| {
            let rule = || Error::file(FILE, layer, format!("cannot be computed as {}", c.way));
            Ok((c.rows, all.iter().position(|way| way.name() == c.way).ok_or_else(rule)?))
        };
        let taken = choices.iter().map(at).collect::<Result<_>>()?;
        model.set_ways(layer, Ways { all, taken });
    }
    Ok(())
}
