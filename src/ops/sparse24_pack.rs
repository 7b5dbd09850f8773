//! The compressed form of a 2:4 matrix, and back.
//!
//! `values [n, k/2]`: the kept weights in order. `meta u32 [n, ceil(k/32)]`: two bits for the place of each kept weight in
//! its group of four, ascending, low bits first; 16 kept weights to a word.

use std::any::Any;

use super::binary::MUL;
use super::sparse24::{BLOCK, matrix24, random_mask, ties, wgsl};
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Launch, Params, Plan, Problem};
use crate::op::{Array, Case, Fill, Gradient, Op, Saves, Tolerance};
use crate::shape::{self, Meta, Shape};
use crate::tensor::Tensor;

/// w `[n, k]` (float or i8) and mask `[n, k]` (w's type; any float type beside i8) to `values [n, k/2]`, `meta`. A group
/// with more than two ones keeps the first two; one with fewer is filled up with zeros at its lowest free places.
#[derive(Clone, Copy, Debug)]
pub struct Compress24;

/// `values [n, k/2]`, `meta` to w `[n, k]`, zero where nothing was kept.
#[derive(Clone, Copy, Debug)]
pub struct Decompress24 {
    pub k: usize,
}

/// w `[n, k]`, `meta` to the elements of w at the kept places, `[n, k/2]`: the transpose of [`Decompress24`].
#[derive(Clone, Copy, Debug)]
pub struct Gather24;

/// Words of a row of `meta`.
pub(super) fn meta_words(k: usize) -> usize {
    k.div_ceil(32)
}

/// Places of the two kept weights of group `group` of a row of meta, from f64 words.
pub(super) fn places(row: &[f64], group: usize) -> [usize; 2] {
    let nibble = (row[group / 8] as u32) >> (4 * (group % 8));
    [(nibble & 3) as usize, (nibble >> 2 & 3) as usize]
}

/// Whether `values` and `meta` are a compressed `[n, k]`.
pub(super) fn compressed(values: &Meta, meta: &Meta, k: usize) -> bool {
    let [n, half] = *values.dims() else { return false };
    k.is_multiple_of(4) && half * 2 == k && meta.dims() == [n, meta_words(k)] && meta.dtype == DType::U32
}

impl Op for Compress24 {
    fn name(&self) -> &'static str {
        "compress24"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [w, mask] = inputs else {
            return Err(Error::Shape { op: self.name(), rule: "w and mask", got: shape::list(inputs) });
        };
        let (n, k) = matrix24(self.name(), w, inputs)?;
        let types =
            if w.dtype == DType::I8 { mask.dtype.is_float() } else { w.dtype.is_float() && mask.dtype == w.dtype };
        if !types {
            let expected = "w float with a mask of its type, or w i8 with a float mask";
            return Err(Error::Dtype { op: self.name(), expected, got: shape::list(inputs) });
        }
        if mask.dims() != [n, k] {
            return Err(Error::Shape { op: self.name(), rule: "a mask of w's shape", got: shape::list(inputs) });
        }
        Ok(vec![Meta::new(&[n, k / 2], w.dtype)?, Meta::new(&[n, meta_words(k)], DType::U32)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (w, mask, k) = (&inputs[0].data, &inputs[1].data, inputs[0].dims()[1]);
        let (mut values, mut meta) = (Vec::new(), Vec::new());
        for (w, mask) in w.chunks(k.max(1)).zip(mask.chunks(k.max(1))) {
            let mut words = vec![0u32; meta_words(k)];
            for (group, (w, mask)) in w.chunks(4).zip(mask.chunks(4)).enumerate() {
                let ones = (0..4).filter(|&i| mask[i] != 0.0);
                let zeros = (0..4).filter(|&i| mask[i] == 0.0);
                let mut places: Vec<usize> = ones.chain(zeros).take(2).collect();
                places.sort_unstable();
                values.extend(places.iter().map(|&i| if mask[i] != 0.0 { w[i] } else { 0.0 }));
                words[group / 8] |= ((places[0] | places[1] << 2) as u32) << (4 * (group % 8));
            }
            meta.extend(words.into_iter().map(f64::from));
        }
        vec![values, meta]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("compress24_fwd", DType::FLOATS, cpu::compress24),
            Kernel { fits: bytes, ..wgsl("compress24_i8_fwd", "compress24_i8_fwd", &[DType::F32], plan_compress) },
            Kernel { fits: floats, ..wgsl("compress24_fwd", "compress24_fwd", DType::FLOATS, plan_compress) },
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].dims()[0]).u(inputs[0].dims()[1])
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[1], outputs: &[1] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        // Places that were filled up hold zeros whatever w is; the mask takes what flowed to them away again.
        let dense = g.one(&Decompress24 { k: g.input_metas[0].dims()[1] }, &[g.grad(0)?, g.output(1)?])?;
        Ok(vec![Some(g.one(&MUL, &[&dense, g.input(1)?])?), None])
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for Decompress24 {
    fn name(&self) -> &'static str {
        "decompress24"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs {
            [values, meta] if compressed(values, meta, self.k) && values.dtype != DType::U32 => {
                Ok(vec![Meta::new(&[values.dims()[0], self.k], values.dtype)?])
            }
            _ => {
                let rule = "values [n, k/2] and meta u32 [n, ceil(k/32)], k a multiple of 4";
                Err(Error::Shape { op: self.name(), rule, got: format!("{}, k {}", shape::list(inputs), self.k) })
            }
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (n, k) = (inputs[0].dims()[0], self.k);
        let mut w = vec![0.0; n * k];
        for row in 0..n {
            let meta = &inputs[1].data[row * meta_words(k)..];
            for group in 0..k / 4 {
                for (slot, place) in places(meta, group).into_iter().enumerate() {
                    w[row * k + 4 * group + place] = inputs[0].data[row * k / 2 + 2 * group + slot];
                }
            }
        }
        vec![w]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("decompress24_fwd", DType::FLOATS, cpu::decompress24),
            Kernel { fits: bytes, ..wgsl("decompress24_i8_fwd", "decompress24_i8_fwd", &[DType::F32], plan_groups) },
            Kernel { fits: floats, ..wgsl("decompress24_fwd", "decompress24_fwd", DType::FLOATS, plan_groups) },
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].dims()[0]).u(self.k)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[1], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(g.one(&Gather24, &[g.grad(0)?, g.input(1)?])?), None])
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for Gather24 {
    fn name(&self) -> &'static str {
        "gather24"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [w, meta] = inputs else {
            return Err(Error::Shape { op: self.name(), rule: "w and meta", got: shape::list(inputs) });
        };
        super::quant::float_input(self.name(), w, inputs)?;
        let (n, k) = matrix24(self.name(), w, inputs)?;
        let values = Meta::new(&[n, k / 2], w.dtype)?;
        if !compressed(&values, meta, k) {
            return Err(Error::Shape { op: self.name(), rule: "meta u32 [n, ceil(k/32)]", got: shape::list(inputs) });
        }
        Ok(vec![values])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (n, k) = (inputs[0].dims()[0], inputs[0].dims()[1]);
        let mut values = Vec::with_capacity(n * k / 2);
        for row in 0..n {
            let meta = &inputs[1].data[row * meta_words(k)..];
            for group in 0..k / 4 {
                values.extend(places(meta, group).map(|place| inputs[0].data[row * k + 4 * group + place]));
            }
        }
        vec![values]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("gather24_fwd", DType::FLOATS, cpu::gather24),
            wgsl("gather24_fwd", "gather24_fwd", DType::FLOATS, plan_groups),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].dims()[0]).u(inputs[0].dims()[1])
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[1], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let k = g.input_metas[0].dims()[1];
        Ok(vec![Some(g.one(&Decompress24 { k }, &[g.grad(0)?, g.input(1)?])?), None])
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn bytes(p: &Problem) -> bool {
    p.inputs[0].dtype == DType::I8
}

fn floats(p: &Problem) -> bool {
    !bytes(p)
}

/// One launch for the values (per group, or per word of four bytes) and one for the words of meta.
fn plan_compress(p: &Problem) -> Plan {
    let values = if bytes(p) { p.outputs[0].count().div_ceil(4) } else { p.outputs[0].count() / 2 };
    let meta = Launch::linear(p.outputs[1].count(), BLOCK, p.params()).entry("compress24_meta").slots(&[1, 3]);
    Plan::sequence(vec![Launch::linear(values, BLOCK, p.params()).slots(&[0, 1, 2]).trips(4), meta.trips(8)])
}

/// One invocation per group of four places (which is one word of i8).
fn plan_groups(p: &Problem) -> Plan {
    let groups = p.inputs[0].count().max(p.outputs[0].count()) / 4;
    Plan::of(Launch::linear(groups, BLOCK, p.params()))
}

/// Words of meta of random pairs.
pub(super) fn random_meta(seed: u64, shape: &Shape) -> Vec<f64> {
    let mut stream = crate::rng::Stream::new(seed, 0x2424);
    let nibbles = [0x4u32, 0x8, 0xc, 0x9, 0xd, 0xe];
    let mut word = || (0..8).fold(0u32, |word, i| word | nibbles[stream.below(6)] << (4 * i));
    (0..shape.count()).map(|_| f64::from(word())).collect()
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dims in [[1, 4], [3, 8], [5, 12], [7, 64], [33, 68], [64, 252]] {
        let [n, k] = dims;
        let (values, meta) = ([n, k / 2], [n, meta_words(k)]);
        let mask = Fill::Custom(random_mask);
        for &dtype in DType::FLOATS {
            let case = Case::new(Compress24, Tolerance::Exact).normal(&dims, dtype).input(&dims, dtype, mask.clone());
            let small = dtype == DType::F32 && n < 8;
            cases.push(if small { case.grad() } else { case });
            let case = Case::new(Decompress24 { k }, Tolerance::Exact).normal(&values, dtype);
            let case = case.input(&meta, DType::U32, Fill::Custom(random_meta));
            cases.push(if small { case.grad() } else { case });
            let case = Case::new(Gather24, Tolerance::Exact).normal(&dims, dtype);
            let case = case.input(&meta, DType::U32, Fill::Custom(random_meta));
            cases.push(if small { case.grad() } else { case });
        }
        // Masks with too many and too few ones.
        let bits = Fill::Integers { low: 0, high: 1 };
        let case = Case::new(Compress24, Tolerance::Exact).input(&dims, DType::F32, ties());
        cases.push(case.input(&dims, DType::F32, bits).variant("any mask"));
        let bytes = Fill::Integers { low: -128, high: 127 };
        let case = Case::new(Compress24, Tolerance::Exact).input(&dims, DType::I8, bytes.clone());
        cases.push(case.input(&dims, DType::F32, mask));
        let case = Case::new(Decompress24 { k }, Tolerance::Exact).input(&values, DType::I8, bytes);
        cases.push(case.input(&meta, DType::U32, Fill::Custom(random_meta)));
    }
    let case = Case::new(Compress24, Tolerance::Exact).normal(&[768, 3072], DType::F32);
    cases.push(case.input(&[768, 3072], DType::F32, Fill::Custom(random_mask)).bench());
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::{run, run_one};
    use crate::ops::sparse24::{Form24, Mask24};

    #[test]
    fn layout_of_one_row() {
        let device = crate::device::open("cpu").unwrap();
        let w = Tensor::from_slice(&device, &[1, 8], &[4.0f32, 1.0, 3.0, 2.0, -5.0, 0.0, 5.0, 1.0]).unwrap();
        let mask = run_one(&Mask24 { form: Form24::OneDimensional }, &[&w]).unwrap();
        let packed = run(&Compress24, &[&w, &mask]).unwrap();
        assert_eq!(packed[0].to_vec::<f32>().unwrap(), [4.0, 3.0, -5.0, 5.0]);
        // Places 0 and 2 in both groups: 0b1000 each.
        assert_eq!(packed[1].to_vec::<u32>().unwrap(), [0x88]);
    }

    /// Every mask of four bits with every sign pattern: decompressing gives back w where at most two are kept.
    #[test]
    fn every_mask_survives_the_round_trip() {
        let device = crate::device::open("cpu").unwrap();
        let (mut w, mut mask) = (Vec::new(), Vec::new());
        for bits in (0u32..16).filter(|b| b.count_ones() <= 2) {
            for signs in 0u32..16 {
                for i in 0..4 {
                    w.push((i + 1) as f32 * if signs >> i & 1 == 1 { -1.0 } else { 1.0 });
                    mask.push((bits >> i & 1) as f32);
                }
            }
        }
        let n = w.len() / 16;
        let expected: Vec<f32> = w.iter().zip(&mask).map(|(w, m)| w * m).collect();
        let (w, mask) = (Tensor::from_slice(&device, &[n, 16], &w), Tensor::from_slice(&device, &[n, 16], &mask));
        let packed = run(&Compress24, &[&w.unwrap(), &mask.unwrap()]).unwrap();
        let back = run_one(&Decompress24 { k: 16 }, &[&packed[0], &packed[1]]).unwrap();
        assert_eq!(back.to_vec::<f32>().unwrap(), expected);
    }
}
