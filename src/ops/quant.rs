//! Quantization: ranges, scales, simulated (fake) quantization with its straight-through gradient.
//!
//! One rounding and one scale rule serve the simulated and the stored form on every device, so the two agree to the
//! bit: the scale is `width * (1 / levels)` with the constant rounded to f32, elements are multiplied by the correctly
//! rounded f32 reciprocal of the scale, and rounding is to nearest even. Division by the scale would differ between
//! devices by an ulp and flip roundings. The references below therefore compute in f32 on purpose: they define bits.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, always, source};
use crate::op::{Array, Cost, Family, Gradient, Op, Saves};
use crate::ops::vector;
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub use super::quant_int4::{MatmulInt4, PackInt4, UnpackInt4};
pub use super::quant_int8::MatmulInt8Groups;
pub use super::quant_matmul::MatmulInt8;
pub use super::quantize::{Dequantize, Quantize};

mod cases;
mod grid;
mod ranges;
mod step;

use grid::backward_input;
pub use grid::{Granularity, Grid, GridFrom, LONGEST_MEAN, Scheme, Statistic};
pub(super) use grid::{check, check_bits, float_input, group_length, map_params, ranges};
pub(super) use ranges::{mode, own_launches, range_launches};
pub use step::{StepSlope, TrackStep};

pub static FAMILY: Family = Family { name: "quant", cases: cases::cases, source: Some(SOURCE) };

pub(super) const SOURCE: Source = source!("quant");
pub(super) const BLOCK: u32 = 64;
/// Elements that one invocation maps.
const PER_INVOCATION: usize = 8;

/// Range of each group: `x[..]` to `range f32 [groups, 2]`. A group that holds a NaN has the range (NaN, NaN).
#[derive(Clone, Copy, Debug)]
pub struct Observe {
    pub granularity: Granularity,
    pub statistic: Statistic,
}

/// y = (clamp(rne(x / s) + z) - z) s: x as the quantized model sees it, in its own type. Inputs x and what `from` asks
/// for. NaN stays NaN.
///
/// Gradient: straight through where the rounded level was not clamped, 0 elsewhere. The mask looks at the level after
/// rounding, as PyTorch's does, so that the largest element, whose quotient may be an ulp above the last level, learns.
/// A given step learns too (see [`StepSlope`]).
#[derive(Clone, Copy, Debug)]
pub struct FakeQuant {
    pub bits: u32,
    pub scheme: Scheme,
    pub granularity: Granularity,
    pub from: GridFrom,
}

/// dx = dy [qmin <= rne(x / s) + z <= qmax]; inputs x, `range [groups, 2]` or `step`, dy.
#[derive(Clone, Copy, Debug)]
pub struct FakeQuantBackward {
    pub bits: u32,
    pub scheme: Scheme,
    pub granularity: Granularity,
    pub from: GridFrom,
}

impl Op for Observe {
    fn name(&self) -> &'static str {
        "observe"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x] = inputs else {
            return Err(Error::Shape { op: self.name(), rule: "one input", got: shape::list(inputs) });
        };
        float_input(self.name(), x, inputs)?;
        let (groups, _) = self.granularity.groups(self.name(), x)?;
        Ok(vec![Meta::new(&[groups, 2], DType::F32)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let ranges = ranges(&inputs[0].data, group_length(self.granularity, &inputs[0]));
        let keep = |[low, high]: [f64; 2]| match self.statistic {
            Statistic::MinMax => [low, high],
            Statistic::AbsMax if low.is_nan() => [low, high],
            Statistic::AbsMax => [-low.abs().max(high.abs()), low.abs().max(high.abs())],
        };
        vec![ranges.into_iter().flat_map(keep).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("observe_fwd", DType::FLOATS, cpu::observe),
            vector::cuda(SOURCE, ["observe_fwd_v2"; 2], DType::FLOATS, whole_vectors, |p| vectors(plan_observe(p))),
            wgsl("observe_fwd", "observe_fwd", DType::FLOATS, plan_observe),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], outputs: &[Meta]) -> Params {
        let groups = outputs[0].dims()[0];
        Params::new().u(inputs[0].count()).u(inputs[0].count() / groups).flag(self.statistic == Statistic::AbsMax)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for FakeQuant {
    fn name(&self) -> &'static str {
        "fake_quant"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let (x, _) = check(self.name(), (self.bits, self.scheme, self.granularity, self.from), inputs)?;
        Ok(vec![x])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let x = &inputs[0];
        let length = group_length(self.granularity, x);
        let grids = Grid::all(self.scheme, self.bits, self.from, inputs, length);
        let row = |(group, grid): (&[f64], Grid)| group.iter().map(|&v| f64::from(grid.value(v))).collect::<Vec<_>>();
        vec![x.data.chunks(length).zip(grids).flat_map(row).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("fake_quant_fwd", DType::FLOATS, cpu::fake_quant),
            vector::cuda(SOURCE, ["fake_quant_fwd_v2"; 2], DType::FLOATS, whole_vectors, |p| vectors(plan_fake(p))),
            wgsl("fake_quant_fwd", "fake_quant_fwd", DType::FLOATS, plan_fake),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        map_params((self.scheme, self.bits, self.granularity, self.from), inputs)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let Self { bits, scheme, granularity, from } = *self;
        let backward = FakeQuantBackward { bits, scheme, granularity, from };
        if from != GridFrom::Own {
            let inputs = [g.input(0)?, g.input(1)?, g.grad(0)?];
            let dx = g.needs(0).then(|| g.one(&backward, &inputs)).transpose()?;
            let learns = from == GridFrom::Step && g.needs(1);
            return Ok(vec![dx, learns.then(|| self.step_gradient(g)).transpose()?]);
        }
        // A narrow grid around a group's own amax clamps nothing, and means clamp almost everything: dy itself.
        if scheme == Scheme::SymmetricNarrow || scheme.means() {
            return Ok(vec![Some(g.grad(0)?.clone())]);
        }
        let backward = FakeQuantBackward { from: GridFrom::Range, ..backward };
        let observe = Observe { granularity: self.granularity, statistic: Statistic::MinMax };
        let range = g.one(&observe, &[g.input(0)?])?;
        Ok(vec![Some(g.one(&backward, &[g.input(0)?, &range, g.grad(0)?])?)])
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for FakeQuantBackward {
    fn name(&self) -> &'static str {
        "fake_quant_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        backward_input(self.name(), (self.bits, self.scheme, self.granularity, self.from), inputs).map(|x| vec![x])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let length = group_length(self.granularity, &inputs[0]);
        let grids = Grid::all(self.scheme, self.bits, self.from, inputs, length);
        let elements = inputs[0].data.iter().zip(&inputs[2].data).enumerate();
        vec![elements.map(|(i, (&x, &dy))| if grids[i / length].inside(x) { dy } else { 0.0 }).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("fake_quant_bwd", DType::FLOATS, cpu::fake_quant_backward),
            vector::cuda(SOURCE, ["fake_quant_bwd_v2"; 2], DType::FLOATS, whole_vectors, |p| vectors(plan_map(p))),
            wgsl("fake_quant_bwd", "fake_quant_bwd", DType::FLOATS, plan_map),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        map_params((self.scheme, self.bits, self.granularity, self.from), inputs)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 3.0 * outputs[0].count() as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

pub(super) const fn wgsl(
    name: &'static str,
    entry: &'static str,
    dtypes: &'static [DType],
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    Kernel { name, code: Code::Gpu { source: SOURCE, entry, constants: &[] }, dtypes, fits: always, plan }
}

fn plan_observe(p: &Problem) -> Plan {
    let words = p.params();
    let [count, length, absolute] = [0, 1, 2].map(|i| words.words()[i] as usize);
    let (launches, bytes) = range_launches(count, length, absolute == 1, 1, 2);
    Plan::sequence(launches).scratch(bytes)
}

fn plan_map(p: &Problem) -> Plan {
    let items = p.outputs[0].count().div_ceil(PER_INVOCATION);
    Plan::of(Launch::linear(items, BLOCK, p.params()).trips(PER_INVOCATION))
}

fn plan_fake(p: &Problem) -> Plan {
    if p.inputs.len() == 2 {
        return plan_map(p);
    }
    // Arguments: x, y, then scratch: ranges, parts of ranges.
    let (count, length) = (p.inputs[0].count(), p.params().words()[1] as usize);
    let (mut launches, bytes) = own_launches(p, 2, 3);
    let map = Launch::linear(count.div_ceil(PER_INVOCATION), BLOCK, p.params()).trips(PER_INVOCATION);
    launches.push(map.slots(&[0, 2, 1]));
    Plan::sequence(launches).scratch(count / length * 8).scratch(bytes)
}

/// Groups of whole eights, or one group: the eight neighbours of a thread share a grid, and parts of groups start at
/// multiples of 16 bytes.
fn whole_vectors(p: &Problem) -> bool {
    let words = p.params();
    let [count, length] = [0, 1].map(|i| words.words()[i] as usize);
    length.is_multiple_of(PER_INVOCATION) || length == count
}

/// A plan with a warp for each part of a group, and larger blocks of maps.
fn vectors(plan: Plan) -> Plan {
    let launches = plan.launches.into_iter().map(|launch| {
        let words = launch.params.words();
        let [count, length] = [0, 1].map(|i| words[i] as usize);
        match launch.entry {
            Some("observe_fwd") => {
                let parts = count / length * words[4] as usize;
                let warps = Launch::linear(parts, vector::BLOCK / 32, launch.params).entry("observe_fwd_v2");
                Launch { groups: warps.groups, entry: warps.entry, ..launch }
            }
            Some(_) => launch,
            None => {
                let items = Launch::linear(count.div_ceil(PER_INVOCATION), vector::BLOCK, launch.params);
                Launch { groups: items.groups, ..launch }
            }
        }
    });
    Plan { launches: launches.collect(), scratch: plan.scratch }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn levels(x: &[f64], scheme: Scheme, bits: u32) -> Vec<f32> {
        let [low, high] = ranges(x, x.len())[0];
        let grid = Grid::new(scheme, bits, low, high);
        x.iter().map(|&v| grid.level(v)).collect()
    }

    #[test]
    fn int8_oracle() {
        // 63.5 rounds to even, 25.4 down.
        assert_eq!(levels(&[-1.0, 0.5, 0.2], Scheme::SymmetricNarrow, 8), [-127.0, 64.0, 25.0]);
        assert_eq!(levels(&[-1.0, 0.5, 0.2], Scheme::SymmetricFull, 8), [-128.0, 64.0, 26.0]);
        // s = 1.5 / 255, zero point 170: -1 is level 0, 0 is level 170, 0.5 is level 255.
        assert_eq!(levels(&[-1.0, 0.0, 0.5], Scheme::Asymmetric, 8), [0.0, 170.0, 255.0]);
        assert_eq!(levels(&[0.0; 3], Scheme::SymmetricNarrow, 8), [0.0; 3]);
    }

    #[test]
    fn largest_element_is_never_masked_by_a_narrow_grid() {
        let mut stream = crate::rng::Stream::new(3, 0);
        for bits in 2..=8 {
            for _ in 0..2000 {
                let amax = stream.normal().abs() as f32;
                let grid = Grid::new(Scheme::SymmetricNarrow, bits, f64::from(-amax), f64::from(amax));
                assert!(grid.inside(f64::from(amax)) && grid.inside(f64::from(-amax)), "{bits} bits, amax {amax}");
            }
        }
    }

    /// What `reciprocal` of reciprocal.wgsl computes, in integers only.
    fn long_division(s: f32) -> f32 {
        let bits = s.to_bits();
        let (exponent, mantissa) = (bits >> 23, (bits & 0x7f_ffff) | 0x80_0000);
        if mantissa == 0x80_0000 {
            return f32::from_bits((254 - exponent) << 23);
        }
        let (mut quotient, mut rest) = (0u32, 0x80_0000u32);
        for _ in 0..3 {
            let shifted = rest << 8;
            let digit = shifted / mantissa;
            rest = shifted - digit * mantissa;
            quotient = (quotient << 8) | digit;
        }
        quotient += u32::from(2 * rest > mantissa);
        f32::from_bits(((253 - exponent) << 23) + (quotient - 0x80_0000))
    }

    #[test]
    fn the_shader_reciprocal_is_correctly_rounded_for_every_mantissa() {
        for mantissa in 0..1u32 << 23 {
            let s = f32::from_bits(0x3c00_0000 | mantissa);
            assert_eq!(long_division(s).to_bits(), (1.0 / s).to_bits(), "{s:e}");
        }
        for exponent in [20u32, 126, 127, 128, 246] {
            let s = f32::from_bits((exponent << 23) | 0x12_3456);
            assert_eq!(long_division(s).to_bits(), (1.0 / s).to_bits(), "{s:e}");
        }
    }

    #[test]
    fn straight_through_gradient_is_the_clip_mask() {
        let device = crate::device::open("cpu").unwrap();
        let x = Tensor::from_slice(&device, &[1, 5], &[-2.0f32, -1.0, 0.3, 1.0, 1.2]).unwrap();
        let range = Tensor::from_slice(&device, &[1, 2], &[-1.0f32, 1.0]).unwrap();
        let dy = Tensor::from_slice(&device, &[1, 5], &[1.0f32, 2.0, 3.0, 4.0, 5.0]).unwrap();
        let op = FakeQuantBackward {
            bits: 8,
            scheme: Scheme::SymmetricNarrow,
            granularity: Granularity::Tensor,
            from: GridFrom::Range,
        };
        let dx = crate::dispatch::run_one(&op, &[&x, &range, &dy]).unwrap();
        assert_eq!(dx.to_vec::<f32>().unwrap(), [0.0, 2.0, 3.0, 4.0, 0.0]);
    }

    #[test]
    fn bad_requests_are_typed_errors() {
        let meta = |dims: &[usize]| Meta::new(dims, DType::F32).unwrap();
        let op =
            FakeQuant { bits: 9, scheme: Scheme::Asymmetric, granularity: Granularity::Tensor, from: GridFrom::Own };
        assert_eq!(op.infer(&[meta(&[4])]).unwrap_err().code(), "E-PARAMETER");
        let op = FakeQuant { bits: 8, granularity: Granularity::Group(3), ..op };
        assert_eq!(op.infer(&[meta(&[4])]).unwrap_err().code(), "E-SHAPE");
        let op = FakeQuant { granularity: Granularity::Channel, from: GridFrom::Range, ..op };
        assert_eq!(op.infer(&[meta(&[4, 8]), meta(&[3, 2])]).unwrap_err().code(), "E-SHAPE");
    }
}
