//! Mixture of experts for few tokens: the chosen experts' rows are read where they lie, so nothing is sorted, and the second
//! product sums a token's experts itself.

use std::any::Any;

use super::moe::routing;
use super::quant_matmul::MAX_K;
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::cuda::LOWEST_ARCH;
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, source};
use crate::op::{Array, Case, Cost, Family, Fill, Op, Tolerance};
use crate::shape::{self, Meta};

pub static FAMILY: Family = Family { name: "moe_gather", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("moe_gather");
const BLOCK: u32 = 64;
/// Tokens up to which a GPU reads experts token by token; more are worth sorting.
const FEW: usize = 16;
/// Threads that share an output of the CUDA rung, and threads of its blocks.
const WARP: usize = 32;
const WARP_BLOCK: usize = 128;

/// Which of the two products of a split feed-forward block.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Gathered {
    /// Sums a token's experts: x has a row for each slot and y one for each token. Else x has a row for each token.
    pub sum: bool,
    pub relu: bool,
    /// Slots whose gate is not above this are not executed.
    pub threshold: Option<f32>,
}

/// With e the expert that token t chose j-th, z(t, j) = W[e] x[row]. Without `sum` y[t k + j] = f(z(t, j) + b[e]), 0 where
/// nothing is executed; with it y[t] = f(sum_j z(t, j) + b), f ReLU or nothing. Inputs x `[m, d]` (`[m k, d]` with `sum`), weight
/// `[E, n, d]`, bias `[E, n]` (`[n]`) of one float type, `indices u32 [m, k]` (, `gates f32 [m, k]` with a threshold) of
/// [`super::moe::MoeGate`]; an index past the last expert is none. Output `[m k, n]` (`[m, n]`). Inference only: a training's rows
/// are many, and the grouped products have gradients.
#[derive(Clone, Copy, Debug)]
pub struct GatheredMatmul(pub Gathered);

/// The int8 form: `xq i8`, `xs f32 [rows]`, `wq i8 [E, n, d]`, `ws f32 [E, n]`, bias f32, indices (, gates), with exact int32 sums
/// for each expert. Output f32.
#[derive(Clone, Copy, Debug)]
pub struct GatheredMatmulInt8(pub Gathered);

/// m, k, n, d and experts of inputs whose weight is `weight` and whose indices come after `bias`.
fn extents(inputs: &[Meta], weight: usize) -> Option<[usize; 5]> {
    let indices = inputs.get(if weight == 1 { 3 } else { 5 })?;
    match (inputs.get(weight)?.dims(), indices.dims()) {
        (&[experts, n, d], &[m, k]) if k >= 1 && indices.dtype == DType::U32 => Some([m, k, n, d, experts]),
        _ => None,
    }
}

impl Gathered {
    fn infer(self, op: &'static str, inputs: &[Meta], weight: usize) -> Result<Vec<Meta>> {
        let rule = if weight == 1 {
            "x [m or m k, d], weight [E, n, d], bias [E, n] or [n] of one float type, indices u32 [m, k] (, gates f32 [m, k])"
        } else {
            "xq i8 [m or m k, d], xs f32 [rows], wq i8 [E, n, d], ws f32 [E, n], bias f32 [E, n] or [n], indices u32 [m, k] (, gates f32 [m, k])"
        };
        let refuse = || Error::Shape { op, rule, got: format!("{} for {self:?}", shape::list(inputs)) };
        let [m, k, n, d, experts] = extents(inputs, weight).ok_or_else(refuse)?;
        let (x, bias) = (&inputs[0], &inputs[if weight == 1 { 2 } else { 4 }]);
        let rows = m.checked_mul(if self.sum { k } else { 1 }).ok_or_else(refuse)?;
        let dims: &[usize] = if self.sum { &[n] } else { &[experts, n] };
        let types = if weight == 1 {
            x.dtype.is_float() && inputs[1].dtype == x.dtype && bias.dtype == x.dtype
        } else {
            let scales = inputs[1].dims() == [rows] && inputs[3].dims() == [experts, n];
            let floats = [1, 3, 4].iter().all(|&i| inputs[i].dtype == DType::F32);
            x.dtype == DType::I8 && inputs[2].dtype == DType::I8 && scales && floats && d <= MAX_K
        };
        let last = if weight == 1 { 4 } else { 6 };
        let gates = match (self.threshold, &inputs[last..]) {
            (None, []) => true,
            (Some(_), [gates]) => gates.dims() == [m, k] && gates.dtype == DType::F32,
            _ => false,
        };
        if !types || !gates || x.dims() != [rows, d] || bias.dims() != dims || experts == 0 {
            return Err(refuse());
        }
        let dtype = if weight == 1 { x.dtype } else { DType::F32 };
        Ok(vec![Meta::new(&[if self.sum { m } else { m * k }, n], dtype)?])
    }

    fn params(self, inputs: &[Meta], weight: usize) -> Params {
        let [m, k, n, d, experts] = extents(inputs, weight).unwrap_or_default();
        let skips = self.threshold.is_some();
        let words = Params::new().u(m).u(n).u(d).u(k).u(experts).flag(self.sum).flag(self.relu).flag(skips);
        words.f(self.threshold.unwrap_or(0.0))
    }

    /// `row(x row, weight row)`: a dot product, scaled where it is one of integers.
    fn reference(self, inputs: &[Array], weight: usize, row: impl Fn(usize, usize) -> f64) -> Vec<Vec<f64>> {
        let (indices, bias) = (&inputs[if weight == 1 { 3 } else { 5 }], &inputs[if weight == 1 { 2 } else { 4 }].data);
        let ([experts, n, _], k) = ([0, 1, 2].map(|axis| inputs[weight].dims()[axis]), indices.dims()[1]);
        let gates = self.threshold.map(|threshold| (f64::from(threshold), &inputs[inputs.len() - 1].data));
        let f = |z: f64| if self.relu { z.max(0.0) } else { z };
        let expert = |slot: usize| {
            let above = gates.is_none_or(|(threshold, gates)| gates[slot] > threshold);
            (above && indices.data[slot] < experts as f64).then_some(indices.data[slot] as usize)
        };
        let slots = indices.data.len();
        let y = if self.sum {
            let token = |t: usize| {
                let own = || (t * k..(t + 1) * k).filter_map(|s| Some((s, expert(s)?)));
                let sum = |c: usize| own().map(|(s, e)| row(s, e * n + c)).sum::<f64>();
                (0..n).map(|c| f(sum(c) + bias[c])).collect::<Vec<_>>()
            };
            (0..slots / k).flat_map(token).collect()
        } else {
            let slot = |s: usize| match expert(s) {
                Some(e) => (0..n).map(|c| f(row(s / k, e * n + c) + bias[e * n + c])).collect(),
                None => vec![0.0; n],
            };
            (0..slots).flat_map(slot).collect()
        };
        vec![y]
    }

    fn cost(self, inputs: &[Meta], outputs: &[Meta], weight: usize) -> Cost {
        let [m, k, n, d, experts] = extents(inputs, weight).unwrap_or_default();
        // How many experts are chosen is not known from shapes: at most one per slot.
        let used = experts.min(m * k) as f64 / experts.max(1) as f64;
        let moved = (inputs[0].bytes() + outputs[0].bytes()) as f64 + used * inputs[weight].bytes() as f64;
        Cost { flops: 2.0 * (m * k * n) as f64 * d as f64, bytes: moved }
    }
}

fn dot(x: &Array, w: &Array, row: usize, column: usize) -> f64 {
    let d = x.dims()[1];
    x.data[row * d..][..d].iter().zip(&w.data[column * d..][..d]).map(|(a, b)| a * b).sum()
}

impl Op for GatheredMatmul {
    fn name(&self) -> &'static str {
        "gathered_matmul"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        self.0.infer(self.name(), inputs, 1)
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        self.0.reference(inputs, 1, |row, column| dot(&inputs[0], &inputs[1], row, column))
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("gathered_matmul_fwd", DType::FLOATS, cpu::gathered_matmul),
            warp("gathered_matmul_fwd_warp", DType::FLOATS),
            gpu("gathered_matmul_fwd", DType::FLOATS),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        self.0.params(inputs, 1)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        self.0.cost(inputs, outputs, 1)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for GatheredMatmulInt8 {
    fn name(&self) -> &'static str {
        "gathered_matmul_int8"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        self.0.infer(self.name(), inputs, 2)
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (xs, ws) = (&inputs[1].data, &inputs[3].data);
        let scaled = |row: usize, column: usize| dot(&inputs[0], &inputs[2], row, column) * xs[row] * ws[column];
        self.0.reference(inputs, 2, scaled)
    }

    fn kernels(&self) -> &'static [Kernel] {
        const F32: &[DType] = &[DType::F32];
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("gathered_matmul_int8_fwd", F32, cpu::gathered_matmul_int8),
            warp("gathered_matmul_int8_fwd_warp", F32),
            gpu("gathered_matmul_int8_fwd", F32),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        self.0.params(inputs, 2)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        self.0.cost(inputs, outputs, 2)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const fn gpu(entry: &'static str, dtypes: &'static [DType]) -> Kernel {
    Kernel { name: entry, code: Code::Gpu { source: SOURCE, entry, constants: &[] }, dtypes, fits: few, plan }
}

/// A warp for each output, which reads its weight row side by side.
const fn warp(entry: &'static str, dtypes: &'static [DType]) -> Kernel {
    let code = Code::Cuda { source: SOURCE, entry, constants: &[], arch: LOWEST_ARCH, tensor: &[] };
    Kernel { name: entry, code, dtypes, fits: few, plan: plan_warp }
}

/// Iterations of one invocation.
fn trips(p: &Problem) -> usize {
    let words = p.params();
    let [d, k, sum] = [2, 3, 5].map(|i| words.words()[i] as usize);
    if sum == 1 { k * (d + 1) } else { d + 1 }
}

/// Few tokens; software adapters take any number of integers, where sorting was measured to cost twice the time (floats: half).
fn few(p: &Problem) -> bool {
    let tokens = p.params().words()[0] as usize;
    let any = p.info.software && p.op::<GatheredMatmulInt8>().is_some();
    (tokens <= FEW || any) && p.info.limits.loop_budget.is_none_or(|budget| trips(p) as u64 <= budget)
}

/// Gates have a slot whether there are any or not: without them it holds x, which is not read there.
fn slots(p: &Problem) -> Vec<usize> {
    let inputs = p.inputs.len();
    let gates = p.params().words()[7] == 1;
    let before = inputs - usize::from(gates);
    (0..before).chain([if gates { before } else { 0 }, inputs]).collect()
}

fn plan(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.outputs[0].count(), BLOCK, p.params()).slots(&slots(p)).trips(trips(p)))
}

fn plan_warp(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.outputs[0].count() * WARP, WARP_BLOCK as u32, p.params()).slots(&slots(p)))
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (m, experts, k, n, d) in [
        (1, 1, 1, 1, 1),
        (1, 8, 2, 5, 7),
        (1, 12, 6, 32, 96),
        (1, 12, 12, 96, 32),
        (3, 4, 4, 6, 5),
        (4, 7, 3, 17, 33),
        (9, 40, 2, 16, 24),
        (40, 6, 3, 17, 64),
        (70, 3, 2, 40, 36),
        // More than one block of tokens, long rows, and experts that many tokens share.
        (300, 3, 2, 70, 300),
        (257, 2, 2, 33, 1100),
        (600, 2, 1, 33, 40),
    ] {
        let route = routing(m, k, experts);
        for (sum, relu, skips, any) in [
            (false, true, false, false),
            (true, false, false, false),
            (false, false, true, false),
            (true, true, true, false),
            (true, false, false, true),
            (false, true, true, true),
        ] {
            let op = Gathered { sum, relu, threshold: skips.then_some(0.25) };
            let rows = if sum { m * k } else { m };
            let bias: &[usize] = if sum { &[n] } else { &[experts, n] };
            // Also experts that do not exist, which are none.
            let indices = || match any {
                true => Fill::Integers { low: 0, high: experts as i64 },
                false => Fill::Values(route.indices.clone()),
            };
            let rest = |case: Case| {
                let case = case.input(&[m, k], DType::U32, indices());
                let case = if skips { case.normal(&[m, k], DType::F32) } else { case };
                if any { case.variant("any expert") } else { case }
            };
            let terms = if sum { k * d } else { d };
            for &dtype in if n % 8 == 0 { DType::FLOATS } else { &[DType::F32][..] } {
                let case = Case::new(GatheredMatmul(op), Tolerance::Contraction { k: terms });
                let case = case.normal(&[rows, d], dtype).normal(&[experts, n, d], dtype).normal(bias, dtype);
                cases.push(rest(case));
            }
            let bytes = || Fill::Integers { low: -127, high: 127 };
            let scales = || Fill::Uniform { low: 1e-3, high: 2e-2 };
            let case = Case::new(GatheredMatmulInt8(op), Tolerance::Contraction { k: if sum { 4 * k } else { 4 } })
                .input(&[rows, d], DType::I8, bytes())
                .input(&[rows], DType::F32, scales())
                .input(&[experts, n, d], DType::I8, bytes())
                .input(&[experts, n], DType::F32, scales())
                .normal(bias, DType::F32);
            cases.push(rest(case));
        }
    }
    // Both matrices of GPT-2 small's FFN as 96 experts of 32, a quarter of them chosen, over one token.
    let (k, experts) = (24, 96);
    let route = routing(1, k, experts);
    for (sum, rows, n, d) in [(false, 1, 32, 768), (true, k, 768, 32)] {
        let bias: &[usize] = if sum { &[n] } else { &[experts, n] };
        let op = Gathered { sum, relu: !sum, threshold: None };
        let case = Case::new(GatheredMatmul(op), Tolerance::Contraction { k: 768 }).normal(&[rows, d], DType::F32);
        let case = case.normal(&[experts, n, d], DType::F32).normal(bias, DType::F32);
        cases.push(case.input(&[1, k], DType::U32, Fill::Values(route.indices.clone())).bench());
    }
    cases
}
