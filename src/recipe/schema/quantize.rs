//! `[quantize]`: weights and inputs of linears on a grid.

use serde::{Deserialize, Serialize};

use super::{Distil, Recipe, Training, default_calibration};
use crate::compress::quantization::calibrate::{AVERAGING, Calibrator};
use crate::compress::quantization::{Activations, BitSchedule, Format, Levels, Phase};
use crate::compress::written;
use crate::error::{Error, Result};
use crate::recipe::check::{MAX_CALIBRATION, refuse};
use crate::recipe::order::Step;

/// How the grid comes about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Training under the rounding.
    #[default]
    Qat,
    /// Weights rounded as they are, inputs by each token's range.
    Dynamic,
    /// As dynamic, but inputs by steps calibrated on training text.
    Static,
    /// As static, calibrated on made-up text.
    DataFree,
    Gptq,
    Awq,
    /// Weights rounded as they are, inputs in floating point.
    WeightOnly,
}

/// Where an input's step comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Observer {
    /// Each token has its own.
    Token,
    MinMax,
    /// Under training: follows the inputs until the last quarter of the steps.
    MovingAverage,
    Percentile,
    Entropy,
    Mse,
    /// Inputs stay in floating point.
    None,
}

/// Text that calibration runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Inputs {
    Data,
    /// Uniformly drawn tokens.
    Random,
    /// What the model says to random beginnings.
    SelfGenerated,
}

/// Weights that share a step where inputs stay in floating point (torchao's int4).
const GROUP: usize = 32;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantize {
    #[serde(default)]
    pub method: Method,
    /// Of a weight, 2 to 8. Inputs have 8.
    #[serde(default = "eight")]
    pub bits: u32,
    #[serde(default)]
    pub levels: Levels,
    /// Weights along the input that share a step, 0 for a whole output channel; without it 32 where inputs stay in floating
    /// point and 0 where they do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<usize>,
    /// Without it: token, min_max for the static methods, none for gptq, awq and weight_only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observer: Option<Observer>,
    /// Steps of the weights, and of inputs that have one, are trained (LSQ).
    #[serde(default)]
    pub learned_steps: bool,
    /// SmoothQuant's alpha: how much of the inputs' range the weights take over first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smooth: Option<f64>,
    /// More bits at first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<BitSchedule>,
    /// Without it: data, and random for data_free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inputs: Option<Inputs>,
    #[serde(default = "default_calibration")]
    pub calibration_batches: usize,
    #[serde(default)]
    pub distil: Distil,
    /// Of `qat`, and only of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<Training>,
}

fn eight() -> u32 {
    8
}

impl Quantize {
    /// The key, with its value, by which it asks what blocks see, one after the other.
    pub(in crate::recipe) fn walks_blocks(&self) -> Option<(&'static str, String)> {
        if !matches!(self.method, Method::Qat | Method::Dynamic | Method::WeightOnly) {
            return Some(("quantize.method", written(&self.method)));
        }
        let smooth = self.smooth.map(|alpha| ("quantize.smooth", alpha.to_string()));
        smooth.or_else(|| self.calibrator().map(|_| ("quantize.observer", written(&self.observer()))))
    }

    pub fn observer(&self) -> Observer {
        self.observer.unwrap_or(match self.method {
            Method::Qat | Method::Dynamic => Observer::Token,
            Method::Static | Method::DataFree => Observer::MinMax,
            Method::Gptq | Method::Awq | Method::WeightOnly => Observer::None,
        })
    }

    /// What the observer calibrates with; none for tokens and floats.
    pub fn calibrator(&self) -> Option<Calibrator> {
        match self.observer() {
            Observer::Token | Observer::None => None,
            Observer::MinMax => Some(Calibrator::MinMax),
            Observer::MovingAverage => Some(Calibrator::MovingAverage),
            Observer::Percentile => Some(Calibrator::Percentile),
            Observer::Entropy => Some(Calibrator::Entropy),
            Observer::Mse => Some(Calibrator::Mse),
        }
    }

    pub fn inputs(&self) -> Inputs {
        self.inputs.unwrap_or(if self.method == Method::DataFree { Inputs::Random } else { Inputs::Data })
    }

    pub fn format(&self) -> Format {
        let activations = match self.observer() {
            Observer::Token => Activations::Token,
            Observer::None => Activations::Float,
            _ => Activations::Static,
        };
        let group = self.groups.unwrap_or(if activations == Activations::Float { GROUP } else { 0 });
        Format { bits: self.bits, levels: self.levels, group, activations }
    }

    /// Of a training of so many steps.
    pub fn phase(&self, steps: u64) -> Phase {
        let tracks = self.observer() == Observer::MovingAverage && !self.learned_steps;
        let tracking = if tracks { AVERAGING as f32 } else { 0.0 };
        Phase { steps, learned: self.learned_steps, tracking, bits: self.schedule }
    }

    /// Whether steps of weights stand beside them from this stage on.
    fn leaves_steps(&self) -> bool {
        self.learned_steps || matches!(self.method, Method::Gptq | Method::Awq)
    }

    pub(in crate::recipe) fn check(&self, recipe: &Recipe) -> Result<()> {
        self.check_method()?;
        self.format().check().map_err(|e| match e {
            Error::Parameter { parameter, value, allowed, .. } => {
                let key = if parameter == "bits" { "quantize.bits" } else { "quantize.groups" };
                Error::Recipe { key: key.into(), value, allowed: allowed.into() }
            }
            other => other,
        })?;
        if let Some(alpha) = self.smooth.filter(|a| !(0.0..=1.0).contains(a)) {
            return refuse("quantize.smooth", alpha, "0 to 1");
        }
        if self.calibration_batches == 0 || self.calibration_batches > MAX_CALIBRATION {
            return refuse("quantize.calibration_batches", self.calibration_batches, "1 to 100000");
        }
        self.check_neighbours(recipe)?;
        self.distil.check("quantize.distil")
    }

    fn check_method(&self) -> Result<()> {
        let name = written(&self.method);
        let qat = self.method == Method::Qat;
        match &self.training {
            Some(training) if qat => training.check("quantize.training")?,
            None if qat => return refuse("quantize.training", "nothing", "a table: qat trains"),
            Some(_) => {
                let allowed = format!("nothing: {name} does not train (--set quantize.training=false leaves it out)");
                return refuse("quantize.training", "a table", allowed);
            }
            None => {}
        }
        let observer = self.observer();
        let fits = match self.method {
            Method::Dynamic => observer == Observer::Token,
            Method::Static | Method::DataFree => self.calibrator().is_some(),
            Method::WeightOnly => observer == Observer::None,
            _ => true,
        };
        if !fits {
            let allowed = "token for dynamic; min_max, moving_average, percentile, entropy or mse for static and data_free; none for weight_only";
            return refuse("quantize.observer", format!("{} with {name}", written(&observer)), allowed);
        }
        let uniform = self.levels == Levels::Uniform;
        if self.learned_steps && !(qat && uniform) {
            return refuse("quantize.learned_steps", true, "false, but for qat with uniform levels");
        }
        if !uniform && matches!(self.method, Method::Gptq | Method::Awq) {
            return refuse("quantize.levels", written(&self.levels), format!("uniform for {name}"));
        }
        if let Some(schedule) = &self.schedule {
            let steps = self.training.as_ref().map_or(0, |t| t.steps);
            if !qat || !uniform {
                return refuse("quantize.schedule", written(schedule), "only for qat with uniform levels");
            }
            schedule.check(self.bits, steps).map_err(|e| match e {
                Error::Parameter { parameter, value, allowed, .. } => {
                    Error::Recipe { key: format!("quantize.schedule.{parameter}"), value, allowed: allowed.into() }
                }
                other => other,
            })?;
        }
        if self.method == Method::DataFree && self.inputs() == Inputs::Data {
            return refuse("quantize.inputs", "data", "random or self_generated for data_free");
        }
        Ok(())
    }

    /// What stages before and after ask for.
    fn check_neighbours(&self, recipe: &Recipe) -> Result<()> {
        let steps = recipe.steps();
        let place = |step: Step| steps.iter().position(|s| *s == step);
        let before = |step: Step| place(Step::Quantize) < place(step);
        let beside = self.leaves_steps() || self.smooth.is_some() || self.calibrator().is_some();
        if before(Step::Structure) && beside {
            let allowed = "structure before quantize: steps and factors belong to the tensors that it cuts";
            return refuse("order", "quantize before structure", allowed);
        }
        let group = self.format().group;
        let mut widths = Vec::new();
        let teacher = recipe.model.size();
        let width = teacher.heads * teacher.head_size;
        for (size, width) in [(teacher, width), (recipe.smallest(), recipe.smallest_width())] {
            widths.extend([width, size.heads * size.head_size, size.ffn_width]);
        }
        if let Some(experts) = recipe.experts.as_ref().filter(|_| before(Step::Experts)) {
            widths.push(experts.expert_size);
            let beside = [
                (self.smooth.is_some(), "quantize.smooth".to_string()),
                (self.method == Method::Awq, "quantize.method = \"awq\"".into()),
                (self.leaves_steps() && group > 0, format!("quantize.groups = {group}, set or by default")),
            ];
            if let Some((_, what)) = beside.iter().find(|(there, _)| *there) {
                let allowed = "experts after quantize without smooth, awq and steps of groups, as they share and reorder what these stand beside (groups = 0: a step per channel)";
                return refuse("experts", format!("after {what}"), allowed);
            }
        }
        // The teacher's own widths count only where it is quantized before it is cut.
        let relevant = if before(Step::Structure) || recipe.structure.is_none() { &widths[..] } else { &widths[3..] };
        if let Some(width) = relevant.iter().find(|w| group > 0 && !w.is_multiple_of(group)) {
            return refuse(
                "quantize.groups",
                group,
                format!("a divisor of the inputs of every linear, {width} of some"),
            );
        }
        if recipe.pipeline.is_some() && self.schedule.is_some() {
            let allowed = "absent with [pipeline]: validation would not know the stages' bits";
            return refuse("quantize.schedule", "a schedule of bits", allowed);
        }
        if recipe.pipeline.is_some() && self.observer() == Observer::MovingAverage && self.method == Method::Qat {
            let allowed = "another one with [pipeline]: a stage's replicas would follow different inputs";
            return refuse("quantize.observer", "moving_average", allowed);
        }
        Ok(())
    }
}
