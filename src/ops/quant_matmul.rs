//! Matrix product of quantized operands with exact int32 accumulation.

use std::any::Any;

use super::groups::{self, MULTIPROCESSORS};
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, cuda_source, source};
use crate::op::{Array, Case, Cost, Family, Fill, Op, Tolerance};
use crate::shape::{self, Meta};

pub static FAMILY: Family = Family { name: "quant_matmul", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("quant_matmul");
/// The rungs on warp groups stand in a file of their own.
const GROUPS: Source = cuda_source!("quant_matmul_wgmma");
const BLOCK: u32 = 64;
/// Longest reduction whose sums of products of -128 fit i32.
pub(super) const MAX_K: usize = (1 << 17) - 1;

/// y[i, j] = (sum_k xq[i, k] wq[j, k]) xs[i] ws[j] (+ bias[j]): the int8 linear layer.
///
/// Inputs `xq i8 [m, k]`, `xs f32 [m]` (one scale per token), `wq i8 [n, k]`, `ws f32 [n]` (one per output channel),
/// with `bias` also `f32 [n]`; output `f32 [m, n]`. Both operands are symmetric (zero point 0). The sum is an exact
/// int32, so k is at most 131,071; the epilogue rounds to f32 once per step. Inference only: training sees
/// [`super::quant::FakeQuant`], whose products are these sums times the scales.
#[derive(Clone, Copy, Debug)]
pub struct MatmulInt8 {
    pub bias: bool,
}

impl Op for MatmulInt8 {
    fn name(&self) -> &'static str {
        "matmul_int8"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "xq i8 [m, k], xs f32 [m], wq i8 [n, k], ws f32 [n] (, bias f32 [n]), k at most 131071";
        let refuse = || Error::Shape { op: self.name(), rule, got: shape::list(inputs) };
        if inputs.len() != 4 + usize::from(self.bias) {
            return Err(refuse());
        }
        let (&[m, k], &[n, wk]) = (inputs[0].dims(), inputs[2].dims()) else {
            return Err(refuse());
        };
        let vector = |meta: &Meta, length: usize| meta.dims() == [length] && meta.dtype == DType::F32;
        let bytes = inputs[0].dtype == DType::I8 && inputs[2].dtype == DType::I8;
        let scales = vector(&inputs[1], m) && inputs[3..].iter().all(|v| vector(v, n));
        if !bytes || !scales || k != wk || k > MAX_K {
            return Err(refuse());
        }
        Ok(vec![Meta::new(&[m, n], DType::F32)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (x, w) = (&inputs[0], &inputs[2]);
        let (k, n) = (x.dims()[1], w.dims()[0]);
        let mut y = Vec::new();
        for i in 0..x.dims()[0] {
            for j in 0..n {
                let (row, column) = (&x.data[i * k..][..k], &w.data[j * k..][..k]);
                let sum: f64 = row.iter().zip(column).map(|(a, b)| a * b).sum();
                let bias = inputs.get(4).map_or(0.0, |b| b.data[j]);
                y.push(sum * inputs[1].data[i] * inputs[3].data[j] + bias);
            }
        }
        vec![y]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const F32: &[DType] = &[DType::F32];
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("matmul_int8_fwd", F32, cpu::matmul_int8),
            warp_groups("matmul_int8_fwd_wgmma", |p| fits_groups(p, WIDE), |p| plan_groups(p, WIDE)),
            warp_groups("matmul_int8_narrow_wgmma", |p| fits_groups(p, NARROW), |p| plan_groups(p, NARROW)),
            tensor("matmul_int8_fwd_few_mma", few_tokens, |p| plan_tensor(p, FEW)),
            tensor("matmul_int8_fwd_mma", whole_chunks, |p| plan_tensor(p, MANY)),
            wgsl("matmul_int8_fwd_v3", "matmul_int8_fwd_v3", four_rows, plan_v3),
            wgsl("matmul_int8_fwd_v2", "matmul_int8_fwd_v2", whole_words, plan_v2),
            wgsl("matmul_int8_fwd", "matmul_int8_fwd", crate::kernel::always, plan_v1),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        let [m, n] = [0, 1].map(|axis| outputs[0].dims()[axis]);
        Params::new().u(m).u(n).u(inputs[0].dims()[1]).flag(self.bias)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 2.0 * outputs[0].count() as f64 * inputs[0].dims()[1] as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

pub(super) const fn wgsl(
    name: &'static str,
    entry: &'static str,
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name, code, dtypes: &[DType::F32], fits, plan }
}

pub(super) const fn tensor(name: &'static str, fits: fn(&Problem) -> bool, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Cuda { source: SOURCE, entry: name, constants: &[], arch: 80, tensor: &["mma.sync"] };
    Kernel { name, code, dtypes: &[DType::F32], fits, plan }
}

pub(super) const fn warp_groups(name: &'static str, fits: fn(&Problem) -> bool, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Cuda { source: GROUPS, entry: name, constants: &[], arch: 90, tensor: &["wgmma.mma_async"] };
    Kernel { name, code, dtypes: &[DType::F32], fits, plan }
}

/// The tiles of `cuda/weights.cuh`: weights by tokens of a block, its threads, and the bytes of its pipeline.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub rows: usize,
    pub tokens: usize,
    pub threads: u32,
    pub shared: usize,
}

impl Tile {
    /// `stages` times `slices` of 128 bytes of every token's row and `chunks` 16-byte chunks of every weight's row.
    pub const fn new([rows, tokens]: [usize; 2], threads: u32, slices: usize, stages: usize, chunks: usize) -> Self {
        Self { rows, tokens, threads, shared: stages * slices * (tokens * 128 + rows * chunks * 16) }
    }

    /// One block per tile of y `[m, n]`.
    pub fn launch(&self, p: &Problem) -> Launch {
        let [m, n] = [0, 1].map(|axis| p.outputs[0].dims()[axis]);
        let tiles = m.div_ceil(self.tokens) * n.div_ceil(self.rows);
        Launch::linear(tiles * self.threads as usize, self.threads, p.params()).shared(self.shared)
    }
}

/// Tokens up to which many small tiles of weights are better than few large ones.
pub(super) const FEW_TOKENS: usize = 32;
pub(super) const MANY: Tile = Tile::new([128, 128], 256, 1, 3, 8);
pub(super) const FEW: Tile = Tile::new([32, 16], 128, 4, 4, 8);

/// Rows and columns of a tile of two warp groups.
pub(super) type GroupTile = [usize; 2];
pub(super) const WIDE: GroupTile = [128, 256];
pub(super) const NARROW: GroupTile = [128, 128];

/// Tiles of outputs, down and across.
pub(super) fn group_tiles([rows, columns]: [usize; 2], tile: GroupTile) -> [usize; 2] {
    [rows.div_ceil(tile[0]), columns.div_ceil(tile[1])]
}

/// Whether tiles of `outputs` fill the multiprocessors: all of them for wide ones, half for narrow ones, below which the
/// small tiles of `mma` spread better. Few tokens have rungs of their own. Software adapters are never full.
pub(super) fn fills(p: &Problem, outputs: [usize; 2], tile: GroupTile) -> bool {
    let wanted = if tile == WIDE { MULTIPROCESSORS } else { MULTIPROCESSORS / 2 };
    let [down, across] = group_tiles(outputs, tile);
    let full = outputs[1] > tile[1] / 2 && down * across >= wanted;
    p.info.software || full && p.outputs[0].dims()[0] > FEW_TOKENS
}

/// Warp groups on weights in registers: tiles of weights by tokens, the tokens (the first input) by a tensor map.
pub(super) fn token_launch(p: &Problem, tile: GroupTile, params: Params) -> Launch {
    let [m, n] = [0, 1].map(|axis| p.outputs[0].dims()[axis]);
    let (element, k) = (p.inputs[0].dtype, p.inputs[0].shape.last());
    let stages = if tile == WIDE { 6 } else { 8 };
    let [down, across] = group_tiles([n, m], tile);
    Launch::new([groups::blocks(p, down * across), 1, 1], params.u(down).u(across))
        .map(groups::matrix(0, element, [m, k], k, tile[1]))
        .shared(groups::shared(stages, tile[1] * 128, 0))
}

pub(super) fn fits_groups(p: &Problem, tile: GroupTile) -> bool {
    let [m, n] = [0, 1].map(|axis| p.outputs[0].dims()[axis]);
    whole_chunks(p) && p.inputs[0].shape.last() > 0 && fills(p, [m, n], tile)
}

pub(super) fn plan_groups(p: &Problem, tile: GroupTile) -> Plan {
    const STAGES: usize = 4;
    let [m, n] = [0, 1].map(|axis| p.outputs[0].dims()[axis]);
    let (k, bias) = (p.inputs[0].shape.last(), p.inputs.len() == 5);
    let [down, across] = group_tiles([m, n], tile);
    let params = Params::new().u(m).u(n).u(k).flag(bias).u(down).u(across);
    let launch = Launch::new([groups::blocks(p, down * across), 1, 1], params)
        .slots(&[0, 1, 2, 3, if bias { 4 } else { 3 }, p.inputs.len()])
        .map(groups::matrix(0, DType::I8, [m, k], k, tile[0]))
        .map(groups::matrix(2, DType::I8, [n, k], k, tile[1]))
        .shared(groups::shared(STAGES, (tile[0] + tile[1]) * 128, 0));
    Plan::of(launch)
}

/// Rows start on 16 bytes.
pub(super) fn whole_chunks(p: &Problem) -> bool {
    p.inputs[0].shape.last().is_multiple_of(16)
}

pub(super) fn few_tokens(p: &Problem) -> bool {
    whole_chunks(p) && p.outputs[0].dims()[0] <= FEW_TOKENS
}

pub(super) fn plan_tensor(p: &Problem, tile: Tile) -> Plan {
    let bias = p.inputs.len() == 5;
    Plan::of(tile.launch(p).slots(&[0, 1, 2, 3, if bias { 4 } else { 3 }, p.inputs.len()]))
}

/// Rows start on words.
pub(super) fn whole_words(p: &Problem) -> bool {
    p.inputs[0].shape.last().is_multiple_of(4)
}

pub(super) fn four_rows(p: &Problem) -> bool {
    whole_words(p) && p.outputs[0].dims()[0] >= 4
}

/// One launch of `items` invocations; without a bias the slot of the bias holds another input, which is not read.
fn launch(p: &Problem, items: usize, trips: usize) -> Plan {
    let bias = p.inputs.len() == 5;
    let slots = [0, 1, 2, 3, if bias { 4 } else { 3 }, p.inputs.len()];
    Plan::of(Launch::linear(items, BLOCK, p.params()).slots(&slots).trips(trips))
}

pub(super) fn plan_v1(p: &Problem) -> Plan {
    launch(p, p.outputs[0].count(), p.inputs[0].shape.last().div_ceil(4))
}

pub(super) fn plan_v2(p: &Problem) -> Plan {
    let (m, n) = (p.outputs[0].dims()[0], p.outputs[0].dims()[1]);
    launch(p, m * n.div_ceil(4), p.inputs[0].shape.last() / 4)
}

pub(super) fn plan_v3(p: &Problem) -> Plan {
    let (m, n) = (p.outputs[0].dims()[0], p.outputs[0].dims()[1]);
    launch(p, m.div_ceil(4) * n.div_ceil(4), p.inputs[0].shape.last() / 4)
}

fn cases() -> Vec<Case> {
    let narrow = Fill::Integers { low: -127, high: 127 };
    let scales = Fill::Uniform { low: 1e-3, high: 2e-2 };
    let case = |[m, n, k]: [usize; 3], bias: bool, values: &Fill, scales: &Fill, tolerance: Tolerance| {
        let case = Case::new(MatmulInt8 { bias }, tolerance)
            .input(&[m, k], DType::I8, values.clone())
            .input(&[m], DType::F32, scales.clone())
            .input(&[n, k], DType::I8, values.clone())
            .input(&[n], DType::F32, scales.clone());
        if bias { case.normal(&[n], DType::F32) } else { case }
    };
    let mut cases = Vec::new();
    // An exact integer, two scalings, a bias: four roundings.
    let epilogue = Tolerance::Contraction { k: 4 };
    let ones = Fill::Integers { low: 1, high: 1 };
    for size in [
        [1, 1, 1],
        [1, 1, 4],
        [3, 5, 7],
        [4, 4, 64],
        [1, 33, 65],
        [1, 31, 128],
        [2, 9, 12],
        [7, 16, 130],
        [63, 64, 96],
        [65, 63, 128],
        [33, 17, 1000],
        // Several stages and tiles of the tensor kernels, ragged ends.
        [5, 70, 2064],
        [135, 131, 656],
    ] {
        cases.push(case(size, false, &narrow, &scales, epilogue));
        cases.push(case(size, true, &narrow, &scales, epilogue));
        // Unit scales show the int32 sums themselves (all below 2^24 here).
        cases.push(case(size, false, &narrow, &ones, Tolerance::Exact).variant("unit scales"));
    }
    // The most negative byte, which the unsigned form of the weights turns into 0.
    let extreme = Fill::Integers { low: -128, high: -128 };
    cases.push(case([5, 6, 257], false, &extreme, &ones, Tolerance::Exact));
    // GPT-2 small's first FFN matrix over 128 tokens and over one.
    cases.push(case([128, 3072, 768], true, &narrow, &scales, epilogue).bench());
    cases.push(case([1, 3072, 768], true, &narrow, &scales, epilogue).bench());
    cases.extend(super::requantize::cases());
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::{run, run_one};
    use crate::ops::quant::{FakeQuant, Granularity, GridFrom, Quantize, Scheme};
    use crate::tensor::Tensor;

    #[test]
    fn a_product_over_nothing_is_the_bias() {
        let device = crate::device::open("cpu").unwrap();
        let empty = |rows: usize| Tensor::from_slice(&device, &[rows, 0], &[0i8; 0]).unwrap();
        let floats = |values: &[f32]| Tensor::from_slice(&device, &[values.len()], values).unwrap();
        let (scales, bias) = (floats(&[1.0, 2.0]), floats(&[3.0, 4.0, 5.0]));
        let inputs = [&empty(2), &scales, &empty(3), &floats(&[1.0; 3]), &bias];
        let y = run_one(&MatmulInt8 { bias: true }, &inputs).unwrap();
        assert_eq!(y.to_vec::<f32>().unwrap(), [3.0, 4.0, 5.0, 3.0, 4.0, 5.0]);
    }

    /// What training sees (products of fake-quantized values) is the integer path: dividing the exact products by the
    /// scales gives the int32 sums, and the kernel with unit scales gives them too.
    #[test]
    fn simulated_product_is_the_integer_product() {
        let device = crate::device::open("cpu").unwrap();
        let (m, n, k) = (5, 9, 67);
        let mut stream = crate::rng::Stream::new(2, 0);
        let mut draw = |rows: usize| -> Tensor {
            let values: Vec<f32> = (0..rows * k).map(|_| stream.normal() as f32).collect();
            Tensor::from_slice(&device, &[rows, k], &values).unwrap()
        };
        let (x, w) = (draw(m), draw(n));
        let (bits, scheme, granularity) = (8, Scheme::SymmetricNarrow, Granularity::Channel);
        let stored = |t: &Tensor| run(&Quantize { bits, scheme, granularity, from: GridFrom::Own }, &[t]).unwrap();
        let fake = |t: &Tensor| run_one(&FakeQuant { bits, scheme, granularity, from: GridFrom::Own }, &[t]).unwrap();
        let ones = |n: usize| Tensor::from_slice(&device, &[n], &vec![1.0f32; n]).unwrap();
        let (sx, sw) = (stored(&x), stored(&w));
        let op = MatmulInt8 { bias: false };
        let sums = run_one(&op, &[&sx[0], &ones(m), &sw[0], &ones(n)]).unwrap().to_vec::<f32>().unwrap();
        let (fx, fw) = (fake(&x).to_vec::<f32>().unwrap(), fake(&w).to_vec::<f32>().unwrap());
        let (xs, ws) = (sx[1].to_vec::<f32>().unwrap(), sw[1].to_vec::<f32>().unwrap());
        for i in 0..m {
            for j in 0..n {
                // Each fake-quantized value is an integer times its scale rounded once; the rounding of the quotient
                // recovers the integer exactly, and the exact f64 product of integers must be the kernel's sum.
                let level = |v: f32, s: f32| (f64::from(v) / f64::from(s)).round();
                let sum: f64 = (0..k).map(|c| level(fx[i * k + c], xs[i]) * level(fw[j * k + c], ws[j])).sum();
                assert_eq!(f64::from(sums[i * n + j]), sum, "sum of ({i}, {j})");
                let simulated: f64 = (0..k).map(|c| f64::from(fx[i * k + c]) * f64::from(fw[j * k + c])).sum();
                let scale = f64::from(xs[i]) * f64::from(ws[j]);
                assert_eq!((simulated / scale).round(), sum, "simulated sum of ({i}, {j})");
            }
        }
    }

    #[test]
    fn sums_that_could_overflow_are_refused() {
        let meta = |dims: &[usize], dtype| Meta::new(dims, dtype).unwrap();
        let op = MatmulInt8 { bias: false };
        let inputs = |k: usize| {
            [meta(&[1, k], DType::I8), meta(&[1], DType::F32), meta(&[1, k], DType::I8), meta(&[1], DType::F32)]
        };
        assert!(op.infer(&inputs(MAX_K)).is_ok());
        assert_eq!(op.infer(&inputs(MAX_K + 1)).unwrap_err().code(), "E-SHAPE");
    }
}
