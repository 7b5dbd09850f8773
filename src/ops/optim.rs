//! Optimizer updates in place: one launch over the flat buffer of a parameter group.

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

/// AdamW (Loshchilov and Hutter 2019) with bias correction; inputs param, grad, m, v f32 `[N]`, factor f32 `[1]`, and a
/// 0/1 mask f32 `[N]` when `masked`. In place on param, m and v.
///
/// g = grad factor; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
/// param -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay param). Where the mask is 0, gradient, parameter
/// and both moments are 0 afterwards: momentum and decay cannot revive a pruned weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub learning_rate: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub epsilon: f32,
    pub weight_decay: f32,
    /// Steps counted from 1.
    pub step: u32,
    pub masked: bool,
}

impl AdamW {
    /// 1 / (1 - beta^t), computed in f64 on the host and rounded once, so that every device uses the same factor.
    fn corrections(&self) -> (f32, f32) {
        let of = |beta: f32| (1.0 / (1.0 - f64::from(beta).powi(self.step.max(1) as i32))) as f32;
        (of(self.beta1), of(self.beta2))
    }
}

/// SGD with momentum and decoupled decay; inputs param, grad, velocity f32 `[N]`, factor f32 `[1]`, mask when `masked`.
/// velocity = momentum velocity + grad factor; param -= lr (velocity + decay param).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    pub learning_rate: f32,
    pub momentum: f32,
    pub weight_decay: f32,
    pub masked: bool,
}

/// factor = scale min(1, max_norm / (scale sqrt(s) + 1e-6)) from the sum s of squared raw gradients, f32 `[1]` to `[1]`;
/// max_norm <= 0 clips nothing. `scale` is 1 / tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipFactor {
    pub max_norm: f32,
    pub scale: f32,
}

/// All but the factor have the first input's shape `[N]`; the factor, at `factor`, is `[1]`.
fn check(op: &'static str, inputs: &[Meta], count: usize, factor: usize) -> Result<()> {
    let fits = |(i, m): (usize, &Meta)| {
        m.dtype == DType::F32
            && if i == factor { m.dims() == [1] } else { m.shape == inputs[0].shape && m.shape.rank() == 1 }
    };
    if inputs.len() == count && inputs.iter().enumerate().all(fits) {
        return Ok(());
    }
    let rule = "f32 vectors of one length, a factor [1], a mask when masked";
    Err(Error::Shape { op, rule, got: shape::list(inputs) })
}

impl Op for AdamW {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check("adamw", inputs, 5 + usize::from(self.masked), 4)?;
        Ok(vec![inputs[0]; 3])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let n = inputs[0].data.len();
        let (b1, b2) = (f64::from(self.beta1), f64::from(self.beta2));
        let (t, factor) = (self.step.max(1) as i32, inputs[4].data[0]);
        let mut out = vec![vec![0.0; n]; 3];
        for i in 0..n {
            if self.masked && inputs[5].data[i] == 0.0 {
                continue;
            }
            let (p, g) = (inputs[0].data[i], inputs[1].data[i] * factor);
            let m = b1 * inputs[2].data[i] + (1.0 - b1) * g;
            let v = b2 * inputs[3].data[i] + (1.0 - b2) * g * g;
            let direction = m / (1.0 - b1.powi(t)) / ((v / (1.0 - b2.powi(t))).sqrt() + f64::from(self.epsilon));
            let decayed = direction + f64::from(self.weight_decay) * p;
            (out[0][i], out[1][i], out[2][i]) = (p - f64::from(self.learning_rate) * decayed, m, v);
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
        let (c1, c2) = self.corrections();
        let rates =
            Params::new().u(inputs[0].count()).flag(self.masked).f(self.learning_rate).f(self.beta1).f(self.beta2);
        rates.f(self.epsilon).f(self.weight_decay).f(c1).f(c2)
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
        check("sgd", inputs, 4 + usize::from(self.masked), 3)?;
        Ok(vec![inputs[0]; 2])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let n = inputs[0].data.len();
        let mut out = vec![vec![0.0; n]; 2];
        for i in 0..n {
            if self.masked && inputs[4].data[i] == 0.0 {
                continue;
            }
            let p = inputs[0].data[i];
            let velocity = f64::from(self.momentum) * inputs[2].data[i] + inputs[1].data[i] * inputs[3].data[0];
            let step = velocity + f64::from(self.weight_decay) * p;
            (out[0][i], out[1][i]) = (p - f64::from(self.learning_rate) * step, velocity);
        }
        out
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[Kernel::cpu("sgd", &[DType::F32], cpu::sgd), wgsl("sgd", plan_sgd)];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let rates = Params::new().u(inputs[0].count()).flag(self.masked).f(self.learning_rate).f(self.momentum);
        rates.f(0.0).f(0.0).f(self.weight_decay).f(1.0).f(1.0)
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

impl Op for ClipFactor {
    fn name(&self) -> &'static str {
        "clip_factor"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs {
            [s] if s.dims() == [1] && s.dtype == DType::F32 => Ok(vec![*s]),
            _ => Err(Error::Shape { op: "clip_factor", rule: "one f32 [1]", got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (scale, norm) = (f64::from(self.scale), f64::from(self.scale) * inputs[0].data[0].sqrt());
        let clip = if self.max_norm > 0.0 { (f64::from(self.max_norm) / (norm + 1e-6)).min(1.0) } else { 1.0 };
        vec![vec![scale * clip]]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("clip_factor", &[DType::F32], cpu::clip_factor), wgsl("clip_factor", plan_one)];
        KERNELS
    }

    fn params(&self, _: &[Meta], _: &[Meta]) -> Params {
        // The block is as long as the shader's struct, which the three ops share.
        (0..5).fold(Params::new().u(1).flag(false).f(self.max_norm).f(self.scale), |params, _| params.f(0.0))
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
    plan_flat(p, block, &[0, 1, 2, 3, 5], &[0, 1, 2, 3, 4, 1])
}

fn plan_sgd(p: &Problem) -> Plan {
    plan_flat(p, BLOCK, &[0, 1, 2, 4], &[0, 1, 2, 3, 1])
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

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let bits = Fill::Integers { low: 0, high: 1 };
    let positive = Fill::Uniform { low: 0.0, high: 2.0 };
    for n in [1usize, 7, 63, 65, 1024, 100_003] {
        for (masked, step) in [(false, 1), (true, 1), (false, 1000), (true, 17)] {
            let op = AdamW {
                learning_rate: 1e-2,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.05,
                step,
                masked,
            };
            // The direction m / sqrt(v) is a quotient of sums of two terms each, so its error is a contraction's.
            let case =
                Case::new(op, Tolerance::Contraction { k: 16 }).normal(&[n], DType::F32).normal(&[n], DType::F32);
            let case = case.normal(&[n], DType::F32).input(&[n], DType::F32, positive.clone());
            let case = case.input(&[1], DType::F32, Fill::Values(vec![0.37]));
            cases.push(if masked { case.input(&[n], DType::F32, bits.clone()) } else { case });
        }
        for masked in [false, true] {
            let op = Sgd { learning_rate: 0.1, momentum: 0.9, weight_decay: 0.01, masked };
            let case = Case::new(op, Tolerance::Contraction { k: 8 }).normal(&[n], DType::F32).normal(&[n], DType::F32);
            let case = case.normal(&[n], DType::F32).input(&[1], DType::F32, Fill::Values(vec![0.37]));
            cases.push(if masked { case.input(&[n], DType::F32, bits.clone()) } else { case });
        }
    }
    for (max_norm, scale, squares) in
        [(1.0, 1.0, 4.0), (1.0, 0.01, 4.0), (0.0, 0.5, 9.0), (1.0, 1e-3, 0.0), (5.0, 1.0, 1e8)]
    {
        let case = Case::new(ClipFactor { max_norm, scale }, Tolerance::Transcendental);
        cases.push(case.input(&[1], DType::F32, Fill::Values(vec![squares])));
    }
    // GPT-2 small's largest matrix group.
    let n = 7_077_888;
    let op = AdamW {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.05,
        step: 10,
        masked: false,
    };
    let case = Case::new(op, Tolerance::Contraction { k: 16 }).normal(&[n], DType::F32).normal(&[n], DType::F32);
    let case = case.normal(&[n], DType::F32).input(&[n], DType::F32, positive);
    cases.push(case.input(&[1], DType::F32, Fill::Values(vec![0.37])).bench());
    cases
}
