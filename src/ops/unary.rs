//! Elementwise functions of one tensor, and casts between float storage types.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Constants, Kernel, Launch, Params, Plan, Problem, Source, always, source, wgsl_source};
use crate::op::{Array, Case, Cost, Family, Fill, Gradient, Op, Saves, Tolerance};
use crate::ops::vector;
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "unary", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("unary");
const WIDE_SOURCE: Source = wgsl_source!("unary_wide");
/// Invocations per workgroup, and elements each of them handles.
const BLOCK: u32 = 64;
const PER_INVOCATION: usize = 4;

/// Which function; the order is the kernels' `kind` parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Function {
    Relu,
    /// 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), Hendrycks and Gimpel 2016.
    GeluTanh,
    /// 0.5 x (1 + erf(x / sqrt 2)).
    GeluErf,
    /// x sigmoid(x).
    Silu,
    Tanh,
    Sigmoid,
    Exp,
    Scale(f32),
    /// 1 / x; infinity at 0.
    Reciprocal,
}

impl Function {
    pub const fn code(self) -> usize {
        match self {
            Function::Relu => 0,
            Function::GeluTanh => 1,
            Function::GeluErf => 2,
            Function::Silu => 3,
            Function::Tanh => 4,
            Function::Sigmoid => 5,
            Function::Exp => 6,
            Function::Scale(_) => 7,
            Function::Reciprocal => 8,
        }
    }

    const fn factor(self) -> f32 {
        if let Function::Scale(factor) = self { factor } else { 1.0 }
    }

    const fn names(self) -> (&'static str, &'static str) {
        match self {
            Function::Relu => ("relu", "relu_bwd"),
            Function::GeluTanh => ("gelu_tanh", "gelu_tanh_bwd"),
            Function::GeluErf => ("gelu_erf", "gelu_erf_bwd"),
            Function::Silu => ("silu", "silu_bwd"),
            Function::Tanh => ("tanh", "tanh_bwd"),
            Function::Sigmoid => ("sigmoid", "sigmoid_bwd"),
            Function::Exp => ("exp", "exp_bwd"),
            Function::Scale(_) => ("scale", "scale_bwd"),
            Function::Reciprocal => ("reciprocal", "reciprocal_bwd"),
        }
    }

    /// f(x) in f64.
    pub fn reference(self, x: f64) -> f64 {
        match self {
            Function::Relu => x.max(0.0),
            Function::GeluTanh => 0.5 * x * (1.0 + (GELU_SCALE * (x + 0.044715 * x * x * x)).tanh()),
            Function::GeluErf => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
            Function::Silu => x / (1.0 + (-x).exp()),
            Function::Tanh => x.tanh(),
            Function::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Function::Exp => x.exp(),
            Function::Scale(factor) => x * f64::from(factor),
            Function::Reciprocal => 1.0 / x,
        }
    }

    /// f'(x) in f64; 0 at relu's kink.
    pub fn derivative(self, x: f64) -> f64 {
        match self {
            Function::Relu => f64::from(x > 0.0),
            Function::GeluTanh => {
                let t = (GELU_SCALE * (x + 0.044715 * x * x * x)).tanh();
                0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * GELU_SCALE * (1.0 + 3.0 * 0.044715 * x * x)
            }
            Function::GeluErf => {
                let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
                0.5 * (1.0 + erf(x / std::f64::consts::SQRT_2)) + x * density
            }
            Function::Silu => {
                let s = 1.0 / (1.0 + (-x).exp());
                s * (1.0 + x * (1.0 - s))
            }
            Function::Tanh => 1.0 - x.tanh().powi(2),
            Function::Sigmoid => {
                let s = 1.0 / (1.0 + (-x).exp());
                s * (1.0 - s)
            }
            Function::Exp => x.exp(),
            Function::Scale(factor) => f64::from(factor),
            Function::Reciprocal => -1.0 / (x * x),
        }
    }
}

/// sqrt(2 / pi).
const GELU_SCALE: f64 = 0.797_884_560_802_865_4;

/// Error function in f64: Maclaurin series below 3, continued fraction of erfc (Lentz) above.
pub fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a < 3.0 {
        let (mut term, mut sum, mut n) = (x, x, 0.0);
        while term.abs() > 1e-17 * sum.abs().max(1e-300) {
            n += 1.0;
            term *= -x * x / n;
            sum += term / (2.0 * n + 1.0);
        }
        return sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    // erfc(a) = exp(-a^2) / sqrt(pi) * 1/(a + (1/2)/(a + 1/(a + (3/2)/(a + ...)))), evaluated from the tail.
    let tail = (1..=60).rev().fold(a, |t, k| a + f64::from(k) / 2.0 / t);
    let erfc = (-a * a).exp() / (std::f64::consts::PI.sqrt() * tail);
    (1.0 - erfc).copysign(x)
}

/// y = f(x); shapes `[..]` to the same.
#[derive(Clone, Copy, Debug)]
pub struct Unary(pub Function);

/// dx = dy f'(x); inputs x and dy of one shape.
#[derive(Clone, Copy, Debug)]
pub struct UnaryBackward(pub Function);

/// Storage type of every element changed to `to`, rounding to nearest even.
#[derive(Clone, Copy, Debug)]
pub struct Cast {
    pub to: DType,
}

impl Op for Unary {
    fn name(&self) -> &'static str {
        self.0.names().0
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs {
            [x] if x.dtype.is_float() => Ok(vec![*x]),
            [_] => Err(Error::Dtype { op: self.name(), expected: "a float type", got: shape::list(inputs) }),
            _ => Err(Error::Shape { op: self.name(), rule: "one input", got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        vec![inputs[0].data.iter().map(|&x| self.0.reference(x)).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[[Kernel; 5]; KINDS.len()] = &each(
            [
                Kernel::cpu("unary_fwd", DType::FLOATS, cpu::unary),
                vector::cuda(SOURCE, ["unary_fwd_v2"; 2], DType::FLOATS, always, vectors),
                wgsl("unary_fwd", "unary_fwd", DType::FLOATS),
            ],
            ["unary_fwd_wide", "unary_fwd_fours"],
        );
        &KERNELS[self.0.code()]
    }

    fn params(&self, _: &[Meta], outputs: &[Meta]) -> Params {
        Params::new().u(outputs[0].count()).u(self.0.code()).f(self.0.factor())
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(g.one(&UnaryBackward(self.0), &[g.input(0)?, g.grad(0)?])?)])
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for UnaryBackward {
    fn name(&self) -> &'static str {
        self.0.names().1
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs {
            [x, dy] if x == dy && x.dtype.is_float() => Ok(vec![*x]),
            _ => Err(Error::Shape { op: self.name(), rule: "x and dy of one float shape", got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let pairs = inputs[0].data.iter().zip(&inputs[1].data);
        vec![pairs.map(|(&x, &dy)| dy * self.0.derivative(x)).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[[Kernel; 5]; KINDS.len()] = &each(
            [
                Kernel::cpu("unary_bwd", DType::FLOATS, cpu::unary_backward),
                vector::cuda(SOURCE, ["unary_bwd_v2"; 2], DType::FLOATS, always, vectors),
                wgsl("unary_bwd", "unary_bwd", DType::FLOATS),
            ],
            ["unary_bwd_wide", "unary_bwd_fours"],
        );
        &KERNELS[self.0.code()]
    }

    fn params(&self, _: &[Meta], outputs: &[Meta]) -> Params {
        Params::new().u(outputs[0].count()).u(self.0.code()).f(self.0.factor())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs {
            [x] if x.dtype.is_float() && self.to.is_float() => Ok(vec![Meta { dtype: self.to, ..*x }]),
            [_] => {
                Err(Error::Dtype { op: "cast", expected: "float types", got: format!("{} to {}", inputs[0], self.to) })
            }
            _ => Err(Error::Shape { op: "cast", rule: "one input", got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        vec![inputs[0].data.clone()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        // The prelude is that of the 16-bit side, or of the source where both are; the entry says what it writes.
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("cast_fwd", DType::FLOATS, cpu::cast),
            vector::cuda(SOURCE, ["cast_fwd_v2", "cast_to_f32_v2"], DType::FLOATS, to_f32, fours),
            vector::cuda(SOURCE, ["cast_fwd_v2", "cast_from_f32_v2"], &[DType::F16, DType::Bf16], from_f32, fours),
            vector::cuda(SOURCE, ["cast_fwd_v2", "cast_to_bf16_words_v2"], &[DType::F16], f16_to_bf16, vectors),
            vector::cuda(SOURCE, ["cast_fwd_v2", "cast_from_bf16_words_v2"], &[DType::F16], bf16_to_f16, vectors),
            Kernel { fits: to_f32, ..wgsl("cast_fwd", "cast_to_f32", DType::FLOATS) },
            Kernel { fits: from_f32, ..wgsl("cast_fwd", "cast_from_f32", &[DType::F16, DType::Bf16]) },
            Kernel { fits: f16_to_bf16, ..wgsl("cast_fwd", "cast_to_bf16_words", &[DType::F16]) },
            Kernel { fits: bf16_to_f16, ..wgsl("cast_fwd", "cast_from_bf16_words", &[DType::F16]) },
        ];
        KERNELS
    }

    fn element(&self, inputs: &[Meta], outputs: &[Meta]) -> DType {
        match (inputs[0].dtype, outputs[0].dtype) {
            (DType::F32, to) => to,
            (DType::Bf16, DType::F16) => DType::F16,
            (from, _) => from,
        }
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        Params::new().u(outputs[0].count()).u(inputs[0].dtype as usize).u(outputs[0].dtype as usize)
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(g.one(&Cast { to: g.input_metas[0].dtype }, &[g.grad(0)?])?)])
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        Cost { flops: 0.0, bytes: (inputs[0].bytes() + outputs[0].bytes()) as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn to_f32(p: &Problem) -> bool {
    p.outputs[0].dtype == DType::F32
}

fn from_f32(p: &Problem) -> bool {
    p.inputs[0].dtype == DType::F32
}

fn f16_to_bf16(p: &Problem) -> bool {
    (p.inputs[0].dtype, p.outputs[0].dtype) == (DType::F16, DType::Bf16)
}

fn bf16_to_f16(p: &Problem) -> bool {
    (p.inputs[0].dtype, p.outputs[0].dtype) == (DType::Bf16, DType::F16)
}

const fn wgsl(name: &'static str, entry: &'static str, dtypes: &'static [DType]) -> Kernel {
    Kernel { name, code: Code::Gpu { source: SOURCE, entry, constants: &[] }, dtypes, fits: always, plan }
}

/// A function's code as the shader's constant.
const KINDS: [Constants; 9] = [
    &[("KIND", 0.0)],
    &[("KIND", 1.0)],
    &[("KIND", 2.0)],
    &[("KIND", 3.0)],
    &[("KIND", 4.0)],
    &[("KIND", 5.0)],
    &[("KIND", 6.0)],
    &[("KIND", 7.0)],
    &[("KIND", 8.0)],
];

/// The records of each function, by its code: before the `plain` ones two rungs for software rasterizers, in which the function is
/// a constant.
const fn each(plain: [Kernel; 3], [wide, fours]: [&'static str; 2]) -> [[Kernel; 5]; KINDS.len()] {
    let mut all = [[plain[0], plain[0], plain[0], plain[1], plain[2]]; KINDS.len()];
    let mut kind = 0;
    while kind < KINDS.len() {
        let plan = vector::plan_blocks;
        let code = Code::Wgsl { source: WIDE_SOURCE, entry: wide, constants: KINDS[kind] };
        all[kind][0] = Kernel { name: wide, code, dtypes: &[DType::F32], fits: vector::whole_eights, plan };
        let code = Code::Wgsl { source: SOURCE, entry: fours, constants: KINDS[kind] };
        all[kind][1] = Kernel { name: fours, code, dtypes: DType::FLOATS, fits: vector::whole_fours, plan };
        kind += 1;
    }
    all
}

/// Each invocation handles `PER_INVOCATION` neighbouring elements: fewer, fatter invocations suit every adapter class.
fn plan(p: &Problem) -> Plan {
    let items = p.outputs[0].count().div_ceil(PER_INVOCATION);
    Plan::of(Launch::linear(items, BLOCK, p.params()).trips(PER_INVOCATION))
}

/// 16 bytes of the element type to a thread.
fn vectors(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.outputs[0].count().div_ceil(vector::vector(p)), vector::BLOCK, p.params()))
}

/// Four elements to a thread, whatever the types.
fn fours(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.outputs[0].count().div_ceil(4), vector::BLOCK, p.params()))
}

const FUNCTIONS: [Function; 9] = [
    Function::Relu,
    Function::GeluTanh,
    Function::GeluErf,
    Function::Silu,
    Function::Tanh,
    Function::Sigmoid,
    Function::Exp,
    Function::Scale(-0.37),
    Function::Reciprocal,
];

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    // relu's kink lies at 0: draws keep clear of it so that differences see one branch.
    let fill = |f: Function| match f {
        Function::Relu => Fill::Away { kinks: &[0.0], gap: 0.01 },
        Function::Reciprocal => Fill::Away { kinks: &[0.0], gap: 0.3 },
        _ => Fill::Normal { mean: 0.0, deviation: 2.0 },
    };
    for f in FUNCTIONS {
        let tolerance = match f {
            Function::Relu => Tolerance::Exact,
            Function::Scale(_) => Tolerance::Arithmetic,
            _ => Tolerance::Transcendental,
        };
        for &dtype in DType::FLOATS {
            for dims in [&[1][..], &[7], &[3, 5, 17], &[5, 24], &[64, 64], &[255, 257]] {
                let case = Case::new(Unary(f), tolerance).input(dims, dtype, fill(f));
                let small = case.inputs[0].meta.count() < 300 && dtype == DType::F32;
                cases.push(if small { case.grad() } else { case });
                let backward = Case::new(UnaryBackward(f), tolerance).input(dims, dtype, fill(f)).normal(dims, dtype);
                // One element near saturation: 1 - y of a rounded y, judged by the terms and not by what is left.
                cases.push(if dims == [1] && tolerance == Tolerance::Transcendental {
                    backward.terms(1.0)
                } else {
                    backward
                });
            }
        }
        // Saturated, and where the tail of a gate is all there is.
        if matches!(f, Function::GeluTanh | Function::GeluErf | Function::Silu | Function::Tanh | Function::Sigmoid) {
            let far = vec![-100.0, -20.0, -9.0, -5.5, 0.0, 1e-30, 5.5, 20.0, 100.0];
            let case = |op: Unary| Case::new(op, tolerance).input(&[9], DType::F32, Fill::Values(far.clone()));
            cases.push(case(Unary(f)));
        }
        // GPT-2 small's FFN activation over 1,024 tokens.
        cases.push(Case::new(Unary(f), tolerance).input(&[1024, 3072], DType::F32, fill(f)).bench());
    }
    // Above 65,535 workgroups of 64 x 4 elements the launch folds into two dimensions.
    cases.push(Case::new(Unary(Function::Relu), Tolerance::Exact).normal(&[65_537 * 256 + 3], DType::F32));
    for &from in DType::FLOATS {
        for &to in DType::FLOATS {
            for dims in [&[1][..], &[13], &[64, 33], &[300, 301]] {
                cases.push(Case::new(Cast { to }, Tolerance::Exact).normal(dims, from));
            }
        }
    }
    cases.push(Case::new(Cast { to: DType::Bf16 }, Tolerance::Exact).normal(&[1024, 3072], DType::F32).bench());
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_known_values() {
        // Abramowitz and Stegun, table 7.1, and symmetry.
        for (x, y) in
            [(0.0, 0.0), (0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0), (3.5, 0.999_999_256_9)]
        {
            approx::assert_abs_diff_eq!(erf(x), y, epsilon = 1e-10);
            approx::assert_abs_diff_eq!(erf(-x), -y, epsilon = 1e-10);
        }
    }
}
