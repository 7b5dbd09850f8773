//! Weights with unstructured or block sparsity: the words that are not zero, and bitmaps that say where they stood.
//!
//! A word is one f32, or four int8 along k, which is what byte dot products take: int8 weights are skipped in blocks of four.
//! `values [c]` (int8: `[4 c]`): the kept words, for every 64 words of k row after row, in their order; 16 more that mean nothing,
//! so that kernels may read whole registers. `lists u32 [ceil(words/64), n, 3]`: for each such block and row two words of mask,
//! low bits first, and the place of its first value, in words.

use std::any::Any;

use super::quant_matmul::MAX_K;
use crate::cpu;
pub use crate::cpu::BITMAP_BLOCK as BLOCK;
pub use crate::cpu::BITMAP_PADDING as PADDING;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, always, source};
use crate::op::{Array, Case, Cost, Family, Fill, Op, Tolerance};
use crate::rng::Stream;
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "sparse_bitmap", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("sparse_bitmap");
const GROUP: u32 = 64;

/// `values` and `lists` of w `[n, k]`, f32 or i8 (then k in fours). Every word that is not zero is kept, so [`DecompressBitmap`]
/// gives w back to the bit but for the sign of f32 zeros, which masks and sums leave behind. On the host: how many values there
/// are depends on them.
pub fn compress(w: &Tensor) -> Result<[Tensor; 2]> {
    let (n, words) = match *w.dims() {
        [n, k] if w.dtype() == DType::F32 && k > 0 => (n, k),
        [n, k] if w.dtype() == DType::I8 && k > 0 && k.is_multiple_of(4) => (n, k / 4),
        _ => {
            let rule = "w [n, k], f32, or i8 with k a multiple of 4";
            return Err(Error::Shape { op: "compress_bitmap", rule, got: w.meta().to_string() });
        }
    };
    let (bytes, sign) = (w.to_bytes()?, if w.dtype() == DType::F32 { 0x80 } else { 0 });
    let (mut values, mut lists) = (Vec::new(), Vec::new());
    for b in 0..words.div_ceil(BLOCK) {
        for j in 0..n {
            let (mut mask, start) = (0u64, (values.len() / 4) as u32);
            let row = &bytes[4 * j * words..][..4 * words];
            for (place, word) in row.chunks(4).skip(b * BLOCK).take(BLOCK).enumerate() {
                if word != [0; 4] && word != [0, 0, 0, sign] {
                    mask |= 1 << place;
                    values.extend_from_slice(word);
                }
            }
            lists.extend([mask as u32, (mask >> 32) as u32, start]);
        }
    }
    values.resize(values.len() + 4 * PADDING, 0);
    let values = Tensor::from_bytes(w.device(), Meta::new(&[values.len() / w.dtype().size()], w.dtype())?, &values)?;
    Ok([values, Tensor::from_slice(w.device(), &[words.div_ceil(BLOCK), n, 3], &lists)?])
}

/// What kernels rely on and no shape says: `lists` of rows of `words` words name `kept` values one after the other, and no word
/// behind a row's last.
///
/// # Errors
/// The rule that is broken and where.
pub fn check_lists(lists: &[u32], words: usize, kept: usize) -> std::result::Result<(), String> {
    let rows = lists.len() / 3 / words.div_ceil(BLOCK).max(1);
    let mut next = 0;
    for (i, list) in lists.chunks_exact(3).enumerate() {
        let (block, row) = (i / rows.max(1), i % rows.max(1));
        let mask = u64::from(list[0]) | u64::from(list[1]) << 32;
        let length = (words - block * BLOCK).min(BLOCK);
        if mask & !(u64::MAX >> (BLOCK - length)) != 0 {
            return Err(format!("has a bit behind the {length} words of block {block} of row {row}"));
        }
        if list[2] as usize != next {
            return Err(format!("block {block} of row {row} starts at {} where {next} words stand before it", list[2]));
        }
        next += mask.count_ones() as usize;
    }
    if next + PADDING != kept {
        return Err(format!("names {next} words where {} are kept", kept.saturating_sub(PADDING)));
    }
    Ok(())
}

/// `values`, `lists` to w `[n, k]`.
#[derive(Clone, Copy, Debug)]
pub struct DecompressBitmap {
    pub k: usize,
    pub dtype: DType,
}

/// y = x W^T (+ bias) with W `[n, k]` compressed: x `f32 [m, k]`, values, lists, bias `f32 [n]` to `f32 [m, n]`. Inference only.
#[derive(Clone, Copy, Debug)]
pub struct MatmulBitmap {
    pub bias: bool,
}

/// The int8 form: `xq i8 [m, k]`, `xs f32 [m]`, values, lists, `ws f32 [n]`, bias `f32 [n]` to `f32 [m, n]`; exact int32 sums,
/// then the epilogue of [`super::quant::MatmulInt8`]. Inference only.
#[derive(Clone, Copy, Debug)]
pub struct MatmulBitmapInt8 {
    pub bias: bool,
}

/// Elements of a word.
fn per_word(dtype: DType) -> usize {
    4 / dtype.size()
}

/// The rows n, where `values` of type `dtype` and `lists` may be a compressed `[n, k]`.
fn compressed(values: &Meta, lists: &Meta, dtype: DType, k: usize) -> Option<usize> {
    let (&[count], &[blocks, n, 3]) = (values.dims(), lists.dims()) else { return None };
    let per = per_word(dtype);
    let types = values.dtype == dtype && lists.dtype == DType::U32;
    let sizes = k > 0 && k.is_multiple_of(per) && blocks == (k / per).div_ceil(BLOCK) && count >= per * PADDING;
    (types && sizes).then_some(n)
}

/// Row `j` made dense, from f64 values and words: `per` elements to a word.
fn row(values: &Array, lists: &Array, per: usize, k: usize, j: usize) -> Vec<f64> {
    let n = lists.dims()[1];
    let mut row = vec![0.0; k];
    for (b, block) in row.chunks_mut(BLOCK * per).enumerate() {
        let list = &lists.data[3 * (b * n + j)..][..3];
        let mut at = list[2] as usize * per;
        for (place, word) in block.chunks_mut(per).enumerate() {
            if (list[place / 32] as u32) >> (place % 32) & 1 == 1 {
                word.copy_from_slice(&values.data[at..at + per]);
                at += per;
            }
        }
    }
    row
}

/// x W^T, made of dense rows.
fn product(x: &Array, values: &Array, lists: &Array, per: usize) -> Vec<f64> {
    let ([m, k], n) = ([0, 1].map(|axis| x.dims()[axis]), lists.dims()[1]);
    let mut y = vec![0.0; m * n];
    for j in 0..n {
        let w = row(values, lists, per, k, j);
        for i in 0..m {
            y[i * n + j] = x.data[i * k..][..k].iter().zip(&w).map(|(x, w)| x * w).sum();
        }
    }
    y
}

/// m, n, words of a row, bias.
fn parameters(m: usize, n: usize, words: usize, bias: bool) -> Params {
    Params::new().u(m).u(n).u(words).flag(bias)
}

impl Op for DecompressBitmap {
    fn name(&self) -> &'static str {
        "decompress_bitmap"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let n = match inputs {
            [values, lists] if matches!(self.dtype, DType::F32 | DType::I8) => {
                compressed(values, lists, self.dtype, self.k)
            }
            _ => None,
        };
        let refused = || {
            let rule = "values [c], f32 or i8 as the op says, and lists u32 [ceil(words of k/64), n, 3]";
            Error::Shape { op: self.name(), rule, got: format!("{}, k {}", shape::list(inputs), self.k) }
        };
        Ok(vec![Meta::new(&[n.ok_or_else(refused)?, self.k], self.dtype)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let made = |j| row(&inputs[0], &inputs[1], per_word(self.dtype), self.k, j);
        vec![(0..inputs[1].dims()[1]).flat_map(made).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("decompress_bitmap_fwd", F32, cpu::decompress_bitmap),
            gpu("decompress_bitmap_fwd", |p| plan(p, &[0, 1, 2], p.inputs[1].count() / 3, BLOCK)),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        parameters(0, inputs[1].dims()[1], self.k / per_word(self.dtype), false)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for MatmulBitmap {
    fn name(&self) -> &'static str {
        "matmul_bitmap"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "x [m, k], values [c], lists u32 [ceil(k/64), n, 3] (, bias [n]), floats f32";
        let refuse = || Error::Shape { op: self.name(), rule, got: shape::list(inputs) };
        if inputs.len() != 3 + usize::from(self.bias) || inputs[0].dtype != DType::F32 {
            return Err(refuse());
        }
        let &[m, k] = inputs[0].dims() else { return Err(refuse()) };
        let n = compressed(&inputs[1], &inputs[2], DType::F32, k).ok_or_else(refuse)?;
        if !inputs[3..].iter().all(|b| b.dims() == [n] && b.dtype == DType::F32) {
            return Err(refuse());
        }
        Ok(vec![Meta::new(&[m, n], DType::F32)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let n = inputs[2].dims()[1];
        let mut y = product(&inputs[0], &inputs[1], &inputs[2], 1);
        if let Some(bias) = inputs.get(3) {
            y.iter_mut().enumerate().for_each(|(id, y)| *y += bias.data[id % n]);
        }
        vec![y]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("matmul_bitmap_fwd", F32, cpu::matmul_bitmap),
            // Without a bias its slot holds x (bytes: ws), which is not read there.
            gpu("matmul_bitmap_fwd", |p| {
                let slots = [0, 1, 2, if p.inputs.len() == 4 { 3 } else { 0 }, p.inputs.len()];
                plan(p, &slots, p.outputs[0].count(), p.inputs[2].dims()[0] * BLOCK)
            }),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        parameters(outputs[0].dims()[0], outputs[0].dims()[1], inputs[0].dims()[1], self.bias)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs, inputs[1].count() - PADDING)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for MatmulBitmapInt8 {
    fn name(&self) -> &'static str {
        "matmul_bitmap_int8"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule =
            "xq i8 [m, k], xs f32 [m], values i8 [4 c], lists u32 [ceil(k/256), n, 3], ws f32 [n] (, bias f32 [n])";
        let refuse = || Error::Shape { op: self.name(), rule, got: shape::list(inputs) };
        if inputs.len() != 5 + usize::from(self.bias) || inputs[0].dtype != DType::I8 {
            return Err(refuse());
        }
        let &[m, k] = inputs[0].dims() else { return Err(refuse()) };
        let n = compressed(&inputs[2], &inputs[3], DType::I8, k).ok_or_else(refuse)?;
        let vector = |meta: &Meta, length: usize| meta.dims() == [length] && meta.dtype == DType::F32;
        if !vector(&inputs[1], m) || !inputs[4..].iter().all(|v| vector(v, n)) || k > MAX_K {
            return Err(refuse());
        }
        Ok(vec![Meta::new(&[m, n], DType::F32)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let n = inputs[3].dims()[1];
        let mut y = product(&inputs[0], &inputs[2], &inputs[3], 4);
        for (id, y) in y.iter_mut().enumerate() {
            let scale = inputs[1].data[id / n] * inputs[4].data[id % n];
            *y = *y * scale + inputs.get(5).map_or(0.0, |b| b.data[id % n]);
        }
        vec![y]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("matmul_bitmap_int8_fwd", F32, cpu::matmul_bitmap_int8),
            gpu("matmul_bitmap_int8_fwd", |p| {
                let slots = [0, 1, 2, 3, 4, if p.inputs.len() == 6 { 5 } else { 4 }, p.inputs.len()];
                plan(p, &slots, p.outputs[0].count(), p.inputs[3].dims()[0] * BLOCK)
            }),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        parameters(outputs[0].dims()[0], outputs[0].dims()[1], inputs[0].dims()[1] / 4, self.bias)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs, inputs[2].count() - 4 * PADDING)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A multiply-add for each kept element and token.
fn cost(inputs: &[Meta], outputs: &[Meta], kept: usize) -> Cost {
    let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
    Cost { flops: 2.0 * (kept * outputs[0].dims()[0]) as f64, bytes }
}

const F32: &[DType] = &[DType::F32];

const fn gpu(entry: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name: entry, code, dtypes: F32, fits: always, plan }
}

fn plan(p: &Problem, slots: &[usize], items: usize, trips: usize) -> Plan {
    Plan::of(Launch::linear(items, GROUP, p.params()).slots(slots).trips(trips))
}

/// Lists of random masks that keep `kept` of 256 words, some rows of small matrices none and some all; and how many words that is.
fn random_lists(n: usize, words: usize, kept: u32) -> (usize, Vec<f64>) {
    let mut stream = Stream::new((n * words) as u64, kept);
    let (mut start, mut lists) = (0, Vec::new());
    for b in 0..words.div_ceil(BLOCK) {
        for j in 0..n {
            let mut bits = (0..BLOCK / 4).flat_map(|_| stream.word().to_le_bytes()).map(u32::from);
            let random = (0..BLOCK).fold(0u64, |mask, i| mask | u64::from(bits.next().is_some_and(|b| b < kept)) << i);
            let mask = match j % 37 {
                11 if n < 1000 => 0,
                23 if n < 1000 => u64::MAX,
                _ => random,
            };
            let mask = mask & (u64::MAX >> (BLOCK - (words - b * BLOCK).min(BLOCK)));
            lists.extend([f64::from(mask as u32), f64::from((mask >> 32) as u32), start as f64]);
            start += mask.count_ones() as usize;
        }
    }
    (start, lists)
}

/// The case with the two inputs of a compressed `[n, k]` of which about `kept` of 256 words are kept.
pub(super) fn weights(case: Case, [n, k]: [usize; 2], dtype: DType, kept: u32, fill: Fill) -> Case {
    let words = k / per_word(dtype);
    let (count, lists) = random_lists(n, words, kept);
    let case = case.input(&[per_word(dtype) * (count + PADDING)], dtype, fill);
    case.input(&[words.div_ceil(BLOCK), n, 3], DType::U32, Fill::Values(lists))
}

fn cases() -> Vec<Case> {
    let narrow = Fill::Integers { low: -128, high: 127 };
    let float = |[m, n, k]: [usize; 3], bias: bool, kept: u32| {
        let case = Case::new(MatmulBitmap { bias }, Tolerance::Contraction { k: k + 1 }).normal(&[m, k], DType::F32);
        let case = weights(case, [n, k], DType::F32, kept, Fill::NORMAL);
        if bias { case.normal(&[n], DType::F32) } else { case }
    };
    let bytes = |[m, n, k]: [usize; 3], bias: bool, kept: u32, scales: Fill, tolerance: Tolerance| {
        let case = Case::new(MatmulBitmapInt8 { bias }, tolerance);
        let case = case.input(&[m, k], DType::I8, narrow.clone()).input(&[m], DType::F32, scales.clone());
        let case = weights(case, [n, k], DType::I8, kept, narrow.clone()).input(&[n], DType::F32, scales);
        if bias { case.normal(&[n], DType::F32) } else { case }
    };
    let scales = Fill::Uniform { low: 1e-3, high: 2e-2 };
    let ones = Fill::Integers { low: 1, high: 1 };
    let mut cases = Vec::new();
    for [n, k] in [[1, 4], [3, 36], [40, 64], [5, 68], [70, 260], [39, 512]] {
        for kept in [26, 128] {
            for (dtype, fill) in [(DType::F32, Fill::NORMAL), (DType::I8, narrow.clone())] {
                let case = Case::new(DecompressBitmap { k, dtype }, Tolerance::Exact);
                cases.push(weights(case, [n, k], dtype, kept, fill));
            }
        }
    }
    // Every number of registers of tokens, several panels and strips, ragged ends of each extent.
    for (size, kept) in [
        ([1, 1, 4], 128),
        ([1, 300, 68], 51),
        ([2, 40, 36], 51),
        ([3, 9, 64], 128),
        ([7, 45, 256], 26),
        ([8, 31, 132], 128),
        ([9, 17, 64], 51),
        ([17, 39, 324], 26),
        ([33, 64, 128], 128),
        ([65, 275, 96], 51),
        ([128, 16, 520], 51),
        ([262, 21, 260], 26),
    ] {
        for bias in [false, true] {
            cases.push(float(size, bias, kept));
            cases.push(bytes(size, bias, kept, scales.clone(), Tolerance::Contraction { k: 4 }));
        }
        // Unit scales show the int32 sums themselves.
        cases.push(bytes(size, false, kept, ones.clone(), Tolerance::Exact).variant("unit scales"));
    }
    // GPT-2 small's first FFN matrix with one half, a fifth and a tenth of its words, over one token and many.
    for kept in [128, 51, 26] {
        for m in [1, 512] {
            cases.push(float([m, 3072, 768], true, kept).bench());
            cases.push(bytes([m, 3072, 768], true, kept, scales.clone(), Tolerance::Contraction { k: 4 }).bench());
        }
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::run_one;
    use crate::ops::matmul::Matmul;

    fn weights(n: usize, words: usize, density: f64) -> Vec<u32> {
        let mut stream = Stream::new(7, words as u32);
        let mut word = || if stream.uniform() < density { stream.word() } else { 0 };
        (0..n * words).map(|_| word()).collect()
    }

    /// Any bits; only the sign of an f32 zero is lost.
    #[test]
    fn what_was_compressed_comes_back_to_the_bit() {
        for device in ["cpu", "cuda-host", "wgpu"] {
            let Ok(device) = crate::device::open(device) else { continue };
            for (n, words, density) in [(1, 1, 0.0), (3, 63, 1.0), (5, 64, 0.5), (4, 130, 0.2), (300, 70, 0.1)] {
                let mut bits = weights(n, words, density);
                bits[0] = 0x8000_0000;
                for (dtype, k) in [(DType::F32, words), (DType::I8, 4 * words)] {
                    let meta = Meta::new(&[n, k], dtype).unwrap();
                    let w = Tensor::from_bytes(&device, meta, bytemuck::cast_slice(&bits)).unwrap();
                    let [values, lists] = compress(&w).unwrap();
                    let signed = |b: &&u32| **b == 0x8000_0000 && dtype == DType::F32;
                    let kept = bits.iter().filter(|b| **b != 0 && !signed(b)).count();
                    let bits: Vec<u32> = bits.iter().map(|b| if signed(&b) { 0 } else { *b }).collect();
                    assert_eq!(values.meta().bytes(), 4 * (kept + PADDING));
                    let back = run_one(&DecompressBitmap { k, dtype }, &[&values, &lists]).unwrap();
                    assert_eq!(back.to_bytes().unwrap(), bytemuck::cast_slice::<_, u8>(&bits), "{dtype:?} {n} {words}");
                }
            }
        }
    }

    #[test]
    fn products_are_those_of_the_dense_weights() {
        let device = crate::device::open("cpu").unwrap();
        let mut stream = Stream::new(3, 0);
        let (m, n, k) = (20, 70, 200);
        let mut normal = |count: usize| -> Vec<f32> { (0..count).map(|_| stream.normal() as f32).collect() };
        let (x, mut w) = (normal(m * k), normal(n * k));
        w.iter_mut().enumerate().for_each(|(i, w)| *w = if i * i % 7 == 1 { *w } else { 0.0 });
        let x = Tensor::from_slice(&device, &[m, k], &x).unwrap();
        let w = Tensor::from_slice(&device, &[n, k], &w).unwrap();
        let [values, lists] = compress(&w).unwrap();
        let sparse = run_one(&MatmulBitmap { bias: false }, &[&x, &values, &lists]).unwrap();
        let dense = run_one(&Matmul { transpose_b: true, ..Matmul::default() }, &[&x, &w]).unwrap();
        for (a, b) in sparse.to_vec::<f32>().unwrap().iter().zip(dense.to_vec::<f32>().unwrap()) {
            approx::assert_abs_diff_eq!(*a, b, epsilon = 1e-4);
        }
    }

    #[test]
    fn what_is_no_compressed_matrix_is_refused() {
        let meta = |dims: &[usize], dtype| Meta::new(dims, dtype).unwrap();
        let lists = |blocks| meta(&[blocks, 5, 3], DType::U32);
        let (x, values) = (meta(&[2, 130], DType::F32), meta(&[40], DType::F32));
        let op = MatmulBitmap { bias: false };
        assert_eq!(op.infer(&[x, values, lists(3)]).unwrap()[0].dims(), [2, 5]);
        assert_eq!(op.infer(&[x, values, lists(2)]).unwrap_err().code(), "E-SHAPE");
        assert_eq!(op.infer(&[x, meta(&[15], DType::F32), lists(3)]).unwrap_err().code(), "E-SHAPE");
        let device = crate::device::open("cpu").unwrap();
        let odd = Tensor::from_slice(&device, &[2, 6], &[1i8; 12]).unwrap();
        assert_eq!(compress(&odd).unwrap_err().code(), "E-SHAPE");
    }
}
