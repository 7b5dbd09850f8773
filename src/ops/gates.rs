//! Gates: columns of a tensor in groups (an attention head's, one neuron's, all of a sublayer's), each group times one number.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, source, spans};
use crate::op::{Array, Case, Cost, Family, Fill, Gradient, Op, Saves, Tolerance};
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::shape::{self, Meta, Shape};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "gates", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("gates");
const BLOCK: u32 = 64;
const PER_INVOCATION: usize = 4;

/// y[r, c] = x[r, c] g[c / (n / G)] for x `[.., n]` and gates f32 `[G]`: n / G neighbouring columns share a gate. Gates
/// `[.., G]` of as many rows as x differ from row to row, and their gradients are those of each row (Michel et al. 2019).
#[derive(Clone, Copy, Debug)]
pub struct ScaleGroups;

/// sum over the columns c of group j of a[r, c] b[r, c]: a and b `[.., n]` to f32 `[.., G]`. With b the gradient that
/// reached a: the gradient of a gate of 1 on each group.
#[derive(Clone, Copy, Debug)]
pub struct GroupDots {
    /// G
    pub groups: usize,
}

/// The extents with G in place of the last.
fn grouped(x: &Meta, groups: usize) -> Result<Shape> {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = groups;
    }
    Shape::new(&dims)
}

impl Op for ScaleGroups {
    fn name(&self) -> &'static str {
        "scale_groups"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x, gates] = inputs else {
            return Err(Error::Shape { op: self.name(), rule: "x and gates", got: shape::list(inputs) });
        };
        if !x.dtype.is_float() || gates.dtype != DType::F32 {
            return Err(Error::Dtype { op: self.name(), expected: "float x, f32 gates", got: shape::list(inputs) });
        }
        let groups = gates.shape.last();
        let rows = gates.count() == groups || gates.count() == x.shape.rows() * groups;
        if x.count() == 0 || groups == 0 || !x.shape.last().is_multiple_of(groups) || !rows {
            let rule = "gates [G] or [rows, G] with a G that divides x's last extent";
            return Err(Error::Shape { op: self.name(), rule, got: shape::list(inputs) });
        }
        Ok(vec![*x])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (x, gates) = (&inputs[0], &inputs[1]);
        let (n, groups) = (x.shape.last(), gates.shape.last());
        let each_row = gates.data.len() > groups;
        let gate = |row: usize, column: usize| {
            let first = if each_row { row * groups } else { 0 };
            gates.data[first + column * groups / n]
        };
        vec![x.data.iter().enumerate().map(|(i, x)| x * gate(i / n, i % n)).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("scale_groups_fwd", DType::FLOATS, cpu::scale_groups),
            gpu("scale_groups_fwd", plan_scale, |p| bindable(p, &p.inputs[1])),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let (x, gates) = (inputs[0], inputs[1]);
        Params::new().u(x.count()).u(0).u(x.shape.last() / gates.shape.last().max(1)).u(gates.count())
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let dy = g.grad(0)?;
        let dx = g.needs(0).then(|| g.one(self, &[dy, g.input(1)?])).transpose()?;
        if !g.needs(1) {
            return Ok(vec![dx, None]);
        }
        let gates = g.input_metas[1];
        let dots = g.one(&GroupDots { groups: gates.shape.last() }, &[g.input(0)?, dy])?;
        let sums = if dots.count() == gates.count() {
            dots
        } else {
            g.one(&Reduce { function: ReduceFunction::Sum, axis: Axis::Rows }, &[&dots])?
        };
        Ok(vec![dx, Some(sums.reshape(gates.dims())?)])
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for GroupDots {
    fn name(&self) -> &'static str {
        "group_dots"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs {
            [a, b] if a != b || !a.dtype.is_float() => {
                Err(Error::Shape { op: self.name(), rule: "two float inputs of one shape", got: shape::list(inputs) })
            }
            [a, _] if a.count() > 0 && self.groups > 0 && a.shape.last().is_multiple_of(self.groups) => {
                Ok(vec![Meta { shape: grouped(a, self.groups)?, dtype: DType::F32 }])
            }
            _ => {
                let rule = "two inputs whose last extent the number of groups divides";
                let got = format!("{} groups of {}", self.groups, shape::list(inputs));
                Err(Error::Shape { op: self.name(), rule, got })
            }
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (a, b, n) = (&inputs[0].data, &inputs[1].data, inputs[0].shape.last());
        let mut sums = vec![0.0; inputs[0].shape.rows() * self.groups];
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            sums[i / n * self.groups + i % n * self.groups / n] += a * b;
        }
        vec![sums]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("group_dots_fwd", DType::FLOATS, cpu::group_dots),
            gpu("group_dots_fwd", plan_dots, short_groups),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        Params::new().u(outputs[0].count()).u(0).u(inputs[0].shape.last() / self.groups.max(1)).u(1)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let gates = g.grad(0)?;
        let of = |i: usize| g.needs(1 - i).then(|| g.one(&ScaleGroups, &[g.input(i)?, gates])).transpose();
        Ok(vec![of(1)?, of(0)?])
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = 2 * inputs[0].bytes() + outputs[0].bytes();
        Cost { flops: 2.0 * inputs[0].count() as f64, bytes: bytes as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const fn gpu(entry: &'static str, plan: fn(&Problem) -> Plan, fits: fn(&Problem) -> bool) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name: entry, code, dtypes: DType::FLOATS, fits, plan }
}

/// Whether an argument is bound whole.
fn bindable(p: &Problem, argument: &Meta) -> bool {
    argument.bytes() as u64 <= p.info.limits.binding_bytes
}

fn group_of(p: &Problem) -> usize {
    p.inputs[0].shape.last() / p.op::<GroupDots>().map_or(1, |op| op.groups.max(1))
}

/// Groups that one invocation sums without a driver's cutting its loop.
fn short_groups(p: &Problem) -> bool {
    p.info.limits.loop_budget.is_none_or(|budget| group_of(p) as u64 <= budget)
}

fn plan_scale(p: &Problem) -> Plan {
    let (count, size) = (p.inputs[0].count(), p.element.size());
    let group = p.inputs[0].shape.last() / p.inputs[1].shape.last().max(1);
    let launches = spans(count, size, p.info.limits.binding_bytes).map(|span| {
        let params = Params::new().u(span.len()).u(span.start).u(group).u(p.inputs[1].count());
        let launch = Launch::linear(span.len().div_ceil(PER_INVOCATION), BLOCK, params).trips(PER_INVOCATION);
        if span.len() == count {
            return launch;
        }
        let (offset, bytes) = (span.start * size, span.len() * size);
        launch.window(0, offset, bytes).window(2, offset, bytes)
    });
    Plan::sequence(launches.collect())
}

fn plan_dots(p: &Problem) -> Plan {
    let (sums, group, size) = (p.outputs[0].count(), group_of(p), p.element.size());
    // A sum takes a group of each input: spans of whole groups, whose sums start where a binding may.
    let launches = spans(sums, (group * size).max(4), p.info.limits.binding_bytes).map(|span| {
        let params = Params::new().u(span.len()).u(0).u(group).u(1);
        let launch = Launch::linear(span.len(), BLOCK, params).trips(group);
        if span.len() == sums {
            return launch;
        }
        let (offset, bytes) = (span.start * group * size, span.len() * group * size);
        launch.window(0, offset, bytes).window(1, offset, bytes).window(2, 4 * span.start, 4 * span.len())
    });
    Plan::sequence(launches.collect())
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    // (x, groups): heads of even and odd sizes, neurons, whole sublayers.
    let shapes: [(&[usize], usize); 9] = [
        (&[1], 1),
        (&[3, 4], 2),
        (&[2, 3, 15], 5),
        (&[5, 7], 7),
        (&[6, 11], 1),
        (&[3, 63], 9),
        (&[2, 5, 64], 4),
        (&[7, 65], 65),
        (&[129, 256], 4),
    ];
    for &dtype in DType::FLOATS {
        for (dims, groups) in shapes {
            let rows = dims.iter().product::<usize>() / dims[dims.len() - 1];
            let marked = |case: Case| {
                let small = case.inputs[0].meta.count() < 700 && dtype == DType::F32;
                if small { case.grad() } else { case }
            };
            let scaled = Case::new(ScaleGroups, Tolerance::Arithmetic).normal(dims, dtype);
            cases.push(marked(scaled.clone().normal(&[groups], DType::F32)));
            let each_row = [&dims[..dims.len() - 1], &[groups]].concat();
            if rows > 1 {
                cases.push(marked(scaled.normal(&each_row, DType::F32)));
            }
            let group = dims[dims.len() - 1] / groups;
            let dots = Case::new(GroupDots { groups }, Tolerance::Contraction { k: group });
            cases.push(marked(dots.normal(dims, dtype).normal(dims, dtype)));
        }
    }
    // Closed gates, as a method leaves them.
    let closed = Case::new(ScaleGroups, Tolerance::Exact).normal(&[5, 24], DType::F32);
    let values = vec![1.0, 0.0, 1.0, 1.0, 0.0, 0.0];
    cases.push(closed.input(&[6], DType::F32, Fill::Values(values)).variant("closed"));
    // Heads and neurons of BERT base over 1,024 tokens.
    for (n, groups) in [(768, 12), (3072, 3072)] {
        let x = Case::new(ScaleGroups, Tolerance::Arithmetic).normal(&[1024, n], DType::F32);
        cases.push(x.normal(&[groups], DType::F32).bench());
        let dots = Case::new(GroupDots { groups }, Tolerance::Contraction { k: n / groups });
        cases.push(dots.normal(&[1024, n], DType::F32).normal(&[1024, n], DType::F32).bench());
    }
    cases
}
