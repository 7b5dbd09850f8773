//! The scale rule: schemes, granularities, where grids come from, and what an op's inputs must be for them.

use super::mode;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::Params;
use crate::op::Array;
use crate::shape::{self, Meta};

/// Which integers stand for which reals. `b` bits.
///
/// The last two look at the mean magnitude of a group where the others look at its range, so their groups are runs of at
/// most [`LONGEST_MEAN`] elements; their gradient is plain straight-through. Zeros (below 2^-100, as subnormal numbers are
/// zeros on some devices) are no part of a mean: pruned weights say nothing about the size of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// s = amax / (2^(b-1) - 1), levels -(2^(b-1) - 1) ..= 2^(b-1) - 1: no level without its negative.
    SymmetricNarrow,
    /// s = 2 amax / 2^b, levels -2^(b-1) ..= 2^(b-1) - 1.
    SymmetricFull,
    /// s = (max - min) / (2^b - 1), zero point clamp(rne(-min / s)), levels 0 ..= 2^b - 1; the range is widened to hold 0.
    Asymmetric,
    /// Levels -1, 0, 1: |x| above 0.7 mean |x| is 1, and s is the mean magnitude of those (Li and Liu 2016, Eq 5-6). 2 bits.
    Ternary,
    /// Levels -1 and 1, and 0 for 0 alone, so that a pruned weight stays one: s = mean |x| (Rastegari et al. 2016, Eq 6). 2 bits.
    Binary,
}

/// Sums of magnitudes run in order, one element after the other, so that their bits are the same everywhere.
pub const LONGEST_MEAN: usize = 65_535;

/// What the grid of a group follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GridFrom {
    /// The group's own elements.
    Own,
    /// An input `range f32 [groups, 2]`.
    Range,
    /// An input `step f32 [groups]`, or `[1]` for all groups: s itself, at least 2^-100. Zero point 0.
    Step,
}

/// Which elements share a scale. Every granularity is a run of neighbours in a row-major tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Granularity {
    Tensor,
    /// One per row of a weight `[n, k]`: its output channel.
    Channel,
    /// One per row of activations `[tokens, k]`.
    Token,
    /// One per this many neighbours along the last axis.
    Group(usize),
}

/// What an observer keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Statistic {
    /// (min, max).
    MinMax,
    /// (-amax, amax).
    AbsMax,
}

impl Granularity {
    /// (number of groups, elements per group) of a tensor.
    pub fn groups(self, op: &'static str, x: &Meta) -> Result<(usize, usize)> {
        let refuse = |rule| Err(Error::Shape { op, rule, got: x.to_string() });
        if x.count() == 0 {
            return refuse("at least one element");
        }
        match self {
            Granularity::Tensor => Ok((1, x.count())),
            Granularity::Channel | Granularity::Token => Ok((x.shape.rows(), x.shape.last())),
            Granularity::Group(size) if size > 0 && x.shape.last().is_multiple_of(size) => Ok((x.count() / size, size)),
            Granularity::Group(_) => refuse("last extent a multiple of the group"),
        }
    }
}

/// Levels of a scheme: what the kernels take as parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Levels {
    pub low: f32,
    pub high: f32,
    /// Scale per unit of width.
    pub unit: f32,
}

/// Groups narrower than this count as all zero (scale 1), wider ones than [`WIDEST`] as not finite (scale NaN): inside,
/// scale and reciprocal are normal numbers on every device.
pub(in crate::ops) const NARROWEST: f32 = 7.888_609e-31;
pub(in crate::ops) const WIDEST: f32 = 1.329_228e36;

impl Scheme {
    pub(in crate::ops) const ALL: [Scheme; 3] = [Scheme::SymmetricNarrow, Scheme::SymmetricFull, Scheme::Asymmetric];
    pub(in crate::ops) const MEANS: [Scheme; 2] = [Scheme::Ternary, Scheme::Binary];

    pub(crate) fn levels(self, bits: u32) -> Levels {
        let half = (1u32 << (bits - 1)) as f32;
        match self {
            Scheme::SymmetricNarrow => Levels { low: 1.0 - half, high: half - 1.0, unit: 1.0 / (half - 1.0) },
            Scheme::SymmetricFull => Levels { low: -half, high: half - 1.0, unit: 1.0 / half },
            Scheme::Asymmetric => Levels { low: 0.0, high: 2.0 * half - 1.0, unit: 1.0 / (2.0 * half - 1.0) },
            // Rounding goes up at half a step, so the step that elements are divided by is twice the threshold.
            Scheme::Ternary => Levels { low: -1.0, high: 1.0, unit: 1.4 },
            Scheme::Binary => Levels { low: -1.0, high: 1.0, unit: 0.0 },
        }
    }

    pub(in crate::ops) fn means(self) -> bool {
        Self::MEANS.contains(&self)
    }

    pub(crate) fn asymmetric(self) -> bool {
        self == Scheme::Asymmetric
    }

    /// What is subtracted from a level so that it fits i8: half the levels where they start at 0.
    pub fn shift(self, bits: u32) -> i32 {
        if self.asymmetric() { 1 << (bits - 1) } else { 0 }
    }
}

/// The scale rule written for the references and for methods that round on the host: f32 at every step.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    pub scale: f32,
    pub inverse: f32,
    pub zero: f32,
    levels: Levels,
}

impl Grid {
    /// Of values of at most this magnitude.
    pub fn symmetric(scheme: Scheme, bits: u32, largest: f64) -> Self {
        Self::new(scheme, bits, -largest, largest)
    }

    /// Of a given step.
    pub fn of_step(scheme: Scheme, bits: u32, step: f64) -> Self {
        let (levels, step) = (scheme.levels(bits), step as f32);
        if step.is_nan() || step > WIDEST {
            return Self { scale: f32::NAN, inverse: f32::NAN, zero: 0.0, levels };
        }
        let scale = step.max(NARROWEST);
        Self { scale, inverse: 1.0 / scale, zero: 0.0, levels }
    }

    /// Of a group's own elements.
    pub(in crate::ops) fn own(scheme: Scheme, bits: u32, x: &[f64]) -> Self {
        if !scheme.means() {
            let [low, high] = ranges(x, x.len().max(1)).first().copied().unwrap_or([0.0; 2]);
            return Self::new(scheme, bits, low, high);
        }
        let levels = scheme.levels(bits);
        let magnitudes = || x.iter().map(|v| (*v as f32).abs());
        let count = magnitudes().filter(|v| *v >= NARROWEST).count().max(1);
        let mean = magnitudes().fold(0.0, |sum, v| sum + v) * (1.0 / count as f32);
        if mean.is_nan() || mean > WIDEST {
            return Self { scale: f32::NAN, inverse: f32::NAN, zero: 0.0, levels };
        }
        if mean < NARROWEST {
            return Self { scale: 1.0, inverse: 0.0, zero: 0.0, levels };
        }
        if scheme == Scheme::Binary {
            return Self { scale: mean, inverse: 1.0 / NARROWEST, zero: 0.0, levels };
        }
        let inverse = 1.0 / (mean * levels.unit);
        let (mut sum, mut count) = (0.0f32, 0.0f32);
        for v in magnitudes().filter(|v| v * inverse > 0.5) {
            (sum, count) = (sum + v, count + 1.0);
        }
        Self { scale: sum * (1.0 / count), inverse, zero: 0.0, levels }
    }

    /// The grids of all groups of `inputs[0]`: from `inputs[1]`, or from their own elements.
    pub(in crate::ops) fn all(scheme: Scheme, bits: u32, from: GridFrom, inputs: &[Array], length: usize) -> Vec<Self> {
        let x = &inputs[0].data;
        match from {
            GridFrom::Own => x.chunks(length).map(|group| Self::own(scheme, bits, group)).collect(),
            GridFrom::Range => inputs[1].data.chunks(2).map(|r| Self::new(scheme, bits, r[0], r[1])).collect(),
            GridFrom::Step => {
                let steps = &inputs[1].data;
                let step = |group: usize| steps[if steps.len() == 1 { 0 } else { group }];
                (0..x.len() / length).map(|group| Self::of_step(scheme, bits, step(group))).collect()
            }
        }
    }

    pub(in crate::ops) fn new(scheme: Scheme, bits: u32, low: f64, high: f64) -> Self {
        let levels = scheme.levels(bits);
        let (low, high) = (low as f32, high as f32);
        let width = match scheme {
            Scheme::Asymmetric => high.max(0.0) - low.min(0.0),
            _ => high.abs().max(low.abs()),
        };
        let finite = width <= WIDEST && !low.is_nan() && !high.is_nan();
        if !finite {
            return Self { scale: f32::NAN, inverse: f32::NAN, zero: 0.0, levels };
        }
        if width < NARROWEST {
            return Self { scale: 1.0, inverse: 0.0, zero: 0.0, levels };
        }
        let scale = width * levels.unit;
        let inverse = 1.0 / scale;
        let zero = match scheme {
            Scheme::Asymmetric => (-low.min(0.0) * inverse).round_ties_even().clamp(levels.low, levels.high),
            _ => 0.0,
        };
        Self { scale, inverse, zero, levels }
    }

    /// The level before clamping; NaN stays NaN.
    fn raw(&self, x: f64) -> f32 {
        (x as f32 * self.inverse).round_ties_even() + self.zero
    }

    /// The integer that stands for x; NaN stays NaN.
    pub fn level(&self, x: f64) -> f32 {
        self.raw(x).clamp(self.levels.low, self.levels.high)
    }

    pub(super) fn inside(&self, x: f64) -> bool {
        (self.levels.low..=self.levels.high).contains(&self.raw(x))
    }

    /// x as its integer shows it.
    pub fn value(&self, x: f64) -> f32 {
        (self.level(x) - self.zero) * self.scale
    }
}

/// Minimum and maximum of each group; NaN where a group holds one.
pub(in crate::ops) fn ranges(x: &[f64], length: usize) -> Vec<[f64; 2]> {
    let range = |group: &[f64]| {
        if group.iter().any(|v| v.is_nan()) {
            return [f64::NAN; 2];
        }
        [group.iter().copied().fold(f64::INFINITY, f64::min), group.iter().copied().fold(f64::NEG_INFINITY, f64::max)]
    };
    x.chunks(length).map(range).collect()
}

pub(in crate::ops) fn group_length(granularity: Granularity, x: &Array) -> usize {
    match granularity {
        Granularity::Tensor => x.data.len().max(1),
        Granularity::Channel | Granularity::Token => x.shape.last().max(1),
        Granularity::Group(size) => size.max(1),
    }
}

pub(in crate::ops) fn check_bits(op: &'static str, bits: u32) -> Result<()> {
    if (2..=8).contains(&bits) {
        return Ok(());
    }
    Err(Error::Parameter { op, parameter: "bits", value: bits.to_string(), allowed: "2..=8" })
}

pub(in crate::ops) fn float_input(op: &'static str, x: &Meta, all: &[Meta]) -> Result<()> {
    if x.dtype.is_float() {
        return Ok(());
    }
    Err(Error::Dtype { op, expected: "a float type for x", got: shape::list(all) })
}

/// bits, scheme, granularity, where grids come from.
pub(in crate::ops) type Rule = (u32, Scheme, Granularity, GridFrom);

/// The element type and shape of x and its number of groups, where x and what the grids come from fit the rule.
pub(in crate::ops) fn check(
    op: &'static str,
    (bits, scheme, granularity, from): Rule,
    inputs: &[Meta],
) -> Result<(Meta, usize)> {
    check_bits(op, bits)?;
    let shape = |rule| Err(Error::Shape { op, rule, got: shape::list(inputs) });
    let (x, given) = match (inputs, from) {
        ([x], GridFrom::Own) => (x, None),
        ([x, given], GridFrom::Range | GridFrom::Step) => (x, Some(given)),
        _ => return shape("x, and a range or a step where grids come from one"),
    };
    float_input(op, x, inputs)?;
    let (groups, length) = granularity.groups(op, x)?;
    let fits = |dims: &[usize]| given.is_some_and(|g| g.dims() == dims && g.dtype == DType::F32);
    let parameter = |parameter, value: String, allowed| Err(Error::Parameter { op, parameter, value, allowed });
    match (scheme, from) {
        (Scheme::Ternary | Scheme::Binary, _) if bits != 2 => parameter("bits", bits.to_string(), "2 for these levels"),
        (Scheme::Ternary | Scheme::Binary, GridFrom::Own) if length > LONGEST_MEAN => {
            parameter("group", length.to_string(), "at most 65535 elements where the mean decides")
        }
        (Scheme::Ternary | Scheme::Binary, GridFrom::Range) => {
            parameter("from", "Range".into(), "Own or Step: these levels have no range")
        }
        (Scheme::Asymmetric, GridFrom::Step) => parameter("from", "Step".into(), "a range: a step has no zero point"),
        (_, GridFrom::Range) if !fits(&[groups, 2]) => shape("range f32 [groups, 2]"),
        (_, GridFrom::Step) if !fits(&[groups]) && !fits(&[1]) => shape("step f32 [groups] or [1]"),
        _ => Ok((*x, groups)),
    }
}

pub(super) fn check_range(op: &'static str, groups: usize, range: &Meta, all: &[Meta]) -> Result<()> {
    if range.dims() == [groups, 2] && range.dtype == DType::F32 {
        return Ok(());
    }
    let got = format!("{}, {groups} groups", shape::list(all));
    Err(Error::Shape { op, rule: "range f32 [groups, 2]", got })
}

/// As [`check`] for an op that also takes dy and goes by given grids.
pub(super) fn backward_input(op: &'static str, rule: Rule, inputs: &[Meta]) -> Result<Meta> {
    match inputs {
        [x, given, dy] if x == dy && rule.3 != GridFrom::Own => Ok(check(op, rule, &[*x, *given])?.0),
        _ => {
            let rule = "x, a range or step, and dy with the shape of x";
            Err(Error::Shape { op, rule, got: shape::list(inputs) })
        }
    }
}

/// count, group length, how grids are made, lowest level, highest level, scale per unit of width, shift of stored levels.
pub(in crate::ops) fn map_params(
    (scheme, bits, granularity, from): (Scheme, u32, Granularity, GridFrom),
    inputs: &[Meta],
) -> Params {
    let x = &inputs[0];
    let length = match granularity {
        Granularity::Tensor => x.count(),
        Granularity::Channel | Granularity::Token => x.shape.last(),
        Granularity::Group(size) => size,
    };
    let mode = match from {
        GridFrom::Step if inputs.get(1).is_some_and(|step| step.count() == 1) => mode::ONE_STEP,
        GridFrom::Step => mode::STEPS,
        _ if scheme.means() => mode::MEANS,
        _ => u32::from(scheme.asymmetric()),
    };
    let levels = scheme.levels(bits);
    Params::new()
        .u(x.count())
        .u(length)
        .u(mode as usize)
        .f(levels.low)
        .f(levels.high)
        .f(levels.unit)
        .f(scheme.shift(bits) as f32)
        .flag(from == GridFrom::Own)
}
