//! Hard concrete gates (Louizos et al. 2018): numbers in [0, 1] that are 0 or 1 with a probability of their own, and yet have
//! a gradient. gamma = -0.1, zeta = 1.1, beta = 2/3, epsilon = 1e-6, CoFi's.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, source};
use crate::op::{Array, Case, Cost, Family, Fill, Gradient, Op, Saves, Tolerance};
use crate::rng::Site;
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "hard_concrete", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("hard_concrete");
const BLOCK: u32 = 64;
/// Words of one Philox block: one invocation handles the elements they belong to.
const PER_INVOCATION: usize = 4;

/// Ends of the stretched interval, temperature, and the least distance of a uniform number from 0 and 1.
pub const GAMMA: f64 = -0.1;
pub const ZETA: f64 = 1.1;
pub const BETA: f64 = 2.0 / 3.0;
pub const EPSILON: f64 = 1e-6;

/// Which value of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateValue {
    /// z = clamp(sigmoid((ln u - ln(1 - u) + log_alpha) / beta) (zeta - gamma) + gamma, 0, 1), u uniform in (epsilon,
    /// 1 - epsilon) by seed, site, index and the step in device memory.
    Sample { seed: u64, site: u32 },
    /// The test-time value of Louizos et al.: clamp(sigmoid(log_alpha) (zeta - gamma) + gamma, 0, 1).
    Test,
    /// P(z != 0) = sigmoid(log_alpha - beta ln(-gamma / zeta)).
    Open,
}

/// Gates of log_alpha f32 `[..]`, in its shape; a sample also takes the step, u32 `[1]`.
#[derive(Clone, Copy, Debug)]
pub struct HardConcrete(pub GateValue);

/// Gradient of log_alpha. Inputs: (log_alpha, dz), and the step of a sample.
#[derive(Clone, Copy, Debug)]
pub struct HardConcreteBackward(pub GateValue);

/// x = clamp(x, low, high) in place: output 0 is input 0. No gradient.
#[derive(Clone, Copy, Debug)]
pub struct Clamp {
    pub low: f32,
    pub high: f32,
}

/// P(z != 0) of a log_alpha.
pub fn open(log_alpha: f64) -> f64 {
    sigmoid(log_alpha - BETA * (-GAMMA / ZETA).ln())
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

impl GateValue {
    fn drawn(self) -> Site {
        match self {
            GateValue::Sample { seed, site } => Site { seed, site, step: 0 },
            _ => Site { seed: 0, site: 0, step: 0 },
        }
    }

    fn sampled(self) -> bool {
        matches!(self, GateValue::Sample { .. })
    }

    fn params(self, count: usize) -> Params {
        let kind = match self {
            GateValue::Sample { .. } => 0,
            GateValue::Test => 1,
            GateValue::Open => 2,
        };
        let site = self.drawn();
        Params::new().u(count).u(kind).word(site.seed as u32).word((site.seed >> 32) as u32).word(site.site)
    }

    /// (z, dz / d log_alpha) of element `i`.
    fn value(self, log_alpha: f64, i: usize, step: Option<&Array>) -> (f64, f64) {
        let (noise, beta) = match self {
            GateValue::Open => {
                let chance = open(log_alpha);
                return (chance, chance * (1.0 - chance));
            }
            GateValue::Test => (0.0, 1.0),
            GateValue::Sample { .. } => {
                let site = Site { step: step.map_or(0, |s| s.data[0] as u32), ..self.drawn() };
                let u = EPSILON + (1.0 - 2.0 * EPSILON) * f64::from(site.uniform(i as u32));
                (u.ln() - (1.0 - u).ln(), BETA)
            }
        };
        let s = sigmoid((noise + log_alpha) / beta);
        let stretched = s * (ZETA - GAMMA) + GAMMA;
        let slope = if stretched > 0.0 && stretched < 1.0 { (ZETA - GAMMA) * s * (1.0 - s) / beta } else { 0.0 };
        (stretched.clamp(0.0, 1.0), slope)
    }

    /// Checks the inputs behind log_alpha and, backward, dz.
    fn check(self, op: &'static str, inputs: &[Meta], leading: usize) -> Result<Vec<Meta>> {
        let steps = usize::from(self.sampled());
        let fits = inputs.len() == leading + steps
            && inputs[..leading].iter().all(|m| m.dtype == DType::F32 && m.shape == inputs[0].shape)
            && inputs[leading..].iter().all(|m| m.dtype == DType::U32 && m.dims() == [1]);
        if !fits || inputs[0].count() == 0 {
            let rule = "f32 inputs of one shape, and of a sample the step u32 [1]";
            return Err(Error::Shape { op, rule, got: shape::list(inputs) });
        }
        Ok(vec![inputs[0]])
    }
}

impl Op for HardConcrete {
    fn name(&self) -> &'static str {
        "hard_concrete"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        self.0.check(self.name(), inputs, 1)
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let value = |(i, x): (usize, &f64)| self.0.value(*x, i, inputs.get(1)).0;
        vec![inputs[0].data.iter().enumerate().map(value).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("hard_concrete_fwd", &[DType::F32], cpu::hard_concrete),
            gpu("hard_concrete_fwd", plan_forward),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        self.0.params(inputs[0].count())
    }

    fn saves(&self) -> Saves {
        // The step too, where there is one.
        Saves { inputs: &[0, 1], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let step = if self.0.sampled() { Some(g.input(1)?) } else { None };
        let inputs: Vec<&Tensor> = [g.input(0)?, g.grad(0)?].into_iter().chain(step).collect();
        let dx = g.one(&HardConcreteBackward(self.0), &inputs)?;
        Ok([Some(dx)].into_iter().chain(step.map(|_| None)).collect())
    }

    fn cost(&self, inputs: &[Meta], _: &[Meta]) -> Cost {
        Cost { flops: 120.0 * inputs[0].count() as f64, bytes: 2.0 * inputs[0].bytes() as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for HardConcreteBackward {
    fn name(&self) -> &'static str {
        "hard_concrete_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        self.0.check(self.name(), inputs, 2)
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let pairs = inputs[0].data.iter().zip(&inputs[1].data).enumerate();
        vec![pairs.map(|(i, (x, dz))| dz * self.0.value(*x, i, inputs.get(2)).1).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("hard_concrete_bwd", &[DType::F32], cpu::hard_concrete_backward),
            gpu("hard_concrete_bwd", plan_backward),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        self.0.params(inputs[0].count())
    }

    fn cost(&self, inputs: &[Meta], _: &[Meta]) -> Cost {
        Cost { flops: 120.0 * inputs[0].count() as f64, bytes: 3.0 * inputs[0].bytes() as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for Clamp {
    fn name(&self) -> &'static str {
        "clamp"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        if !(self.low.is_finite() && self.high.is_finite() && self.low <= self.high) {
            let value = format!("{} to {}", self.low, self.high);
            return Err(Error::Parameter { op: "clamp", parameter: "bounds", value, allowed: "finite, in order" });
        }
        match inputs {
            [x] if x.dtype == DType::F32 && x.count() > 0 => Ok(vec![*x]),
            _ => Err(Error::Shape { op: self.name(), rule: "one f32 input", got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (low, high) = (f64::from(self.low), f64::from(self.high));
        vec![inputs[0].data.iter().map(|x| x.clamp(low, high)).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("clamp_values", &[DType::F32], cpu::clamp), gpu("clamp_values", plan_clamp)];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].count()).u(0).u(0).u(0).u(0).f(self.low).f(self.high)
    }

    fn aliases(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const fn gpu(entry: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name: entry, code, dtypes: &[DType::F32], fits: bindable, plan }
}

fn bindable(p: &Problem) -> bool {
    p.inputs[0].bytes() as u64 <= p.info.limits.binding_bytes
}

fn launch(p: &Problem) -> Launch {
    // The block that all entries share has seven words.
    let mut params = p.params();
    while params.words().len() < 7 {
        params = params.u(0);
    }
    Launch::linear(p.inputs[0].count().div_ceil(PER_INVOCATION), BLOCK, params).trips(PER_INVOCATION + 10)
}

/// Bindings: log_alpha, step, z; log_alpha stands in for a step that is not read.
fn plan_forward(p: &Problem) -> Plan {
    let sampled = p.inputs.len() > 1;
    Plan::of(launch(p).slots(if sampled { &[0, 1, 2] } else { &[0, 0, 1] }))
}

/// Bindings: log_alpha, dz, step, dx.
fn plan_backward(p: &Problem) -> Plan {
    let sampled = p.inputs.len() > 2;
    Plan::of(launch(p).slots(if sampled { &[0, 1, 2, 3] } else { &[0, 1, 0, 2] }))
}

fn plan_clamp(p: &Problem) -> Plan {
    Plan::of(launch(p))
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let spread = Fill::Normal { mean: 0.0, deviation: 3.0 };
    let step = || Fill::Values(vec![5.0]);
    let values = [GateValue::Sample { seed: 0x0123_4567_89ab_cdef, site: 2 }, GateValue::Test, GateValue::Open];
    for dims in [&[1][..], &[7], &[3, 5], &[64], &[5, 13], &[257]] {
        for value in values {
            let with_step = |case: Case| if value.sampled() { case.input(&[1], DType::U32, step()) } else { case };
            let x = |case: Case| case.input(dims, DType::F32, spread.clone());
            let forward = with_step(x(Case::new(HardConcrete(value), Tolerance::Transcendental)));
            cases.push(if dims != [257] { forward.grad() } else { forward });
            let backward = x(Case::new(HardConcreteBackward(value), Tolerance::Transcendental));
            cases.push(with_step(backward.normal(dims, DType::F32)));
        }
        let clamp = Case::new(Clamp { low: -4.6, high: 0.25 }, Tolerance::Exact);
        cases.push(clamp.input(dims, DType::F32, spread.clone()));
    }
    // The neurons of BERT base.
    let neurons = |case: Case| case.input(&[12 * 3072], DType::F32, spread.clone());
    let sample = Case::new(HardConcrete(values[0]), Tolerance::Transcendental);
    cases.push(neurons(sample).input(&[1], DType::U32, step()).bench());
    cases.push(neurons(Case::new(Clamp { low: -4.6, high: 4.6 }, Tolerance::Exact)).bench());
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device;
    use crate::dispatch;

    /// compression.md 6.2.
    #[test]
    fn chances_of_being_open_are_the_published_ones() {
        let oracle = [(0.0, 0.831822), (10.0, 0.999991), (-4.6, 0.047363), (4.6, 0.997972)];
        for name in ["reference", "cpu"] {
            let device = device::open(name).unwrap();
            for (log_alpha, want) in oracle {
                let x = Tensor::from_f64(&device, &[1], DType::F32, &[log_alpha]).unwrap();
                let have = dispatch::run_one(&HardConcrete(GateValue::Open), &[&x]).unwrap().to_f64().unwrap()[0];
                assert!((have - want).abs() < 6e-7, "{name} {log_alpha}: {have} where {want} is published");
                assert!((open(log_alpha) - want).abs() < 6e-7);
            }
        }
    }

    /// The share of samples that are not 0 is what `Open` says, over 40,000 of them.
    #[test]
    fn samples_are_open_as_often_as_their_chance_says() {
        let device = device::open("cpu").unwrap();
        let count = 40_000;
        for log_alpha in [-3.0f32, -1.0, 0.0, 2.0] {
            let x = Tensor::from_slice(&device, &[count], &vec![log_alpha; count]).unwrap();
            let step = Tensor::from_slice(&device, &[1], &[3u32]).unwrap();
            let op = HardConcrete(GateValue::Sample { seed: 7, site: 1 });
            let z = dispatch::run_one(&op, &[&x, &step]).unwrap().to_vec::<f32>().unwrap();
            assert!(z.iter().all(|z| (0.0..=1.0).contains(z)));
            let share = z.iter().filter(|z| **z != 0.0).count() as f64 / count as f64;
            let chance = open(f64::from(log_alpha));
            // Four deviations.
            let bound = 4.0 * (chance * (1.0 - chance) / count as f64).sqrt();
            assert!((share - chance).abs() < bound, "{log_alpha}: {share} of {chance}");
        }
    }
}
