//! Elementwise arithmetic of two tensors, the second broadcast over rows or as a scalar, and scaled accumulation.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, always, source, spans, wgsl_source};
use crate::op::{Array, Case, Cost, Family, Gradient, Op, Saves, Tolerance};
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::ops::unary::{Function, Unary};
use crate::ops::vector;
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "binary", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("binary");
const WIDE_SOURCE: Source = wgsl_source!("binary_wide");
const BLOCK: u32 = 64;
const PER_INVOCATION: usize = 4;

/// Which function; the order is the kernels' `kind` parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BinaryFunction {
    Add,
    Sub,
    Mul,
}

/// y = a + b, a - b or a b, shaped like a. b has a's shape, or is a row `[a.last()]` repeated over a's rows, or has
/// exactly one element.
#[derive(Clone, Copy, Debug)]
pub struct Binary(pub BinaryFunction);

/// The sum of two tensors: what gradients that meet are joined with.
pub const ADD: Binary = Binary(BinaryFunction::Add);

/// The product of two tensors, element by element.
pub const MUL: Binary = Binary(BinaryFunction::Mul);

/// target += factor x, in place: output 0 is input 0. Inputs (target, x) of one shape; no gradient.
#[derive(Clone, Copy, Debug)]
pub struct AccumulateScaled {
    pub factor: f32,
}

/// Whether b can stand beside a, see [`Binary`].
fn broadcasts(a: &Meta, b: &Meta) -> bool {
    a.shape == b.shape || b.count() == 1 || b.dims() == [a.shape.last()]
}

impl Op for Binary {
    fn name(&self) -> &'static str {
        match self.0 {
            BinaryFunction::Add => "add",
            BinaryFunction::Sub => "sub",
            BinaryFunction::Mul => "mul",
        }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [a, b] = inputs else {
            return Err(Error::Shape { op: self.name(), rule: "two inputs", got: shape::list(inputs) });
        };
        if !a.dtype.is_float() || a.dtype != b.dtype {
            return Err(Error::Dtype { op: self.name(), expected: "one float type", got: shape::list(inputs) });
        }
        if !broadcasts(a, b) {
            let rule = "b of a's shape, a row of a's last extent, or one element";
            return Err(Error::Shape { op: self.name(), rule, got: shape::list(inputs) });
        }
        Ok(vec![*a])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let b = inputs[1].data.iter().cycle();
        let pairs = inputs[0].data.iter().zip(b);
        vec![match self.0 {
            BinaryFunction::Add => pairs.map(|(a, b)| a + b).collect(),
            BinaryFunction::Sub => pairs.map(|(a, b)| a - b).collect(),
            BinaryFunction::Mul => pairs.map(|(a, b)| a * b).collect(),
        }]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("binary_fwd", DType::FLOATS, cpu::binary),
            vector::cuda(SOURCE, ["binary_fwd_v2"; 2], DType::FLOATS, never_wraps, |p| plan(p, vectors)),
            WIDE,
            BY_FOURS,
            wgsl("binary_fwd", "binary_fwd", |p| plan(p, fours)),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        Params::new().u(outputs[0].count()).u(self.0 as usize).u(0).u(inputs[1].count())
    }

    fn saves(&self) -> Saves {
        match self.0 {
            BinaryFunction::Mul => Saves { inputs: &[0, 1], outputs: &[] },
            _ => Saves::default(),
        }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let dy = g.grad(0)?;
        let da = match self.0 {
            _ if !g.needs(0) => None,
            BinaryFunction::Mul => Some(g.one(self, &[dy, g.input(1)?])?),
            _ => Some(dy.clone()),
        };
        if !g.needs(1) {
            return Ok(vec![da, None]);
        }
        let full = match self.0 {
            BinaryFunction::Mul => g.one(self, &[dy, g.input(0)?])?,
            _ => dy.clone(),
        };
        let (a, b) = (g.input_metas[0], g.input_metas[1]);
        let summed = if a.count() == b.count() {
            full
        } else {
            let axis = if b.count() == 1 { Axis::All } else { Axis::Rows };
            g.one(&Reduce { function: ReduceFunction::Sum, axis }, &[&full])?
        };
        let summed = summed.reshape(b.dims())?;
        let db = match self.0 {
            BinaryFunction::Sub => g.one(&Unary(Function::Scale(-1.0)), &[&summed])?,
            _ => summed,
        };
        Ok(vec![da, Some(db)])
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for AccumulateScaled {
    fn name(&self) -> &'static str {
        "accumulate_scaled"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs {
            [target, x] if target == x && x.dtype.is_float() => Ok(vec![*target]),
            _ => {
                Err(Error::Shape { op: self.name(), rule: "target and x of one float shape", got: shape::list(inputs) })
            }
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let pairs = inputs[0].data.iter().zip(&inputs[1].data);
        vec![pairs.map(|(target, x)| target + f64::from(self.factor) * x).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("accumulate_scaled", DType::FLOATS, cpu::accumulate_scaled),
            vector::cuda(SOURCE, ["accumulate_scaled_v2"; 2], DType::FLOATS, always, |p| plan_accumulate(p, vectors)),
            wgsl("accumulate_scaled", "accumulate_scaled", |p| plan_accumulate(p, fours)),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].count()).u(0).u(0).u(1).f(self.factor)
    }

    fn aliases(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    fn cost(&self, inputs: &[Meta], _: &[Meta]) -> Cost {
        Cost { flops: 2.0 * inputs[0].count() as f64, bytes: 3.0 * inputs[0].bytes() as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const fn wgsl(name: &'static str, entry: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name, code, dtypes: DType::FLOATS, fits: always, plan }
}

/// For software rasterizers, where one binding holds all.
const BY_FOURS: Kernel = {
    let code = Code::Wgsl { source: SOURCE, entry: "binary_fwd_fours", constants: &[] };
    let fits: fn(&Problem) -> bool = |p| vector::whole_fours(p) && is_bound_whole(p, 4);
    Kernel { name: "binary_fwd_fours", code, dtypes: DType::FLOATS, fits, plan: vector::plan_blocks }
};

/// The same by words of 64 bits.
const WIDE: Kernel = {
    let code = Code::Wgsl { source: WIDE_SOURCE, entry: "binary_fwd_wide", constants: &[] };
    let fits: fn(&Problem) -> bool = |p| vector::whole_eights(p) && is_bound_whole(p, 8);
    Kernel { name: "binary_fwd_wide", code, dtypes: &[DType::F32], fits, plan: vector::plan_blocks }
};

/// Whether b is whole vectors of so many elements, and one binding holds the output.
fn is_bound_whole(p: &Problem, vector: usize) -> bool {
    p.inputs[1].count().is_multiple_of(vector) && p.outputs[0].bytes() as u64 <= p.info.limits.binding_bytes
}

/// How a number of elements becomes a launch.
type Geometry = fn(&Problem, usize, Params) -> Launch;

fn fours(_: &Problem, items: usize, params: Params) -> Launch {
    Launch::linear(items.div_ceil(PER_INVOCATION), BLOCK, params).trips(PER_INVOCATION)
}

/// 16 bytes to a thread.
fn vectors(p: &Problem, items: usize, params: Params) -> Launch {
    Launch::linear(items.div_ceil(vector::vector(p)), vector::BLOCK, params)
}

/// Whether no vector of 16 bytes goes over the end of a broadcast b.
fn never_wraps(p: &Problem) -> bool {
    let period = p.inputs[1].count();
    period == 1 || period == p.outputs[0].count() || period.is_multiple_of(vector::vector(p))
}

/// One launch per binding-sized span. A full b is cut like a; a broadcast b is bound whole and found by its period.
fn plan(p: &Problem, launch: Geometry) -> Plan {
    let (count, size, period) = (p.outputs[0].count(), p.element.size(), p.inputs[1].count());
    let kind = p.op::<Binary>().map_or(0, |op| op.0 as usize);
    let launches = spans(count, size, p.info.limits.binding_bytes).map(|span| {
        let (items, offset, bytes) = (span.len(), span.start * size, span.len() * size);
        let full = period == count;
        let (base, period) = if full { (0, items) } else { (span.start, period) };
        let params = Params::new().u(items).u(kind).u(base).u(period).f(1.0);
        let launch = launch(p, items, params);
        if items == count {
            return launch;
        }
        let launch = launch.window(0, offset, bytes).window(2, offset, bytes);
        if full { launch.window(1, offset, bytes) } else { launch }
    });
    Plan::sequence(launches.collect())
}

fn plan_accumulate(p: &Problem, launch: Geometry) -> Plan {
    let (count, size) = (p.outputs[0].count(), p.element.size());
    let factor = p.op::<AccumulateScaled>().map_or(0.0, |op| op.factor);
    let launches = spans(count, size, p.info.limits.binding_bytes).map(|span| {
        let (offset, bytes) = (span.start * size, span.len() * size);
        let launch = launch(p, span.len(), Params::new().u(span.len()).u(0).u(0).u(1).f(factor));
        if span.len() == count { launch } else { launch.window(0, offset, bytes).window(1, offset, bytes) }
    });
    Plan::sequence(launches.collect())
}

fn cases() -> Vec<Case> {
    use BinaryFunction::{Add, Mul, Sub};
    let mut cases = Vec::new();
    for function in [Add, Sub, Mul] {
        for &dtype in DType::FLOATS {
            let shapes: [(&[usize], &[usize]); 13] = [
                (&[1], &[1]),
                (&[7], &[7]),
                (&[3, 5, 17], &[3, 5, 17]),
                (&[64, 65], &[64, 65]),
                (&[4, 1], &[1]),
                (&[5, 7], &[7]),
                (&[1, 9], &[9]),
                (&[2, 3, 63], &[63]),
                (&[3, 1031], &[1031]),
                (&[6, 11], &[]),
                (&[2, 129], &[1, 1]),
                (&[255, 257], &[255, 257]),
                (&[5, 24], &[24]),
            ];
            for (a, b) in shapes {
                let case = Case::new(Binary(function), Tolerance::Arithmetic).normal(a, dtype).normal(b, dtype);
                let small = case.inputs[0].meta.count() < 300 && dtype == DType::F32;
                cases.push(if small { case.grad() } else { case });
            }
        }
    }
    // A residual sum and a bias of GPT-2 small over 1,024 tokens.
    for dtype in [DType::F32, DType::Bf16] {
        let case = Case::new(ADD, Tolerance::Arithmetic).normal(&[1024, 768], dtype);
        cases.push(case.clone().normal(&[1024, 768], dtype).bench());
        cases.push(case.normal(&[768], dtype).bench());
    }
    for &dtype in DType::FLOATS {
        for dims in [&[1][..], &[13], &[65, 63], &[300, 301]] {
            // The terms may cancel, so the error is one of a sum of two products, not of a single rounding.
            let case = Case::new(AccumulateScaled { factor: -0.37 }, Tolerance::Contraction { k: 2 });
            cases.push(case.normal(dims, dtype).normal(dims, dtype));
        }
    }
    let case = Case::new(AccumulateScaled { factor: 0.25 }, Tolerance::Contraction { k: 2 });
    let case = case.normal(&[768 * 3072], DType::F32).normal(&[768 * 3072], DType::F32);
    cases.push(case.bench());
    cases
}
