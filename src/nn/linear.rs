//! A linear layer in whatever representation its tensors have.

use super::config::Head;
use super::forward::Pass;
use super::model::missing;
use super::ways::{Way, dense_weight};
use crate::dispatch;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::binary::MUL;
use crate::ops::matmul::Matmul;
use crate::ops::quant::{Dequantize, Granularity, GridFrom, MatmulInt8, MatmulInt8Groups, Quantize, Scheme};
use crate::ops::quant_int4::{MatmulInt4, UnpackInt4};
use crate::ops::requantize::{Between, MatmulInt8Requantized};
use crate::ops::sparse_bitmap::{MatmulBitmap, MatmulBitmapInt8};
use crate::ops::sparse24::{MatmulSparse24, MatmulSparse24Int8};
use crate::shape::Meta;
use crate::tape::Var;
use crate::tensor::Tensor;

/// Activations of int8 layers: symmetric narrow, one scale per token.
pub(super) const ACTIVATION: Quantize =
    Quantize { bits: 8, scheme: Scheme::SymmetricNarrow, granularity: Granularity::Token, from: GridFrom::Own };

impl Pass<'_> {
    /// y = x W^T + b for x `[.., k]`, on the kernel of the stored representation.
    pub fn linear(&mut self, name: &str, x: &Var) -> Result<Var> {
        let x = &self.smoothed(name, x)?;
        let bias = self.optional(&format!("{name}.bias"))?;
        if let Some(weight) = self.optional(&format!("{name}.weight"))? {
            let updated = if self.tuned { self.updated(name, &weight)? } else { None };
            let beside = self.tuned && updated.is_none();
            let (input, weight) = self.hooked(name, x.clone(), updated.unwrap_or(weight))?;
            let y = match &bias {
                Some(bias) => self.tape.first(Matmul::linear_bias(), &[&input, &weight, bias])?,
                None => self.tape.first(Matmul::linear(), &[&input, &weight])?,
            };
            return if beside { self.low_rank(name, x, y) } else { Ok(y) };
        }
        let learnable = if self.tuned && self.tape.recording() { self.learnable(name, x)? } else { None };
        let dense = if learnable.is_some() { learnable } else { self.in_16_bits(name, x)? };
        if let Some((input, weight)) = dense {
            let y = match &bias {
                Some(bias) => self.tape.first(Matmul::linear_bias(), &[&input, &weight, bias])?,
                None => self.tape.first(Matmul::linear(), &[&input, &weight])?,
            };
            return if self.tuned { self.low_rank(name, x, y) } else { Ok(y) };
        }
        let rows = self.rows(x)?;
        if let Some(y) = self.on_other_way(name, &rows, bias.as_ref())? {
            let y = if self.tuned { self.low_rank(name, &rows, y)? } else { y };
            return with_last(x, &y);
        }
        let scale = self.optional(&format!("{name}.scale"))?;
        let y = if let Some(values) = self.optional(&format!("{name}.values"))? {
            let metadata = self.optional(&format!("{name}.metadata"))?.ok_or_else(|| missing(name))?;
            match scale {
                Some(scale) => {
                    let q = self.quantized(name, &rows)?;
                    let inputs = [&q[0], &q[1], &values, &metadata, &scale].into_iter().chain(&bias);
                    self.tape.first(MatmulSparse24Int8 { bias: bias.is_some() }, &inputs.collect::<Vec<_>>())?
                }
                None => {
                    let inputs = [&rows, &values, &metadata].into_iter().chain(&bias);
                    self.tape.first(MatmulSparse24 { bias: bias.is_some() }, &inputs.collect::<Vec<_>>())?
                }
            }
        } else if let Some(kept) = self.optional(&format!("{name}.kept"))? {
            let lists = self.optional(&format!("{name}.lists"))?.ok_or_else(|| missing(name))?;
            match scale {
                Some(scale) => {
                    let q = self.quantized(name, &rows)?;
                    let inputs = [&q[0], &q[1], &kept, &lists, &scale].into_iter().chain(&bias);
                    self.tape.first(MatmulBitmapInt8 { bias: bias.is_some() }, &inputs.collect::<Vec<_>>())?
                }
                None => {
                    let inputs = [&rows, &kept, &lists].into_iter().chain(&bias);
                    self.tape.first(MatmulBitmap { bias: bias.is_some() }, &inputs.collect::<Vec<_>>())?
                }
            }
        } else if let (Some(weight), Some(scale)) = (self.optional(&format!("{name}.int8"))?, &scale) {
            if scale.dims().len() == weight.dims().len() {
                let group = rows.tensor.shape().last() / scale.tensor.shape().last().max(1);
                let inputs = [&rows, &weight, scale].into_iter().chain(&bias);
                let op = MatmulInt8Groups { group, bias: bias.is_some() };
                let y = self.tape.first(op, &inputs.collect::<Vec<_>>())?;
                let y = if self.tuned { self.low_rank(name, &rows, y)? } else { y };
                return with_last(x, &y);
            }
            let q = self.quantized(name, &rows)?;
            let inputs = [&q[0], &q[1], &weight, scale].into_iter().chain(&bias);
            self.tape.first(MatmulInt8 { bias: bias.is_some() }, &inputs.collect::<Vec<_>>())?
        } else if let (Some(packed), Some(scale)) = (self.optional(&format!("{name}.int4"))?, &scale) {
            let group = rows.tensor.shape().last() / scale.tensor.shape().last().max(1);
            let inputs = [&rows, &packed, scale].into_iter().chain(&bias);
            self.tape.first(MatmulInt4 { group, bias: bias.is_some() }, &inputs.collect::<Vec<_>>())?
        } else {
            return Err(missing(&format!("{name}.weight")));
        };
        let y = if self.tuned { self.low_rank(name, &rows, y)? } else { y };
        with_last(x, &y)
    }

    /// Two int8 layers with an activation between, whose output the first one's kernel rounds for the second: x `[.., d]` to
    /// `[.., d2]`. `None` where one of them is stored or computed otherwise, something is to learn or to be gated, or the device
    /// has no such kernel.
    pub(super) fn int8_pair(&mut self, layers: [&str; 2], activation: Between, x: &Var) -> Result<Option<Var>> {
        let [inner, outer] = layers;
        let free = !self.tape.recording() && self.hooks.is_empty() && self.computes().is_none() && !self.tuned;
        let stored = |name: &str, part: &str| self.model.tensors.get(&format!("{name}.{part}"));
        let rounds_own = !["smooth", "input_step"].iter().any(|part| stored(outer, part).is_some());
        let dense = |name: &&str| {
            let otherwise = ["weight", "values", "kept"].iter().any(|part| stored(name, part).is_some());
            let as_stored = matches!(self.way(name, x.tensor.shape().rows()), None | Some(Way::Stored));
            let by_channel = stored(name, "scale").is_some_and(|scale| scale.dims().len() == 1);
            stored(name, "int8").is_some() && by_channel && as_stored && !otherwise
        };
        if !free || !rounds_own || !layers.iter().all(dense) {
            return Ok(None);
        }
        let parts = |pass: &mut Self, name: &str| -> Result<Vec<Var>> {
            let mut parts = vec![pass.parameter(&format!("{name}.int8"))?, pass.parameter(&format!("{name}.scale"))?];
            parts.extend(pass.optional(&format!("{name}.bias"))?);
            Ok(parts)
        };
        let (first, second) = (parts(self, inner)?, parts(self, outer)?);
        let op = MatmulInt8Requantized { bias: first.len() == 3, activation };
        let rows = Meta::new(&[x.tensor.shape().rows(), x.tensor.shape().last()], DType::I8)?;
        let scale = Meta::new(&rows.dims()[..1], DType::F32)?;
        let metas: Vec<Meta> = [rows, scale].into_iter().chain(first.iter().map(|part| part.tensor.meta())).collect();
        if !dispatch::supports(x.tensor.device(), &op, &metas) {
            return Ok(None);
        }
        let rows = self.smoothed(inner, x)?;
        let rows = self.rows(&rows)?;
        let q = self.quantized(inner, &rows)?;
        let hidden = self.tape.run(op, &q[..2].iter().chain(&first).collect::<Vec<_>>())?;
        let op = MatmulInt8 { bias: second.len() == 3 };
        let y = self.tape.first(op, &hidden.iter().chain(&second).collect::<Vec<_>>())?;
        with_last(x, &y).map(Some)
    }

    /// The input and the dense weight where a pass computes in 16 bits and the stored form has kernels for f32 alone.
    fn in_16_bits(&mut self, name: &str, x: &Var) -> Result<Option<(Var, Var)>> {
        let stored = |part: &str| self.model.tensors.contains_key(&format!("{name}.{part}"));
        if self.computes().is_none() || !stored("kept") || stored("scale") {
            return Ok(None);
        }
        let weight = self.constant(&dense_weight(self.model, name)?)?;
        Ok(Some((x.clone(), weight)))
    }

    /// The input times the linear's `.smooth`, where it has one.
    pub(super) fn smoothed(&mut self, name: &str, x: &Var) -> Result<Var> {
        let Some(factors) = self.model.tensors.get(&format!("{name}.smooth")) else {
            return Ok(x.clone());
        };
        let factors = self.constant(factors)?;
        self.tape.first(MUL, &[x, &factors])
    }

    /// Rows as integers and a scale for each: by the linear's `.input_step`, or each by its own range.
    pub(super) fn quantized(&mut self, name: &str, rows: &Var) -> Result<Vec<Var>> {
        match self.model.tensors.get(&format!("{name}.input_step")) {
            Some(step) => {
                let step = Var::constant(step.clone());
                self.tape.run(Quantize { from: GridFrom::Step, ..ACTIVATION }, &[rows, &step])
            }
            None => {
                let known = self.rounded.take().filter(|(of, _)| of.tensor.is(&rows.tensor));
                let levels = known.map_or_else(|| self.tape.run(ACTIVATION, &[rows]), |(_, levels)| Ok(levels))?;
                // Query, key and value have one input. Held with its levels, so that its memory is not another tensor's meanwhile.
                let again = !self.tape.recording() && [".query", ".key"].iter().any(|part| name.ends_with(part));
                self.rounded = again.then(|| (rows.clone(), levels.clone()));
                Ok(levels)
            }
        }
    }

    /// Weights `[E, n, k]` of experts that are stored in groups with a scale `[E, n, k / group]` each.
    pub(super) fn unpacked(&mut self, name: &str, packed: Option<Var>, scale: &Var) -> Result<Var> {
        let [e, n, groups] = scale.dims()[..] else {
            return Err(missing(&format!("{name}.scale")));
        };
        let rows = scale.reshape(&[e * n, groups])?;
        let weight = match packed {
            Some(packed) => {
                let k = 8 * packed.tensor.shape().last();
                let packed = packed.reshape(&[e * n, k / 8])?;
                self.tape.first(UnpackInt4 { group: k / groups.max(1) }, &[&packed, &rows])?
            }
            None => {
                let q = self.parameter(&format!("{name}.int8"))?;
                let granularity = Granularity::Group(q.tensor.shape().last() / groups.max(1));
                let scales = rows.reshape(&[e * n * groups])?;
                let zeros = Var::constant(Tensor::zeros(scales.tensor.device(), scales.meta())?);
                let op = Dequantize { scheme: Scheme::SymmetricNarrow, granularity, bits: 8 };
                self.tape.first(op, &[&q, &scales, &zeros])?
            }
        };
        let k = weight.tensor.count() / (e * n).max(1);
        let weight = weight.reshape(&[e, n, k])?;
        self.entering(weight)
    }

    /// The head's weight: `[V, d]` (the embedding when tied) or `[labels, d]`.
    pub fn head_weight(&mut self) -> Result<Var> {
        match self.model.config.head {
            Head::Language { tied: true } => self.parameter("embedding.tokens"),
            _ => self.parameter("head.weight"),
        }
    }

    /// Logits `[.., V]` (or labels) of hidden states.
    pub fn logits(&mut self, hidden: &Var) -> Result<Var> {
        if matches!(self.model.config.head, Head::Language { tied: true }) {
            let weight = self.head_weight()?;
            return self.tape.first(Matmul::linear(), &[hidden, &weight]);
        }
        self.linear("head", hidden)
    }

    /// `[.., k]` as `[rows, k]`.
    pub(super) fn rows(&self, x: &Var) -> Result<Var> {
        let shape = x.tensor.shape();
        x.reshape(&[shape.rows(), shape.last()])
    }
}

/// Rows of y under the leading extents of x.
fn with_last(x: &Var, y: &Var) -> Result<Var> {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = y.tensor.shape().last();
    }
    y.reshape(&dims)
}
