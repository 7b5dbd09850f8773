//! Rotary position embedding (Su et al. 2021), and the two-dimensional form of GLM (Du et al. 2022; Zeng et al. 2023).

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, always, source};
use crate::op::{Array, Case, Cost, Family, Fill, Gradient, Op, Saves, Tolerance};
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "rope", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("rope");
const BLOCK: u32 = 64;

/// Which elements of a head are rotated together, and by which position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeKind {
    /// Pair (j, j + D/2) turns by column j of the table at the token's position.
    Half,
    /// The first half of the head turns by the position, the second by the block position: pair (j, j + D/4) by column
    /// j, pair (D/2 + j, D/2 + j + D/4) by column D/4 + j, for j below D/4.
    Glm2d,
}

/// (a, b) -> (a cos - b sin, b cos + a sin) for every pair of a head; with `inverse` the angle is negated.
///
/// Inputs: x `[B, T, H, D]`; cos and sin f32 `[P, D/2]` from [`tables`]; positions u32 `[B, T]`; block positions u32
/// `[B, T]` with [`RopeKind::Glm2d`]. Output: like x. A position beyond the table takes its last row.
///
/// The gradient is the same op turned the other way: a rotation's transpose is its inverse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rope {
    pub kind: RopeKind,
    pub inverse: bool,
}

/// Cosine and sine tables `[positions, columns]` of an explicit list of inverse frequencies, one per column: pruned
/// layers keep any subset of the frequencies. Computed in f64, because a shader's sine is only good to 2^-11.
pub fn tables(inverse_frequencies: &[f32], positions: usize) -> (Vec<f32>, Vec<f32>) {
    let angle = |position: usize, frequency: f32| position as f64 * f64::from(frequency);
    let angles: Vec<f64> = (0..positions).flat_map(|p| inverse_frequencies.iter().map(move |&f| angle(p, f))).collect();
    (angles.iter().map(|a| a.cos() as f32).collect(), angles.iter().map(|a| a.sin() as f32).collect())
}

/// The usual inverse frequencies base^(-2 j / dim) for j below dim / 2: Su et al. use dim = D and base 10,000, GLM
/// dim = D/2 twice, once for each kind of position.
pub fn inverse_frequencies(dim: usize, base: f32) -> Vec<f32> {
    (0..dim / 2).map(|j| f64::from(base).powf(-2.0 * j as f64 / dim as f64) as f32).collect()
}

impl Rope {
    /// Elements that turn alternately with their partner are this far apart, and a head has this many such spans.
    fn span(&self, dim: usize) -> (usize, usize) {
        match self.kind {
            RopeKind::Half => (dim / 2, 1),
            RopeKind::Glm2d => (dim / 4, 2),
        }
    }
}

impl Op for Rope {
    fn name(&self) -> &'static str {
        match self.kind {
            RopeKind::Half => "rope",
            RopeKind::Glm2d => "rope_glm",
        }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let broken = |rule| Error::Shape { op: self.name(), rule, got: shape::list(inputs) };
        let (x, cos, sin, positions) = match (self.kind, inputs) {
            (RopeKind::Half, [x, cos, sin, positions]) => (x, cos, sin, [positions, positions]),
            (RopeKind::Glm2d, [x, cos, sin, positions, blocks]) => (x, cos, sin, [positions, blocks]),
            _ => return Err(broken("inputs x, cos, sin, positions, and block positions for the 2-D form")),
        };
        if !x.dtype.is_float() || cos.dtype != DType::F32 || sin != cos {
            return Err(Error::Dtype {
                op: self.name(),
                expected: "x of a float type, cos and sin f32 alike",
                got: shape::list(inputs),
            });
        }
        let &[b, t, _, d] = x.dims() else { return Err(broken("x [B, T, H, D]")) };
        let (span, spans) = self.span(d);
        if d == 0 || d != 2 * span * spans {
            return Err(broken("D a multiple of 2, of 4 for the 2-D form"));
        }
        if cos.dims().len() != 2 || cos.dims()[1] != d / 2 || cos.dims()[0] == 0 {
            return Err(broken("cos and sin [P, D/2] with P at least 1"));
        }
        if positions.iter().any(|p| p.dims() != [b, t] || p.dtype != DType::U32) {
            return Err(broken("positions u32 [B, T]"));
        }
        Ok(vec![*x])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (x, cos, sin) = (&inputs[0], &inputs[1].data, &inputs[2].data);
        let (heads, dim, last) = (x.dims()[2], x.dims()[3], inputs[1].dims()[0] - 1);
        let sign = if self.inverse { -1.0 } else { 1.0 };
        let mut y = x.data.clone();
        let mut turn = |a: usize, b: usize, position: f64, column: usize| {
            let at = (position as usize).min(last) * (dim / 2) + column;
            let (c, s) = (cos[at], sign * sin[at]);
            y[a] = x.data[a] * c - x.data[b] * s;
            y[b] = x.data[b] * c + x.data[a] * s;
        };
        for row in 0..x.data.len() / dim {
            let (start, token) = (row * dim, row / heads);
            match self.kind {
                RopeKind::Half => {
                    for j in 0..dim / 2 {
                        turn(start + j, start + dim / 2 + j, inputs[3].data[token], j);
                    }
                }
                RopeKind::Glm2d => {
                    for j in 0..dim / 4 {
                        let second = start + dim / 2;
                        turn(start + j, start + dim / 4 + j, inputs[3].data[token], j);
                        turn(second + j, second + dim / 4 + j, inputs[4].data[token], dim / 4 + j);
                    }
                }
            }
        }
        vec![y]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("rope_fwd", DType::FLOATS, cpu::rope),
            Kernel {
                name: "rope_fwd",
                code: Code::Gpu { source: SOURCE, entry: "rope_fwd", constants: &[] },
                dtypes: DType::FLOATS,
                fits: always,
                plan,
            },
        ];
        KERNELS
    }

    /// Heads (all tokens'), heads per token, D, span, spans, rows of the table, sign of the angle.
    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        let dims = outputs[0].dims();
        let (heads, dim) = (dims[2], dims[3]);
        let (span, spans) = self.span(dim);
        let sizes = Params::new().u(outputs[0].count() / dim.max(1)).u(heads).u(dim).u(span).u(spans);
        sizes.u(inputs[1].dims()[0]).f(if self.inverse { -1.0 } else { 1.0 })
    }

    fn saves(&self) -> Saves {
        match self.kind {
            RopeKind::Half => Saves { inputs: &[1, 2, 3], outputs: &[] },
            RopeKind::Glm2d => Saves { inputs: &[1, 2, 3, 4], outputs: &[] },
        }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let back = Rope { inverse: !self.inverse, ..*self };
        let mut arguments = vec![g.grad(0)?];
        for &index in self.saves().inputs {
            arguments.push(g.input(index)?);
        }
        let dx = g.one(&back, &arguments)?;
        // The tables are constants, positions are indices.
        let mut grads = vec![None; g.input_metas.len()];
        grads[0] = Some(dx);
        Ok(grads)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 3.0 * outputs[0].count() as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// One invocation per span of a head: it reads and writes every element of the span's pairs once.
fn plan(p: &Problem) -> Plan {
    let Some(op) = p.op::<Rope>() else { return Plan::default() };
    let dim = p.outputs[0].shape.last();
    let (span, spans) = op.span(dim);
    let items = p.outputs[0].count() / dim.max(1) * spans;
    let blocks = if op.kind == RopeKind::Glm2d { 4 } else { 3 };
    Plan::of(Launch::linear(items, BLOCK, p.params()).trips(span + 1).slots(&[0, 1, 2, 3, blocks, p.inputs.len()]))
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let case = |kind, inverse, [b, t, h, d]: [usize; 4], rows: usize, dtype| {
        let angle = Fill::Uniform { low: -1.0, high: 1.0 };
        // Positions reach one beyond the table.
        let position = || Fill::Integers { low: 0, high: rows as i64 };
        let case = Case::new(Rope { kind, inverse }, Tolerance::Contraction { k: 2 }).normal(&[b, t, h, d], dtype);
        let case = case.input(&[rows, d / 2], DType::F32, angle.clone()).input(&[rows, d / 2], DType::F32, angle);
        let case = case.input(&[b, t], DType::U32, position());
        if kind == RopeKind::Glm2d { case.input(&[b, t], DType::U32, position()) } else { case }
    };
    for inverse in [false, true] {
        for (kind, dims) in [(RopeKind::Half, [2, 6, 10, 64, 30]), (RopeKind::Glm2d, [4, 8, 12, 64, 20])] {
            for d in dims {
                cases.push(case(kind, inverse, [1, 1, 1, d], 1, DType::F32).grad());
                cases.push(case(kind, inverse, [2, 5, 3, d], 7, DType::F32).grad());
                for dtype in DType::FLOATS {
                    cases.push(case(kind, inverse, [2, 13, 5, d], 40, *dtype));
                }
            }
        }
    }
    // ChatGLM-6B: 32 heads of 128; LLaMA-like 12 heads of 64.
    for dtype in DType::FLOATS {
        cases.push(case(RopeKind::Glm2d, false, [1, 64, 32, 128], 2048, *dtype).bench());
        cases.push(case(RopeKind::Half, false, [1, 512, 12, 64], 512, *dtype).bench());
    }
    cases
}

#[cfg(test)]
mod tests;
