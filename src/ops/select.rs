//! Selection: which elements of each row are the largest. What masks are made from.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, source};
use crate::op::{Array, Case, Cost, Family, Fill, Op, Tolerance};
use crate::shape::{self, Meta};

pub static FAMILY: Family = Family { name: "select", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("select");
const BLOCK: u32 = 64;
/// Elements of a row that one workgroup counts.
const CHUNK: usize = 4096;
/// Rows up to this long are ranked element by element.
const RANKED: usize = 64;

/// x f32 `[g, n]` to f32 `[g, n]`: 1 for the `keep` largest elements of each row (by |x| where `magnitude`), else 0. Exactly
/// `keep` are chosen whatever the values: the lower index wins ties, -0 equals 0, and a NaN is smaller than everything.
/// A choice, not a function with a slope: it has no gradient.
#[derive(Clone, Copy, Debug)]
pub struct KeepLargest {
    /// 0 to n.
    pub keep: usize,
    pub magnitude: bool,
}

impl Op for KeepLargest {
    fn name(&self) -> &'static str {
        "keep_largest"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs {
            [x] if x.dtype != DType::F32 => Err(Error::Dtype { op: self.name(), expected: "f32", got: x.to_string() }),
            [x] if x.shape.rank() == 2 && self.keep <= x.shape.last() => Ok(vec![*x]),
            _ => {
                let got = format!("{} with keep {}", shape::list(inputs), self.keep);
                Err(Error::Shape { op: self.name(), rule: "x [g, n] and keep at most n", got })
            }
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (x, n) = (&inputs[0].data, inputs[0].dims()[1]);
        let mut mask = vec![0.0; x.len()];
        if n == 0 {
            return vec![mask];
        }
        let size = |x: f64| if self.magnitude { x.abs() } else { x };
        for (x, mask) in x.chunks(n).zip(mask.chunks_mut(n)) {
            let mut order: Vec<usize> = (0..n).collect();
            // A stable sort: among equals the lower index stays first.
            order.sort_by(|&a, &b| match (x[a].is_nan(), x[b].is_nan()) {
                (false, false) => size(x[b]).partial_cmp(&size(x[a])).unwrap_or(std::cmp::Ordering::Equal),
                (a, b) => a.cmp(&b),
            });
            order[..self.keep].iter().for_each(|&i| mask[i] = 1.0);
        }
        vec![mask]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("keep_largest", &[DType::F32], cpu::keep_largest),
            Kernel { fits: short, ..gpu("keep_largest_ranked", "keep_largest_ranked", plan_ranked) },
            gpu("keep_largest_radix", "keep_largest_write", plan_radix),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let [rows, n] = [inputs[0].dims()[0], inputs[0].dims()[1]];
        Params::new().u(rows).u(n).u(self.keep).flag(self.magnitude)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], _: &[Meta]) -> Cost {
        // Four passes over the digits of the keys, one that writes.
        Cost { flops: 4.0 * inputs[0].count() as f64, bytes: 24.0 * inputs[0].count() as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// 1 where x > threshold, else 0; x f32 `[..]`. NaN is above nothing. No gradient.
#[derive(Clone, Copy, Debug)]
pub struct Above {
    pub threshold: f32,
}

impl Op for Above {
    fn name(&self) -> &'static str {
        "above"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs {
            [x] if x.dtype == DType::F32 => Ok(vec![*x]),
            [x] => Err(Error::Dtype { op: "above", expected: "f32", got: x.to_string() }),
            _ => Err(Error::Shape { op: "above", rule: "one input", got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let above = |&x: &f64| f64::from(u8::from(x > f64::from(self.threshold)));
        vec![inputs[0].data.iter().map(above).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("above", &[DType::F32], cpu::above), gpu("above", "above", plan_above)];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].count()).f(self.threshold)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const fn gpu(name: &'static str, entry: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name, code, dtypes: &[DType::F32], fits: bindable, plan }
}

fn bindable(p: &Problem) -> bool {
    p.inputs[0].bytes() as u64 <= p.info.limits.binding_bytes
}

fn short(p: &Problem) -> bool {
    bindable(p) && p.inputs[0].shape.last() <= RANKED
}

fn plan_above(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.inputs[0].count(), BLOCK, p.params()))
}

fn plan_ranked(p: &Problem) -> Plan {
    // The block that the radix entries share.
    let params = p.params().u(1).u(0);
    Plan::of(Launch::linear(p.inputs[0].count(), BLOCK, params).trips(p.inputs[0].shape.last()))
}

/// Four times count and choose a digit of 8 bits, the highest first; then write. Arguments: x, mask, counts, state.
fn plan_radix(p: &Problem) -> Plan {
    let (rows, chunks) = (p.inputs[0].shape.rows(), p.inputs[0].shape.last().div_ceil(CHUNK));
    let params = |shift| p.params().u(chunks).u(shift);
    let groups = |count: usize, shift| Launch::linear(count, 1, params(shift));
    let per_lane = CHUNK / BLOCK as usize;
    let digit = |shift: usize| {
        let count = groups(rows * chunks, shift).entry("keep_largest_count").slots(&[0, 2, 3]).trips(per_lane);
        let choose = groups(rows, shift).entry("keep_largest_digit").slots(&[2, 3]).trips(chunks.max(256));
        [count, choose]
    };
    let mut launches: Vec<Launch> = [24, 16, 8, 0].into_iter().flat_map(digit).collect();
    let write = groups(rows * chunks, 0).entry("keep_largest_write");
    launches.push(write.trips(3 * per_lane + chunks.div_ceil(BLOCK as usize)));
    Plan::sequence(launches).scratch(rows * chunks * 256 * 4).scratch(rows * 8)
}

/// Few values, all with their negatives, zeros of both signs, infinities and NaN.
fn awkward(seed: u64, shape: &crate::shape::Shape) -> Vec<f64> {
    let mut stream = crate::rng::Stream::new(seed, 0x5e1e);
    let values = [0.0, -0.0, 1.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e-40, -1e-40, 2.5];
    (0..shape.count()).map(|_| values[stream.below(values.len())]).collect()
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let ties = Fill::Integers { low: -2, high: 2 };
    for [rows, n] in [[1, 1], [1, 2], [3, 7], [2, 64], [5, 65], [1, 1000], [4, 4099], [2, 70_001]] {
        for magnitude in [false, true] {
            // Of one element both are the same case.
            for keep in [n / 3, n - 1].into_iter().take(n) {
                let case = || Case::new(KeepLargest { keep, magnitude }, Tolerance::Exact);
                cases.push(case().normal(&[rows, n], DType::F32));
                cases.push(case().input(&[rows, n], DType::F32, ties.clone()).variant("ties"));
                cases.push(case().input(&[rows, n], DType::F32, Fill::Custom(awkward)).variant("awkward"));
            }
        }
    }
    for keep in [0, 65] {
        let case = Case::new(KeepLargest { keep, magnitude: false }, Tolerance::Exact);
        cases.push(case.input(&[3, 65], DType::F32, ties.clone()).variant("none or all"));
    }
    for n in [1, 63, 65, 4099] {
        for threshold in [0.25, f32::NEG_INFINITY, f32::INFINITY, 0.0] {
            let case = || Case::new(Above { threshold }, Tolerance::Exact);
            cases.push(case().normal(&[n], DType::F32));
            cases.push(case().input(&[n], DType::F32, Fill::Custom(awkward)).variant("awkward"));
        }
    }
    // Groups of four, as 2:4 has them.
    cases.push(Case::new(KeepLargest { keep: 2, magnitude: true }, Tolerance::Exact).normal(&[9000, 4], DType::F32));
    // GPT-2 small's second feed-forward matrix at a tenth of its weights.
    let matrix = Case::new(KeepLargest { keep: 235_929, magnitude: true }, Tolerance::Exact);
    cases.push(matrix.normal(&[1, 2_359_296], DType::F32).bench());
    cases
}
