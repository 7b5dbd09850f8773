//! Layer normalisation, RMS normalisation, and the scaled residual addition fused in front of either.

mod backward;
mod cases;

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Params, Plan, Problem, Source, cuda_source, source};
use crate::op::{Array, Cost, Family, Gradient, Op, Saves};
use crate::ops::rows::{PLANS, fours, rungs};
use crate::ops::unary::{Function, Unary};
use crate::ops::vector::{self, above};
use crate::shape::{self, Meta, Shape};
use crate::tensor::Tensor;

pub(crate) use backward::CHUNK;
pub use backward::{AddNormBackward, NormBackward};

pub static FAMILY: Family = Family { name: "norm", cases: cases::cases, source: Some(SOURCE) };

const SOURCE: Source = source!("norm");

/// The rungs that keep a row on chip stand in a file of their own.
const VECTORS: Source = cuda_source!("norm_vectors");

/// Rows of whole vectors, at most so many elements of them to a thread, by team.
const KEPT: [usize; 3] = [32; 3];
const KEPT_ADDED: [usize; 3] = [32, 32, 16];

fn fits(p: &Problem, kept: [usize; 3]) -> bool {
    vector::aligned_rows(p) && p.inputs[0].shape.last() <= kept[2] * vector::TEAMS[2]
}

macro_rules! forward {
    ($name:literal, $kept:expr) => {{
        const ENTRIES: [&str; 3] =
            [concat!($name, "_fwd_warp_v3"), concat!($name, "_fwd_block_v3"), concat!($name, "_fwd_wide_v3")];
        let plan: fn(&Problem) -> Plan = |p| Plan::of(vector::rows(p, &ENTRIES, $kept));
        vector::cuda(VECTORS, [concat!($name, "_fwd_v3"), ENTRIES[0]], DType::FLOATS, |p| fits(p, $kept), plan)
    }};
}

/// y = (x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis (Ba, Kiros and Hinton 2016).
///
/// Inputs: x `[.., d]`, weight `[d]`, bias `[d]`, one float type. Outputs: y like x; mean and rstd, f32, x's shape
/// without its last axis. The variance is the biased one.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm {
    pub epsilon: f32,
}

/// y = x / sqrt(mean(x^2) + epsilon) * weight over the last axis (Zhang and Sennrich 2019).
///
/// Inputs: x `[.., d]`, weight `[d]`. Outputs: y like x; rstd, f32, x's shape without its last axis.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm {
    pub epsilon: f32,
}

/// h = x + scale * r, y = norm(h): a residual connection and the normalisation after it in one pass.
///
/// Inputs: x and r `[.., d]`, weight `[d]`, and bias `[d]` unless `rms`. Outputs: y and h like x, then mean (unless
/// `rms`) and rstd, f32, x's shape without its last axis. GLM's residual has scale = sqrt(2 layers).
#[derive(Clone, Copy, Debug)]
pub struct AddNorm {
    pub epsilon: f32,
    pub scale: f32,
    /// RMS normalisation instead of layer normalisation.
    pub rms: bool,
}

/// Checks rows `[.., d]` (`full` of them, first in order) and vectors `[d]` of one float type; gives the metas of y
/// and of a per-row statistic.
fn check(op: &'static str, rule: &'static str, inputs: &[Meta], full: usize, vectors: usize) -> Result<(Meta, Meta)> {
    let broken = || Error::Shape { op, rule, got: shape::list(inputs) };
    if inputs.len() != full + vectors {
        return Err(broken());
    }
    let x = inputs[0];
    let same_type = inputs.iter().all(|m| m.dtype == x.dtype);
    if !x.dtype.is_float() || !same_type {
        return Err(Error::Dtype { op, expected: "one float type", got: shape::list(inputs) });
    }
    let d = x.shape.last();
    let rows = inputs[..full].iter().all(|m| m.shape == x.shape);
    if x.shape.rank() == 0 || d == 0 || !rows || inputs[full..].iter().any(|m| m.dims() != [d]) {
        return Err(broken());
    }
    Ok((x, statistic(x.shape)?))
}

/// One f32 per row.
fn statistic(x: Shape) -> Result<Meta> {
    Meta::new(&x.dims()[..x.rank().saturating_sub(1)], DType::F32)
}

/// Parameter words of every kernel of the family: rows, d, epsilon, scale, rms, joined, chunks.
fn words(x: &Meta, (epsilon, scale): (f32, f32), rms: bool, joined: bool) -> Params {
    let rows = x.shape.rows();
    let params = Params::new().u(rows).u(x.shape.last()).f(epsilon).f(scale);
    params.flag(rms).flag(joined).u(rows.div_ceil(CHUNK))
}

/// h, y, mean, rstd of one row in f64.
fn normalise(x: &[f64], weight: &[f64], bias: Option<&[f64]>, epsilon: f64) -> (Vec<f64>, f64, f64) {
    let d = x.len() as f64;
    // RMSNorm has no bias and takes no mean off.
    let mean = if bias.is_some() { x.iter().sum::<f64>() / d } else { 0.0 };
    let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / d;
    let rstd = 1.0 / (variance + epsilon).sqrt();
    let shift = |i: usize| bias.map_or(0.0, |b| b[i]);
    let y = x.iter().enumerate().map(|(i, v)| (v - mean) * rstd * weight[i] + shift(i)).collect();
    (y, mean, rstd)
}

/// The reference of all three ops on already added rows: y, mean, rstd.
fn reference(x: &[f64], weight: &[f64], bias: Option<&[f64]>, epsilon: f32) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut y, mut mean, mut rstd) = (Vec::with_capacity(x.len()), Vec::new(), Vec::new());
    for row in x.chunks(weight.len()) {
        let (row_y, row_mean, row_rstd) = normalise(row, weight, bias, f64::from(epsilon));
        y.extend(row_y);
        mean.push(row_mean);
        rstd.push(row_rstd);
    }
    (y, mean, rstd)
}

fn cost(inputs: &[Meta], outputs: &[Meta]) -> Cost {
    let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
    // Mean, centred square, scale and shift.
    Cost { flops: 8.0 * inputs[0].count() as f64, bytes }
}

impl Op for LayerNorm {
    fn name(&self) -> &'static str {
        "layernorm"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let (y, statistic) = check("layernorm", "x [.., d], weight [d], bias [d], d above 0", inputs, 1, 2)?;
        Ok(vec![y, statistic, statistic])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (y, mean, rstd) = reference(&inputs[0].data, &inputs[1].data, Some(&inputs[2].data), self.epsilon);
        vec![y, mean, rstd]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const ROWS: [Kernel; 5] = above(
            forward!("layernorm", KEPT),
            rungs(SOURCE, "layernorm_fwd", cpu::layernorm, ["layernorm_fwd", "layernorm_fwd_v2"], PLANS),
        );
        const KERNELS: &[Kernel] = &fours(SOURCE, "layernorm_fwd_fours", ROWS);
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(&inputs[0], (self.epsilon, 1.0), false, false)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1], outputs: &[1, 2] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let inputs = [g.input(0)?, g.input(1)?, g.output(1)?, g.output(2)?, g.grad(0)?];
        Ok(g.run(&NormBackward { rms: false }, &inputs)?.into_iter().map(Some).collect())
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for RmsNorm {
    fn name(&self) -> &'static str {
        "rmsnorm"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let (y, statistic) = check("rmsnorm", "x [.., d], weight [d], d above 0", inputs, 1, 1)?;
        Ok(vec![y, statistic])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (y, _, rstd) = reference(&inputs[0].data, &inputs[1].data, None, self.epsilon);
        vec![y, rstd]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &above(
            forward!("rmsnorm", KEPT),
            rungs(SOURCE, "rmsnorm_fwd", cpu::rmsnorm, ["rmsnorm_fwd", "rmsnorm_fwd_v2"], PLANS),
        );
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(&inputs[0], (self.epsilon, 1.0), true, false)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1], outputs: &[1] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let rstd = g.output(1)?;
        let grads = g.run(&NormBackward { rms: true }, &[g.input(0)?, g.input(1)?, rstd, rstd, g.grad(0)?])?;
        Ok(grads.into_iter().take(2).map(Some).collect())
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for AddNorm {
    fn name(&self) -> &'static str {
        if self.rms { "add_rmsnorm" } else { "add_layernorm" }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "x and r [.., d], weight [d], bias [d] (none with rms), d above 0";
        let (y, statistic) = check(self.name(), rule, inputs, 2, if self.rms { 1 } else { 2 })?;
        let mut outputs = vec![y, y, statistic, statistic];
        outputs.truncate(if self.rms { 3 } else { 4 });
        Ok(outputs)
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let scale = f64::from(self.scale);
        let h: Vec<f64> = inputs[0].data.iter().zip(&inputs[1].data).map(|(x, r)| x + scale * r).collect();
        let bias = inputs.get(3).map(|b| b.data.as_slice());
        let (y, mean, rstd) = reference(&h, &inputs[2].data, bias, self.epsilon);
        if self.rms { vec![y, h, rstd] } else { vec![y, h, mean, rstd] }
    }

    fn kernels(&self) -> &'static [Kernel] {
        const LAYER: &[Kernel] = &above(
            forward!("add_layernorm", KEPT_ADDED),
            rungs(
                SOURCE,
                "add_layernorm_fwd",
                cpu::add_layernorm,
                ["add_layernorm_fwd", "add_layernorm_fwd_v2"],
                PLANS,
            ),
        );
        const RMS: &[Kernel] = &above(
            forward!("add_rmsnorm", KEPT_ADDED),
            rungs(SOURCE, "add_rmsnorm_fwd", cpu::add_rmsnorm, ["add_rmsnorm_fwd", "add_rmsnorm_fwd_v2"], PLANS),
        );
        if self.rms { RMS } else { LAYER }
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(&inputs[0], (self.epsilon, self.scale), self.rms, false)
    }

    fn differentiable(&self) -> usize {
        2
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[2], outputs: if self.rms { &[1, 2] } else { &[1, 2, 3] } }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let dh = g.grads.get(1).and_then(Option::as_ref);
        let Ok(dy) = g.grad(0) else {
            // Only h was used: a plain scaled addition.
            let dh = g.grad(1)?;
            let dr = g.one(&Unary(Function::Scale(self.scale)), &[dh])?;
            return Ok([Some(dh.clone()), Some(dr), None, None].into_iter().take(g.input_metas.len()).collect());
        };
        let rstd = g.output(if self.rms { 2 } else { 3 })?;
        let mean = if self.rms { rstd } else { g.output(2)? };
        let op = AddNormBackward { scale: self.scale, rms: self.rms, joined: dh.is_some() };
        let grads = g.run(&op, &[g.output(1)?, g.input(2)?, mean, rstd, dy, dh.unwrap_or(dy)])?;
        Ok(grads.into_iter().take(g.input_metas.len()).map(Some).collect())
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
