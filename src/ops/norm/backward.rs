//! Backward of the normalisations: one pass gives dx, and the sums over rows for weight and bias run through partial
//! sums of fixed chunks of rows, so that their order does not depend on the device or its threads.

use std::any::Any;

use super::{KEPT_ADDED as KEPT, SOURCE, VECTORS, fits, words};
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Launch, Params, Plan, Problem};
use crate::op::{Array, Cost, Op};
use crate::ops::rows::{BLOCK, group_launch, row_launch, rungs};
use crate::ops::vector::{self, above};
use crate::shape::{self, Meta};

pub(crate) use crate::cpu::NORM_CHUNK as CHUNK;

/// dx, dweight `[d]` and dbias `[d]` of layer or RMS normalisation.
///
/// Inputs: x `[.., d]`, weight `[d]`, mean and rstd (f32, one per row), dy like x. With `rms` the mean is not read and
/// rstd stands in for it; dbias = sum of dy over rows is then a by-product.
#[derive(Clone, Copy, Debug)]
pub struct NormBackward {
    pub rms: bool,
}

/// dx, dr = scale dx, dweight and dbias of [`super::AddNorm`].
///
/// Inputs: h `[.., d]`, weight `[d]`, mean (rstd stands in with `rms`), rstd, dy, and dh, the gradient that reached h
/// itself; without `joined` there was none, dh is not read and dy stands in.
#[derive(Clone, Copy, Debug)]
pub struct AddNormBackward {
    pub scale: f32,
    pub rms: bool,
    pub joined: bool,
}

fn check(op: &'static str, inputs: &[Meta], gradients: usize) -> Result<()> {
    let broken = |rule| Error::Shape { op, rule, got: shape::list(inputs) };
    let [x, weight, mean, rstd, grads @ ..] = inputs else {
        return Err(broken("x, weight, mean, rstd, dy"));
    };
    if grads.len() != gradients || grads.iter().any(|g| g != x) {
        return Err(broken("gradients like x"));
    }
    let dims = x.dims();
    let (Some(&d), true) = (dims.last(), x.dtype.is_float() && weight.dtype == x.dtype) else {
        return Err(broken("x and weight of one float type"));
    };
    let statistic = Meta::new(&dims[..dims.len() - 1], DType::F32)?;
    if d == 0 || weight.dims() != [d] || *mean != statistic || *rstd != statistic {
        return Err(broken("weight [d], mean and rstd f32, one per row of x"));
    }
    Ok(())
}

/// dx without dh, dweight, dbias in f64.
fn reference(rms: bool, inputs: &[Array]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let [x, weight, mean, rstd, dy] = [0, 1, 2, 3, 4].map(|i| &inputs[i].data);
    let d = weight.len();
    let (mut dx, mut dweight, mut dbias) = (vec![0.0; x.len()], vec![0.0; d], vec![0.0; d]);
    for row in 0..rstd.len() {
        let mean = if rms { 0.0 } else { mean[row] };
        let normalised = |i: usize| (x[row * d + i] - mean) * rstd[row];
        let g = |i: usize| dy[row * d + i] * weight[i];
        let g_mean = if rms { 0.0 } else { (0..d).map(g).sum::<f64>() / d as f64 };
        let g_along = (0..d).map(|i| g(i) * normalised(i)).sum::<f64>() / d as f64;
        for i in 0..d {
            dx[row * d + i] = rstd[row] * (g(i) - g_mean - normalised(i) * g_along);
            dweight[i] += dy[row * d + i] * normalised(i);
            dbias[i] += dy[row * d + i];
        }
    }
    (dx, dweight, dbias)
}

fn cost(inputs: &[Meta], outputs: &[Meta]) -> Cost {
    let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
    Cost { flops: 15.0 * inputs[0].count() as f64, bytes }
}

impl Op for NormBackward {
    fn name(&self) -> &'static str {
        if self.rms { "rmsnorm_bwd" } else { "layernorm_bwd" }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check(self.name(), inputs, 1)?;
        Ok(vec![inputs[0], inputs[1], inputs[1]])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (dx, dweight, dbias) = reference(self.rms, inputs);
        vec![dx, dweight, dbias]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const ROWS: [Kernel; 4] = rungs(SOURCE, "norm_bwd", cpu::norm_backward, ["norm_bwd", "norm_bwd_v2"], PLANS);
        const KERNELS: &[Kernel] = &above(PLAIN, ROWS);
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(&inputs[0], (0.0, 1.0), self.rms, false)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for AddNormBackward {
    fn name(&self) -> &'static str {
        if self.rms { "add_rmsnorm_bwd" } else { "add_layernorm_bwd" }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check(self.name(), inputs, 2)?;
        Ok(vec![inputs[0], inputs[0], inputs[1], inputs[1]])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (mut dx, dweight, dbias) = reference(self.rms, inputs);
        if self.joined {
            for (dx, dh) in dx.iter_mut().zip(&inputs[5].data) {
                *dx += dh;
            }
        }
        let dr = dx.iter().map(|dx| f64::from(self.scale) * dx).collect();
        vec![dx, dr, dweight, dbias]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const ROWS: [Kernel; 4] =
            rungs(SOURCE, "add_norm_bwd", cpu::add_norm_backward, ["add_norm_bwd", "add_norm_bwd_v2"], PLANS);
        const KERNELS: &[Kernel] = &above(ADDED, ROWS);
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(&inputs[0], (0.0, self.scale), self.rms, self.joined)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const PLANS: [fn(&Problem) -> Plan; 2] = [|p| sums(p, row_launch(p)), |p| sums(p, group_launch(p))];

/// `first` writes dx; then partial sums per column and chunk of rows, then one sum per column.
fn sums(p: &Problem, first: Launch) -> Plan {
    let x = p.inputs[0].shape;
    let (chunks, d) = (x.rows().div_ceil(CHUNK), x.last());
    let added = p.inputs.len() == 6;
    let (partial, total) =
        if added { ("add_norm_bwd_partial", "add_norm_bwd_total") } else { ("norm_bwd_partial", "norm_bwd_total") };
    let partial = Launch::linear(chunks * d, BLOCK, p.params()).entry(partial).trips(CHUNK);
    let total = Launch::linear(d, BLOCK, p.params()).entry(total).trips(chunks);
    Plan::sequence(vec![first, partial, total]).scratch(chunks * d * 8)
}

const fn vectors(names: [&'static str; 2]) -> Kernel {
    vector::cuda(VECTORS, names, DType::FLOATS, |p| fits(p, KEPT), vector_sums)
}

/// x and dy stay on chip.
const PLAIN: Kernel = vectors(["norm_bwd_v3", "norm_bwd_warp_v3"]);
const ADDED: Kernel = vectors(["add_norm_bwd_v3", "add_norm_bwd_warp_v3"]);

/// As [`sums`], with 32 vectors of columns to a block of a chunk, then 32 columns to a block.
fn vector_sums(p: &Problem) -> Plan {
    const ACROSS: usize = 32;
    let x = p.inputs[0].shape;
    let (chunks, d) = (x.rows().div_ceil(CHUNK), x.last());
    let added = p.inputs.len() == 6;
    let (rows, partial, total) = if added {
        let rows = ["add_norm_bwd_warp_v3", "add_norm_bwd_block_v3", "add_norm_bwd_wide_v3"];
        (rows, "add_norm_bwd_partial_v2", "add_norm_bwd_total_v2")
    } else {
        let rows = ["norm_bwd_warp_v3", "norm_bwd_block_v3", "norm_bwd_wide_v3"];
        (rows, "norm_bwd_partial_v2", "norm_bwd_total_v2")
    };
    let across = (d / vector::vector(p)).div_ceil(ACROSS);
    let partial = Launch::linear(chunks * across, 1, p.params()).entry(partial);
    let total = Launch::linear(d.div_ceil(ACROSS), 1, p.params()).entry(total);
    Plan::sequence(vec![vector::rows(p, &rows, KEPT), partial, total]).scratch(chunks * d * 8)
}
