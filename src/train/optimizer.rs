//! Optimizer groups: the parameters of a group live in one flat buffer, so a step is one launch per group.

mod norm;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::precision::{LossScale, Precision};
use super::schedule::Schedule;
use crate::device::{Device, Kind};
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::nn::model::GATE;
use crate::nn::pieces;
use crate::nn::tuning::TUNING;
use crate::ops::binary::AccumulateScaled;
use crate::ops::optim::{AdamW, Sgd, StepRates, UpdateFactor};
use crate::ops::reduce::CountNonFinite;
use crate::shape::Meta;
use crate::tape::{Grads, Var};
use crate::tensor::Tensor;

/// Update rule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum Rule {
    /// Loshchilov and Hutter 2019.
    Adamw {
        beta1: f32,
        beta2: f32,
        epsilon: f32,
    },
    Sgd {
        momentum: f32,
    },
}

impl Default for Rule {
    fn default() -> Self {
        Rule::Adamw { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub schedule: Schedule,
    #[serde(default)]
    pub rule: Rule,
    /// Decoupled; matrices only, never norms and biases.
    pub weight_decay: f32,
    /// Largest global gradient norm; 0 for no clipping.
    pub clip: f32,
    #[serde(default)]
    pub precision: Precision,
}

/// Name of the loss scale in a checkpoint.
const LOSS_SCALE: &str = "loss_scale";

/// Name of the masks in a checkpoint.
const MASK: &str = "mask";

/// Offsets of parameters are multiples of this many bytes, what a binding needs.
const ALIGNMENT: usize = 256;

struct Slot {
    name: String,
    dims: Vec<usize>,
    /// Of the model; see [`pieces::piece_of`].
    piece: usize,
    /// Byte offset in the flat buffers.
    offset: usize,
    filled: bool,
}

impl Slot {
    /// Byte offset behind it, the padding included.
    fn end(&self) -> usize {
        self.offset + (4 * self.dims.iter().product::<usize>()).next_multiple_of(ALIGNMENT)
    }
}

struct Group {
    part: Part,
    slots: Vec<Slot>,
    parameters: Tensor,
    gradients: Tensor,
    first_moment: Tensor,
    /// Absent for SGD.
    second_moment: Option<Tensor>,
    mask: Option<Tensor>,
    weight_decay: f32,
    /// Of gates alone.
    gates: Option<Gates>,
}

/// What the group of gates has for itself.
struct Gates {
    /// Learning rate as a multiple of the weights'.
    rate: f64,
    /// See [`StepRates`].
    rates: Tensor,
}

/// Groups in their order: decayed matrices, norms and biases, gates.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Matrices,
    Vectors,
    Gates,
}

/// Parameters, their gradients and moments, and in device memory what a step reads and decides: queueing a step needs no
/// number from the host and no number from the device.
pub struct Optimizer {
    groups: Vec<Group>,
    settings: Settings,
    step: u64,
    /// What the gradients of the last step are divided by.
    weight: f64,
    /// See [`StepRates`]; written before each step.
    rates: Tensor,
    /// u32 `[1]`: steps done before the one under way; random draws are keyed by it.
    counter: Tensor,
    /// See [`UpdateFactor`].
    state: Tensor,
    /// Sums of squares of gradients, f32 `[matrices and vectors, pieces]`; 0 for what other devices train.
    squares: Tensor,
    pieces: usize,
    /// As long as the longest parameter that ever had no gradient in a step.
    zeros: Option<Tensor>,
    /// Only what was added to the model learns.
    tuned: bool,
    /// Changes with what a step queues and with the memory it uses.
    generation: u64,
    device: Arc<dyn Device>,
}

/// What a step came to. Reading it waits for the device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Per unit of weight.
    pub loss: f64,
    /// Before clipping; 0 where a loss scale that was too large made the step void.
    pub norm: f64,
    /// The step whose gradients were not finite, counted from 1. Since then no step has changed anything.
    pub failed: Option<u64>,
}

impl Optimizer {
    /// Moves the f32 parameters that `trained` accepts into flat buffers; the model's tensors become views of them.
    pub fn new(model: &mut Model, settings: Settings, trained: impl Fn(&str) -> bool) -> Result<Self> {
        let device = model.device().clone();
        if device.info().kind == Kind::Reference {
            let reason = "it stores f64, flat parameter buffers are f32: train on cpu, wgpu or cuda".into();
            return Err(Error::NotAvailable { device: "reference".into(), reason });
        }
        let tuned = model.tuned();
        let mut groups = Vec::new();
        let part_of = |name: &str, tensor: &Tensor| match tensor.dims().len() {
            _ if name.ends_with(GATE) => Part::Gates,
            2.. if !name.ends_with(".bias") => Part::Matrices,
            _ => Part::Vectors,
        };
        for part in [Part::Matrices, Part::Vectors, Part::Gates] {
            let wanted = |name: &str, tensor: &Tensor| {
                tensor.dtype() == DType::F32 && part_of(name, tensor) == part && model.learns(name) && trained(name)
            };
            let mut names: Vec<String> =
                model.tensors.iter().filter(|(n, t)| wanted(n, t)).map(|(n, _)| n.clone()).collect();
            // So that what a piece has lies together, alike on every device that trains it.
            names.sort_by_key(|name| pieces::piece_of(&model.config, name));
            if !names.is_empty() {
                let mut group = Group::new(model, names, &device, part, settings)?;
                if part == Part::Gates {
                    let rates = Tensor::zeros(&device, Meta::new(&[StepRates::WORDS], DType::F32)?)?;
                    group.gates = Some(Gates { rate: 1.0, rates });
                }
                groups.push(group);
            }
        }
        let rates = Tensor::zeros(&device, Meta::new(&[StepRates::WORDS], DType::F32)?)?;
        let counter = Tensor::zeros(&device, Meta::new(&[1], DType::U32)?)?;
        let state = Tensor::zeros(&device, Meta::new(&[UpdateFactor::STATE], DType::F32)?)?;
        let pieces = pieces::pieces(&model.config);
        let squares = Tensor::zeros(&device, Meta::new(&[2, pieces], DType::F32)?)?;
        let mut optimizer = Self {
            groups,
            settings,
            step: 0,
            weight: 1.0,
            rates,
            counter,
            state,
            squares,
            pieces,
            zeros: None,
            tuned,
            generation: 0,
            device,
        };
        optimizer.set_loss_scale(LossScale::of(settings.precision))?;
        Ok(optimizer)
    }

    /// Starts anew with this scale; `None`: losses are not scaled.
    fn set_loss_scale(&mut self, scale: Option<LossScale>) -> Result<()> {
        let [factor, good] = scale.map_or([1.0, 0.0], LossScale::words);
        self.state.upload(&[factor, good, 0.0, 0.0, 0.0])
    }

    fn scaled(&self) -> bool {
        LossScale::of(self.settings.precision).is_some()
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.step
    }

    pub fn precision(&self) -> Precision {
        self.settings.precision
    }

    /// What the loss is multiplied by before gradients are taken, as a tensor of one element that follows the scale from
    /// step to step (of two: also the good steps since it changed); [`Optimizer::update`] takes it out again.
    pub fn loss_scale(&self, dims: &[usize]) -> Result<Tensor> {
        Tensor::over(&self.device, self.state.buffer().clone(), self.state.offset(), Meta::new(dims, DType::F32)?)
    }

    /// u32 `[1]`, the number of steps before the one under way: what draws random numbers reads it.
    pub fn counter(&self) -> &Tensor {
        &self.counter
    }

    /// What was captured under another number is not what a step queues now.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Steps queue something else from now on, or use other memory.
    pub fn invalidate(&mut self) {
        self.generation += 1;
    }

    /// Counts the next step and writes what it needs to know, before anything of it is queued. Its gradients will be divided
    /// by `weight` (tokens or their weighted count).
    pub fn begin(&mut self, weight: f64, total_steps: u64) -> Result<()> {
        let learning_rate = self.learning_rate(total_steps) as f32;
        let betas = if let Rule::Adamw { beta1, beta2, .. } = self.settings.rule { [beta1, beta2] } else { [0.0; 2] };
        self.forget_gradients();
        self.set_counter(self.step)?;
        (self.step, self.weight) = (self.step + 1, weight);
        let rates = StepRates { learning_rate, betas, weight, step: self.step };
        for gates in self.groups.iter().filter_map(|group| group.gates.as_ref()) {
            let learning_rate = (f64::from(learning_rate) * gates.rate) as f32;
            gates.rates.upload(&StepRates { learning_rate, ..rates }.words())?;
        }
        self.rates.upload(&rates.words())
    }

    /// Gates learn at this peak rate, on the schedule's shape.
    pub fn set_gate_rate(&mut self, peak: f64) {
        let rate = peak / self.settings.schedule.peak;
        self.groups.iter_mut().filter_map(|group| group.gates.as_mut()).for_each(|gates| gates.rate = rate);
    }

    /// Starts the sums of gradients anew.
    pub fn forget_gradients(&mut self) {
        self.groups.iter_mut().flat_map(|g| &mut g.slots).for_each(|s| s.filled = false);
    }

    /// Lets random draws be those of the step after `done` steps.
    pub fn set_counter(&self, done: u64) -> Result<()> {
        self.counter.upload(&[done as u32])
    }

    pub fn parameter_count(&self) -> usize {
        self.groups.iter().flat_map(|g| &g.slots).map(|s| s.dims.iter().product::<usize>()).sum()
    }

    /// Adds gradients of one micro-batch. The first one of a step is copied, so nothing has to be cleared.
    pub fn accumulate(&mut self, leaves: &BTreeMap<String, Var>, grads: &Grads) -> Result<()> {
        for group in &mut self.groups {
            for slot in &mut group.slots {
                let Some(grad) = leaves.get(&slot.name).and_then(|v| grads.of(v)).transpose()? else {
                    continue;
                };
                let target = view(&group.gradients, slot)?;
                if slot.filled {
                    dispatch::run(&AccumulateScaled { factor: 1.0 }, &[&target, &grad])?;
                } else {
                    let bytes = grad.meta().bytes();
                    self.device.copy(grad.buffer(), grad.offset(), target.buffer(), slot.offset, bytes)?;
                    slot.filled = true;
                }
            }
        }
        Ok(())
    }

    /// Queues one update from the accumulated gradients; `losses` is the sum of the step's losses, f32 `[1]`. Whether it
    /// happens is decided on the device: a gradient that is not finite changes nothing ([`Optimizer::outcome`] tells).
    pub fn update(&mut self, losses: &Tensor) -> Result<()> {
        if self.groups.is_empty() {
            return Ok(());
        }
        let squares = self.squares()?;
        self.apply(&squares, losses)
    }

    /// Gradients that no micro-batch of the step gave are 0, not what an earlier step left.
    fn clear_unfilled(&mut self) -> Result<()> {
        for group in &self.groups {
            for slot in group.slots.iter().filter(|s| !s.filled) {
                let count = slot.dims.iter().product();
                let zeros = match &self.zeros {
                    Some(zeros) if zeros.count() >= count => zeros,
                    _ => self.zeros.insert(Tensor::zeros(&self.device, Meta::new(&[count], DType::F32)?)?),
                };
                self.device.copy(zeros.buffer(), 0, group.gradients.buffer(), slot.offset, 4 * count)?;
            }
        }
        Ok(())
    }

    /// What the last step came to; waits for it.
    pub fn outcome(&self) -> Result<Outcome> {
        let state = self.state.to_vec::<f32>()?;
        let [.., failed, loss, norm] = state[..] else {
            return Err(Error::file("optimizer", "state", "too short"));
        };
        let failed = (failed != 0.0).then_some(failed as u64);
        Ok(Outcome { loss: f64::from(loss), norm: f64::from(norm), failed })
    }

    /// Learning rate of the step that `begin` would start next.
    pub fn learning_rate(&self, total_steps: u64) -> f64 {
        self.settings.schedule.rate(self.step + 1, total_steps)
    }

    /// Refuses parameters or moments that are not finite: nothing of the kind may reach a file.
    pub fn check_finite(&self) -> Result<()> {
        for group in &self.groups {
            for flat in
                [Some(&group.parameters), Some(&group.first_moment), group.second_moment.as_ref()].into_iter().flatten()
            {
                if dispatch::run_one(&CountNonFinite, &[flat])?.to_vec::<u32>()?.first() != Some(&0) {
                    return Err(self.find_non_finite(self.step)?);
                }
            }
        }
        Ok(())
    }

    /// Names the first parameter that is not finite, or whose gradient is not: values first, they are the cause.
    pub fn find_non_finite(&self, step: u64) -> Result<Error> {
        for (kind, flat) in [("value", false), ("gradient", true)] {
            for group in &self.groups {
                for slot in &group.slots {
                    let tensor = view(if flat { &group.gradients } else { &group.parameters }, slot)?;
                    let found = dispatch::run_one(&CountNonFinite, &[&tensor])?.to_vec::<u32>()?;
                    if let [count, index] = found[..]
                        && count > 0
                    {
                        let (layer, name) = slot.name.rsplit_once('.').unwrap_or(("model", &slot.name));
                        return Ok(Error::NonFinite {
                            step,
                            layer: layer.to_string(),
                            tensor: format!("{kind} of {name}"),
                            count: count as usize,
                            index: index as usize,
                        });
                    }
                }
            }
        }
        // Every element is finite, so the sum of squares overflowed f32.
        let (layer, tensor) = ("model".to_string(), "sum of squared gradients".to_string());
        Ok(Error::NonFinite { step, layer, tensor, count: 1, index: 0 })
    }

    /// Holds `mask` (0/1, the parameter's shape) on gradient, parameter and moments from now on.
    pub fn set_mask(&mut self, name: &str, mask: &Tensor) -> Result<()> {
        for group in &mut self.groups {
            let Some(slot) = group.slots.iter().find(|s| s.name == name) else {
                continue;
            };
            if mask.dims() != slot.dims {
                let got = format!("{:?} for {:?}", mask.dims(), slot.dims);
                return Err(Error::Shape { op: "mask", rule: "the parameter's shape", got });
            }
            if group.mask.is_none() {
                let ones = vec![1.0f32; group.parameters.count()];
                group.mask = Some(Tensor::from_slice(&self.device, &[ones.len()], &ones)?);
                self.generation += 1;
            }
            if let Some(flat) = &group.mask {
                self.device.copy(mask.buffer(), mask.offset(), flat.buffer(), slot.offset, mask.meta().bytes())?;
            }
            return Ok(());
        }
        // What does not learn keeps its zeros.
        if self.tuned && !name.starts_with(TUNING) {
            return Ok(());
        }
        Err(Error::file("optimizer", name, "no trained parameter of this name to mask"))
    }

    /// Gradient of the last step's summed loss with respect to a parameter, and the factor that makes it the gradient per
    /// unit of weight (half of that after a step that doubled the loss scale). The next step overwrites its memory.
    pub fn gradient(&self, name: &str) -> Result<(Tensor, f32)> {
        for group in &self.groups {
            if let Some(slot) = group.slots.iter().find(|s| s.name == name) {
                let scale = if self.scaled() { self.loss_scale(&[1])?.to_vec::<f32>()?[0] } else { 1.0 };
                return Ok((view(&group.gradients, slot)?, (1.0 / (self.weight * f64::from(scale))) as f32));
            }
        }
        Err(Error::file("optimizer", name, "no trained parameter of this name"))
    }

    /// Whether the last step changed nothing because its gradients overflowed; without a loss scale none is void.
    pub fn is_void(&self) -> Result<bool> {
        Ok(self.scaled() && self.outcome()?.norm == 0.0)
    }

    /// Sums of this step's gradients, one flat tensor per group; two optimizers of the same parameters have the same layout.
    pub fn gradients(&mut self) -> Result<Vec<Tensor>> {
        self.clear_unfilled()?;
        // Whatever is added to them from now on counts.
        self.groups.iter_mut().flat_map(|g| &mut g.slots).for_each(|s| s.filled = true);
        Ok(self.groups.iter().map(|g| g.gradients.clone()).collect())
    }

    /// Everything a resumed run needs beside the parameters, by the parameters' names: however they are spread over
    /// optimizers then, each finds its own.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        if self.scaled() {
            state.insert(LOSS_SCALE.to_string(), self.loss_scale(&[2])?.duplicate()?);
        }
        for group in &self.groups {
            for (kind, flat) in group.kept() {
                for slot in &group.slots {
                    state.insert(format!("{kind}/{}", slot.name), view(flat, slot)?);
                }
            }
        }
        Ok(state)
    }

    /// Restores what [`Optimizer::state`] gave, and the step count.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>, step: u64) -> Result<()> {
        let path = std::path::Path::new("optimizer state");
        let take = |name: &str, dims: &[usize]| -> Result<&Tensor> {
            let tensor = state.get(name).ok_or_else(|| Error::file(path, name, "missing"))?;
            if tensor.meta() != Meta::new(dims, DType::F32)? {
                return Err(Error::file(path, name, format!("{} where f32{dims:?} is needed", tensor.meta())));
            }
            Ok(tensor)
        };
        let names = self.groups.iter().flat_map(|g| &g.slots).map(|s| s.name.clone()).collect::<Vec<_>>();
        for name in names {
            if let Some(mask) = state.get(&format!("{MASK}/{name}")) {
                self.set_mask(&name, mask)?;
            }
        }
        for group in &self.groups {
            for (kind, flat) in group.kept().into_iter().filter(|(kind, _)| *kind != MASK) {
                for slot in &group.slots {
                    let from = take(&format!("{kind}/{}", slot.name), &slot.dims)?;
                    let bytes = from.meta().bytes();
                    self.device.copy(from.buffer(), from.offset(), flat.buffer(), slot.offset, bytes)?;
                }
            }
        }
        let scale = if self.scaled() { take(LOSS_SCALE, &[2])?.to_vec::<f32>()? } else { Vec::new() };
        self.set_loss_scale(scale.try_into().ok().map(LossScale::from_words))?;
        self.step = step;
        self.invalidate();
        Ok(())
    }
}

/// A parameter's part of a flat buffer.
fn view(flat: &Tensor, slot: &Slot) -> Result<Tensor> {
    Tensor::over(flat.device(), flat.buffer().clone(), slot.offset, Meta::new(&slot.dims, DType::F32)?)
}

impl Group {
    fn new(
        model: &mut Model,
        names: Vec<String>,
        device: &Arc<dyn Device>,
        part: Part,
        settings: Settings,
    ) -> Result<Self> {
        let mut slots: Vec<Slot> = Vec::new();
        for name in names {
            let (dims, piece) = (model.get(&name)?.dims().to_vec(), pieces::piece_of(&model.config, &name));
            let offset = slots.last().map_or(0, Slot::end);
            slots.push(Slot { name, dims, piece, offset, filled: false });
        }
        let end = slots.last().map_or(0, Slot::end);
        // Zeros: the padding between parameters must stay harmless in norms and updates.
        let flat = || Tensor::zeros(device, Meta::new(&[end / 4], DType::F32)?);
        let parameters = flat()?;
        for slot in &slots {
            let tensor = model.get(&slot.name)?;
            device.copy(tensor.buffer(), tensor.offset(), parameters.buffer(), slot.offset, tensor.meta().bytes())?;
            model.tensors.insert(slot.name.clone(), view(&parameters, slot)?);
        }
        let second_moment = if matches!(settings.rule, Rule::Adamw { .. }) { Some(flat()?) } else { None };
        Ok(Self {
            part,
            slots,
            parameters,
            gradients: flat()?,
            first_moment: flat()?,
            second_moment,
            mask: None,
            weight_decay: if part == Part::Matrices { settings.weight_decay } else { 0.0 },
            gates: None,
        })
    }

    /// What a checkpoint keeps, by kind.
    fn kept(&self) -> Vec<(&'static str, &Tensor)> {
        let optional = [("second_moment", self.second_moment.as_ref()), (MASK, self.mask.as_ref())];
        let all = [("first_moment", Some(&self.first_moment))].into_iter().chain(optional);
        all.filter_map(|(kind, flat)| Some((kind, flat?))).collect()
    }

    fn update(&self, rule: Rule, factor: &Tensor, rates: &Tensor) -> Result<()> {
        let masked = self.mask.is_some();
        let weight_decay = self.weight_decay;
        let (p, g, m) = (&self.parameters, &self.gradients, &self.first_moment);
        match (rule, &self.second_moment) {
            (Rule::Adamw { beta1, beta2, epsilon }, Some(v)) => {
                let op = AdamW { beta1, beta2, epsilon, weight_decay, masked };
                let inputs: Vec<&Tensor> = [p, g, m, v, factor, rates].into_iter().chain(&self.mask).collect();
                dispatch::run(&op, &inputs)?;
            }
            (Rule::Sgd { momentum }, _) => {
                let op = Sgd { momentum, weight_decay, masked };
                let inputs: Vec<&Tensor> = [p, g, m, factor, rates].into_iter().chain(&self.mask).collect();
                dispatch::run(&op, &inputs)?;
            }
            (Rule::Adamw { .. }, None) => return Err(Error::file("optimizer", "second_moment", "missing")),
        }
        Ok(())
    }
}
