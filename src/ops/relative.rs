//! Additive attention bias by bucketed distance (T5, Raffel et al. 2020): near distances have a bucket each, farther ones
//! share buckets that grow with their logarithm.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, source};
use crate::op::{Array, Case, Cost, Family, Fill, Gradient, Op, Saves, Tolerance};
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "relative", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("relative");
const BLOCK: u32 = 64;

/// Where the queries and keys of a bias stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub queries: usize,
    pub keys: usize,
    /// Position of the first query; keys start at 0.
    pub query_offset: usize,
    /// Keys after the query have the second half of the buckets; else they have the bucket of distance 0.
    pub both_sides: bool,
}

/// bias[h, t, s] = table[h, bucket(s - t - query_offset)]: the bias that [`super::attention::Attention`] adds to its scores.
///
/// Inputs: table `[H, buckets]`; ids u32 `[R]` from [`buckets`], the bucket of each distance (farther ones have the last).
/// Output: `[H, T, S]`. A bucket beyond the table is its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelativeBias(pub Span);

/// dtable[h, b] = sum of dbias[h, t, s] over the pairs of bucket b: first along diagonals, then over the diagonals of a
/// bucket, in f32. Inputs: dbias `[H, T, S]`, ids u32 `[R]`. Output: `[H, buckets]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelativeBiasBackward {
    pub span: Span,
    pub buckets: usize,
}

/// Bucket of every distance from 0 to `farthest`, of `count` buckets in one direction: the first half one distance each, the
/// others by the logarithm, `farthest` and beyond the last (Raffel et al. 2020; 16 and 128 there for each side).
pub fn buckets(count: usize, farthest: usize) -> Vec<u32> {
    let near = (count / 2).max(1);
    let growth = (farthest.max(near + 1) as f64 / near as f64).ln();
    let bucket = |distance: usize| {
        if distance < near {
            return distance as u32;
        }
        let share = (distance as f64 / near as f64).ln() / growth;
        // Where a bucket starts at a whole distance, the logarithm's last bit must not decide.
        let further = (share * (count - near) as f64 + 1e-9).floor() as usize;
        (near + further).min(count.saturating_sub(1)) as u32
    };
    (0..=farthest).map(bucket).collect()
}

impl Span {
    /// Keys behind, at and before a query come as diagonals: `g = s - t + queries - 1`.
    fn diagonals(&self) -> usize {
        self.queries + self.keys - 1
    }

    fn check(&self, op: &'static str) -> Result<()> {
        let most = i32::MAX as usize;
        let sizes = [self.queries, self.keys];
        if sizes.contains(&0) || sizes.iter().chain([&self.query_offset]).any(|&n| n >= most / 4) {
            return Err(Error::Parameter {
                op,
                parameter: "span",
                value: format!("{self:?}"),
                allowed: "queries and keys from 1, positions below 2^29",
            });
        }
        Ok(())
    }

    /// Bucket of a pair, from the definition.
    fn bucket(&self, t: usize, s: usize, ids: &[f64], buckets: usize) -> usize {
        let distance = s as i64 - (t + self.query_offset) as i64;
        let side = if distance > 0 && self.both_sides { buckets / 2 } else { 0 };
        let reach = if distance > 0 && !self.both_sides { 0 } else { distance.unsigned_abs() as usize };
        (ids[reach.min(ids.len() - 1)] as usize + side).min(buckets - 1)
    }

    /// H, T, S, buckets, length of the ids, offset, both sides.
    fn params(&self, heads: usize, buckets: usize, ids: usize) -> Params {
        let sizes = Params::new().u(heads).u(self.queries).u(self.keys).u(buckets).u(ids);
        sizes.u(self.query_offset).u(usize::from(self.both_sides))
    }
}

fn check_ids(op: &'static str, inputs: &[Meta]) -> Result<()> {
    match inputs {
        [x, ids] if x.dtype.is_float() && ids.dtype == DType::U32 && ids.dims().len() == 1 && ids.count() > 0 => Ok(()),
        _ => {
            Err(Error::Shape { op, rule: "a float tensor and u32 ids [R] with R at least 1", got: shape::list(inputs) })
        }
    }
}

impl Op for RelativeBias {
    fn name(&self) -> &'static str {
        "relative_bias"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check_ids(self.name(), inputs)?;
        self.0.check(self.name())?;
        match inputs[0].dims() {
            &[heads, buckets] if heads > 0 && buckets > 0 => {
                Ok(vec![Meta::new(&[heads, self.0.queries, self.0.keys], inputs[0].dtype)?])
            }
            _ => Err(Error::Shape { op: self.name(), rule: "table [H, buckets]", got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (heads, buckets) = (inputs[0].dims()[0], inputs[0].dims()[1]);
        let mut bias = Vec::with_capacity(heads * self.0.queries * self.0.keys);
        for h in 0..heads {
            for t in 0..self.0.queries {
                let row = (0..self.0.keys).map(|s| self.0.bucket(t, s, &inputs[1].data, buckets));
                bias.extend(row.map(|b| inputs[0].data[h * buckets + b]));
            }
        }
        vec![bias]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("relative_fwd", DType::FLOATS, cpu::relative_bias),
            gpu("relative_fwd", fits_bindings, forward),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        self.0.params(inputs[0].dims()[0], inputs[0].dims()[1], inputs[1].count())
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[1], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let back = RelativeBiasBackward { span: self.0, buckets: g.input_metas[0].dims()[1] };
        Ok(vec![Some(g.one(&back, &[g.grad(0)?, g.input(1)?])?), None])
    }

    fn cost(&self, _: &[Meta], outputs: &[Meta]) -> Cost {
        Cost { flops: 0.0, bytes: outputs[0].bytes() as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for RelativeBiasBackward {
    fn name(&self) -> &'static str {
        "relative_bias_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check_ids(self.name(), inputs)?;
        self.span.check(self.name())?;
        match inputs[0].dims() {
            &[heads, t, s] if heads > 0 && (t, s) == (self.span.queries, self.span.keys) && self.buckets > 0 => {
                Ok(vec![Meta::new(&[heads, self.buckets], inputs[0].dtype)?])
            }
            _ => Err(Error::Shape {
                op: self.name(),
                rule: "dbias [H, T, S] of the span, and at least 1 bucket",
                got: shape::list(inputs),
            }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (heads, Span { queries, keys, .. }) = (inputs[0].dims()[0], self.span);
        let mut table = vec![0.0; heads * self.buckets];
        for (place, dbias) in inputs[0].data.iter().enumerate() {
            let (h, t, s) = (place / (queries * keys), place / keys % queries, place % keys);
            table[h * self.buckets + self.span.bucket(t, s, &inputs[1].data, self.buckets)] += dbias;
        }
        vec![table]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("relative_bwd", DType::FLOATS, cpu::relative_bias_backward),
            gpu("relative_bwd_diagonals", fits_backward, backward),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        self.span.params(inputs[0].dims()[0], self.buckets, inputs[1].count())
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], _: &[Meta]) -> Cost {
        Cost { flops: inputs[0].count() as f64, bytes: inputs[0].bytes() as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const fn gpu(entry: &'static str, fits: fn(&Problem) -> bool, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name: entry, code, dtypes: DType::FLOATS, fits, plan }
}

fn fits_bindings(p: &Problem) -> bool {
    p.inputs.iter().chain(p.outputs).all(|m| m.bytes() as u64 <= p.info.limits.binding_bytes)
}

fn fits_backward(p: &Problem) -> bool {
    let trips = p.op::<RelativeBiasBackward>().map_or(0, |op| op.span.diagonals() + 2);
    fits_bindings(p) && p.info.limits.loop_budget.is_none_or(|budget| trips as u64 <= budget)
}

fn forward(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.outputs[0].count(), BLOCK, p.params()))
}

/// Sums along diagonals into scratch, then of the diagonals of each bucket.
fn backward(p: &Problem) -> Plan {
    let Some(op) = p.op::<RelativeBiasBackward>() else { return Plan::default() };
    let (heads, diagonals) = (p.inputs[0].dims()[0], op.span.diagonals());
    let shortest = op.span.queries.min(op.span.keys);
    let sums = Launch::linear(heads * diagonals, BLOCK, p.params()).trips(shortest + 2).slots(&[0, 3]);
    let table = Launch::linear(p.outputs[0].count(), BLOCK, p.params()).entry("relative_bwd_buckets");
    Plan::sequence(vec![sums, table.trips(diagonals + 2).slots(&[3, 1, 2])]).scratch(heads * diagonals * 4)
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut both = |heads: usize, span: Span, count: usize, ids: Vec<u32>, dtype: DType, grad: bool| {
        let reach = ids.len();
        let values = Fill::Values(ids.into_iter().map(f64::from).collect());
        let case = Case::new(RelativeBias(span), Tolerance::Exact).normal(&[heads, count], dtype);
        let case = case.input(&[reach], DType::U32, values.clone());
        cases.push(if grad { case.grad() } else { case });
        let terms = span.queries * span.keys;
        let back = RelativeBiasBackward { span, buckets: count };
        let case = Case::new(back, Tolerance::Contraction { k: terms });
        let case = case.normal(&[heads, span.queries, span.keys], dtype);
        cases.push(case.input(&[reach], DType::U32, values));
    };
    for both_sides in [false, true] {
        let of = |count: usize| if both_sides { count / 2 } else { count };
        let span = |queries, keys, query_offset| Span { queries, keys, query_offset, both_sides };
        both(1, span(1, 1, 0), 2, buckets(of(2), 3), DType::F32, true);
        both(2, span(3, 5, 0), 4, buckets(of(4), 6), DType::F32, true);
        both(3, span(7, 4, 0), 8, buckets(of(8), 5), DType::F32, true);
        // Decoding: queries behind cached keys. An id beyond the table, and one bucket alone.
        both(2, span(1, 9, 6), 8, buckets(of(8), 20), DType::F32, true);
        both(2, span(4, 6, 3), 4, vec![0, 9, 2], DType::F32, true);
        both(2, span(4, 6, 3), 1, vec![0], DType::F32, true);
        for dtype in DType::FLOATS {
            both(3, span(33, 65, 0), 32, buckets(of(32), 128), *dtype, false);
            both(2, span(130, 127, 5), 32, buckets(of(32), 128), *dtype, false);
        }
        // Loops beyond a workgroup's reach in both launches.
        both(1, span(700, 300, 0), 32, buckets(of(32), 128), DType::F32, false);
    }
    // T5-base over 512 tokens.
    let span = Span { queries: 512, keys: 512, query_offset: 0, both_sides: true };
    both(12, span, 32, buckets(16, 128), DType::F32, false);
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    /// First distance of each bucket in the reference implementation (32 buckets of both sides, 128).
    #[test]
    fn buckets_start_where_t5s_do() {
        let ids = buckets(16, 128);
        let first = |bucket: u32| ids.iter().position(|&id| id == bucket).unwrap();
        let starts: Vec<usize> = (0..16).map(first).collect();
        assert_eq!(starts, [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]);
        assert_eq!((ids.len(), ids[128]), (129, 15));
        assert_eq!(buckets(1, 4), [0, 0, 0, 0, 0]);
        assert_eq!(buckets(2, 1), [0, 1]);
        assert!(buckets(40, 3).is_sorted());
    }

    #[test]
    fn sides_and_shapes() {
        let span = Span { queries: 2, keys: 3, query_offset: 1, both_sides: true };
        // Query 0 stands at 1: keys at -1, 0, +1.
        let ids = [0.0, 1.0];
        assert_eq!((0..3).map(|s| span.bucket(0, s, &ids, 4)).collect::<Vec<_>>(), [1, 0, 3]);
        let behind = Span { both_sides: false, ..span };
        assert_eq!((0..3).map(|s| behind.bucket(1, s, &ids, 2)).collect::<Vec<_>>(), [1, 1, 0]);
        let table = Meta::new(&[2, 4], DType::F32).unwrap();
        let ids = Meta::new(&[2], DType::U32).unwrap();
        assert!(RelativeBias(span).infer(&[table, ids]).is_ok());
        assert!(RelativeBias(span).infer(&[table, table]).is_err());
        assert!(RelativeBias(Span { keys: 0, ..span }).infer(&[table, ids]).is_err());
    }
}
