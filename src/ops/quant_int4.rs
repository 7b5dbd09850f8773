//! Weight-only int4: eight weights to a word, one scale per group, products with float activations.

use std::any::Any;

use super::matmul::Matmul;
use super::quant::{
    BLOCK, Granularity, Grid, GridFrom, SOURCE as QUANT_SOURCE, Scheme, map_params, range_launches, ranges,
};
use super::quant_matmul::{FEW_TOKENS, NARROW, Tile, fills, token_launch};
use super::reduce::{Axis, Reduce, ReduceFunction};
use super::unary::Cast;
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, always, cuda_source, source};
use crate::op::{Array, Case, Cost, Family, Fill, Gradient, Op, Saves, Tolerance};
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "quant_int4", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("quant_int4");
/// The rung on warp groups stands in a file of its own.
const GROUPS: Source = cuda_source!("quant_int4_wgmma");

/// w `[n, k]` to `packed u32 [n, k/8]` and `scales f32 [n, k/group]`: symmetric narrow levels -7 ..= 7 by the rule of
/// `quant.rs`, stored plus 8, the lowest column in the lowest four bits. `group` is a multiple of 8 that divides k.
#[derive(Clone, Copy, Debug)]
pub struct PackInt4 {
    pub group: usize,
}

/// `packed`, `scales` to w `f32 [n, k]`.
#[derive(Clone, Copy, Debug)]
pub struct UnpackInt4 {
    pub group: usize,
}

/// y = x W^T (+ bias) with W packed: x `[m, k]` of any float type, `packed`, `scales`, bias `[n]` in x's type; y `[m, n]` in
/// x's type. Differentiable in x and the bias; the packed weight is fixed.
#[derive(Clone, Copy, Debug)]
pub struct MatmulInt4 {
    pub group: usize,
    pub bias: bool,
}

/// k of a packed matrix whose scales fit, else `None`.
fn packed_columns(packed: &Meta, scales: &Meta, group: usize) -> Option<usize> {
    let &[n, words] = packed.dims() else { return None };
    let k = words * 8;
    let groups = group > 0 && group.is_multiple_of(8) && k.is_multiple_of(group);
    let types = packed.dtype == DType::U32 && scales.dtype == DType::F32;
    (groups && types && scales.dims() == [n, k / group]).then_some(k)
}

/// Every weight of a packed matrix, from f64 words.
fn unpacked(packed: &[f64], scales: &[f64], group: usize) -> Vec<f64> {
    let level = |i: usize| f64::from(((packed[i / 8] as u32) >> (4 * (i % 8)) & 15) as i32 - 8);
    (0..packed.len() * 8).map(|i| level(i) * scales[i / group]).collect()
}

impl Op for PackInt4 {
    fn name(&self) -> &'static str {
        "pack_int4"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "float w [n, k], k a multiple of the group, the group a multiple of 8";
        match inputs {
            [w] if w.dtype.is_float() && w.shape.rank() == 2 && w.count() > 0 => {
                let [n, k] = [0, 1].map(|axis| w.dims()[axis]);
                if self.group > 0 && self.group.is_multiple_of(8) && k.is_multiple_of(self.group) {
                    return Ok(vec![Meta::new(&[n, k / 8], DType::U32)?, Meta::new(&[n, k / self.group], DType::F32)?]);
                }
                Err(Error::Shape { op: self.name(), rule, got: format!("{w}, group {}", self.group) })
            }
            _ => Err(Error::Shape { op: self.name(), rule, got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let w = &inputs[0].data;
        let grids: Vec<Grid> = ranges(w, self.group)
            .into_iter()
            .map(|[low, high]| Grid::new(Scheme::SymmetricNarrow, 4, low, high))
            .collect();
        let nibble = |i: usize| {
            let level = grids[i / self.group].level(w[i]);
            (if level.is_nan() { 8 } else { level as i32 + 8 }) as u32
        };
        let word = |first: usize| f64::from((0..8).fold(0, |word, b| word | nibble(first + b) << (4 * b)));
        let packed = (0..w.len()).step_by(8).map(word).collect();
        vec![packed, grids.iter().map(|g| f64::from(g.scale)).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        // The shader text is that of the quant family: one scale rule.
        const PACK: Code = Code::Gpu { source: QUANT_SOURCE, entry: "pack_int4_fwd", constants: &[] };
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("pack_int4_fwd", DType::FLOATS, cpu::pack_int4),
            Kernel { name: "pack_int4_fwd", code: PACK, dtypes: DType::FLOATS, fits: always, plan: plan_pack },
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        map_params((Scheme::SymmetricNarrow, 4, Granularity::Group(self.group), GridFrom::Own), inputs)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for UnpackInt4 {
    fn name(&self) -> &'static str {
        "unpack_int4"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let refuse = || {
            let rule = "packed u32 [n, k/8] and scales f32 [n, k/group], the group a multiple of 8";
            Error::Shape { op: self.name(), rule, got: format!("{}, group {}", shape::list(inputs), self.group) }
        };
        let [packed, scales] = inputs else { return Err(refuse()) };
        let k = packed_columns(packed, scales, self.group).ok_or_else(refuse)?;
        Ok(vec![Meta::new(&[packed.dims()[0], k], DType::F32)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        vec![unpacked(&inputs[0].data, &inputs[1].data, self.group)]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("unpack_int4_fwd", &[DType::F32], cpu::unpack_int4),
            wgsl("unpack_int4_fwd", &[DType::F32], plan_unpack),
        ];
        KERNELS
    }

    fn params(&self, _: &[Meta], outputs: &[Meta]) -> Params {
        Params::new().u(outputs[0].dims()[0]).u(1).u(outputs[0].dims()[1]).u(self.group)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for MatmulInt4 {
    fn name(&self) -> &'static str {
        "matmul_int4"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let refuse = || {
            let rule = "float x [m, k], packed u32 [n, k/8], scales f32 [n, k/group] (, bias [n] in x's type)";
            Error::Shape { op: self.name(), rule, got: format!("{}, group {}", shape::list(inputs), self.group) }
        };
        if inputs.len() != 3 + usize::from(self.bias) {
            return Err(refuse());
        }
        let (x, n) = (&inputs[0], inputs[1].dims().first().copied().unwrap_or(0));
        let k = packed_columns(&inputs[1], &inputs[2], self.group).ok_or_else(refuse)?;
        let bias = inputs.get(3).is_none_or(|b| b.dims() == [n] && b.dtype == x.dtype);
        match *x.dims() {
            [m, columns] if columns == k && x.dtype.is_float() && bias => Ok(vec![Meta::new(&[m, n], x.dtype)?]),
            _ => Err(refuse()),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (m, k, n) = (inputs[0].dims()[0], inputs[0].dims()[1], inputs[1].dims()[0]);
        let w = unpacked(&inputs[1].data, &inputs[2].data, self.group);
        let y = |id: usize| {
            let (x, w) = (&inputs[0].data[id / n * k..][..k], &w[id % n * k..][..k]);
            let sum: f64 = x.iter().zip(w).map(|(a, b)| a * b).sum();
            sum + inputs.get(3).map_or(0.0, |b| b.data[id % n])
        };
        vec![(0..m * n).map(y).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("matmul_int4_fwd", DType::FLOATS, cpu::matmul_int4),
            WARP_GROUPS,
            tensor("matmul_int4_fwd_few_mma", few_tokens, |p| plan_tensor(p, FEW)),
            tensor("matmul_int4_fwd_mma", whole_chunks, |p| plan_tensor(p, MANY)),
            wgsl("matmul_int4_fwd", DType::FLOATS, plan_matmul),
        ];
        KERNELS
    }

    /// x decides how activations are stored; scales are f32 always.
    fn element(&self, inputs: &[Meta], _: &[Meta]) -> DType {
        inputs[0].dtype
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        let [m, n] = [0, 1].map(|axis| outputs[0].dims()[axis]);
        Params::new().u(m).u(n).u(inputs[0].dims()[1]).u(self.group).flag(self.bias)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[1, 2], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let dy = g.grad(0)?;
        let mut grads = vec![None; g.input_metas.len()];
        if g.needs(0) {
            let w = g.one(&UnpackInt4 { group: self.group }, &[g.input(1)?, g.input(2)?])?;
            let w = if dy.dtype() == DType::F32 { w } else { g.one(&Cast { to: dy.dtype() }, &[&w])? };
            grads[0] = Some(g.one(&Matmul::default(), &[dy, &w])?);
        }
        if self.bias && g.needs(3) {
            grads[3] = Some(g.one(&Reduce { function: ReduceFunction::Sum, axis: Axis::Rows }, &[dy])?);
        }
        Ok(grads)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 2.0 * outputs[0].count() as f64 * inputs[0].dims()[1] as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const fn wgsl(entry: &'static str, dtypes: &'static [DType], plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name: entry, code, dtypes, fits: always, plan }
}

const fn tensor(name: &'static str, fits: fn(&Problem) -> bool, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Cuda { source: SOURCE, entry: name, constants: &[], arch: 80, tensor: &["mma.sync"] };
    Kernel { name, code, dtypes: &[DType::F16, DType::Bf16], fits, plan }
}

const WARP_GROUPS: Kernel = Kernel {
    name: "matmul_int4_fwd_wgmma",
    code: Code::Cuda {
        source: GROUPS,
        entry: "matmul_int4_fwd_wgmma",
        constants: &[],
        arch: 90,
        tensor: &["wgmma.mma_async"],
    },
    dtypes: &[DType::F16, DType::Bf16],
    fits: fits_groups,
    plan: plan_groups,
};

const MANY: Tile = Tile::new([128, 128], 256, 1, 4, 2);
const FEW: Tile = Tile::new([32, 16], 128, 4, 6, 2);

/// Rows of words start on 16 bytes, and 32 products share a scale.
fn whole_chunks(p: &Problem) -> bool {
    p.op::<MatmulInt4>().is_some_and(|op| op.group.is_multiple_of(32))
}

fn few_tokens(p: &Problem) -> bool {
    whole_chunks(p) && p.outputs[0].dims()[0] <= FEW_TOKENS
}

fn fits_groups(p: &Problem) -> bool {
    let outputs = [1, 0].map(|axis| p.outputs[0].dims()[axis]);
    whole_chunks(p) && p.inputs[0].shape.last() > 0 && fills(p, outputs, NARROW)
}

fn plan_groups(p: &Problem) -> Plan {
    Plan::of(token_launch(p, NARROW, p.params()).slots(&slots(p)))
}

/// Without a bias its slot holds x, which is not read there.
fn slots(p: &Problem) -> [usize; 5] {
    [0, 1, 2, if p.inputs.len() == 4 { 3 } else { 0 }, p.inputs.len()]
}

fn plan_tensor(p: &Problem, tile: Tile) -> Plan {
    Plan::of(tile.launch(p).slots(&slots(p)))
}

/// Arguments: w, packed, scales, then scratch: ranges, parts of ranges, zero points (all 0).
fn plan_pack(p: &Problem) -> Plan {
    let (count, length) = (p.inputs[0].count(), p.params().words()[1] as usize);
    let (mut launches, bytes) = range_launches(count, length, false, 3, 4);
    launches.push(Launch::linear(count / 8, BLOCK, p.params()).slots(&[0, 3, 1]).trips(8));
    let scales = Launch::linear(count / length, BLOCK, p.params()).entry("quantize_scales");
    launches.push(scales.slots(&[3, 2, 5]));
    let groups = count / length;
    Plan::sequence(launches).scratch(groups * 8).scratch(bytes).scratch(groups * 4)
}

fn plan_unpack(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.inputs[0].count(), BLOCK, p.params()).trips(8))
}

fn plan_matmul(p: &Problem) -> Plan {
    let launch = Launch::linear(p.outputs[0].count(), BLOCK, p.params());
    Plan::of(launch.slots(&slots(p)).trips(p.inputs[0].dims()[1]))
}

/// Words of eight nibbles 1 ..= 15.
fn words(seed: u64, shape: &crate::shape::Shape) -> Vec<f64> {
    let mut stream = crate::rng::Stream::new(seed, 0x14);
    let mut word = || (0..8).fold(0u32, |word, b| word | (1 + stream.below(15) as u32) << (4 * b));
    (0..shape.count()).map(|_| f64::from(word())).collect()
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let matmul = |[m, n, k]: [usize; 3], group: usize, bias: bool, dtype: DType| {
        let case = Case::new(MatmulInt4 { group, bias }, Tolerance::Contraction { k })
            .normal(&[m, k], dtype)
            .input(&[n, k / 8], DType::U32, Fill::Custom(words))
            .input(&[n, k / group], DType::F32, Fill::Uniform { low: 0.01, high: 0.2 });
        if bias { case.normal(&[n], dtype) } else { case }
    };
    for (size, group) in [
        ([1, 1, 8], 8),
        ([1, 5, 32], 16),
        ([3, 7, 96], 32),
        ([4, 16, 128], 64),
        ([17, 33, 256], 128),
        ([65, 63, 64], 32),
        // Several stages and tiles of the tensor kernels, ragged ends, a group that no slice of 64 divides.
        ([5, 70, 2112], 96),
        ([135, 131, 352], 32),
    ] {
        let [m, n, k] = size;
        for &dtype in DType::FLOATS {
            cases.push(Case::new(PackInt4 { group }, Tolerance::Exact).normal(&[n, k], dtype));
            let case = matmul(size, group, n % 2 == 1, dtype);
            cases.push(if dtype == DType::F32 && m * k < 300 { case.grad() } else { case });
        }
        cases.push(matmul(size, group, n % 2 == 0, DType::F32));
        let case =
            Case::new(UnpackInt4 { group }, Tolerance::Exact).input(&[n, k / 8], DType::U32, Fill::Custom(words));
        cases.push(case.input(&[n, k / group], DType::F32, Fill::Uniform { low: 0.01, high: 0.2 }));
    }
    // GPT-2 small's first FFN matrix over one token and over 128.
    cases.push(Case::new(PackInt4 { group: 64 }, Tolerance::Exact).normal(&[3072, 768], DType::F32).bench());
    cases.push(matmul([1, 3072, 768], 64, true, DType::F32).bench());
    cases.push(matmul([128, 3072, 768], 64, true, DType::F32).bench());
    for dtype in [DType::F16, DType::Bf16] {
        cases.push(matmul([1, 3072, 768], 64, true, dtype).bench());
        cases.push(matmul([128, 3072, 768], 64, true, dtype).bench());
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::{run, run_one};
    use crate::ops::quant::FakeQuant;

    /// What is packed is what fake-quant of four bits shows, to the bit.
    #[test]
    fn packing_is_fake_quant_of_four_bits() {
        let device = crate::device::open("cpu").unwrap();
        let mut stream = crate::rng::Stream::new(9, 0);
        let w: Vec<f32> = (0..6 * 64).map(|_| stream.normal() as f32).collect();
        let w = Tensor::from_slice(&device, &[6, 64], &w).unwrap();
        let packed = run(&PackInt4 { group: 16 }, &[&w]).unwrap();
        let back = run_one(&UnpackInt4 { group: 16 }, &[&packed[0], &packed[1]]).unwrap();
        let granularity = Granularity::Group(16);
        let fake = FakeQuant { bits: 4, scheme: Scheme::SymmetricNarrow, granularity, from: GridFrom::Own };
        assert_eq!(back.to_vec::<f32>().unwrap(), run_one(&fake, &[&w]).unwrap().to_vec::<f32>().unwrap());
        assert_eq!(PackInt4 { group: 12 }.infer(&[w.meta()]).unwrap_err().code(), "E-SHAPE");
    }
}
