//! A GPT's training step in burn, as its users write one: its modules, its autodiff, its AdamW.

use std::collections::BTreeMap;

use burn::backend::Autodiff;
use burn::module::{Module, Param, ParamId};
use burn::nn::activation::ActivationConfig;
use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig, generate_autoregressive_mask};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::transformer::{PositionWiseFeedForward, PositionWiseFeedForwardConfig};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear};
use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::{AdamW, AdamWConfig, GradientsParams, Optimizer};
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};

use crate::protocol::{Case, Work};
use crate::{input, number, read, wait};

/// Pre-norm.
#[derive(Module, Debug)]
struct Block<B: Backend> {
    norm_attention: LayerNorm<B>,
    attention: MultiHeadAttention<B>,
    norm_ffn: LayerNorm<B>,
    ffn: PositionWiseFeedForward<B>,
}

/// A decoder with learned positions, whose head is its embedding.
#[derive(Module, Debug)]
struct Gpt<B: Backend> {
    tokens: Embedding<B>,
    positions: Embedding<B>,
    blocks: Vec<Block<B>>,
    norm_final: LayerNorm<B>,
}

/// A weight where the model has it.
enum Weight<'a, B: Backend> {
    Table(&'a mut Param<Tensor<B, 2>>),
    /// The case has one row per output, burn one column.
    Linear(&'a mut Param<Tensor<B, 2>>),
    Vector(&'a mut Param<Tensor<B, 1>>),
}

/// A layer's weights, by the case's names.
type Pair<'a, B> = [(String, Weight<'a, B>); 2];

fn norm<'a, B: Backend>(name: &str, layer: &'a mut LayerNorm<B>) -> Pair<'a, B> {
    let shift = layer.beta.as_mut().expect("a bias");
    [(format!("{name}.weight"), Weight::Vector(&mut layer.gamma)), (format!("{name}.bias"), Weight::Vector(shift))]
}

fn linear<'a, B: Backend>(name: &str, layer: &'a mut Linear<B>) -> Pair<'a, B> {
    let bias = layer.bias.as_mut().expect("a bias");
    [(format!("{name}.weight"), Weight::Linear(&mut layer.weight)), (format!("{name}.bias"), Weight::Vector(bias))]
}

impl<B: Backend> Gpt<B> {
    /// Of the case's sizes.
    fn new(case: &Case, device: &B::Device) -> Self {
        let dims = |name: &str| case.inputs.iter().find(|t| t.name == name).map(|t| [t.dims[0], t.dims[1]]);
        let table = |name: &str| dims(name).expect("a table");
        let ([words, width], [length, _]) = (table("embedding.tokens"), table("embedding.positions"));
        let norm = || LayerNormConfig::new(width).init(device);
        let block = |[inner, _]: [usize; 2]| {
            let attention = MultiHeadAttentionConfig::new(width, number(case, "heads") as usize).with_dropout(0.0);
            let ffn = PositionWiseFeedForwardConfig::new(width, inner).with_dropout(0.0);
            Block {
                norm_attention: norm(),
                attention: attention.init(device),
                norm_ffn: norm(),
                ffn: ffn.with_activation(ActivationConfig::GeluApproximate).init(device),
            }
        };
        Self {
            tokens: EmbeddingConfig::new(words, width).init(device),
            positions: EmbeddingConfig::new(length, width).init(device),
            blocks: (0..).map_while(|i| dims(&format!("blocks.{i}.ffn.in.weight"))).map(block).collect(),
            norm_final: norm(),
        }
    }

    /// By the case's names.
    fn weights(&mut self) -> Vec<(String, Weight<'_, B>)> {
        let mut found = vec![
            ("embedding.tokens".into(), Weight::Table(&mut self.tokens.weight)),
            ("embedding.positions".into(), Weight::Table(&mut self.positions.weight)),
        ];
        for (i, Block { norm_attention, attention, norm_ffn, ffn }) in self.blocks.iter_mut().enumerate() {
            for (part, layer) in [("norm_attention", norm_attention), ("norm_ffn", norm_ffn)] {
                found.extend(norm(&format!("blocks.{i}.{part}"), layer));
            }
            let linears = [
                ("attention.query", &mut attention.query),
                ("attention.key", &mut attention.key),
                ("attention.value", &mut attention.value),
                ("attention.output", &mut attention.output),
                ("ffn.in", &mut ffn.linear_inner),
                ("ffn.out", &mut ffn.linear_outer),
            ];
            for (part, layer) in linears {
                found.extend(linear(&format!("blocks.{i}.{part}"), layer));
            }
        }
        found.extend(norm("norm_final", &mut self.norm_final));
        found
    }

    /// The mean cross-entropy.
    fn forward(&self, tokens: Tensor<B, 2, Int>, targets: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        let ([rows, length], device) = (tokens.dims(), tokens.device());
        let positions = Tensor::arange(0..length as i64, &device).unsqueeze::<2>();
        let mut x = self.tokens.forward(tokens) + self.positions.forward(positions);
        let mask = generate_autoregressive_mask::<B>(rows, length, &device);
        for Block { norm_attention, attention, norm_ffn, ffn } in &self.blocks {
            let normed = MhaInput::self_attn(norm_attention.forward(x.clone())).mask_attn(mask.clone());
            x = x + attention.forward(normed).context;
            x = x.clone() + ffn.forward(norm_ffn.forward(x));
        }
        let hidden: Tensor<B, 2> = self.norm_final.forward(x).flatten(0, 1);
        let logits = hidden.matmul(self.tokens.weight.val().transpose());
        CrossEntropyLossConfig::new().init(&device).forward(logits, targets)
    }
}

type Model<B> = Gpt<Autodiff<B>>;
type Optimizing<B> = OptimizerAdaptor<AdamW, Model<B>, Autodiff<B>>;

struct Training<B: Backend> {
    /// Always there between steps.
    model: Option<Model<B>>,
    /// Of `matrices`, which decay, and of the rest: an optimizer has one rate of decay.
    optimizers: [Optimizing<B>; 2],
    matrices: Vec<ParamId>,
    tokens: Tensor<Autodiff<B>, 2, Int>,
    targets: Tensor<Autodiff<B>, 1, Int>,
    rate: f64,
    loss: Option<Tensor<B, 1>>,
}

fn ids<B: Backend, const D: usize>(case: &Case, bytes: &[Vec<u8>], name: &str) -> Tensor<B, D, Int> {
    let index = place(case, name);
    let values = bytes[index].chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let data = TensorData::new(values.collect::<Vec<_>>(), case.inputs[index].dims.clone());
    Tensor::from_data(data, &B::Device::default())
}

fn place(case: &Case, name: &str) -> usize {
    case.inputs.iter().position(|t| t.name == name).expect("an input of that name")
}

impl<B: Backend> Training<B> {
    fn new(case: &Case, bytes: &[Vec<u8>]) -> Self {
        let device = B::Device::default();
        let (mut model, mut matrices) = (Model::<B>::new(case, &device), Vec::new());
        for (name, weight) in model.weights() {
            let index = place(case, &name);
            match weight {
                Weight::Table(param) => {
                    *param = Param::from_tensor(input(case, bytes, index));
                    matrices.push(param.id);
                }
                Weight::Linear(param) => {
                    let turned: Tensor<B, 2> = input::<B, 2>(case, bytes, index).transpose();
                    // Packed, as burn's own initialization has it.
                    *param = Param::from_tensor(Tensor::from_data(turned.to_data(), &device));
                    matrices.push(param.id);
                }
                Weight::Vector(param) => *param = Param::from_tensor(input(case, bytes, index)),
            }
        }
        let epsilon = number(case, "epsilon") as f32;
        let optimizer = |decay: f64| {
            let config = AdamWConfig::new().with_beta_1(0.9).with_beta_2(0.999).with_epsilon(epsilon);
            config.with_weight_decay(decay as f32).init()
        };
        Self {
            model: Some(model),
            optimizers: [optimizer(number(case, "decay")), optimizer(0.0)],
            matrices,
            tokens: ids(case, bytes, "tokens"),
            targets: ids(case, bytes, "targets"),
            rate: number(case, "rate"),
            loss: None,
        }
    }

    fn step(&mut self) {
        let mut model = self.model.take().expect("a model");
        let loss = model.forward(self.tokens.clone(), self.targets.clone());
        let mut gradients = loss.backward();
        let matrices = GradientsParams::from_params(&mut gradients, &model, &self.matrices);
        let rest = GradientsParams::from_module(&mut gradients, &model);
        for (optimizer, gradients) in self.optimizers.iter_mut().zip([matrices, rest]) {
            model = optimizer.step(self.rate, model, gradients);
        }
        (self.model, self.loss) = (Some(model), Some(loss.inner()));
    }
}

pub struct Step<B: Backend> {
    case: Case,
    slots: Vec<Option<Training<B>>>,
    device: B::Device,
}

/// Of a case in f32.
pub fn open<B: Backend>(case: &Case, slots: usize) -> Option<Box<dyn Work>> {
    let slots = (0..slots).map(|_| None).collect();
    let step = Step::<B> { case: case.clone(), slots, device: Default::default() };
    case.params.contains("compute:f32").then(|| Box::new(step) as Box<dyn Work>)
}

impl<B: Backend> Work for Step<B> {
    fn fill(&mut self, slot: usize, inputs: Vec<Vec<u8>>) {
        // Before anything new is taken.
        self.slots[slot] = None;
        self.slots[slot] = Some(Training::new(&self.case, &inputs));
        wait::<B>(&self.device);
    }

    fn run(&mut self, slot: usize) {
        self.slots[slot].as_mut().expect("a filled slot").step();
        wait::<B>(&self.device);
    }

    fn read(&self, slot: usize) -> Vec<Vec<u8>> {
        let training = self.slots[slot].as_ref().expect("a filled slot");
        let mut model = training.model.clone().expect("a model");
        let by_name = model.weights().into_iter().map(|(name, weight)| {
            let values = match weight {
                Weight::Table(param) => read(&param.val()),
                Weight::Linear(param) => read(&param.val().transpose()),
                Weight::Vector(param) => read(&param.val()),
            };
            (name, values)
        });
        let mut weights: BTreeMap<String, Vec<u8>> = by_name.collect();
        let loss = training.loss.as_ref().map_or(vec![0xFF; 4], read);
        let names = self.case.inputs.iter().filter_map(|meta| weights.remove(&meta.name));
        std::iter::once(loss).chain(names).collect()
    }

    fn kernel(&self) -> String {
        "nn modules, Autodiff, one AdamW of what decays and one of the rest".into()
    }

    fn outputs(&self) -> Vec<usize> {
        (0..self.case.inputs.len() - 1).collect()
    }
}
