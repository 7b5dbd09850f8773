//! Whole models among the cases that libraries are compared on, built and run as a user's are: a training step, an encoder, an int8
//! FFN. Inputs are weights by name, in the order of [`Config::parameters`], then what one batch holds. Only
//! `kernels bench --serve` runs them, for a judge (`benches/peers/cpu`) who has their references.

use std::sync::Arc;

use crate::compress::freeze::{self, Form};
use crate::compress::quantization::Format;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::config::Size;
use crate::nn::{Activation, Batch, Config, Model, Pass, Positions};
use crate::op::{Fill, Input};
use crate::rng::Stream;
use crate::shape::{Meta, Shape};
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::lifecycle::Micro;
use crate::train::optimizer::{Optimizer, Rule, Settings};
use crate::train::precision::Precision;
use crate::train::schedule::{self, Schedule};
use crate::train::trainer;

/// What is done with a model.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Task {
    /// Loss, gradients and the first update of AdamW from fresh moments.
    Step(Precision),
    /// Logits of a tagger.
    Encoder { int8: bool },
    /// The FFN of one block, int8.
    Ffn,
}

/// A model, what is done with it, and on how much.
pub struct Whole {
    /// For people.
    pub name: String,
    pub op: &'static str,
    pub params: String,
    /// What products are computed in.
    pub dtype: DType,
    pub inputs: Vec<(String, Input)>,
    pub outputs: Vec<Meta>,
    pub flops: u64,
    pub bytes: u64,
    config: Config,
    task: Task,
}

/// One set of memory that runs on one set of inputs after the other.
pub trait Side {
    /// Other inputs, and no results.
    fn fill(&mut self, inputs: &[Vec<u8>]) -> Result<()>;
    fn run(&mut self) -> Result<()>;
    fn read(&self) -> Result<Vec<Vec<u8>>>;
}

/// The peak rate is large so that an update is far above the rounding of the weight that it is added to; epsilon is about the
/// size of the gradients, so that the first update, g / (|g| + epsilon), says how large they are and not their sign alone.
const RATE: f64 = 1e-2;
const EPSILON: f32 = 1e-3;
const DECAY: f32 = 0.1;

/// Of the linears' weights that an encoder keeps, in fours along the input: what the int8 kernels skip.
const KEPT: f64 = 0.1;

/// Every case; the dense encoder behind the one that is held against it.
pub fn cases() -> Result<Vec<Whole>> {
    let steps = [(256, 4, 4096, [4, 128]), (384, 6, 8192, [2, 256])];
    let mut cases = Vec::new();
    for precision in [Precision::F32, Precision::Bf16] {
        for (width, layers, vocabulary, rows) in steps {
            cases.push(step(width, layers, vocabulary, rows, precision)?);
        }
    }
    for rows in [1, 4, 8] {
        cases.push(encoder(rows, true)?);
        cases.push(encoder(rows, false)?);
    }
    for activation in [Activation::Relu, Activation::Gelu] {
        for rows in [128, 512] {
            cases.push(ffn(rows, activation)?);
        }
    }
    Ok(cases)
}

fn size(width: usize, layers: usize, positions: usize) -> Size {
    Size { layers, heads: width / 64, head_size: 64, ffn_width: 4 * width, max_positions: positions }
}

fn meta(dims: &[usize], dtype: DType) -> Result<Meta> {
    Meta::new(dims, dtype)
}

/// Weights of about the size that a trained model's have; norms near 1.
fn weights(config: &Config, matrix: &Fill) -> Result<Vec<(String, Input)>> {
    let linears = config.all_linears();
    let input = |(name, dims): (String, Vec<usize>)| {
        let layer = name.strip_suffix(".weight");
        let fill = match layer {
            Some(layer) if layer.contains("norm") => Fill::Normal { mean: 1.0, deviation: 0.1 },
            Some(layer) if linears.iter().any(|linear| linear == layer) => matrix.clone(),
            _ => Fill::Normal { mean: 0.0, deviation: 0.05 },
        };
        Ok((name, Input { meta: meta(&dims, DType::F32)?, fill }))
    };
    config.parameters().into_iter().map(input).collect()
}

fn ids(name: &str, dims: &[usize], below: usize) -> Result<(String, Input)> {
    let fill = Fill::Integers { low: 0, high: below as i64 - 1 };
    Ok((name.into(), Input { meta: meta(dims, DType::U32)?, fill }))
}

/// Elements of the weights of all linears.
fn linear_weights(config: &Config) -> usize {
    let linears = config.all_linears();
    let own = |name: &str| name.strip_suffix(".weight").is_some_and(|layer| linears.iter().any(|l| l == layer));
    let all = config.parameters().into_iter().filter(|(name, _)| own(name));
    all.map(|(_, dims)| dims.iter().product::<usize>()).sum()
}

fn step(
    width: usize,
    layers: usize,
    vocabulary: usize,
    [rows, tokens]: [usize; 2],
    precision: Precision,
) -> Result<Whole> {
    let mut config = Config::gpt(size(width, layers, tokens), vocabulary);
    // As the other libraries' examples of a GPT have them.
    config.positions = Positions::Learned;
    config.blocks.iter_mut().for_each(|block| block.inverse_frequencies.clear());
    let dtype = precision.compute().unwrap_or(DType::F32);
    let mut inputs = weights(&config, &Fill::Normal { mean: 0.0, deviation: 0.05 })?;
    let mut outputs = vec![meta(&[1], DType::F32)?];
    outputs.extend(inputs.iter().map(|(_, input)| input.meta));
    let parameters: usize = inputs.iter().map(|(_, input)| input.meta.count()).sum();
    inputs.push(ids("tokens", &[rows, tokens], vocabulary)?);
    inputs.push(ids("targets", &[rows * tokens], vocabulary)?);
    let size = format!("d{width} L{layers} V{vocabulary} T{tokens} B{rows}");
    let heads = config.blocks[0].heads;
    // Forward, and twice that backward; of the causal scores those that count.
    let products = rows * tokens * (linear_weights(&config) + vocabulary * width);
    let attended = layers * rows * tokens * tokens.div_ceil(2) * width * 2;
    Ok(Whole {
        name: format!("GPT step {size} {dtype}"),
        op: "training_step",
        params: format!("Step{{heads:{heads},rate:{RATE},epsilon:{EPSILON},decay:{DECAY},compute:{dtype}}} {size}"),
        dtype,
        inputs,
        outputs,
        flops: 6 * (products + attended) as u64,
        // Weights, gradients and moments, each read and written once.
        bytes: 8 * 4 * parameters as u64,
        config,
        task: Task::Step(precision),
    })
}

/// A third of BERT-base: its widths, four of its blocks, a vocabulary that leaves the time to the blocks.
fn encoder(rows: usize, int8: bool) -> Result<Whole> {
    let (width, layers, tokens, vocabulary) = (768, 4, 128, 8192);
    let labels = (0..9).map(|i| format!("L{i}")).collect::<Vec<_>>();
    let config = Config::bert_tagger(size(width, layers, tokens), vocabulary, labels);
    let mut inputs = weights(&config, &Fill::Custom(fours))?;
    inputs.push(ids("tokens", &[rows, tokens], vocabulary)?);
    let (heads, linears) = (config.blocks[0].heads, linear_weights(&config));
    let size = format!("d{width} L{layers} S{tokens} B{rows}");
    let share = if int8 { KEPT } else { 1.0 };
    let multiplied = rows * tokens * (share * linears as f64) as usize;
    // Of those kept one byte, and of all fours one bit.
    let stored = if int8 { linears / 10 + linears / 32 } else { 4 * linears };
    Ok(Whole {
        name: if int8 { format!("encoder {size} 90 % zeros int8") } else { format!("encoder {size} f32") },
        op: if int8 { "encoder_int8" } else { "encoder" },
        params: format!("Encoder{{heads:{heads}}} {size}"),
        dtype: if int8 { DType::I8 } else { DType::F32 },
        inputs,
        outputs: vec![meta(&[rows, tokens, 9], DType::F32)?],
        flops: 2 * (multiplied + 2 * layers * rows * tokens * tokens * width) as u64,
        bytes: stored as u64,
        config,
        task: Task::Encoder { int8 },
    })
}

/// Normal values, of which whole fours are kept.
fn fours(seed: u64, shape: &Shape) -> Vec<f64> {
    let (mut keep, mut values) = (Stream::new(seed, 0), Stream::new(seed, 1));
    let four = |_| {
        let kept = keep.uniform() < KEPT;
        [(); 4].map(|()| if kept { 0.15 * values.normal() } else { 0.0 })
    };
    (0..shape.count().div_ceil(4)).flat_map(four).take(shape.count()).collect()
}

fn ffn(rows: usize, activation: Activation) -> Result<Whole> {
    let mut config = Config::bert_tagger(size(768, 1, 1), 1, Vec::new());
    let block = &mut config.blocks[0];
    block.activation = activation;
    let (inner, width) = (block.ffn_width, config.width);
    let mut inputs = weights(&config, &Fill::Normal { mean: 0.0, deviation: 0.05 })?;
    inputs.retain(|(name, _)| name.contains(".ffn."));
    inputs.push(("x".into(), Input { meta: meta(&[rows, width], DType::F32)?, fill: Fill::NORMAL }));
    let kind = if activation == Activation::Relu { "relu" } else { "gelu" };
    let size = format!("{rows} x {width} x {inner} {kind}");
    Ok(Whole {
        name: format!("int8 FFN {size}"),
        op: "ffn_int8",
        params: format!("Ffn{{activation:{kind}}} {size}"),
        dtype: DType::I8,
        inputs,
        outputs: vec![meta(&[rows, width], DType::F32)?],
        flops: 4 * (rows * width * inner) as u64,
        bytes: (2 * width * inner + 8 * rows * width) as u64,
        config,
        task: Task::Ffn,
    })
}

impl Whole {
    pub fn side<'a>(&'a self, device: &Arc<dyn Device>) -> Box<dyn Side + 'a> {
        match self.task {
            Task::Step(precision) => {
                let schedule = Schedule { peak: RATE, warmup: 0, shape: schedule::Shape::Constant };
                let rule = Rule::Adamw { beta1: 0.9, beta2: 0.999, epsilon: EPSILON };
                let settings = Settings { schedule, rule, weight_decay: DECAY, clip: 0.0, precision };
                Box::new(Step { whole: self, device: device.clone(), settings, training: None })
            }
            Task::Encoder { .. } | Task::Ffn => {
                Box::new(Inference { whole: self, device: device.clone(), loaded: None, result: None })
            }
        }
    }

    /// What deployment makes of the weights: integers per output channel, and without the zeros where there are many.
    fn deployed(&self, model: Model) -> Result<Model> {
        if self.dtype != DType::I8 {
            return Ok(model);
        }
        let form = Form { sparse: false, quantized: Some(Format::default()) };
        freeze::deployable(&model, form)
    }

    /// Tensors by name; the last ones are no weights.
    fn tensors(&self, device: &Arc<dyn Device>, inputs: &[Vec<u8>]) -> Result<Vec<(String, Tensor)>> {
        let tensor = |((name, input), bytes): (&(String, Input), &Vec<u8>)| {
            Ok((name.clone(), Tensor::from_bytes(device, input.meta, bytes)?))
        };
        self.inputs.iter().zip(inputs).map(tensor).collect()
    }
}

fn batch(tokens: Tensor) -> Result<Batch> {
    let [rows, length] = tokens.dims()[..] else {
        return Err(Error::Shape { op: "batch", rule: "[B, T]", got: tokens.meta().to_string() });
    };
    let positions: Vec<u32> = (0..rows).flat_map(|_| 0..length as u32).collect();
    let positions = Tensor::from_slice(tokens.device(), tokens.dims(), &positions)?;
    Ok(Batch { tokens, positions, block_positions: None, context: None, lengths: None, source: None })
}

struct Step<'a> {
    whole: &'a Whole,
    device: Arc<dyn Device>,
    settings: Settings,
    training: Option<Training>,
}

struct Training {
    model: Model,
    optimizer: Optimizer,
    micro: Micro,
    /// NaN until a step was taken.
    loss: f32,
}

impl Side for Step<'_> {
    fn fill(&mut self, inputs: &[Vec<u8>]) -> Result<()> {
        // Before anything new is taken.
        self.training = None;
        let mut tensors = self.whole.tensors(&self.device, inputs)?;
        let (Some((_, targets)), Some((_, tokens))) = (tensors.pop(), tensors.pop()) else { return Ok(()) };
        let count = targets.count();
        let micro = Micro {
            batch: batch(tokens)?,
            targets,
            weights: Tensor::from_slice(&self.device, &[count], &vec![1.0f32; count])?,
            weight: count as f64,
            gold: true,
            tokens: count,
            teacher: None,
        };
        let mut model = Model::new(self.whole.config.clone(), tensors.into_iter().collect(), &self.device)?;
        let optimizer = Optimizer::new(&mut model, self.settings, |_| true)?;
        self.training = Some(Training { model, optimizer, micro, loss: f32::NAN });
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        let Some(Training { model, optimizer, micro, loss }) = &mut self.training else { return Ok(()) };
        let (mean, _) = trainer::step(model, optimizer, std::slice::from_ref(micro), &[], (0.0, 0, 1))?;
        *loss = mean as f32;
        Ok(())
    }

    fn read(&self) -> Result<Vec<Vec<u8>>> {
        let Some(Training { model, loss, .. }) = &self.training else { return Ok(Vec::new()) };
        let mut results = vec![loss.to_le_bytes().to_vec()];
        for (name, _) in self.whole.config.parameters() {
            results.push(model.get(&name)?.to_bytes()?);
        }
        Ok(results)
    }
}

struct Inference<'a> {
    whole: &'a Whole,
    device: Arc<dyn Device>,
    loaded: Option<(Model, Given)>,
    result: Option<Tensor>,
}

/// What a model is given.
enum Given {
    Tokens(Box<Batch>),
    Rows(Tensor),
}

impl Side for Inference<'_> {
    fn fill(&mut self, inputs: &[Vec<u8>]) -> Result<()> {
        (self.loaded, self.result) = (None, None);
        let mut tensors = self.whole.tensors(&self.device, inputs)?;
        let Some((_, last)) = tensors.pop() else { return Ok(()) };
        let given =
            if self.whole.task == Task::Ffn { Given::Rows(last) } else { Given::Tokens(Box::new(batch(last)?)) };
        let model = Model::new(self.whole.config.clone(), tensors.into_iter().collect(), &self.device)?;
        self.loaded = Some((self.whole.deployed(model)?, given));
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        let Some((model, given)) = &self.loaded else { return Ok(()) };
        let mut pass = Pass::inference(model);
        let y = match given {
            Given::Tokens(batch) => {
                let hidden = pass.hidden(batch)?;
                pass.logits(&hidden)?
            }
            Given::Rows(x) => pass.ffn(0, &Var::constant(x.clone()))?,
        };
        self.result = Some(y.tensor);
        Ok(())
    }

    fn read(&self) -> Result<Vec<Vec<u8>>> {
        self.result.iter().map(Tensor::to_bytes).collect()
    }
}
