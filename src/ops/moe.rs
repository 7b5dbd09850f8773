//! Mixture of experts, routing: which experts a token takes, slots sorted by expert, results summed back per token.
//!
//! A *slot* is token x k + j, the j-th choice of a token. Sorted order groups slots by expert, so that each expert is one
//! dense product over its rows and work that no token asked for is never done.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, always, source};
use crate::op::{Array, Case, Cost, Family, Fill, Gradient, Op, Saves, Tolerance};
use crate::shape::{self, Meta, Shape};
use crate::tensor::Tensor;

pub use super::moe_matmul::{GroupedBackwardInput, GroupedBackwardWeight, GroupedMatmul, GroupedMatmulInt8};

pub static FAMILY: Family = Family { name: "moe", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("moe");
const BLOCK: u32 = 64;

/// Scores `[m, E]` to the k experts of each row: `indices u32 [m, k]` by falling score (the lowest index wins ties, NaN
/// comes last), and `gate f32 [m, k]`, their scores. Gradient: what flows to a gate goes to the score it came from.
#[derive(Clone, Copy, Debug)]
pub struct MoeGate {
    pub k: usize,
}

/// dscores `[m, E]` in `dtype` from indices and `dgate f32 [m, k]`; zero where no gate looked.
#[derive(Clone, Copy, Debug)]
pub struct MoeGateBackward {
    pub experts: usize,
    pub dtype: DType,
}

/// Indices `[m, k]` to `order u32 [m k]` (slots sorted by expert, in rising order within one) and `offsets u32 [E + 1]`
/// (expert e has sorted rows offsets[e] .. offsets[e + 1]). An index past the last expert counts as the last.
#[derive(Clone, Copy, Debug)]
pub struct MoeDispatch {
    pub experts: usize,
}

/// Sorted rows y `[m k, d]`, `order` (, `gate f32 [m, k]` when weighted) to `[m, d]`: each token's k rows, times their
/// gates, summed in the order of its choices. MoEfication takes the unweighted sum.
#[derive(Clone, Copy, Debug)]
pub struct MoeCombine {
    pub k: usize,
    pub weighted: bool,
}

/// dout `[m, d]`, order (, gate, y) to dy `[m k, d]` (, `dgate f32 [m, k]`).
#[derive(Clone, Copy, Debug)]
pub struct MoeCombineBackward {
    pub k: usize,
    pub weighted: bool,
}

/// Errors unless `order` is `u32 [rows]`.
pub(super) fn is_order(meta: &Meta, rows: usize) -> bool {
    meta.dims() == [rows] && meta.dtype == DType::U32
}

impl Op for MoeGate {
    fn name(&self) -> &'static str {
        "moe_gate"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "float scores [m, E] with 1 <= k <= E";
        let refuse = || Error::Shape { op: self.name(), rule, got: format!("{}, k {}", shape::list(inputs), self.k) };
        let [scores] = inputs else { return Err(refuse()) };
        match *scores.dims() {
            [m, experts] if self.k >= 1 && self.k <= experts && scores.dtype.is_float() => {
                Ok(vec![Meta::new(&[m, self.k], DType::U32)?, Meta::new(&[m, self.k], DType::F32)?])
            }
            _ => Err(refuse()),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let experts = inputs[0].dims()[1];
        let (mut indices, mut gates) = (Vec::new(), Vec::new());
        for row in inputs[0].data.chunks(experts) {
            let mut order: Vec<usize> = (0..experts).collect();
            let last = |x: f64| if x.is_nan() { f64::NEG_INFINITY } else { x };
            let falling = |&a: &usize, &b: &usize| {
                let nan = row[a].is_nan().cmp(&row[b].is_nan());
                nan.then(last(row[b]).partial_cmp(&last(row[a])).unwrap_or(std::cmp::Ordering::Equal))
            };
            order.sort_by(falling);
            indices.extend(order[..self.k].iter().map(|&e| e as f64));
            gates.extend(order[..self.k].iter().map(|&e| row[e]));
        }
        vec![indices, gates]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("moe_gate_fwd", DType::FLOATS, cpu::moe_gate),
            wgsl("moe_gate_fwd", DType::FLOATS, plan_gate),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].dims()[0]).u(self.k).u(inputs[0].dims()[1])
    }

    /// Indices come first and carry no gradient; the gate does.
    fn differentiable(&self) -> usize {
        2
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[], outputs: &[0] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let backward = MoeGateBackward { experts: g.input_metas[0].dims()[1], dtype: g.input_metas[0].dtype };
        Ok(vec![Some(g.one(&backward, &[g.output(0)?, g.grad(1)?])?)])
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for MoeGateBackward {
    fn name(&self) -> &'static str {
        "moe_gate_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs {
            [indices, dgate]
                if indices.shape.rank() == 2
                    && indices.shape == dgate.shape
                    && indices.dtype == DType::U32
                    && dgate.dtype == DType::F32
                    && self.dtype.is_float() =>
            {
                Ok(vec![Meta::new(&[indices.dims()[0], self.experts], self.dtype)?])
            }
            _ => {
                let rule = "indices u32 [m, k] and dgate f32 [m, k]";
                Err(Error::Shape { op: self.name(), rule, got: shape::list(inputs) })
            }
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (m, k) = (inputs[0].dims()[0], inputs[0].dims()[1]);
        let mut d = vec![0.0; m * self.experts];
        for (slot, (&e, &g)) in inputs[0].data.iter().zip(&inputs[1].data).enumerate() {
            d[slot / k * self.experts + e as usize] += g;
        }
        vec![d]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("moe_gate_bwd", DType::FLOATS, cpu::moe_gate_backward),
            wgsl("moe_gate_bwd", DType::FLOATS, plan_gate_backward),
        ];
        KERNELS
    }

    fn element(&self, _: &[Meta], _: &[Meta]) -> DType {
        self.dtype
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].dims()[0]).u(inputs[0].dims()[1]).u(self.experts)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for MoeDispatch {
    fn name(&self) -> &'static str {
        "moe_dispatch"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs {
            [indices] if indices.dtype == DType::U32 && self.experts >= 1 => {
                Ok(vec![Meta::new(&[indices.count()], DType::U32)?, Meta::new(&[self.experts + 1], DType::U32)?])
            }
            _ => {
                let rule = "indices u32 [m, k] and at least one expert";
                Err(Error::Shape { op: self.name(), rule, got: shape::list(inputs) })
            }
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let expert = |&slot: &usize| (inputs[0].data[slot] as usize).min(self.experts - 1);
        let mut order: Vec<usize> = (0..inputs[0].data.len()).collect();
        order.sort_by_key(expert);
        let before = |e: usize| order.iter().filter(|slot| expert(slot) < e).count() as f64;
        let offsets = (0..=self.experts).map(before).collect();
        vec![order.iter().map(|&slot| slot as f64).collect(), offsets]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const F32: &[DType] = &[DType::F32];
        const KERNELS: &[Kernel] = &[Kernel::cpu("moe_dispatch_fwd", F32, cpu::moe_dispatch), DISPATCH];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].count()).u(1).u(self.experts)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for MoeCombine {
    fn name(&self) -> &'static str {
        "moe_combine"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "y [m k, d], order u32 [m k] (, gate f32 [m, k] when weighted)";
        let refuse = || Error::Shape { op: self.name(), rule, got: format!("{}, k {}", shape::list(inputs), self.k) };
        let (y, order, gate) = match (inputs, self.weighted) {
            ([y, order], false) => (y, order, None),
            ([y, order, gate], true) => (y, order, Some(gate)),
            _ => return Err(refuse()),
        };
        let &[rows, d] = y.dims() else { return Err(refuse()) };
        if self.k == 0 || !rows.is_multiple_of(self.k) || !y.dtype.is_float() || !is_order(order, rows) {
            return Err(refuse());
        }
        let m = rows / self.k;
        if gate.is_some_and(|g| g.dims() != [m, self.k] || g.dtype != DType::F32) {
            return Err(refuse());
        }
        Ok(vec![Meta::new(&[m, d], y.dtype)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (rows, d) = (inputs[0].dims()[0], inputs[0].dims()[1]);
        let mut out = vec![0.0; rows / self.k * d];
        for (r, &slot) in inputs[1].data.iter().enumerate() {
            let slot = slot as usize;
            let gate = inputs.get(2).map_or(1.0, |g| g.data[slot]);
            for c in 0..d {
                out[slot / self.k * d + c] += gate * inputs[0].data[r * d + c];
            }
        }
        vec![out]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("moe_combine_fwd", DType::FLOATS, cpu::moe_combine),
            wgsl("moe_combine_fwd", DType::FLOATS, plan_combine),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let [rows, d] = [0, 1].map(|axis| inputs[0].dims()[axis]);
        Params::new().u(rows).u(self.k).u(d).flag(self.weighted)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1, 2], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let backward = MoeCombineBackward { k: self.k, weighted: self.weighted };
        if !self.weighted {
            return Ok(vec![Some(g.one(&backward, &[g.grad(0)?, g.input(1)?])?), None]);
        }
        let mut grads = g.run(&backward, &[g.grad(0)?, g.input(1)?, g.input(2)?, g.input(0)?])?;
        let dgate = grads.pop();
        Ok(vec![grads.pop(), None, dgate])
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 2.0 * inputs[0].count() as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for MoeCombineBackward {
    fn name(&self) -> &'static str {
        "moe_combine_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "dout [m, d], order u32 [m k] (, gate f32 [m, k], y [m k, d] when weighted)";
        let refuse = || Error::Shape { op: self.name(), rule, got: format!("{}, k {}", shape::list(inputs), self.k) };
        let Some(&[m, d]) = inputs.first().map(Meta::dims) else { return Err(refuse()) };
        let dtype = inputs[0].dtype;
        let rows = m * self.k;
        let dy = Meta::new(&[rows, d], dtype)?;
        match (&inputs[1..], self.weighted) {
            ([order], false) if is_order(order, rows) && dtype.is_float() => Ok(vec![dy]),
            ([order, gate, y], true)
                if is_order(order, rows) && *y == dy && gate.dims() == [m, self.k] && gate.dtype == DType::F32 =>
            {
                Ok(vec![dy, *gate])
            }
            _ => Err(refuse()),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let d = inputs[0].dims()[1];
        let rows = inputs[1].data.len();
        let (mut dy, mut dgate) = (Vec::with_capacity(rows * d), vec![0.0; rows]);
        for (r, &slot) in inputs[1].data.iter().enumerate() {
            let slot = slot as usize;
            let dout = &inputs[0].data[slot / self.k * d..][..d];
            let gate = inputs.get(2).map_or(1.0, |g| g.data[slot]);
            dy.extend(dout.iter().map(|v| gate * v));
            if let Some(y) = inputs.get(3) {
                dgate[slot] = dout.iter().zip(&y.data[r * d..]).map(|(a, b)| a * b).sum();
            }
        }
        if self.weighted { vec![dy, dgate] } else { vec![dy] }
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("moe_combine_bwd", DType::FLOATS, cpu::moe_combine_backward),
            wgsl("moe_combine_bwd", DType::FLOATS, plan_combine_backward),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        Params::new().u(outputs[0].dims()[0]).u(self.k).u(inputs[0].dims()[1]).flag(self.weighted)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const fn wgsl(entry: &'static str, dtypes: &'static [DType], plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name: entry, code, dtypes, fits: always, plan }
}

/// The record of the counting sort, whose launches name their own entries.
const DISPATCH: Kernel =
    Kernel { name: "moe_dispatch_fwd", ..wgsl("moe_dispatch_count", &[DType::F32], plan_dispatch) };

fn plan_gate(p: &Problem) -> Plan {
    let [m, experts] = [0, 1].map(|axis| p.inputs[0].dims()[axis]);
    Plan::of(Launch::linear(m, BLOCK, p.params()).trips(p.outputs[0].dims()[1] * (experts + 1)))
}

fn plan_gate_backward(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.outputs[0].count(), BLOCK, p.params()).trips(p.inputs[0].dims()[1]))
}

/// Counting sort by chunks of slots: count per chunk, running totals by one invocation, scatter per chunk. Arguments:
/// indices, order, offsets, scratch counts [chunks, E].
fn plan_dispatch(p: &Problem) -> Plan {
    const CHUNK: usize = 1024;
    const MAX_TRIPS: usize = 50_000;
    let (slots, experts) = (p.inputs[0].count(), p.outputs[1].count() - 1);
    let chunk = CHUNK.max((slots * experts).div_ceil(MAX_TRIPS));
    let chunks = slots.div_ceil(chunk).max(1);
    let words = Params::new().u(slots).u(1).u(experts).u(0).u(chunk).u(chunks);
    let each = |entry| Launch::linear(chunks, BLOCK, words).entry(entry);
    Plan::sequence(vec![
        each("moe_dispatch_count").slots(&[0, 3]).trips(chunk + experts),
        Launch::linear(1, BLOCK, words).entry("moe_dispatch_scan").slots(&[0, 3, 2]).trips(chunks * (experts + 1)),
        each("moe_dispatch_scatter").slots(&[0, 3, 1]).trips(chunk),
    ])
    .scratch(chunks * experts * 4)
}

/// The sorted row of every slot, then the sums. Arguments: y, order (, gate), out, scratch inverse [m k].
fn plan_combine(p: &Problem) -> Plan {
    let out = p.inputs.len();
    let gate = if out == 3 { 2 } else { 1 };
    let (rows, k) = (p.inputs[0].dims()[0], p.params().words()[1] as usize);
    let inverse = Launch::linear(rows, BLOCK, p.params()).entry("moe_combine_inverse").slots(&[1, out + 1]);
    let sums = Launch::linear(p.outputs[0].count(), BLOCK, p.params()).slots(&[0, out + 1, gate, out]).trips(k);
    Plan::sequence(vec![inverse, sums]).scratch(rows * 4)
}

/// Arguments: dout, order (, gate, y), dy (, dgate).
fn plan_combine_backward(p: &Problem) -> Plan {
    let weighted = p.inputs.len() == 4;
    let (gate, dy) = if weighted { (2, 4) } else { (1, 2) };
    let mut launches = vec![Launch::linear(p.outputs[0].count(), BLOCK, p.params()).slots(&[0, 1, gate, dy])];
    if weighted {
        let d = p.outputs[0].dims()[1];
        let dots = Launch::linear(p.outputs[1].count(), BLOCK, p.params()).entry("moe_combine_bwd_gate");
        launches.push(dots.slots(&[0, 1, 3, 5]).trips(d));
    }
    Plan::sequence(launches)
}

/// k distinct experts for each of m tokens, and their order and offsets; expert 0 is left out where there are enough.
pub(super) struct Routing {
    pub indices: Vec<f64>,
    pub order: Vec<f64>,
    pub offsets: Vec<f64>,
}

pub(super) fn routing(m: usize, k: usize, experts: usize) -> Routing {
    let mut stream = crate::rng::Stream::new(6, (m * 31 + k) as u32);
    let mut indices = Vec::new();
    for _ in 0..m {
        let mut all: Vec<usize> = (usize::from(k < experts)..experts).collect();
        stream.shuffle(&mut all);
        indices.extend(all[..k].iter().map(|&e| e as f64));
    }
    let shape = Shape::new(&[m, k]).unwrap_or_else(|_| Shape::scalar());
    let mut sorted = MoeDispatch { experts }.reference(&[Array { shape, data: indices.clone() }]);
    let offsets = sorted.pop().unwrap_or_default();
    Routing { indices, order: sorted.pop().unwrap_or_default(), offsets }
}

/// Scores with ties and NaN.
fn tied(seed: u64, shape: &Shape) -> Vec<f64> {
    let mut stream = crate::rng::Stream::new(seed, 0x71e);
    (0..shape.count()).map(|i| if i % 11 == 5 { f64::NAN } else { stream.below(4) as f64 - 2.0 }).collect()
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let sizes = [(1, 1, 1), (1, 8, 2), (3, 7, 3), (5, 4, 4), (17, 96, 20), (64, 33, 5), (130, 16, 4), (3, 129, 7)];
    for (m, experts, k) in sizes {
        let rows = m * k;
        let route = routing(m, k, experts);
        for &dtype in DType::FLOATS {
            let case = Case::new(MoeGate { k }, Tolerance::Exact).normal(&[m, experts], dtype);
            cases.push(if dtype == DType::F32 && m * experts < 64 { case.grad() } else { case });
            let indices = Fill::Values(route.indices.clone());
            let case =
                Case::new(MoeGateBackward { experts, dtype }, Tolerance::Exact).input(&[m, k], DType::U32, indices);
            cases.push(case.normal(&[m, k], DType::F32));
        }
        let case = Case::new(MoeGate { k }, Tolerance::Exact).input(&[m, experts], DType::F32, Fill::Custom(tied));
        cases.push(case.variant("ties"));
        let indices = Fill::Values(route.indices.clone());
        cases.push(Case::new(MoeDispatch { experts }, Tolerance::Exact).input(&[m, k], DType::U32, indices));
        // Any expert for any slot, so that some get all and some none.
        let any = Fill::Integers { low: 0, high: experts as i64 - 1 };
        let case = Case::new(MoeDispatch { experts }, Tolerance::Exact).input(&[m, k], DType::U32, any);
        cases.push(case.variant("any expert"));
        for d in [1, 19] {
            let order = || Fill::Values(route.order.clone());
            for dtype in if d == 1 { &[DType::F32][..] } else { DType::FLOATS } {
                for weighted in [false, true] {
                    let tolerance = Tolerance::Contraction { k };
                    let case = Case::new(MoeCombine { k, weighted }, tolerance).normal(&[rows, d], *dtype);
                    let case = case.input(&[rows], DType::U32, order());
                    let case = if weighted { case.normal(&[m, k], DType::F32) } else { case };
                    cases.push(if *dtype == DType::F32 && rows * d < 200 { case.grad() } else { case });
                    let tolerance = Tolerance::Contraction { k: d };
                    let case = Case::new(MoeCombineBackward { k, weighted }, tolerance).normal(&[m, d], *dtype);
                    let case = case.input(&[rows], DType::U32, order());
                    let gate = |case: Case| case.normal(&[m, k], DType::F32).normal(&[rows, d], *dtype);
                    cases.push(if weighted { gate(case) } else { case });
                }
            }
        }
    }
    // More slots than one chunk of the counting sort.
    let any = Fill::Integers { low: 0, high: 95 };
    cases.push(Case::new(MoeDispatch { experts: 96 }, Tolerance::Exact).input(&[1500, 4], DType::U32, any));
    // T5-base as MoEfication splits it: 96 experts, 20 chosen, 512 tokens.
    cases.push(Case::new(MoeGate { k: 20 }, Tolerance::Exact).normal(&[512, 96], DType::F32).bench());
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::{run, run_one};

    /// With every expert chosen the split feed-forward block is the dense one, up to the order of sums.
    #[test]
    fn all_experts_equal_the_dense_block() {
        let device = crate::device::open("cpu").unwrap();
        let (m, d, experts, width) = (5, 12, 4, 8);
        let mut stream = crate::rng::Stream::new(8, 0);
        let mut draw = |dims: &[usize]| {
            let values: Vec<f64> = (0..dims.iter().product()).map(|_| stream.normal()).collect();
            (Tensor::from_f64(&device, dims, DType::F32, &values).unwrap(), values)
        };
        let (x, xv) = draw(&[m, d]);
        let (w1, w1v) = draw(&[experts, width, d]);
        let (b1, b1v) = draw(&[experts, width]);
        // The second matrix split along its columns: expert e has [d, width].
        let (w2, w2v) = draw(&[experts, d, width]);
        let (scores, _) = draw(&[m, experts]);
        let gate = run(&MoeGate { k: experts }, &[&scores]).unwrap();
        let sorted = run(&MoeDispatch { experts }, &[&gate[0]]).unwrap();
        let first = GroupedMatmul { k: experts, relu: true, bias: true, gather: true, experts };
        let hidden = run_one(&first, &[&x, &w1, &b1, &sorted[0], &sorted[1]]).unwrap();
        let second = GroupedMatmul { k: experts, relu: false, bias: false, gather: false, experts };
        let rows = run_one(&second, &[&hidden, &w2, &sorted[0], &sorted[1]]).unwrap();
        let y = run_one(&MoeCombine { k: experts, weighted: false }, &[&rows, &sorted[0]]).unwrap().to_f64().unwrap();
        for t in 0..m {
            let hidden = |e: usize, j: usize| {
                let dot: f64 = (0..d).map(|c| xv[t * d + c] * w1v[(e * width + j) * d + c]).sum();
                (dot + b1v[e * width + j]).max(0.0)
            };
            for c in 0..d {
                let pairs = (0..experts).flat_map(|e| (0..width).map(move |j| (e, j)));
                let dense: f64 = pairs.map(|(e, j)| hidden(e, j) * w2v[(e * d + c) * width + j]).sum();
                approx::assert_abs_diff_eq!(y[t * d + c], dense, epsilon = 1e-4);
            }
        }
    }

    #[test]
    fn ties_take_the_lowest_expert() {
        let device = crate::device::open("cpu").unwrap();
        let scores = Tensor::from_slice(&device, &[2, 4], &[1.0f32, 1.0, 1.0, 1.0, 0.0, 2.0, -0.0, 2.0]).unwrap();
        let gate = run(&MoeGate { k: 3 }, &[&scores]).unwrap();
        assert_eq!(gate[0].to_vec::<u32>().unwrap(), [0, 1, 2, 1, 3, 0]);
        assert_eq!(MoeGate { k: 5 }.infer(&[scores.meta()]).unwrap_err().code(), "E-SHAPE");
    }
}
