//! Matrix products straight from the compressed 2:4 form.

use std::any::Any;

use super::matmul::Matmul;
use super::quant_matmul::{self, FEW_TOKENS, GroupTile, MAX_K, NARROW, Tile, WIDE, fills};
use super::reduce::{Axis, Reduce, ReduceFunction};
use super::sparse24_pack::{Decompress24, Gather24, compressed, meta_words, places, random_meta};
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, always, cuda_source, source};
use crate::op::{Array, Case, Cost, Family, Fill, Gradient, Op, Saves, Tolerance};
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "sparse24_matmul", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("sparse24_matmul");
/// The rungs on warp groups stand in a file of their own.
const GROUPS: Source = cuda_source!("sparse24_matmul_wgmma");
const BLOCK: u32 = 64;

/// y = x W^T (+ bias) with W `[n, k]` compressed: x `[m, k]`, values `[n, k/2]`, `meta u32 [n, ceil(k/32)]`, bias `[n]`;
/// all floats of one type, y `[m, n]` in it. Differentiable in x, the kept values and the bias.
#[derive(Clone, Copy, Debug)]
pub struct MatmulSparse24 {
    pub bias: bool,
}

/// The int8 form: `xq i8 [m, k]`, `xs f32 [m]`, `values i8 [n, k/2]`, `meta`, `ws f32 [n]`, bias `f32 [n]` to `f32 [m, n]`;
/// exact int32 sums, then the epilogue of [`super::quant::MatmulInt8`]. Inference only.
#[derive(Clone, Copy, Debug)]
pub struct MatmulSparse24Int8 {
    pub bias: bool,
}

/// Row i of x times row j of the compressed matrix.
fn product(x: &Array, values: &Array, meta: &Array, i: usize, j: usize) -> f64 {
    let k = x.dims()[1];
    let (x, values) = (&x.data[i * k..][..k], &values.data[j * k / 2..][..k / 2]);
    let meta = &meta.data[j * meta_words(k)..];
    (0..k / 4)
        .map(|g| {
            let [a, b] = places(meta, g);
            values[2 * g] * x[4 * g + a] + values[2 * g + 1] * x[4 * g + b]
        })
        .sum()
}

impl Op for MatmulSparse24 {
    fn name(&self) -> &'static str {
        "matmul_sparse24"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "x [m, k], values [n, k/2], meta u32 [n, ceil(k/32)] (, bias [n]) of one float type";
        let refuse = || Error::Shape { op: self.name(), rule, got: shape::list(inputs) };
        if inputs.len() != 3 + usize::from(self.bias) {
            return Err(refuse());
        }
        let (&[m, k], &[n, _]) = (inputs[0].dims(), inputs[1].dims()) else {
            return Err(refuse());
        };
        let dtype = inputs[0].dtype;
        let bias = inputs.get(3).is_none_or(|b| b.dims() == [n] && b.dtype == dtype);
        if !dtype.is_float() || inputs[1].dtype != dtype || !compressed(&inputs[1], &inputs[2], k) || !bias {
            return Err(refuse());
        }
        Ok(vec![Meta::new(&[m, n], dtype)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (m, n) = (inputs[0].dims()[0], inputs[1].dims()[0]);
        let bias = |j: usize| inputs.get(3).map_or(0.0, |b| b.data[j]);
        let y = |id: usize| product(&inputs[0], &inputs[1], &inputs[2], id / n, id % n) + bias(id % n);
        vec![(0..m * n).map(y).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("matmul_sparse24_fwd", DType::FLOATS, cpu::matmul_sparse24),
            warp_groups("matmul_sparse24_fwd_wgmma", FLOAT.0, |p| fits_floats(p, WIDE), |p| plan_groups(p, WIDE)),
            warp_groups(
                "matmul_sparse24_narrow_wgmma",
                FLOAT.0,
                |p| fits_floats(p, NARROW),
                |p| plan_groups(p, NARROW),
            ),
            tensor("matmul_sparse24_fwd_few_mma", FLOAT, few_floats, |p| plan_floats(p, FEW)),
            tensor("matmul_sparse24_fwd_mma", FLOAT, whole_floats, |p| plan_floats(p, MANY)),
            Kernel { fits: four_rows, ..wgsl("matmul_sparse24_fwd_v2", DType::FLOATS, plan_rows) },
            wgsl("matmul_sparse24_fwd", DType::FLOATS, plan_elements),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        let [m, n] = [0, 1].map(|axis| outputs[0].dims()[axis]);
        Params::new().u(m).u(n).u(inputs[0].dims()[1]).flag(self.bias)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1, 2], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let (x, values, meta, dy) = (g.input(0)?, g.input(1)?, g.input(2)?, g.grad(0)?);
        let mut grads = vec![None, None, None];
        if g.needs(0) {
            let w = g.one(&Decompress24 { k: x.shape().last() }, &[values, meta])?;
            grads[0] = Some(g.one(&Matmul::default(), &[dy, &w])?);
        }
        if g.needs(1) {
            let dw = g.one(&Matmul { transpose_a: true, ..Matmul::default() }, &[dy, x])?;
            grads[1] = Some(g.one(&Gather24, &[&dw, meta])?);
        }
        if self.bias {
            let sum = Reduce { function: ReduceFunction::Sum, axis: Axis::Rows };
            grads.push(if g.needs(3) { Some(g.one(&sum, &[dy])?) } else { None });
        }
        Ok(grads)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: outputs[0].count() as f64 * inputs[0].dims()[1] as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for MatmulSparse24Int8 {
    fn name(&self) -> &'static str {
        "matmul_sparse24_int8"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule =
            "xq i8 [m, k], xs f32 [m], values i8 [n, k/2], meta u32 [n, ceil(k/32)], ws f32 [n] (, bias f32 [n])";
        let refuse = || Error::Shape { op: self.name(), rule, got: shape::list(inputs) };
        if inputs.len() != 5 + usize::from(self.bias) {
            return Err(refuse());
        }
        let (&[m, k], &[n, _]) = (inputs[0].dims(), inputs[2].dims()) else {
            return Err(refuse());
        };
        let vector = |meta: &Meta, length: usize| meta.dims() == [length] && meta.dtype == DType::F32;
        let bytes = inputs[0].dtype == DType::I8 && inputs[2].dtype == DType::I8;
        let scales = vector(&inputs[1], m) && inputs[4..].iter().all(|v| vector(v, n));
        if !bytes || !scales || !compressed(&inputs[2], &inputs[3], k) || k > MAX_K {
            return Err(refuse());
        }
        Ok(vec![Meta::new(&[m, n], DType::F32)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (m, n) = (inputs[0].dims()[0], inputs[2].dims()[0]);
        let y = |id: usize| {
            let (i, j) = (id / n, id % n);
            let scale = inputs[1].data[i] * inputs[4].data[j];
            product(&inputs[0], &inputs[2], &inputs[3], i, j) * scale + inputs.get(5).map_or(0.0, |b| b.data[j])
        };
        vec![(0..m * n).map(y).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const F32: &[DType] = &[DType::F32];
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("matmul_sparse24_int8_fwd", F32, cpu::matmul_sparse24_int8),
            warp_groups("matmul_sparse24_int8_fwd_wgmma", F32, |p| fits_bytes(p, WIDE), |p| plan_groups(p, WIDE)),
            warp_groups(
                "matmul_sparse24_int8_narrow_wgmma",
                F32,
                |p| fits_bytes(p, NARROW),
                |p| plan_groups(p, NARROW),
            ),
            tensor("matmul_sparse24_int8_fwd_few_mma", BYTES, few_bytes, |p| plan_bytes(p, quant_matmul::FEW)),
            tensor("matmul_sparse24_int8_fwd_mma", BYTES, whole_bytes, |p| plan_bytes(p, quant_matmul::MANY)),
            wgsl("matmul_sparse24_int8_fwd", F32, plan_int8),
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
        Cost { flops: outputs[0].count() as f64 * inputs[0].dims()[1] as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const fn wgsl(entry: &'static str, dtypes: &'static [DType], plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name: entry, code, dtypes, fits: always, plan }
}

/// Element types of a tensor rung and the instruction it must contain.
type Tensor24 = (&'static [DType], &'static [&'static str]);
const FLOAT: Tensor24 = (&[DType::F16, DType::Bf16], &["mma.sp"]);
const BYTES: Tensor24 = (&[DType::F32], &["mma.sync"]);

const fn tensor(
    name: &'static str,
    (dtypes, tensor): Tensor24,
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    let code = Code::Cuda { source: SOURCE, entry: name, constants: &[], arch: 80, tensor };
    Kernel { name, code, dtypes, fits, plan }
}

const fn warp_groups(
    name: &'static str,
    dtypes: &'static [DType],
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    let code = Code::Cuda { source: GROUPS, entry: name, constants: &[], arch: 90, tensor: &["wgmma.mma_async.sp"] };
    Kernel { name, code, dtypes, fits, plan }
}

const MANY: Tile = Tile::new([128, 128], 256, 1, 4, 4);
const FEW: Tile = Tile::new([32, 16], 128, 4, 5, 4);

/// Rows of values start on 16 bytes.
fn whole_floats(p: &Problem) -> bool {
    p.inputs[0].shape.last().is_multiple_of(16)
}

fn few_floats(p: &Problem) -> bool {
    whole_floats(p) && p.outputs[0].dims()[0] <= FEW_TOKENS
}

fn whole_bytes(p: &Problem) -> bool {
    p.inputs[0].shape.last().is_multiple_of(32)
}

fn few_bytes(p: &Problem) -> bool {
    whole_bytes(p) && p.outputs[0].dims()[0] <= FEW_TOKENS
}

/// Without a bias its slot holds x (bytes: ws), which is not read there.
fn float_slots(p: &Problem) -> [usize; 5] {
    [0, 1, 2, if p.inputs.len() == 4 { 3 } else { 0 }, p.inputs.len()]
}

fn byte_slots(p: &Problem) -> [usize; 7] {
    [0, 1, 2, 3, 4, if p.inputs.len() == 6 { 5 } else { 4 }, p.inputs.len()]
}

fn plan_floats(p: &Problem, tile: Tile) -> Plan {
    Plan::of(tile.launch(p).slots(&float_slots(p)))
}

fn plan_bytes(p: &Problem, tile: Tile) -> Plan {
    Plan::of(tile.launch(p).slots(&byte_slots(p)))
}

/// Weights by tokens, which the tiles of a group are as well.
fn outputs(p: &Problem) -> [usize; 2] {
    [1, 0].map(|axis| p.outputs[0].dims()[axis])
}

fn fits_floats(p: &Problem, tile: GroupTile) -> bool {
    whole_floats(p) && p.inputs[0].shape.last() > 0 && fills(p, outputs(p), tile)
}

fn fits_bytes(p: &Problem, tile: GroupTile) -> bool {
    whole_bytes(p) && p.inputs[0].shape.last() > 0 && fills(p, outputs(p), tile)
}

fn plan_groups(p: &Problem, tile: GroupTile) -> Plan {
    let bytes = p.inputs[0].dtype == DType::I8;
    let slots = if bytes { byte_slots(p).to_vec() } else { float_slots(p).to_vec() };
    Plan::of(quant_matmul::token_launch(p, tile, p.params()).slots(&slots))
}

fn four_rows(p: &Problem) -> bool {
    p.outputs[0].dims()[0] >= 4
}

fn float_launch(p: &Problem, items: usize) -> Plan {
    Plan::of(Launch::linear(items, BLOCK, p.params()).slots(&float_slots(p)).trips(p.inputs[0].dims()[1] / 4))
}

fn plan_elements(p: &Problem) -> Plan {
    float_launch(p, p.outputs[0].count())
}

fn plan_rows(p: &Problem) -> Plan {
    let [m, n] = [0, 1].map(|axis| p.outputs[0].dims()[axis]);
    float_launch(p, m.div_ceil(4) * n)
}

fn plan_int8(p: &Problem) -> Plan {
    let launch = Launch::linear(p.outputs[0].count(), BLOCK, p.params());
    Plan::of(launch.slots(&byte_slots(p)).trips(p.inputs[0].dims()[1] / 4))
}

fn cases() -> Vec<Case> {
    let meta = Fill::Custom(random_meta);
    let float = |[m, n, k]: [usize; 3], bias: bool, dtype: DType| {
        let case = Case::new(MatmulSparse24 { bias }, Tolerance::Contraction { k: k / 2 + 1 })
            .normal(&[m, k], dtype)
            .normal(&[n, k / 2], dtype)
            .input(&[n, meta_words(k)], DType::U32, meta.clone());
        if bias { case.normal(&[n], dtype) } else { case }
    };
    let bytes = |[m, n, k]: [usize; 3], bias: bool, scales: Fill, tolerance: Tolerance| {
        let narrow = Fill::Integers { low: -127, high: 127 };
        let case = Case::new(MatmulSparse24Int8 { bias }, tolerance)
            .input(&[m, k], DType::I8, narrow.clone())
            .input(&[m], DType::F32, scales.clone())
            .input(&[n, k / 2], DType::I8, narrow)
            .input(&[n, meta_words(k)], DType::U32, meta.clone())
            .input(&[n], DType::F32, scales);
        if bias { case.normal(&[n], DType::F32) } else { case }
    };
    let scales = Fill::Uniform { low: 1e-3, high: 2e-2 };
    let ones = Fill::Integers { low: 1, high: 1 };
    let mut cases = Vec::new();
    for size in [[1, 1, 4], [1, 7, 36], [2, 5, 12], [3, 9, 64], [4, 4, 68], [7, 13, 132], [33, 31, 96], [65, 64, 128]]
        .into_iter()
        // Several stages and tiles of the tensor kernels, ragged ends.
        .chain([[5, 70, 2096], [6, 33, 2080], [135, 131, 352], [262, 21, 96]])
    {
        let [m, _, k] = size;
        for bias in [false, true] {
            let case = float(size, bias, DType::F32);
            cases.push(if m * k < 300 { case.grad() } else { case });
            cases.push(bytes(size, bias, scales.clone(), Tolerance::Contraction { k: 4 }));
        }
        cases.push(float(size, true, DType::F16));
        cases.push(float(size, true, DType::Bf16));
        // Unit scales show the int32 sums themselves.
        cases.push(bytes(size, false, ones.clone(), Tolerance::Exact).variant("unit scales"));
    }
    // GPT-2 small's first FFN matrix over one token and over 128.
    for m in [1, 128] {
        for &dtype in DType::FLOATS {
            cases.push(float([m, 3072, 768], true, dtype).bench());
        }
        cases.push(bytes([m, 3072, 768], true, scales.clone(), Tolerance::Contraction { k: 4 }).bench());
    }
    cases
}
