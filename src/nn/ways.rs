//! How a layer is computed where its stored form is not what is fastest: the same weight in other forms, chosen by number of rows.

use std::collections::BTreeMap;

use super::config::Experts;
use super::forward::Pass;
use super::linear::ACTIVATION;
use super::model::{Model, missing};
use crate::dispatch;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::binary::MUL;
use crate::ops::gates::ScaleGroups;
use crate::ops::layout::Fill;
use crate::ops::matmul::{Epilogue, Matmul};
use crate::ops::quant::{Dequantize, FakeQuant, Granularity, GridFrom, MatmulInt8};
use crate::ops::quant_int4::UnpackInt4;
use crate::ops::select::{Above, KeepLargest};
use crate::ops::sparse_bitmap::DecompressBitmap;
use crate::ops::sparse24::Decompress24;
use crate::shape::Shape;
use crate::tape::Var;
use crate::tensor::Tensor;

/// One way to compute a layer. All ways of a layer are the same function; the order of sums may differ.
#[derive(Clone)]
pub enum Way {
    /// On the kernels of the stored form.
    Stored,
    /// 2:4 or unstructured integers with their zeros: `weight i8 [n, k]`, `scale f32 [n]`.
    Int8 { weight: Tensor, scale: Tensor },
    /// `weight f32 [n, k]`; inputs are put on their grid first where the stored form's kernels multiply integers.
    Float { weight: Tensor },
    /// Experts sorted also where they could be read where they lie.
    Sorted,
    /// All experts for every token, `inner f32 [E n, d]` and `outer f32 [d, E n]`, and 0 for those that were not chosen.
    AllExperts { inner: Tensor, outer: Tensor },
}

impl Way {
    /// As notes and files name it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Int8 { .. } => "dense int8",
            Self::Float { .. } => "dense f32",
            Self::Sorted => "sorted",
            Self::AllExperts { .. } => "dense f32 with the others set to 0",
        }
    }
}

/// The ways of one layer, and which of them is taken for how many rows.
#[derive(Clone)]
pub struct Ways {
    pub all: Vec<Way>,
    /// (rows, index of the way); not empty.
    pub taken: Vec<(usize, usize)>,
}

impl Ways {
    /// The way for the number of rows that is nearest by ratio.
    pub fn at(&self, rows: usize) -> Option<&Way> {
        let distance = |&&(at, _): &&(usize, usize)| (at.max(1) as f64 / rows.max(1) as f64).ln().abs();
        let nearest = self.taken.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)));
        nearest.and_then(|&(_, way)| self.all.get(way))
    }
}

impl Model {
    /// The same model with every layer on the kernels of its stored form: the same bits on any day. Also for a model whose
    /// tensors are to be changed: ways hold copies.
    #[must_use]
    pub fn as_stored(&self) -> Self {
        let mut stored = self.clone();
        stored.ways.clear();
        stored
    }

    /// Layers that were given ways, and those.
    pub fn ways(&self) -> &BTreeMap<String, Ways> {
        &self.ways
    }

    /// Bytes of the tensors that ways stand on beside the model's own.
    pub fn ways_bytes(&self) -> usize {
        let bytes = |way: &Way| match way {
            Way::Int8 { weight, .. } | Way::Float { weight } => weight.meta().bytes(),
            Way::AllExperts { inner, outer } => inner.meta().bytes() + outer.meta().bytes(),
            Way::Stored | Way::Sorted => 0,
        };
        self.ways.values().flat_map(|ways| &ways.all).map(bytes).sum()
    }

    /// Leaves a layer to its stored form.
    pub fn clear_ways(&mut self, layer: &str) {
        self.ways.remove(layer);
    }

    /// Gives a layer (`blocks.0.attention.query`, or for experts `blocks.0.ffn`) its ways.
    pub fn set_ways(&mut self, layer: &str, ways: Ways) {
        self.ways.insert(layer.into(), ways);
    }
}

impl Pass<'_> {
    /// The way of a layer for so many rows. What learns, is changed by hooks or computes in 16 bits takes the stored form.
    pub(super) fn way(&self, layer: &str, rows: usize) -> Option<&Way> {
        let free = !self.tape.recording() && self.hooks.is_empty() && self.computes().is_none();
        self.model.ways.get(layer).filter(|_| free).and_then(|ways| ways.at(rows))
    }

    /// y `[rows, n]` of a linear for x `[rows, k]` on another way than its stored form, where that is taken.
    pub(super) fn on_other_way(&mut self, name: &str, x: &Var, bias: Option<&Var>) -> Result<Option<Var>> {
        match self.way(name, x.dims()[0]).cloned() {
            Some(Way::Int8 { weight, scale }) => {
                let op = MatmulInt8 { bias: bias.is_some() };
                let q = self.quantized(name, x)?;
                let (weight, scale) = (Var::constant(weight), Var::constant(scale));
                let inputs = [&q[0], &q[1], &weight, &scale].into_iter().chain(bias);
                self.tape.first(op, &inputs.collect::<Vec<_>>()).map(Some)
            }
            Some(Way::Float { weight }) => {
                let x = self.as_multiplied(name, x)?;
                let weight = Var::constant(weight);
                let op = if bias.is_some() { Matmul::linear_bias() } else { Matmul::linear() };
                self.tape.first(op, &[&x, &weight].into_iter().chain(bias).collect::<Vec<_>>()).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// What the experts of block `i` give for rows `[m, d]` and their scores `[m, E]`, with the dense products of all.
    pub(super) fn all_experts(
        &mut self,
        i: usize,
        (rows, scores): (&Var, &Var),
        (inner, outer): (&Tensor, &Tensor),
    ) -> Result<Var> {
        let Some(Experts { selected, threshold, .. }) = self.model.config.blocks[i].experts else {
            return Err(missing(&format!("blocks.{i}.experts")));
        };
        let name = |part: &str| format!("blocks.{i}.ffn.experts.{part}");
        let (experts, hidden) = (scores.tensor.shape().last(), inner.dims()[0]);
        let x = self.as_multiplied(&name("in"), rows)?;
        let bias = self.parameter(&name("in.bias"))?.reshape(&[hidden])?;
        let op = Matmul { epilogue: Epilogue::BiasRelu, ..Matmul::linear() };
        let h = self.tape.first(op, &[&x, &Var::constant(inner.clone()), &bias])?;
        let mut chosen = self.tape.first(KeepLargest { keep: selected, magnitude: false }, &[scores])?;
        if let Some(threshold) = threshold {
            let above = self.tape.first(Above { threshold }, &[scores])?;
            chosen = self.tape.first(MUL, &[&chosen, &above])?;
        }
        let h = self.tape.first(ScaleGroups, &[&h, &chosen])?;
        // Each expert's rows have a grid of their own.
        let (m, n) = (h.dims()[0], hidden / experts.max(1));
        let h = self.as_multiplied(&name("out"), &h.reshape(&[m * experts, n])?)?.reshape(&[m, hidden])?;
        let bias = self.parameter(&format!("blocks.{i}.ffn.out.bias"))?;
        self.tape.first(Matmul::linear_bias(), &[&h, &Var::constant(outer.clone()), &bias])
    }

    /// An input of a compressed linear as its kernels multiply it: on a grid of levels where they multiply integers.
    pub(super) fn as_multiplied(&mut self, name: &str, x: &Var) -> Result<Var> {
        let stored = |part: &str| self.model.tensors.get(&format!("{name}.{part}"));
        let (levels, scale) = (stored("int8").or(stored("values")), stored("scale"));
        // One scale for each output channel: those of groups go with float inputs.
        let channels = levels.zip(scale).is_some_and(|(levels, scale)| levels.dims().len() == scale.dims().len() + 1);
        if !(channels || stored("kept").and(scale).is_some()) {
            return Ok(x.clone());
        }
        let step = stored("input_step").cloned().map(Var::constant);
        let from = if step.is_some() { GridFrom::Step } else { GridFrom::Own };
        let fake =
            FakeQuant { bits: ACTIVATION.bits, scheme: ACTIVATION.scheme, granularity: ACTIVATION.granularity, from };
        self.tape.first(fake, &[x].into_iter().chain(&step).collect::<Vec<_>>())
    }
}

/// Elements of a row of a linear's input, by the config: bitmaps tell them to the next 64 words only.
pub fn columns(model: &Model, name: &str) -> Option<usize> {
    let name = format!("{name}.weight");
    model.config.parameters().into_iter().find(|(own, _)| *own == name).and_then(|(_, dims)| dims.get(1).copied())
}

/// The levels of a layer that is stored as integers, `[n, k]` or of experts `[E, n, k]`, with their zeros where it is 2:4.
///
/// # Errors
/// Those of the device; a tensor that is missing.
pub fn dense_levels(model: &Model, name: &str) -> Result<Tensor> {
    if let Some(levels) = model.tensors.get(&format!("{name}.int8")) {
        return Ok(levels.clone());
    }
    if let Some(kept) = model.tensors.get(&format!("{name}.kept")) {
        let (k, dtype) = (columns(model, name).ok_or_else(|| missing(name))?, kept.dtype());
        return dispatch::run_one(&DecompressBitmap { k, dtype }, &[kept, model.get(&format!("{name}.lists"))?]);
    }
    let (values, metadata) = (model.get(&format!("{name}.values"))?, model.get(&format!("{name}.metadata"))?);
    dispatch::run_one(&Decompress24 { k: 2 * values.shape().last() }, &[values, metadata])
}

/// The f32 weight that a layer's stored form stands for, `[n, k]` or of experts `[E, n, k]`.
///
/// # Errors
/// Those of the device; a tensor that is missing.
pub fn dense_weight(model: &Model, name: &str) -> Result<Tensor> {
    if let Some(weight) = model.tensors.get(&format!("{name}.weight")) {
        return Ok(weight.clone());
    }
    let Some(scale) = model.tensors.get(&format!("{name}.scale")) else {
        return dense_levels(model, name);
    };
    if let Some(packed) = model.tensors.get(&format!("{name}.int4")) {
        let (k, words) = (8 * packed.shape().last(), packed.shape().last());
        let channels = packed.count() / words.max(1);
        let groups = scale.count() / channels.max(1);
        let rows = [packed.reshape(&[channels, words])?, scale.reshape(&[channels, groups])?];
        let weight = dispatch::run_one(&UnpackInt4 { group: k / groups.max(1) }, &[&rows[0], &rows[1]])?;
        return weight.reshape(&[&packed.dims()[..packed.dims().len() - 1], &[k]].concat());
    }
    let levels = dense_levels(model, name)?;
    let k = levels.shape().last();
    let channels = levels.count() / k.max(1);
    let granularity = match scale.count() / channels.max(1) {
        1 => Granularity::Channel,
        groups => Granularity::Group(k / groups.max(1)),
    };
    let zeros = Fill { value: 0.0, dims: Shape::new(&[scale.count()])?, dtype: DType::F32 };
    let zeros = dispatch::one(dispatch::run_on(model.device(), &zeros, &[])?, "fill")?;
    let dequantize = Dequantize { bits: ACTIVATION.bits, scheme: ACTIVATION.scheme, granularity };
    let (rows, scale) = (levels.reshape(&[channels, k])?, scale.reshape(&[scale.count()])?);
    dispatch::run_one(&dequantize, &[&rows, &scale, &zeros])?.reshape(levels.dims())
}
