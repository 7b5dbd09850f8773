//! Quantization-aware training as an output hook: weights and inputs pass through the rounding of their deployed form,
//! straight-through.

use super::format::{Activations, Format, INPUT_BITS, Levels, simulated, stored};
use super::schedule::Phase;
use super::{INPUT_STEP, STEP};
use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::{Model, OutputHook, Pass};
use crate::ops::quant::{
    Dequantize, FakeQuant, Granularity, GridFrom, MatmulInt8, Observe, Quantize, Scheme, Statistic, TrackStep,
};
use crate::rng::Stream;
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Invariant, Method};
use crate::train::optimizer::Optimizer;

pub struct QuantizationAware {
    /// Names of the linears (and expert groups) that are quantized.
    linears: Vec<String>,
    format: Format,
    /// `None` after the stage that quantized: formats and steps are held as they are.
    phase: Option<Phase>,
    /// The format's bits, or more on the way down to them; `None` before the first look.
    bits: Option<u32>,
    tracks: bool,
}

impl QuantizationAware {
    pub fn new(linears: Vec<String>, format: Format, phase: Option<Phase>) -> Self {
        Self { linears, format, phase, bits: None, tracks: phase.is_some_and(|p| p.tracks(0)) }
    }

    fn learns(&self) -> bool {
        self.phase.is_some_and(|p| p.learned)
    }

    /// The format of this moment.
    fn now(&self) -> Format {
        Format { bits: self.bits.unwrap_or(self.format.bits), ..self.format }
    }

    /// A step as a variable that learns, or as a constant.
    fn step(&self, pass: &mut Pass, name: &str) -> Result<Option<Var>> {
        if !pass.model.tensors.contains_key(name) {
            return Ok(None);
        }
        if self.learns() {
            return pass.parameter(name).map(Some);
        }
        pass.model.get(name).map(|step| Some(Var::constant(step.clone())))
    }

    fn input(&self, pass: &mut Pass, linear: &str, x: Var) -> Result<Var> {
        let fake = FakeQuant { from: GridFrom::Own, ..INPUT };
        match self.format.activations {
            Activations::Float => Ok(x),
            Activations::Token => pass.tape.first(fake, &[&x]),
            Activations::Static => {
                let name = format!("{linear}.{INPUT_STEP}");
                let Some(step) = self.step(pass, &name)? else {
                    return Err(Error::file("model", name, "static inputs need a step: calibrate first"));
                };
                if self.tracks && pass.tape.recording() {
                    self.track(&step.tensor, &x.tensor)?;
                }
                pass.tape.first(FakeQuant { from: GridFrom::Step, ..fake }, &[&x, &step])
            }
        }
    }

    fn track(&self, step: &Tensor, x: &Tensor) -> Result<()> {
        let observe = Observe { granularity: Granularity::Tensor, statistic: Statistic::AbsMax };
        let range = dispatch::run_one(&observe, &[x])?;
        let rate = self.phase.map_or(0.0, |p| p.tracking);
        dispatch::run(&TrackStep { bits: INPUT.bits, scheme: INPUT.scheme, rate }, &[step, &range])?;
        Ok(())
    }

    /// Learned steps keep their range when the highest level changes.
    fn rescale(&self, model: &Model, from: &Format, to: &Format) -> Result<()> {
        for linear in &self.linears {
            if let Some(step) = model.tensors.get(&format!("{linear}.{STEP}")) {
                let ratio = (from.highest() / to.highest()) as f32;
                step.upload(&step.to_vec::<f32>()?.iter().map(|s| s * ratio).collect::<Vec<f32>>())?;
            }
        }
        Ok(())
    }

    /// Weights of linears that are here and dense.
    fn dense<'m>(&'m self, model: &'m Model) -> impl Iterator<Item = &'m String> {
        self.linears.iter().filter(|l| model.tensors.contains_key(&format!("{l}.weight")))
    }
}

/// Inputs: symmetric narrow, so that a zero is the integer 0.
const INPUT: FakeQuant = FakeQuant {
    bits: INPUT_BITS,
    scheme: Scheme::SymmetricNarrow,
    granularity: Granularity::Token,
    from: GridFrom::Own,
};

impl OutputHook for QuantizationAware {
    fn on_output(&self, pass: &mut Pass, linear: &str, x: Var, weight: Var) -> Result<(Var, Var)> {
        if !self.linears.iter().any(|l| l == linear) {
            return Ok((x, weight));
        }
        let x = self.input(pass, linear, x)?;
        let weight = match self.step(pass, &format!("{linear}.{STEP}"))? {
            Some(step) => pass.tape.first(self.now().simulate(GridFrom::Step), &[&weight, &step])?,
            None => pass.tape.first(self.now().simulate(GridFrom::Own), &[&weight])?,
        };
        Ok((x, weight))
    }
}

impl Method for QuantizationAware {
    fn name(&self) -> &'static str {
        "quantization-aware training"
    }

    fn on_output(&self) -> Option<&dyn OutputHook> {
        Some(self)
    }

    fn on_update(&mut self, step: u64, model: &Model, optimizer: &mut Optimizer) -> Result<()> {
        let Some(phase) = self.phase else {
            return Ok(());
        };
        let uniform = self.format.levels == Levels::Uniform;
        let bits = phase.bits.filter(|_| uniform).map_or(self.format.bits, |b| b.bits(step, self.format.bits));
        let tracks = phase.tracks(step);
        let before = self.bits.replace(bits);
        if before.is_some_and(|before| before != bits) {
            let from = Format { bits: before.unwrap_or(bits), ..self.format };
            self.rescale(model, &from, &self.now())?;
        }
        if before != Some(bits) || tracks != self.tracks {
            self.tracks = tracks;
            optimizer.invalidate();
        }
        Ok(())
    }

    fn invariants(&self, model: &Model) -> Result<Vec<Invariant>> {
        let (mut pruned, mut revived, mut weights, mut parted) = (0usize, 0usize, 0usize, 0usize);
        let (mut sums, mut unequal) = (0usize, 0usize);
        for linear in self.dense(model) {
            let weight = model.get(&format!("{linear}.weight"))?.to_vec::<f32>()?;
            let (q, scale) = stored(model, linear, &self.format)?;
            let fake = simulated(model, linear, &self.format)?;
            parted += differences(&self.format, (&q, &scale), &fake)?;
            weights += weight.len();
            for (w, q) in weight.iter().zip(q.to_vec::<i8>()?) {
                pruned += usize::from(*w == 0.0);
                revived += usize::from(*w == 0.0 && q != 0);
            }
            if self.format.activations != Activations::Float {
                let [all, wrong] = self.accumulators(model, linear, (&q, &scale), &fake)?;
                (sums, unequal) = (sums + all, unequal + wrong);
            }
        }
        let promise = |rule: &str, wrong: usize, of: usize| Invariant {
            rule: rule.into(),
            measured: format!("{wrong} of {of} do not"),
            holds: wrong == 0,
        };
        let mut promises = vec![
            promise("pruned weights quantize to the integer 0", revived, pruned),
            promise("simulated weights equal the stored integers times their steps", parted, weights),
        ];
        if self.format.activations != Activations::Float {
            let rule = "int32 sums of the simulated integers equal the integer kernel's";
            promises.push(promise(rule, unequal, sums));
        }
        Ok(promises)
    }
}

/// How many simulated weights are not, to the bit, their integers times their steps.
fn differences(format: &Format, (q, scale): (&Tensor, &Tensor), fake: &Tensor) -> Result<usize> {
    let zeros = Tensor::zeros(scale.device(), scale.meta())?;
    let (bits, scheme) = (format.weight_bits(), format.scheme());
    let back = Dequantize { scheme, granularity: format.granularity(), bits };
    let back = dispatch::run_one(&back, &[q, scale, &zeros])?.to_vec::<f32>()?;
    Ok(back.iter().zip(fake.to_vec::<f32>()?).filter(|(a, b)| **a != *b).count())
}

/// Rows of random inputs that accumulators are compared on.
const PROBES: usize = 2;

impl QuantizationAware {
    /// Number of int32 sums, and of those where the integers of the simulated operands give another one than the kernel.
    fn accumulators(
        &self,
        model: &Model,
        linear: &str,
        (q, scale): (&Tensor, &Tensor),
        fake: &Tensor,
    ) -> Result<[usize; 2]> {
        let (n, k) = (q.shape().rows(), q.shape().last());
        let device = model.device();
        let mut stream = Stream::new(0xacc, 0);
        let x: Vec<f32> = (0..PROBES * k).map(|_| stream.normal() as f32).collect();
        let x = Tensor::from_slice(device, &[PROBES, k], &x)?;
        let step = model.tensors.get(&format!("{linear}.{INPUT_STEP}"));
        let given = step.filter(|_| self.format.activations == Activations::Static);
        let from = if given.is_some() { GridFrom::Step } else { GridFrom::Own };
        let inputs: Vec<&Tensor> = [&x].into_iter().chain(given).collect();
        let fake_x = dispatch::run_one(&FakeQuant { from, ..INPUT }, &inputs)?.to_vec::<f32>()?;
        let (bits, scheme, granularity) = (INPUT.bits, INPUT.scheme, INPUT.granularity);
        let stored_x = dispatch::run(&Quantize { bits, scheme, granularity, from }, &inputs)?;
        let ones = |count: usize| Tensor::from_slice(device, &[count], &vec![1.0f32; count]);
        let kernel = [&stored_x[0], &ones(PROBES)?, &q.reshape(&[n, k])?, &ones(n)?];
        let kernel = dispatch::run_one(&MatmulInt8 { bias: false }, &kernel)?.to_vec::<f32>()?;
        // Back from simulated values to integers: both are exact multiples of their step but for one rounding.
        let levels = |values: &[f32], steps: &[f32]| -> Vec<i64> {
            let length = values.len() / steps.len().max(1);
            values.iter().enumerate().map(|(i, v)| f64::from(v / steps[i / length]).round() as i64).collect()
        };
        let x_levels = levels(&fake_x, &stored_x[1].to_vec::<f32>()?);
        let w_levels = levels(&fake.to_vec::<f32>()?, &scale.to_vec::<f32>()?);
        let mut wrong = 0;
        for (i, row) in x_levels.chunks(k).enumerate() {
            for (j, column) in w_levels.chunks(k).enumerate() {
                let sum: i64 = row.iter().zip(column).map(|(a, b)| a * b).sum();
                wrong += usize::from(kernel[i * n + j] != sum as f32);
            }
        }
        Ok([PROBES * n, wrong])
    }
}
