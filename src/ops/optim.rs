//! Optimizer updates in place: one launch over the flat buffer of a parameter group. What changes from step to step is
//! read from device memory and what the gradients decide stays there, so that no step waits for the host.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, always, source, spans};
use crate::op::{Array, Case, Cost, Family, Fill, Op, Tolerance};
use crate::ops::vector;
use crate::shape::{self, Meta};

pub static FAMILY: Family = Family { name: "optim", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("optim");
const BLOCK: u32 = 64;
const PER_INVOCATION: usize = 4;

/// What the host knows of a step before it runs. Its words are the f32 `[5]` that the ops here take as `rates`: learning
/// rate, both corrections of AdamW, 1 / weight, step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepRates {
    pub learning_rate: f32,
    /// Of AdamW; SGD does not look at the corrections.
    pub betas: [f32; 2],
    /// What the step's loss is divided by: tokens, or their weighted count.
    pub weight: f64,
    /// Counted from 1. As f32 it is exact up to 2^24.
    pub step: u64,
}

impl StepRates {
    pub const WORDS: usize = 5;

    /// The corrections 1 / (1 - beta^t) are computed in f64 and rounded once, so that every device uses the same ones.
    pub fn words(&self) -> [f32; Self::WORDS] {
        let step = i32::try_from(self.step.max(1)).unwrap_or(i32::MAX);
        let [c1, c2] = self.betas.map(|beta| (1.0 / (1.0 - f64::from(beta).powi(step))) as f32);
        [self.learning_rate, c1, c2, (1.0 / self.weight.max(f64::MIN_POSITIVE)) as f32, self.step as f32]
    }
}

/// AdamW (Loshchilov and Hutter 2019) with bias correction; inputs param, grad, m, v f32 `[N]`, factor f32 `[1]`, rates
/// f32 `[5]` (see [`StepRates`]), and a 0/1 mask f32 `[N]` when `masked`. In place on param, m and v.
///
/// g = grad factor; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
/// param -= lr (c1 m / (sqrt(c2 v) + eps) + decay param) with c = 1 / (1 - b^t). Where the mask is 0, gradient, parameter
/// and both moments are 0 afterwards: momentum and decay cannot revive a pruned weight. A factor of 0 changes nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub beta1: f32,
    pub beta2: f32,
    pub epsilon: f32,
    pub weight_decay: f32,
    pub masked: bool,
}

/// SGD with momentum and decoupled decay; inputs param, grad, velocity f32 `[N]`, factor f32 `[1]`, rates f32 `[5]`, mask
/// when `masked`. velocity = momentum velocity + grad factor; param -= lr (velocity + decay param). A factor of 0 changes
/// nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    pub momentum: f32,
    pub weight_decay: f32,
    pub masked: bool,
}

/// What raw gradients are multiplied by in an update, and whether there is one, decided on the device.
///
/// Inputs f32: sum s of the squared gradients `[1]`, sum of the losses `[1]`, rates `[5]`, state `[5]` in place: loss scale,
/// good steps since it changed, step that failed (0: none), and for who watches loss per weight and gradient norm.
/// Outputs: state, factor `[1]`.
///
/// norm = sqrt(s) / (weight scale); factor = min(1, max_norm / (norm + 1e-6)) / (weight scale); max_norm <= 0 clips
/// nothing. Where gradients are not finite the factor is 0; with dynamic loss scaling (Micikevicius et al. 2018) the scale
/// is halved, unless it is 1 or the loss itself is not finite. Then, and without a scale, the step has failed, and every
/// later factor is 0 too: parameters stay as they were when it happened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateFactor {
    pub max_norm: f32,
    /// Good steps after which the loss scale is doubled; 0: it is fixed.
    pub growth: u32,
}

impl UpdateFactor {
    pub const STATE: usize = 5;
    pub const LEAST_SCALE: f32 = 1.0;
    pub const MOST_SCALE: f32 = 16_777_216.0;
}

/// All have the first input's shape `[N]` but for the factor `[1]`, at `factor`, and the rates after it.
fn check(op: &'static str, inputs: &[Meta], count: usize, factor: usize) -> Result<()> {
    let fits = |(i, m): (usize, &Meta)| {
        m.dtype == DType::F32
            && match i.checked_sub(factor) {
                Some(0) => m.dims() == [1],
                Some(1) => m.dims() == [StepRates::WORDS],
                _ => m.shape == inputs[0].shape && m.shape.rank() == 1,
            }
    };
    if inputs.len() == count && inputs.iter().enumerate().all(fits) {
        return Ok(());
    }
    let rule = "f32 vectors of one length, a factor [1], rates [5], a mask when masked";
    Err(Error::Shape { op, rule, got: shape::list(inputs) })
}

impl Op for AdamW {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check("adamw", inputs, 6 + usize::from(self.masked), 4)?;
        Ok(vec![inputs[0]; 3])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let n = inputs[0].data.len();
        let (b1, b2) = (f64::from(self.beta1), f64::from(self.beta2));
        let (factor, rates) = (inputs[4].data[0], &inputs[5].data);
        if factor == 0.0 {
            return [0, 2, 3].map(|i| inputs[i].data.clone()).to_vec();
        }
        let mut out = vec![vec![0.0; n]; 3];
        for i in 0..n {
            if self.masked && inputs[6].data[i] == 0.0 {
                continue;
            }
            let (p, g) = (inputs[0].data[i], inputs[1].data[i] * factor);
            let m = b1 * inputs[2].data[i] + (1.0 - b1) * g;
            let v = b2 * inputs[3].data[i] + (1.0 - b2) * g * g;
            let direction = m * rates[1] / ((v * rates[2]).sqrt() + f64::from(self.epsilon));
            let decayed = direction + f64::from(self.weight_decay) * p;
            (out[0][i], out[1][i], out[2][i]) = (p - rates[0] * decayed, m, v);
        }
        out
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("adamw", &[DType::F32], cpu::adamw),
            vector::cuda(SOURCE, ["adamw_v2"; 2], &[DType::F32], always, |p| plan_adamw(p, vector::BLOCK)),
            wgsl("adamw", |p| plan_adamw(p, BLOCK)),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let params = Params::new().u(inputs[0].count()).flag(self.masked).f(self.beta1).f(self.beta2);
        params.f(self.epsilon).f(self.weight_decay)
    }

    fn aliases(&self) -> &'static [(usize, usize)] {
        &[(0, 0), (1, 2), (2, 3)]
    }

    fn cost(&self, inputs: &[Meta], _: &[Meta]) -> Cost {
        let n = inputs[0].count() as f64;
        Cost { flops: 14.0 * n, bytes: n * if self.masked { 32.0 } else { 28.0 } }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for Sgd {
    fn name(&self) -> &'static str {
        "sgd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check("sgd", inputs, 5 + usize::from(self.masked), 3)?;
        Ok(vec![inputs[0]; 2])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let n = inputs[0].data.len();
        let (factor, rate) = (inputs[3].data[0], inputs[4].data[0]);
        if factor == 0.0 {
            return [0, 2].map(|i| inputs[i].data.clone()).to_vec();
        }
        let mut out = vec![vec![0.0; n]; 2];
        for i in 0..n {
            if self.masked && inputs[5].data[i] == 0.0 {
                continue;
            }
            let p = inputs[0].data[i];
            let velocity = f64::from(self.momentum) * inputs[2].data[i] + inputs[1].data[i] * factor;
            let step = velocity + f64::from(self.weight_decay) * p;
            (out[0][i], out[1][i]) = (p - rate * step, velocity);
        }
        out
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[Kernel::cpu("sgd", &[DType::F32], cpu::sgd), wgsl("sgd", plan_sgd)];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let params = Params::new().u(inputs[0].count()).flag(self.masked).f(self.momentum);
        params.f(0.0).f(0.0).f(self.weight_decay)
    }

    fn aliases(&self) -> &'static [(usize, usize)] {
        &[(0, 0), (1, 2)]
    }

    fn cost(&self, inputs: &[Meta], _: &[Meta]) -> Cost {
        let n = inputs[0].count() as f64;
        Cost { flops: 6.0 * n, bytes: n * if self.masked { 24.0 } else { 20.0 } }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for UpdateFactor {
    fn name(&self) -> &'static str {
        "update_factor"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let dims = [1, 1, StepRates::WORDS, Self::STATE];
        let fits = |(m, n): (&Meta, &usize)| m.dims() == [*n] && m.dtype == DType::F32;
        if inputs.len() == dims.len() && inputs.iter().zip(&dims).all(fits) {
            return Ok(vec![inputs[3], inputs[0]]);
        }
        Err(Error::Shape { op: "update_factor", rule: "f32 [1], [1], [5] and [5]", got: shape::list(inputs) })
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (squares, losses, rates) = (inputs[0].data[0], inputs[1].data[0], &inputs[2].data);
        let mut state = inputs[3].data.clone();
        if state[2] != 0.0 {
            return vec![state, vec![0.0]];
        }
        let scale = rates[3] / state[0];
        let norm = scale * squares.sqrt();
        if losses.is_finite() && norm.is_finite() {
            let clip = if self.max_norm > 0.0 { (f64::from(self.max_norm) / (norm + 1e-6)).min(1.0) } else { 1.0 };
            if self.growth > 0 {
                state[1] += 1.0;
                if state[1] >= f64::from(self.growth) {
                    (state[0], state[1]) = ((2.0 * state[0]).min(f64::from(Self::MOST_SCALE)), 0.0);
                }
            }
            (state[3], state[4]) = (losses * rates[3], norm);
            return vec![state, vec![scale * clip]];
        }
        let able = self.growth > 0 && losses.is_finite() && state[0] > f64::from(Self::LEAST_SCALE);
        state = if able {
            vec![(state[0] / 2.0).max(f64::from(Self::LEAST_SCALE)), 0.0, 0.0, losses * rates[3], 0.0]
        } else {
            vec![state[0], state[1], rates[4], 0.0, 0.0]
        };
        vec![state, vec![0.0]]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("update_factor", &[DType::F32], cpu::update_factor), wgsl("update_factor", plan_one)];
        KERNELS
    }

    fn params(&self, _: &[Meta], _: &[Meta]) -> Params {
        // In the block that the three ops share: count, masked, beta1, beta2, epsilon and decay by place.
        let params = Params::new().u(1).flag(self.growth > 0).f(self.max_norm).f(self.growth as f32);
        params.f(Self::LEAST_SCALE).f(Self::MOST_SCALE)
    }

    fn aliases(&self) -> &'static [(usize, usize)] {
        &[(0, 3)]
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const fn wgsl(name: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry: name, constants: &[] };
    Kernel { name, code, dtypes: &[DType::F32], fits: always, plan }
}

fn plan_one(p: &Problem) -> Plan {
    Plan::of(Launch::new([1, 1, 1], p.params()))
}

fn plan_adamw(p: &Problem, block: u32) -> Plan {
    plan_flat(p, block, &[0, 1, 2, 3, 6], &[0, 1, 2, 3, 4, 5, 1])
}

fn plan_sgd(p: &Problem) -> Plan {
    plan_flat(p, BLOCK, &[0, 1, 2, 5], &[0, 1, 2, 3, 4, 1])
}

/// One launch per binding-sized span of the flat buffers; `flat` are the arguments that are as long as the group.
/// `unmasked`: the slots without a mask, whose binding the shader names but then never reads; the gradient stands in.
fn plan_flat(p: &Problem, block: u32, flat: &[usize], unmasked: &[usize]) -> Plan {
    let count = p.inputs[0].count();
    let launches = spans(count, 4, p.info.limits.binding_bytes).map(|span| {
        let items = span.len();
        let params = p.params().words()[1..].iter().fold(Params::new().u(items), |params, &w| params.word(w));
        let launch = Launch::linear(items.div_ceil(PER_INVOCATION), block, params).trips(PER_INVOCATION);
        let part = |launch: Launch, &argument: &usize| launch.window(argument, 4 * span.start, 4 * items);
        let bound = flat.iter().filter(|&&argument| argument < p.inputs.len());
        let launch = if items == count { launch } else { bound.fold(launch, part) };
        if p.inputs.len() < unmasked.len() { launch.slots(unmasked) } else { launch }
    });
    Plan::sequence(launches.collect())
}

/// Inputs of an update: parameter and gradient, velocity or first moment, second moment, factor, rates, mask.
fn update_case(op: impl Op, n: usize, (second, masked): (bool, bool), (factor, rates): (f64, StepRates)) -> Case {
    // The direction m / sqrt(v) is a quotient of sums of two terms each, so its error is a contraction's.
    let case = Case::new(op, Tolerance::Contraction { k: if second { 16 } else { 8 } });
    let mut case = case.normal(&[n], DType::F32).normal(&[n], DType::F32).normal(&[n], DType::F32);
    if second {
        case = case.input(&[n], DType::F32, Fill::Uniform { low: 0.0, high: 2.0 });
    }
    let rates = rates.words().map(f64::from).to_vec();
    case = case.input(&[1], DType::F32, Fill::Values(vec![factor]));
    case = case.input(&[StepRates::WORDS], DType::F32, Fill::Values(rates));
    if masked { case.input(&[n], DType::F32, Fill::Integers { low: 0, high: 1 }) } else { case }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let betas = [0.9, 0.999];
    let adamw = |masked| AdamW { beta1: betas[0], beta2: betas[1], epsilon: 1e-8, weight_decay: 0.05, masked };
    let rates = |learning_rate, step| StepRates { learning_rate, betas, weight: 1.0, step };
    for n in [1usize, 7, 63, 65, 1024, 100_003] {
        for (masked, step) in [(false, 1), (true, 1), (false, 1000), (true, 17)] {
            let variant = ["first", "later"][usize::from(step > 1)];
            cases.push(update_case(adamw(masked), n, (true, masked), (0.37, rates(1e-2, step))).variant(variant));
        }
        for masked in [false, true] {
            let sgd = Sgd { momentum: 0.9, weight_decay: 0.01, masked };
            cases.push(update_case(sgd, n, (false, masked), (0.37, rates(0.1, 1))));
            if n <= 65 {
                cases.push(update_case(sgd, n, (false, masked), (0.0, rates(0.1, 1))).variant("skipped"));
                cases.push(update_case(adamw(masked), n, (true, masked), (0.0, rates(1e-2, 9))).variant("skipped"));
            }
        }
    }
    let (infinity, nan) = (f64::INFINITY, f64::NAN);
    let good = [1.0, 0.0, 0.0, 0.0, 0.0];
    for (variant, growth, max_norm, weight, [squares, losses], state) in [
        ("clipped", 0, 1.0, 1.0, [4.0, 3.0], good),
        ("unclipped", 0, 1.0, 100.0, [4.0, 3.0], good),
        ("no limit", 0, 0.0, 2.0, [9.0, -3.0], good),
        ("no gradient", 0, 1.0, 1e3, [0.0, 0.0], good),
        ("large", 0, 5.0, 1.0, [1e8, 1e4], [1.0, 0.0, 0.0, 7.0, 7.0]),
        ("failed", 0, 1.0, 1.0, [infinity, 3.0], good),
        ("loss failed", 2000, 1.0, 1.0, [4.0, nan], [65_536.0, 4.0, 0.0, 0.0, 0.0]),
        ("failed before", 2000, 1.0, 1.0, [4.0, 3.0], [65_536.0, 4.0, 3.0, 0.0, 0.0]),
        ("scaled", 2000, 1.0, 10.0, [1e12, 3.0], [65_536.0, 4.0, 0.0, 0.0, 0.0]),
        ("grown", 2000, 1.0, 10.0, [1e12, 3.0], [65_536.0, 1999.0, 0.0, 0.0, 0.0]),
        ("grown to the most", 2000, 1.0, 10.0, [1e12, 3.0], [16_777_216.0, 1999.0, 0.0, 0.0, 0.0]),
        ("halved", 2000, 1.0, 10.0, [infinity, 3.0], [65_536.0, 1999.0, 0.0, 0.0, 0.0]),
        ("halved for no number", 2000, 1.0, 10.0, [nan, 3.0], [2.0, 5.0, 0.0, 0.0, 0.0]),
        ("at the least", 2000, 1.0, 10.0, [infinity, 3.0], [1.0, 5.0, 0.0, 0.0, 0.0]),
    ] {
        let rates = StepRates { weight, ..rates(1e-3, 12) }.words().map(f64::from).to_vec();
        let case = Case::new(UpdateFactor { max_norm, growth }, Tolerance::Transcendental).variant(variant);
        let case = case.input(&[1], DType::F32, Fill::Values(vec![squares]));
        let case = case.input(&[1], DType::F32, Fill::Values(vec![losses]));
        let case = case.input(&[StepRates::WORDS], DType::F32, Fill::Values(rates));
        cases.push(case.input(&[UpdateFactor::STATE], DType::F32, Fill::Values(state.to_vec())));
    }
    // GPT-2 small's largest matrix group.
    cases.push(update_case(adamw(false), 7_077_888, (true, false), (0.37, rates(1e-3, 10))).bench());
    cases
}
