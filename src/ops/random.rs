//! Philox-driven ops: dropout, uniform, normal. The bits are the same on every device.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, always, source, spans};
use crate::op::{Array, Case, Cost, Family, Fill, Gradient, Op, Saves, Tolerance};
use crate::rng::Site;
use crate::shape::{self, Meta, Shape};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "random", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("random");
const BLOCK: u32 = 64;
/// Words of one Philox block: one invocation handles the elements they belong to.
const PER_INVOCATION: usize = 4;

/// y_i = x_i / (1 - p) where the uniform number of element i is at least p, else 0 (Srivastava et al. 2014). Inputs: x, and
/// the step as u32 `[1]`: in device memory, so that a captured step draws anew when it is replayed. The gradient is the
/// same op on dy: site, step and index alone decide what is kept.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// p in [0, 1), compared on 24 bits.
    pub probability: f32,
    pub seed: u64,
    /// Which dropout of the model it is.
    pub site: u32,
}

/// low + (high - low) u with u in [0, 1) on 24 bits, product and sum each rounded to f32. No inputs.
#[derive(Clone, Copy, Debug)]
pub struct Uniform {
    pub low: f32,
    pub high: f32,
    pub dims: Shape,
    pub site: Site,
    pub dtype: DType,
}

/// mean + deviation z, z standard normal by inversion of the distribution function: one 32-bit word per element, |z| up
/// to 6.34. No inputs.
#[derive(Clone, Copy, Debug)]
pub struct Normal {
    pub mean: f32,
    pub deviation: f32,
    pub dims: Shape,
    pub site: Site,
    pub dtype: DType,
}

impl Dropout {
    fn threshold(&self) -> u32 {
        (f64::from(self.probability) * 16_777_216.0).round() as u32
    }

    fn scale(&self) -> f32 {
        (1.0 / (1.0 - f64::from(self.probability))) as f32
    }

    /// Where it draws, at step 0.
    fn drawn(&self) -> Site {
        Site { seed: self.seed, site: self.site, step: 0 }
    }
}

fn params(count: usize, base: usize, site: Site, threshold: u32, (a, b): (f32, f32)) -> Params {
    let params = Params::new().u(count).u(base).word(site.seed as u32).word((site.seed >> 32) as u32);
    params.word(site.site).word(site.step).word(threshold).word(0).f(a).f(b)
}

impl Op for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        if !(0.0..1.0).contains(&self.probability) {
            let value = self.probability.to_string();
            return Err(Error::Parameter { op: "dropout", parameter: "probability", value, allowed: "0 <= p < 1" });
        }
        match inputs {
            [x, step] if x.dtype.is_float() && step.dims() == [1] && step.dtype == DType::U32 => Ok(vec![*x]),
            _ => Err(Error::Shape { op: "dropout", rule: "one float input, u32 [1]", got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let site = Site { step: inputs[1].data[0] as u32, ..self.drawn() };
        let keeps = |i: usize| f64::from(site.uniform(i as u32)) >= f64::from(self.threshold()) / 16_777_216.0;
        let scale = f64::from(self.scale());
        vec![inputs[0].data.iter().enumerate().map(|(i, x)| if keeps(i) { x * scale } else { 0.0 }).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("dropout_fwd", DType::FLOATS, cpu::dropout), wgsl("dropout_fwd", plan_dropout)];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        params(inputs[0].count(), 0, self.drawn(), self.threshold(), (self.scale(), 0.0))
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[1], outputs: &[] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(g.one(self, &[g.grad(0)?, g.input(1)?])?), None])
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// What ops without inputs check.
fn drawn(op: &'static str, inputs: &[Meta], shape: Shape, dtype: DType, finite: &[f32]) -> Result<Vec<Meta>> {
    if !inputs.is_empty() {
        return Err(Error::Shape { op, rule: "no inputs", got: shape::list(inputs) });
    }
    if !dtype.is_float() {
        return Err(Error::Dtype { op, expected: "a float type", got: dtype.to_string() });
    }
    if let Some(value) = finite.iter().find(|x| !x.is_finite()) {
        return Err(Error::Parameter { op, parameter: "bound", value: value.to_string(), allowed: "finite numbers" });
    }
    Ok(vec![Meta { shape, dtype }])
}

impl Op for Uniform {
    fn name(&self) -> &'static str {
        "uniform"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        drawn("uniform", inputs, self.dims, self.dtype, &[self.low, self.high, self.high - self.low])
    }

    /// The definition rounds twice to f32; f64 holds the product exactly and rounds the sum harmlessly.
    fn reference(&self, _: &[Array]) -> Vec<Vec<f64>> {
        let (low, span) = (f64::from(self.low), f64::from(self.high - self.low));
        let value = |i: usize| DType::F32.round(low + DType::F32.round(span * f64::from(self.site.uniform(i as u32))));
        vec![(0..self.dims.count()).map(value).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("uniform_fwd", DType::FLOATS, cpu::uniform), wgsl("uniform_fwd", plan_uniform)];
        KERNELS
    }

    fn params(&self, _: &[Meta], outputs: &[Meta]) -> Params {
        params(outputs[0].count(), 0, self.site, 0, (self.low, self.high - self.low))
    }

    fn gradient(&self, _: &Gradient) -> Result<Vec<Option<Tensor>>> {
        Ok(Vec::new())
    }

    fn cost(&self, _: &[Meta], outputs: &[Meta]) -> Cost {
        Cost { flops: 2.0 * outputs[0].count() as f64, bytes: outputs[0].bytes() as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for Normal {
    fn name(&self) -> &'static str {
        "normal"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        drawn("normal", inputs, self.dims, self.dtype, &[self.mean, self.deviation])
    }

    fn reference(&self, _: &[Array]) -> Vec<Vec<f64>> {
        let value = |i: usize| f64::from(self.mean) + f64::from(self.deviation) * word_normal(self.site.word(i as u32));
        vec![(0..self.dims.count()).map(value).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("normal_fwd", DType::FLOATS, cpu::normal), wgsl("normal_fwd", plan_normal)];
        KERNELS
    }

    fn params(&self, _: &[Meta], outputs: &[Meta]) -> Params {
        params(outputs[0].count(), 0, self.site, 0, (self.mean, self.deviation))
    }

    fn gradient(&self, _: &Gradient) -> Result<Vec<Option<Tensor>>> {
        Ok(Vec::new())
    }

    fn cost(&self, _: &[Meta], outputs: &[Meta]) -> Cost {
        Cost { flops: 60.0 * outputs[0].count() as f64, bytes: outputs[0].bytes() as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The normal number of a word: its lower 31 bits m give the tail probability (2 m + 1) / 2^33, its top bit the side.
fn word_normal(word: u32) -> f64 {
    let tail = f64::from(2 * (word & 0x7fff_ffff) + 1) / 8_589_934_592.0;
    let z = tail_quantile(tail);
    if word >> 31 == 1 { -z } else { z }
}

/// z > 0 with P(Z > z) = q for q in (0, 0.5): Abramowitz and Stegun 26.2.23 (error below 4.5e-4), then Halley steps.
fn tail_quantile(q: f64) -> f64 {
    let t = (-2.0 * q.ln()).sqrt();
    let mut z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
    for _ in 0..3 {
        let density = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let error = (upper_tail(z) - q) / density;
        z += error / (1.0 - 0.5 * z * error);
    }
    z
}

/// P(Z > z): the series of erf near 0, the continued fraction of Mills' ratio z + 1/(z + 2/(z + ...)) in the tail.
fn upper_tail(z: f64) -> f64 {
    if z < 2.5 {
        return 0.5 * (1.0 - crate::ops::unary::erf(z * std::f64::consts::FRAC_1_SQRT_2));
    }
    let ratio = (1..=120).rev().fold(z, |t, k| z + f64::from(k) / t);
    (-0.5 * z * z).exp() / ((2.0 * std::f64::consts::PI).sqrt() * ratio)
}

const fn wgsl(name: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry: name, constants: &[] };
    Kernel { name, code, dtypes: DType::FLOATS, fits: always, plan }
}

/// One launch per binding-sized span of the elements; `cut` are the arguments that have them.
fn plan(p: &Problem, cut: &[usize], of: impl Fn(usize, usize) -> Params) -> Plan {
    let (count, size) = (p.outputs[0].count(), p.element.size());
    let launches = spans(count, size, p.info.limits.binding_bytes).map(|span| {
        let items = span.len().div_ceil(PER_INVOCATION);
        let launch = Launch::linear(items, BLOCK, of(span.len(), span.start)).trips(PER_INVOCATION + 10);
        if span.len() == count {
            return launch;
        }
        let window = |launch: Launch, &argument: &usize| launch.window(argument, span.start * size, span.len() * size);
        cut.iter().fold(launch, window)
    });
    Plan::sequence(launches.collect())
}

fn plan_dropout(p: &Problem) -> Plan {
    let Some(op) = p.op::<Dropout>() else { return Plan::default() };
    plan(p, &[0, 2], |count, base| params(count, base, op.drawn(), op.threshold(), (op.scale(), 0.0)))
}

fn plan_uniform(p: &Problem) -> Plan {
    let Some(op) = p.op::<Uniform>() else { return Plan::default() };
    plan(p, &[0], |count, base| params(count, base, op.site, 0, (op.low, op.high - op.low)))
}

fn plan_normal(p: &Problem) -> Plan {
    let Some(op) = p.op::<Normal>() else { return Plan::default() };
    plan(p, &[0], |count, base| params(count, base, op.site, 0, (op.mean, op.deviation)))
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let site = |site: u32| Site { seed: 0x0123_4567_89ab_cdef, site, step: 3 };
    for &dtype in DType::FLOATS {
        // In 16 bits the kernel rounds twice, to f32 and to storage.
        let tolerance = if dtype == DType::F32 { Tolerance::Exact } else { Tolerance::Arithmetic };
        for (n, dims) in [&[1][..], &[7], &[3, 5, 17], &[64, 65], &[257, 255]].into_iter().enumerate() {
            for probability in [0.0, 0.1, 0.5, 0.93] {
                let op = Dropout { probability, seed: site(0).seed, site: n as u32 };
                let case = Case::new(op, tolerance).normal(dims, dtype);
                let case = case.input(&[1], DType::U32, Fill::Values(vec![3.0]));
                let small = case.inputs[0].meta.count() < 300 && dtype == DType::F32;
                cases.push(if small { case.grad() } else { case });
            }
            let Ok(dims) = Shape::new(dims) else { continue };
            for (low, high) in [(0.0, 1.0), (-0.3, 0.7), (1000.0, 1000.1)] {
                let op = Uniform { low, high, dims, site: site(n as u32), dtype };
                cases.push(Case::new(op, Tolerance::Exact));
            }
            for (mean, deviation) in [(0.0, 1.0), (0.5, 0.02)] {
                let op = Normal { mean, deviation, dims, site: site(n as u32), dtype };
                cases.push(Case::new(op, Tolerance::Transcendental));
            }
        }
    }
    // Activations of GPT-2 small over 1,024 tokens, the initial values of one of its weights.
    let dropout = Case::new(Dropout { probability: 0.1, seed: site(9).seed, site: 9 }, Tolerance::Exact);
    let dropout = dropout.normal(&[1024, 768], DType::F32);
    cases.push(dropout.input(&[1], DType::U32, Fill::Values(vec![3.0])).bench());
    if let Ok(dims) = Shape::new(&[768, 768]) {
        let (dtype, site) = (DType::F32, site(10));
        cases.push(
            Case::new(Normal { mean: 0.0, deviation: 0.02, dims, site, dtype }, Tolerance::Transcendental).bench(),
        );
        cases.push(Case::new(Uniform { low: -1.0, high: 1.0, dims, site, dtype }, Tolerance::Exact).bench());
    }
    cases
}

#[cfg(test)]
mod tests;
