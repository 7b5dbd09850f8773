//! Stored quantization: float to int8 with scales and zero points, and back. The scale rule is that of `quant.rs`.

use std::any::Any;

use super::quant::{
    BLOCK, Granularity, Grid, GridFrom, Scheme, check, check_bits, group_length, map_params, own_launches, wgsl,
};
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Launch, Params, Plan, Problem};
use crate::op::{Array, Case, Fill, Op, Tolerance};
use crate::shape::{self, Meta};

/// x and what `from` asks for to `q i8` of x's shape, `scale f32 [groups]`, `zero_point f32 [groups]`.
///
/// Asymmetric levels start at 0; `q` stores them, and `zero_point` the zero point, less 2^(bits-1) so that they fit i8
/// (0 for symmetric schemes): `x = (q - zero_point) scale` whatever the scheme. A group with a NaN has the scale NaN.
#[derive(Clone, Copy, Debug)]
pub struct Quantize {
    pub bits: u32,
    pub scheme: Scheme,
    pub granularity: Granularity,
    pub from: GridFrom,
}

/// `q i8`, `scale f32 [groups]`, `zero_point f32 [groups]` to x f32: (q - zero_point) scale.
#[derive(Clone, Copy, Debug)]
pub struct Dequantize {
    pub scheme: Scheme,
    pub granularity: Granularity,
    pub bits: u32,
}

impl Op for Quantize {
    fn name(&self) -> &'static str {
        "quantize"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let (x, groups) = check(self.name(), (self.bits, self.scheme, self.granularity, self.from), inputs)?;
        let scales = Meta::new(&[groups], DType::F32)?;
        Ok(vec![Meta { dtype: DType::I8, ..x }, scales, scales])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let x = &inputs[0];
        let length = group_length(self.granularity, x);
        let shift = self.scheme.shift(self.bits) as f32;
        let (mut q, mut scales, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
        let grids = Grid::all(self.scheme, self.bits, self.from, inputs, length);
        for (group, grid) in x.data.chunks(length).zip(grids) {
            let stored = |&v: &f64| {
                let level = grid.level(v);
                if level.is_nan() { 0.0 } else { f64::from(level - shift) }
            };
            q.extend(group.iter().map(stored));
            scales.push(f64::from(grid.scale));
            zeros.push(f64::from(grid.zero - shift));
        }
        vec![q, scales, zeros]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("quantize_fwd", DType::FLOATS, cpu::quantize),
            wgsl("quantize_fwd", "quantize_fwd", DType::FLOATS, plan_quantize),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        map_params((self.scheme, self.bits, self.granularity, self.from), inputs)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for Dequantize {
    fn name(&self) -> &'static str {
        "dequantize"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check_bits(self.name(), self.bits)?;
        let rule = "q i8, scale f32 [groups] and zero_point f32 [groups]";
        let refuse = || Error::Shape { op: self.name(), rule, got: shape::list(inputs) };
        let [q, scale, zero] = inputs else {
            return Err(refuse());
        };
        let (groups, _) = self.granularity.groups(self.name(), q)?;
        let fits = |m: &Meta| m.dims() == [groups] && m.dtype == DType::F32;
        if q.dtype != DType::I8 || !fits(scale) || !fits(zero) {
            return Err(refuse());
        }
        Ok(vec![Meta { dtype: DType::F32, ..*q }])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let [q, scale, zero] = inputs else { return Vec::new() };
        let length = group_length(self.granularity, q);
        let value = |(i, &q): (usize, &f64)| {
            let (scale, zero) = (scale.data[i / length] as f32, zero.data[i / length] as f32);
            f64::from((q as f32 - zero) * scale)
        };
        vec![q.data.iter().enumerate().map(value).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("dequantize_fwd", &[DType::F32], cpu::dequantize),
            wgsl("dequantize_fwd", "dequantize_fwd", &[DType::F32], plan_dequantize),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        map_params((self.scheme, self.bits, self.granularity, GridFrom::Own), inputs)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Arguments: x, the grids where they are given, q, scale, zero point, then scratch where they are not: ranges, parts of
/// ranges. One invocation makes one word of q.
fn plan_quantize(p: &Problem) -> Plan {
    let (count, length) = (p.inputs[0].count(), p.params().words()[1] as usize);
    let own = p.inputs.len() == 1;
    let (grids, q) = if own { (4, 1) } else { (1, 2) };
    let (mut launches, bytes) = if own { own_launches(p, grids, 5) } else { (Vec::new(), 0) };
    launches.push(Launch::linear(count.div_ceil(4), BLOCK, p.params()).slots(&[0, grids, q]).trips(4));
    let scales = Launch::linear(count / length, BLOCK, p.params()).entry("quantize_scales");
    launches.push(scales.slots(&[grids, q + 1, q + 2]));
    let plan = Plan::sequence(launches);
    if own { plan.scratch(count / length * 8).scratch(bytes) } else { plan }
}

fn plan_dequantize(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.outputs[0].count().div_ceil(4), BLOCK, p.params()).trips(4))
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (dims, group) in [(&[1usize, 1][..], 1), (&[3, 7], 7), (&[5, 96], 32), (&[65, 63], 21), (&[2, 3, 128], 64)] {
        for granularity in [Granularity::Tensor, Granularity::Token, Granularity::Group(group)] {
            for (scheme, bits) in Scheme::ALL.into_iter().zip([8, 5, 8]) {
                let op = Quantize { bits, scheme, granularity, from: GridFrom::Own };
                cases.push(Case::new(op, Tolerance::Exact).normal(dims, DType::F32));
                let case = Case::new(Dequantize { scheme, granularity, bits }, Tolerance::Exact);
                let case = case.input(dims, DType::I8, Fill::Integers { low: -128, high: 127 });
                let groups = granularity.groups("case", &case.metas()[0]).map_or(1, |(groups, _)| groups);
                let zeros = Fill::Integers { low: -128, high: if scheme.asymmetric() { 127 } else { -128 } };
                let zeros = if scheme.asymmetric() { zeros } else { Fill::Integers { low: 0, high: 0 } };
                cases.push(case.normal(&[groups], DType::F32).input(&[groups], DType::F32, zeros));
            }
        }
    }
    for dtype in [DType::F16, DType::Bf16] {
        for scheme in Scheme::ALL {
            let op = Quantize { bits: 8, scheme, granularity: Granularity::Channel, from: GridFrom::Own };
            cases.push(Case::new(op, Tolerance::Exact).normal(&[9, 65], dtype));
        }
    }
    let (scheme, granularity) = (Scheme::SymmetricNarrow, Granularity::Token);
    let op = Quantize { bits: 8, scheme, granularity, from: GridFrom::Own };
    cases.push(Case::new(op, Tolerance::Exact).normal(&[1024, 768], DType::F32).bench());
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::{run, run_one};
    use crate::ops::quant::FakeQuant;
    use crate::tensor::Tensor;

    /// quantize then dequantize is fake-quant to the bit, and quantizing what came back changes nothing.
    #[test]
    fn stored_and_simulated_forms_agree_to_the_bit() {
        let device = crate::device::open("cpu").unwrap();
        let mut stream = crate::rng::Stream::new(11, 0);
        let x: Vec<f32> = (0..37 * 64).map(|_| stream.normal() as f32).collect();
        let x = Tensor::from_slice(&device, &[37, 64], &x).unwrap();
        for scheme in Scheme::ALL {
            for granularity in [Granularity::Tensor, Granularity::Token, Granularity::Group(16)] {
                for bits in 2..=8 {
                    let stored = run(&Quantize { bits, scheme, granularity, from: GridFrom::Own }, &[&x]).unwrap();
                    let [q, scale, zero] = &stored[..] else { panic!("three outputs") };
                    let back = run_one(&Dequantize { scheme, granularity, bits }, &[q, scale, zero]).unwrap();
                    let fake = run_one(&FakeQuant { bits, scheme, granularity, from: GridFrom::Own }, &[&x]).unwrap();
                    assert_eq!(back.to_bytes().unwrap(), fake.to_bytes().unwrap(), "{scheme:?} {granularity:?} {bits}");
                }
            }
        }
    }
}
