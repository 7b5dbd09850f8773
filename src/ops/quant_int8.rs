//! Weight-only int8: one scale per group, products with float activations.

use std::any::Any;

use super::matmul::Matmul;
use super::quant::{BLOCK, Dequantize, Granularity, Scheme};
use super::reduce::{Axis, Reduce, ReduceFunction};
use super::unary::Cast;
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, always, source};
use crate::op::{Array, Case, Cost, Family, Fill, Gradient, Op, Saves, Tolerance};
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "quant_int8", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("quant_int8");

/// y = x W^T (+ bias) with W = q scale: x `[m, k]` of any float type, `q i8 [n, k]`, `scale f32 [n, k / group]`, bias `[n]`
/// in x's type; y `[m, n]` in x's type. The group is a multiple of 4 that divides k. Differentiable in x and the bias; the
/// weight is fixed.
#[derive(Clone, Copy, Debug)]
pub struct MatmulInt8Groups {
    pub group: usize,
    pub bias: bool,
}

impl Op for MatmulInt8Groups {
    fn name(&self) -> &'static str {
        "matmul_int8_groups"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let refuse = || {
            let rule =
                "float x [m, k], q i8 [n, k], scale f32 [n, k/group] (, bias [n] in x's type), group a multiple of 4";
            Error::Shape { op: self.name(), rule, got: format!("{}, group {}", shape::list(inputs), self.group) }
        };
        if inputs.len() != 3 + usize::from(self.bias) {
            return Err(refuse());
        }
        let (x, q, scale) = (&inputs[0], &inputs[1], &inputs[2]);
        let (&[m, k], &[n, columns]) = (x.dims(), q.dims()) else {
            return Err(refuse());
        };
        let groups = self.group > 0 && self.group.is_multiple_of(4) && k.is_multiple_of(self.group) && k > 0;
        let types = x.dtype.is_float() && q.dtype == DType::I8 && scale.dtype == DType::F32;
        let bias = inputs.get(3).is_none_or(|b| b.dims() == [n] && b.dtype == x.dtype);
        if !groups || !types || !bias || columns != k || scale.dims() != [n, k / self.group] {
            return Err(refuse());
        }
        Ok(vec![Meta::new(&[m, n], x.dtype)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (m, k, n) = (inputs[0].dims()[0], inputs[0].dims()[1], inputs[1].dims()[0]);
        let (x, q, scale) = (&inputs[0].data, &inputs[1].data, &inputs[2].data);
        let y = |id: usize| {
            let (i, j) = (id / n, id % n);
            let product = |c: usize| x[i * k + c] * q[j * k + c] * scale[(j * k + c) / self.group];
            (0..k).map(product).sum::<f64>() + inputs.get(3).map_or(0.0, |b| b.data[j])
        };
        vec![(0..m * n).map(y).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const CODE: Code = Code::Gpu { source: SOURCE, entry: "matmul_int8_groups_fwd", constants: &[] };
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("matmul_int8_groups_fwd", DType::FLOATS, cpu::matmul_int8_groups),
            Kernel { name: "matmul_int8_groups_fwd", code: CODE, dtypes: DType::FLOATS, fits: always, plan },
        ];
        KERNELS
    }

    /// x decides how activations are stored; scales are f32 always.
    fn element(&self, inputs: &[Meta], _: &[Meta]) -> DType {
        inputs[0].dtype
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        let [m, n] = [0, 1].map(|axis| outputs[0].dims()[axis]);
        Params::new().u(m).u(n).u(inputs[0].dims()[1]).u(self.group).flag(self.bias)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[1, 2], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let dy = g.grad(0)?;
        let mut grads = vec![None; g.input_metas.len()];
        if g.needs(0) {
            let (q, scale) = (g.input(1)?, g.input(2)?);
            let scale = scale.reshape(&[scale.count()])?;
            let zeros = Tensor::zeros(g.device, scale.meta())?;
            let granularity = Granularity::Group(self.group);
            let op = Dequantize { scheme: Scheme::SymmetricNarrow, granularity, bits: 8 };
            let w = g.one(&op, &[q, &scale, &zeros])?;
            let w = if dy.dtype() == DType::F32 { w } else { g.one(&Cast { to: dy.dtype() }, &[&w])? };
            grads[0] = Some(g.one(&Matmul::default(), &[dy, &w])?);
        }
        if self.bias && g.needs(3) {
            grads[3] = Some(g.one(&Reduce { function: ReduceFunction::Sum, axis: Axis::Rows }, &[dy])?);
        }
        Ok(grads)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 2.0 * outputs[0].count() as f64 * inputs[0].dims()[1] as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Without a bias its slot holds x, which is not read there.
fn plan(p: &Problem) -> Plan {
    let slots = [0, 1, 2, if p.inputs.len() == 4 { 3 } else { 0 }, p.inputs.len()];
    let launch = Launch::linear(p.outputs[0].count(), BLOCK, p.params());
    Plan::of(launch.slots(&slots).trips(p.inputs[0].dims()[1]))
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let matmul = |[m, n, k]: [usize; 3], group: usize, bias: bool, dtype: DType| {
        let case = Case::new(MatmulInt8Groups { group, bias }, Tolerance::Contraction { k })
            .normal(&[m, k], dtype)
            .input(&[n, k], DType::I8, Fill::Integers { low: -127, high: 127 })
            .input(&[n, k / group], DType::F32, Fill::Uniform { low: 0.001, high: 0.01 });
        if bias { case.normal(&[n], dtype) } else { case }
    };
    for (size, group) in [
        ([1, 1, 4], 4),
        ([1, 5, 32], 16),
        ([3, 7, 96], 32),
        ([4, 16, 128], 128),
        ([17, 33, 256], 64),
        ([5, 70, 2112], 96),
    ] {
        let [m, n, k] = size;
        for &dtype in DType::FLOATS {
            let case = matmul(size, group, n % 2 == 1, dtype);
            cases.push(if dtype == DType::F32 && m * k < 300 { case.grad() } else { case });
        }
        cases.push(matmul(size, group, n % 2 == 0, DType::F32));
    }
    // GPT-2 small's first FFN matrix over one token and over 128.
    cases.push(matmul([1, 3072, 768], 64, true, DType::F32).bench());
    cases.push(matmul([128, 3072, 768], 64, true, DType::F32).bench());
    cases
}
