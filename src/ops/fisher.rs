//! Rank-one updates of inverse matrices in blocks: the inverse of an empirical Fisher matrix, gradient by gradient.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, source};
use crate::op::{Array, Case, Cost, Family, Fill, Op, Tolerance};
use crate::shape::{self, Meta, Shape};

pub static FAMILY: Family = Family { name: "fisher", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("fisher");

/// One more gradient in the inverse of a block-diagonal Fisher matrix (WoodFisher, Singh and Alistarh 2020, with the
/// formula of Sherman and Morrison): for each block F <- F - (F g)(F g)^T / (count + g^T F g).
///
/// Inputs f32: inverses F `[blocks, B, B]`, symmetric, in place; gradients g `[blocks, B]`. No gradient rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RankOneInverse {
    /// Number of gradients that the matrix averages over.
    pub count: f32,
}

/// Largest block: a row of threads handles one.
pub const MAX_BLOCK: usize = 128;

impl Op for RankOneInverse {
    fn name(&self) -> &'static str {
        "rank_one_inverse"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "f32 F [blocks, B, B] and g [blocks, B] with B from 1 to 128";
        match inputs {
            [f, g] if [f, g].iter().any(|m| m.dtype != DType::F32) => {
                Err(Error::Dtype { op: self.name(), expected: "f32", got: shape::list(inputs) })
            }
            [f, g] => match (f.dims(), g.dims()) {
                (&[n, b, c], &[m, d]) if n == m && b == c && c == d && (1..=MAX_BLOCK).contains(&b) => Ok(vec![*f]),
                _ => Err(Error::Shape { op: self.name(), rule, got: shape::list(inputs) }),
            },
            _ => Err(Error::Shape { op: self.name(), rule, got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let b = inputs[1].dims()[1];
        let mut inverses = inputs[0].data.clone();
        for (f, g) in inverses.chunks_mut(b * b).zip(inputs[1].data.chunks(b)) {
            let fg: Vec<f64> = f.chunks(b).map(|row| row.iter().zip(g).map(|(f, g)| f * g).sum()).collect();
            let divisor = f64::from(self.count) + fg.iter().zip(g).map(|(fg, g)| fg * g).sum::<f64>();
            for (row, a) in f.chunks_mut(b).zip(&fg) {
                row.iter_mut().zip(&fg).for_each(|(f, b)| *f -= a * b / divisor);
            }
        }
        vec![inverses]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const CODE: Code = Code::Gpu { source: SOURCE, entry: "rank_one_inverse", constants: &[] };
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("rank_one_inverse", &[DType::F32], cpu::rank_one_inverse),
            Kernel { name: "rank_one_inverse", code: CODE, dtypes: &[DType::F32], fits: bindable, plan },
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[1].dims()[0]).u(inputs[1].dims()[1]).f(self.count)
    }

    fn aliases(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], _: &[Meta]) -> Cost {
        let elements = inputs[0].count() as f64;
        Cost { flops: 4.0 * elements, bytes: 8.0 * elements }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn bindable(p: &Problem) -> bool {
    p.inputs[0].bytes() as u64 <= p.info.limits.binding_bytes
}

fn plan(p: &Problem) -> Plan {
    let &[blocks, b] = p.inputs[1].dims() else {
        return Plan::default();
    };
    Plan::of(Launch::linear(blocks, 1, p.params()).trips(2 * b * b.div_ceil(64) + 3 * b))
}

/// Symmetric positive matrices: the identity and a product with itself.
fn positive(seed: u64, shape: &Shape) -> Vec<f64> {
    let b = shape.last();
    let mut stream = crate::rng::Stream::new(seed, 0xf15e);
    let mut values = Vec::with_capacity(shape.count());
    for _ in 0..shape.count() / (b * b).max(1) {
        let v: Vec<f64> = (0..b).map(|_| stream.normal()).collect();
        values.extend((0..b * b).map(|i| f64::from(u8::from(i / b == i % b)) + v[i / b] * v[i % b] / b as f64));
    }
    values
}

fn cases() -> Vec<Case> {
    let case = |blocks: usize, b: usize, count: f32| {
        let case = Case::new(RankOneInverse { count }, Tolerance::Contraction { k: 2 * b });
        let case = case.input(&[blocks, b, b], DType::F32, Fill::Custom(positive)).normal(&[blocks, b], DType::F32);
        // A difference of the inverse and the update.
        case.terms(1.0)
    };
    let sizes = [(1, 1), (5, 1), (3, 2), (7, 5), (2, 32), (3, 50), (4, 63), (9, 64), (2, 65), (1, 128), (300, 4)];
    let mut cases: Vec<Case> = sizes.into_iter().flat_map(|(n, b)| [case(n, b, 1.0), case(n, b, 1024.0)]).collect();
    // 192 rows of a matrix of GPT-2 small in blocks of 64.
    cases.push(case(2304, 64, 1024.0).bench());
    cases
}
