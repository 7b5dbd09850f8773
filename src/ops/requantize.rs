//! An int8 product, an activation and the rounding of its rows for the next product, in one op.

use std::any::Any;

use super::quant::{Granularity, GridFrom, Quantize, Scheme};
use super::quant_matmul::{
    FEW, MANY, MatmulInt8, NARROW, WIDE, few_tokens, fits_groups, four_rows, plan_groups, plan_tensor, plan_v1,
    plan_v2, plan_v3, tensor, warp_groups, wgsl, whole_chunks, whole_words,
};
use super::unary::Function;
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Launch, Params, Plan, Problem, always};
use crate::op::{Array, Case, Cost, Fill, Input, Op, Tolerance};
use crate::shape::{self, Meta, Shape};

/// Threads of the launch that rounds, and rows of one workgroup: four rows of bytes are whole words whatever n is.
const BLOCK: usize = 256;
const ROWS: usize = 4;

/// How rows are rounded: as the next [`MatmulInt8`] wants them.
const ROUNDING: Quantize =
    Quantize { bits: 8, scheme: Scheme::SymmetricNarrow, granularity: Granularity::Token, from: GridFrom::Own };

/// What stands between a product and the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Between {
    Relu,
    /// The tanh form (Hendrycks and Gimpel 2016).
    Gelu,
}

impl Between {
    const fn function(self) -> Function {
        match self {
            Self::Relu => Function::Relu,
            Self::Gelu => Function::GeluTanh,
        }
    }
}

/// Rows of activation(y), y the product of [`MatmulInt8`], as int8 with a scale for each: the input of the next.
///
/// Inputs as [`MatmulInt8`]; outputs `q i8 [m, n]` and `scale f32 [m]`: what [`Quantize`] makes of each row by its own range,
/// 8 bits, symmetric narrow; the zero points would be 0. A row with a NaN after the activation has the scale NaN. Inference only.
#[derive(Clone, Copy, Debug)]
pub struct MatmulInt8Requantized {
    pub bias: bool,
    pub activation: Between,
}

impl Op for MatmulInt8Requantized {
    fn name(&self) -> &'static str {
        "matmul_int8_requantized"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let product = MatmulInt8 { bias: self.bias }.infer(inputs)?;
        let [m, n] = [0, 1].map(|axis| product[0].dims()[axis]);
        if m * n == 0 {
            let rule = "at least one row and one column";
            return Err(Error::Shape { op: self.name(), rule, got: shape::list(inputs) });
        }
        Ok(vec![Meta::new(&[m, n], DType::I8)?, Meta::new(&[m], DType::F32)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let mut outputs = ROUNDING.reference(&[activated(inputs, self.activation)]);
        outputs.truncate(2);
        outputs
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("matmul_int8_requantized", &[DType::F32], cpu::matmul_int8_requantized),
            Kernel {
                name: "matmul_int8_requantized_wgmma",
                ..warp_groups("matmul_int8_fwd_wgmma", |p| fits_groups(p, WIDE), |p| rounded(p, plan_groups(p, WIDE)))
            },
            Kernel {
                name: "matmul_int8_requantized_narrow_wgmma",
                ..warp_groups(
                    "matmul_int8_narrow_wgmma",
                    |p| fits_groups(p, NARROW),
                    |p| rounded(p, plan_groups(p, NARROW)),
                )
            },
            Kernel {
                name: "matmul_int8_requantized_few_mma",
                ..tensor("matmul_int8_fwd_few_mma", few_tokens, |p| rounded(p, plan_tensor(p, FEW)))
            },
            Kernel {
                name: "matmul_int8_requantized_mma",
                ..tensor("matmul_int8_fwd_mma", whole_chunks, |p| rounded(p, plan_tensor(p, MANY)))
            },
            wgsl("matmul_int8_requantized_v3", "matmul_int8_fwd_v3", four_rows, |p| rounded(p, plan_v3(p))),
            wgsl("matmul_int8_requantized_v2", "matmul_int8_fwd_v2", whole_words, |p| rounded(p, plan_v2(p))),
            wgsl("matmul_int8_requantized", "matmul_int8_fwd", always, |p| rounded(p, plan_v1(p))),
        ];
        KERNELS
    }

    /// Those of the product, then the activation, the largest level and the scale of a unit of width.
    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        let levels = ROUNDING.scheme.levels(ROUNDING.bits);
        let product = MatmulInt8 { bias: self.bias }.params(inputs, outputs);
        product.u(self.activation as usize).f(levels.high).f(levels.unit)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        MatmulInt8 { bias: self.bias }.cost(inputs, outputs)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The hidden layer, `[m, n]`.
fn activated(inputs: &[Array], activation: Between) -> Array {
    let y = MatmulInt8 { bias: inputs.len() == 5 }.reference(inputs);
    let data = y.into_iter().flatten().map(|y| activation.function().reference(y)).collect();
    // Neither input has a shape that the other's extents could not be a shape with.
    let shape = inputs[0].shape.with_last(inputs[2].dims()[0]).unwrap_or(inputs[0].shape);
    Array { shape, data }
}

/// A plan of the product, its y in scratch, and the launch that activates and rounds. Arguments: the product's inputs, q, scale,
/// the hidden layer.
fn rounded(p: &Problem, mut plan: Plan) -> Plan {
    let (y, words) = (p.inputs.len(), p.params());
    let [m, n] = [0, 1].map(|axis| p.outputs[0].dims()[axis]);
    let hidden = y + 2;
    let product = words.words()[..4].iter().fold(Params::new(), |params, &word| params.word(word));
    for launch in &mut plan.launches {
        launch.slots.iter_mut().filter(|slot| **slot == y).for_each(|slot| *slot = hidden);
        if launch.params == words {
            launch.params = product;
        }
    }
    let params = words.words()[4..].iter().fold(Params::new().u(m).u(n), |params, &word| params.word(word));
    let rows = Launch::linear(m.div_ceil(ROWS) * BLOCK, BLOCK as u32, params).entry("matmul_int8_requantize");
    plan.launches.push(rows.slots(&[hidden, y, y + 1]).trips((ROWS + 1) * n.div_ceil(BLOCK)));
    plan.scratch(m * n * 4)
}

/// The levels before they are rounded to whole numbers.
fn unrounded(inputs: &[Array], activation: Between) -> Vec<f64> {
    let hidden = activated(inputs, activation);
    let scales = ROUNDING.reference(std::slice::from_ref(&hidden)).swap_remove(1);
    let n = hidden.dims()[1];
    // As a NaN is stored.
    let level = |x: f64| if x.is_nan() { 0.0 } else { x };
    hidden.data.iter().enumerate().map(|(i, x)| level(x / scales[i / n])).collect()
}

pub(super) fn cases() -> Vec<Case> {
    let narrow = Fill::Integers { low: -127, high: 127 };
    let scales = Fill::Uniform { low: 1e-3, high: 2e-2 };
    let case = |activation: Between, [m, n, k]: [usize; 3], bias: bool, values: &Fill, scales: &Fill| {
        // Products round three or four times, the exponential and the quotient of a GELU more often.
        let tolerance = match activation {
            Between::Relu => Tolerance::Contraction { k: 8 },
            Between::Gelu => Tolerance::Transcendental,
        };
        let case = Case::new(MatmulInt8Requantized { bias, activation }, tolerance)
            .input(&[m, k], DType::I8, values.clone())
            .input(&[m], DType::F32, scales.clone())
            .input(&[n, k], DType::I8, values.clone())
            .input(&[n], DType::F32, scales.clone());
        let case = if bias { case.input(&[n], DType::F32, Fill::Integers { low: -3, high: 3 }) } else { case };
        match activation {
            Between::Relu => case.unrounded(|inputs| unrounded(inputs, Between::Relu)),
            Between::Gelu => case.unrounded(|inputs| unrounded(inputs, Between::Gelu)),
        }
    };
    let mut cases = Vec::new();
    for size in [
        [1, 1, 1],
        [1, 5, 4],
        [3, 33, 36],
        [17, 130, 1],
        [43, 5, 36],
        [1, 3072, 768],
        [17, 130, 768],
        [43, 33, 4],
        [43, 130, 36],
        // Whole chunks of the tensor kernels, ragged tiles.
        [5, 70, 2064],
        [135, 131, 656],
    ] {
        for activation in [Between::Relu, Between::Gelu] {
            cases.push(case(activation, size, false, &narrow, &scales));
            cases.push(case(activation, size, true, &narrow, &scales));
        }
        // Whole numbers times powers of two: nothing but levels is rounded, and ties are the reference's ties.
        let (few, halves) = (Fill::Integers { low: -3, high: 3 }, Fill::Custom(powers_of_two));
        let exact = case(Between::Relu, size, true, &few, &halves);
        cases.push(Case { tolerance: Tolerance::Exact, unrounded: None, ..exact }.variant("powers of two"));
    }
    // Rows that the activation leaves nothing of, and scales that are no numbers.
    let (ones, below) = (Fill::Integers { low: 1, high: 1 }, Fill::Integers { low: -2, high: -1 });
    let negative = case(Between::Relu, [18, 130, 8], false, &ones, &ones);
    let [x, xs, _, ws] = &negative.inputs[..] else { return cases };
    let w = Input { fill: below, ..negative.inputs[2].clone() };
    let inputs = vec![x.clone(), xs.clone(), w, ws.clone()];
    cases.push(Case { inputs, ..negative.clone() }.variant("all negative"));
    for activation in [Between::Relu, Between::Gelu] {
        let wild = case(activation, [18, 130, 8], false, &narrow, &Fill::Custom(wild));
        cases.push(wild.variant("no numbers"));
    }
    // GPT-2 small's first FFN matrix over 128 tokens.
    for activation in [Between::Relu, Between::Gelu] {
        cases.push(case(activation, [128, 3072, 768], true, &narrow, &scales).bench());
    }
    cases
}

/// 2^-3 to 2^2, by place.
fn powers_of_two(_: u64, shape: &Shape) -> Vec<f64> {
    (0..shape.count()).map(|i| f64::from((i % 6) as i32 - 3).exp2()).collect()
}

/// Now and then NaN, infinite, too large for a grid, or 0.
fn wild(_: u64, shape: &Shape) -> Vec<f64> {
    let value = |i: usize| match i % 9 {
        2 => f64::NAN,
        4 => f64::INFINITY,
        6 => 1e37,
        8 => 0.0,
        _ => 0.01,
    };
    // Of the 18 scales of rows; those of columns are plain.
    (0..shape.count()).map(|i| if shape.count() == 18 { value(i) } else { 0.01 }).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::device::{CpuDevice, Device};
    use crate::dispatch::{run, run_one};
    use crate::ops::unary::Unary;
    use crate::tensor::Tensor;
    use crate::verify::draw;

    /// Holds the fused op against the three.
    fn same_bits(device: &Arc<dyn Device>, case: &Case) {
        let op: &MatmulInt8Requantized = case.op.as_any().downcast_ref().unwrap();
        let tensor = |(i, input): (usize, &Input)| {
            Tensor::from_f64(device, input.meta.dims(), input.meta.dtype, &draw(input, 7, i)).unwrap()
        };
        let inputs: Vec<Tensor> = case.inputs.iter().enumerate().map(tensor).collect();
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        let y = run_one(&MatmulInt8 { bias: op.bias }, &inputs).unwrap();
        let hidden = run_one(&Unary(op.activation.function()), &[&y]).unwrap();
        let (apart, fused) = (run(&ROUNDING, &[&hidden]).unwrap(), run(op, &inputs).unwrap());
        for (a, b) in apart.iter().zip(&fused) {
            assert!(a.to_bytes().unwrap() == b.to_bytes().unwrap(), "{} on {}", case.label(), device.info().name);
        }
    }

    /// On a processor the fused op gives the bits of the three, whatever the shape, the values and the number of threads.
    #[test]
    fn bits_are_those_of_three_ops() {
        for threads in [1, 2, 5] {
            let device: Arc<dyn Device> = Arc::new(CpuDevice::new(Some(threads)).unwrap());
            cases().iter().for_each(|case| same_bits(&device, case));
            // More than is hidden at a time.
            let (bytes, scales) = (Fill::Integers { low: -127, high: 127 }, Fill::Uniform { low: 1e-3, high: 2e-2 });
            for activation in [Between::Relu, Between::Gelu] {
                let case = Case::new(MatmulInt8Requantized { bias: false, activation }, Tolerance::Exact)
                    .input(&[271, 4], DType::I8, bytes.clone())
                    .input(&[271], DType::F32, scales.clone())
                    .input(&[16_400, 4], DType::I8, bytes.clone())
                    .input(&[16_400], DType::F32, scales.clone());
                same_bits(&device, &case);
            }
        }
    }
}
