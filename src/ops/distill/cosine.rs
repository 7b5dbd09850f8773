//! Cosine distance between rows.

use std::any::Any;

use super::{SOURCE, check_pair};
use crate::cpu;
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::{Kernel, Launch, Params, Plan, Problem, always};
use crate::op::{Array, Cost, Gradient, Op, Saves};
use crate::ops::rows::{BLOCK, gpu};
use crate::shape::Meta;
use crate::tensor::Tensor;

/// loss_i = w_i (1 - a_i . b_i / (|a_i| |b_i|)); the cosine of a row of zeros is 0 (DistilBERT's third loss).
///
/// Inputs: a and b `[n, d]` of one float type, row weights f32 `[n]`. Output: loss f32 `[n]`. Both a and b get gradients.
#[derive(Clone, Copy, Debug)]
pub struct Cosine;

/// da and db of [`Cosine`]. Inputs: a, b, weights, dloss f32 `[n]`.
#[derive(Clone, Copy, Debug)]
pub struct CosineBackward;

const RULE: &str = "a and b [n, d], d above 0, weights [n] (and dloss [n])";

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn words(inputs: &[Meta]) -> Params {
    // The rest of the shader's block is read by other losses.
    Params::new().u(inputs[0].shape.rows()).u(inputs[0].shape.last()).u(0).u(0).u(0).u(0)
}

fn plan(p: &Problem) -> Plan {
    let x = p.inputs[0].shape;
    Plan::of(Launch::linear(x.rows(), BLOCK, p.params()).trips(2 * (x.last() + x.last().div_ceil(32))))
}

impl Op for Cosine {
    fn name(&self) -> &'static str {
        "cosine"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        Ok(vec![check_pair(self.name(), RULE, inputs, &[])?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let d = inputs[0].shape.last();
        let rows = inputs[0].data.chunks(d).zip(inputs[1].data.chunks(d)).zip(&inputs[2].data);
        let loss = |((a, b), w): ((&[f64], &[f64]), &f64)| {
            let lengths = (dot(a, a) * dot(b, b)).sqrt();
            w * (1.0 - if lengths > 0.0 { dot(a, b) / lengths } else { 0.0 })
        };
        vec![rows.map(loss).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("cosine_fwd", DType::FLOATS, cpu::cosine), gpu(SOURCE, "cosine_fwd", always, plan)];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(inputs)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1, 2], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let grads = g.run(&CosineBackward, &[g.input(0)?, g.input(1)?, g.input(2)?, g.grad(0)?])?;
        Ok(grads.into_iter().map(Some).chain([None]).collect())
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 6.0 * inputs[0].count() as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for CosineBackward {
    fn name(&self) -> &'static str {
        "cosine_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rows = inputs.get(2).copied();
        check_pair(self.name(), RULE, inputs, rows.as_slice())?;
        Ok(vec![inputs[0], inputs[1]])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let d = inputs[0].shape.last();
        let (mut da, mut db) = (Vec::new(), Vec::new());
        let rows = inputs[0].data.chunks(d).zip(inputs[1].data.chunks(d));
        for ((a, b), (w, dloss)) in rows.zip(inputs[2].data.iter().zip(&inputs[3].data)) {
            let (aa, bb) = (dot(a, a), dot(b, b));
            let lengths = (aa * bb).sqrt();
            let cosine = dot(a, b) / lengths;
            // d cos / d a = b / (|a| |b|) - cos a / |a|^2.
            let slope =
                |x: f64, y: f64, xx: f64| -w * dloss * if lengths > 0.0 { y / lengths - cosine * x / xx } else { 0.0 };
            da.extend(a.iter().zip(b).map(|(&a, &b)| slope(a, b, aa)));
            db.extend(a.iter().zip(b).map(|(&a, &b)| slope(b, a, bb)));
        }
        vec![da, db]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("cosine_bwd", DType::FLOATS, cpu::cosine_backward), gpu(SOURCE, "cosine_bwd", always, plan)];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(inputs)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 14.0 * inputs[0].count() as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
