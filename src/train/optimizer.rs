//! Optimizer groups: the parameters of a group live in one flat buffer, so a step is one launch per group.

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
use crate::ops::binary::{ADD, AccumulateScaled, Binary, BinaryFunction};
use crate::ops::optim::{AdamW, ClipFactor, Sgd};
use crate::ops::reduce::{Axis, CountNonFinite, Reduce, ReduceFunction};
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

const MUL: Binary = Binary(BinaryFunction::Mul);

/// Offsets of parameters are multiples of this many bytes, what a binding needs.
const ALIGNMENT: usize = 256;

struct Slot {
    name: String,
    dims: Vec<usize>,
    /// Byte offset in the flat buffers.
    offset: usize,
    filled: bool,
}

struct Group {
    slots: Vec<Slot>,
    parameters: Tensor,
    gradients: Tensor,
    first_moment: Tensor,
    /// Absent for SGD.
    second_moment: Option<Tensor>,
    mask: Option<Tensor>,
    weight_decay: f32,
}

pub struct Optimizer {
    groups: Vec<Group>,
    settings: Settings,
    loss_scale: Option<LossScale>,
    step: u64,
    device: Arc<dyn Device>,
}

impl Optimizer {
    /// Moves the f32 parameters that `trained` accepts into flat buffers; the model's tensors become views of them.
    pub fn new(model: &mut Model, settings: Settings, trained: impl Fn(&str) -> bool) -> Result<Self> {
        let device = model.device().clone();
        if device.info().kind == Kind::Reference {
            let reason = "it stores f64, flat parameter buffers are f32: train on cpu, wgpu or cuda".into();
            return Err(Error::NotAvailable { device: "reference".into(), reason });
        }
        let mut groups = Vec::new();
        for decayed in [true, false] {
            let wanted = |name: &str, tensor: &Tensor| {
                let matrix = tensor.dims().len() > 1;
                tensor.dtype() == DType::F32
                    && (matrix && !name.ends_with(".bias")) == decayed
                    && !name.contains(".router.")
                    && trained(name)
            };
            let names: Vec<String> =
                model.tensors.iter().filter(|(n, t)| wanted(n, t)).map(|(n, _)| n.clone()).collect();
            if !names.is_empty() {
                let decay = if decayed { settings.weight_decay } else { 0.0 };
                groups.push(Group::new(model, names, &device, decay, settings.rule)?);
            }
        }
        Ok(Self { groups, settings, loss_scale: LossScale::of(settings.precision), step: 0, device })
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.step
    }

    pub fn precision(&self) -> Precision {
        self.settings.precision
    }

    /// What the loss is multiplied by before gradients are taken; [`Optimizer::update`] takes it out again.
    pub fn loss_scale(&self) -> f32 {
        self.loss_scale.map_or(1.0, LossScale::factor)
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

    /// One update from the accumulated gradients, which are divided by `weight` (tokens or their weighted count) first.
    /// Returns the gradient norm before clipping; a gradient that is not finite changes nothing and is named. Under a loss
    /// scale such a step is passed over with a smaller scale, and its norm is given as 0.
    pub fn update(&mut self, weight: f64, total_steps: u64) -> Result<f64> {
        match self.squares()? {
            Some(squares) => self.apply(&squares, weight, total_steps),
            None => Ok(0.0),
        }
    }

    /// Sum of squares `[1]` of the accumulated gradients; `None` where nothing is trained.
    pub fn squares(&mut self) -> Result<Option<Tensor>> {
        let mut squares: Option<Tensor> = None;
        for group in &mut self.groups {
            group.clear_unfilled()?;
            // Gradients of pruned weights must not count in the norm that the kept ones are clipped by.
            if let Some(mask) = &group.mask {
                group.gradients = dispatch::run_one(&MUL, &[&group.gradients, mask])?;
            }
            let sum = Reduce { function: ReduceFunction::SumSquares, axis: Axis::All };
            let part = dispatch::run_one(&sum, &[&group.gradients])?.reshape(&[1])?;
            squares = Some(match squares {
                None => part,
                Some(sum) => dispatch::run_one(&ADD, &[&sum, &part])?,
            });
        }
        Ok(squares)
    }

    /// The update once the sum of squares of all gradients is known, those of other devices' parameters included.
    pub fn apply(&mut self, squares: &Tensor, weight: f64, total_steps: u64) -> Result<f64> {
        let step = self.step + 1;
        let scale = (1.0 / (weight.max(f64::MIN_POSITIVE) * f64::from(self.loss_scale()))) as f32;
        let norm = squares.to_f64()?.first().copied().unwrap_or(0.0).sqrt() * f64::from(scale);
        if !norm.is_finite() {
            if !self.loss_scale.as_mut().is_some_and(LossScale::shrink) {
                return Err(self.find_non_finite(step)?);
            }
            self.groups.iter_mut().flat_map(|g| &mut g.slots).for_each(|s| s.filled = false);
            self.step = step;
            return Ok(0.0);
        }
        if let Some(scale) = &mut self.loss_scale {
            scale.grow();
        }
        let factor = dispatch::run_one(&ClipFactor { max_norm: self.settings.clip, scale }, &[squares])?;
        let learning_rate = self.settings.schedule.rate(step, total_steps) as f32;
        for group in &mut self.groups {
            group.update(self.settings.rule, learning_rate, step, &factor)?;
            group.slots.iter_mut().for_each(|s| s.filled = false);
        }
        self.step = step;
        Ok(norm)
    }

    /// Learning rate of the step that `update` would do next.
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
            }
            if let Some(flat) = &group.mask {
                self.device.copy(mask.buffer(), mask.offset(), flat.buffer(), slot.offset, mask.meta().bytes())?;
            }
            return Ok(());
        }
        Err(Error::file("optimizer", name, "no trained parameter of this name to mask"))
    }

    /// Sums of this step's gradients, one flat tensor per group; two optimizers of the same parameters have the same layout.
    pub fn gradients(&mut self) -> Result<Vec<Tensor>> {
        self.groups.iter_mut().try_for_each(Group::clear_unfilled)?;
        Ok(self.groups.iter().map(|g| g.gradients.clone()).collect())
    }

    /// Everything a resumed run needs beside the parameters, by the parameters' names: however they are spread over
    /// optimizers then, each finds its own.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        if let Some(scale) = self.loss_scale {
            state.insert(LOSS_SCALE.to_string(), Tensor::from_slice(&self.device, &[2], &scale.words())?);
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
        if self.loss_scale.is_some()
            && let [factor, good] = take(LOSS_SCALE, &[2])?.to_vec::<f32>()?[..]
        {
            self.loss_scale = Some(LossScale::from_words([factor, good]));
        }
        self.step = step;
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
        weight_decay: f32,
        rule: Rule,
    ) -> Result<Self> {
        let mut slots = Vec::new();
        let mut end = 0;
        for name in names {
            let tensor = model.get(&name)?;
            slots.push(Slot { name, dims: tensor.dims().to_vec(), offset: end, filled: false });
            end += tensor.meta().bytes().div_ceil(ALIGNMENT) * ALIGNMENT;
        }
        // Zeros: the padding between parameters must stay harmless in norms and updates.
        let flat = || Tensor::zeros(device, Meta::new(&[end / 4], DType::F32)?);
        let parameters = flat()?;
        for slot in &slots {
            let tensor = model.get(&slot.name)?;
            device.copy(tensor.buffer(), tensor.offset(), parameters.buffer(), slot.offset, tensor.meta().bytes())?;
            model.tensors.insert(slot.name.clone(), view(&parameters, slot)?);
        }
        let second_moment = if matches!(rule, Rule::Adamw { .. }) { Some(flat()?) } else { None };
        Ok(Self {
            slots,
            parameters,
            gradients: flat()?,
            first_moment: flat()?,
            second_moment,
            mask: None,
            weight_decay,
        })
    }

    /// What a checkpoint keeps, by kind.
    fn kept(&self) -> Vec<(&'static str, &Tensor)> {
        let optional = [("second_moment", self.second_moment.as_ref()), (MASK, self.mask.as_ref())];
        let all = [("first_moment", Some(&self.first_moment))].into_iter().chain(optional);
        all.filter_map(|(kind, flat)| Some((kind, flat?))).collect()
    }

    fn clear_unfilled(&mut self) -> Result<()> {
        for slot in self.slots.iter().filter(|s| !s.filled) {
            let zeros = vec![0.0f32; slot.dims.iter().product()];
            view(&self.gradients, slot)?.upload(&zeros)?;
        }
        Ok(())
    }

    fn update(&mut self, rule: Rule, learning_rate: f32, step: u64, factor: &Tensor) -> Result<()> {
        let masked = self.mask.is_some();
        let weight_decay = self.weight_decay;
        let (p, g, m) = (&self.parameters, &self.gradients, &self.first_moment);
        match (rule, &self.second_moment) {
            (Rule::Adamw { beta1, beta2, epsilon }, Some(v)) => {
                let op = AdamW { learning_rate, beta1, beta2, epsilon, weight_decay, step: step as u32, masked };
                let inputs: Vec<&Tensor> = [p, g, m, v, factor].into_iter().chain(&self.mask).collect();
                dispatch::run(&op, &inputs)?;
            }
            (Rule::Sgd { momentum }, _) => {
                let op = Sgd { learning_rate, momentum, weight_decay, masked };
                let inputs: Vec<&Tensor> = [p, g, m, factor].into_iter().chain(&self.mask).collect();
                dispatch::run(&op, &inputs)?;
            }
            (Rule::Adamw { .. }, None) => return Err(Error::file("optimizer", "second_moment", "missing")),
        }
        Ok(())
    }
}
