//! A GPT's training step in candle, as its users write one: its modules' differentiable forms, its AdamW.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Embedding, Linear, Module, Optimizer, ParamsAdamW, loss, ops};

use crate::protocol::{self, Case, Work};

/// Numbers of the case: `Step{heads:4,rate:0.01,epsilon:0.001,decay:0.1,compute:f32}`.
#[derive(Clone, Copy)]
struct Settings {
    heads: usize,
    rate: f64,
    epsilon: f64,
    decay: f64,
}

pub struct Step {
    metas: Vec<protocol::Tensor>,
    settings: Settings,
    slots: Vec<Option<Training>>,
}

struct Training {
    weights: BTreeMap<String, Var>,
    /// Of matrices, which decay, and of the rest.
    optimizers: [AdamW; 2],
    tokens: Tensor,
    targets: Tensor,
    heads: usize,
    loss: Option<Tensor>,
}

/// Of a case in f32.
pub fn open(case: &Case, slots: usize) -> Option<Box<dyn Work>> {
    let field = |name: &str| -> Option<&str> {
        let start = case.params.find(&format!("{name}:"))? + name.len() + 1;
        case.params[start..].split([',', '}']).next()
    };
    let number = |name: &str| field(name)?.parse::<f64>().ok();
    let settings = Settings {
        heads: field("heads")?.parse().ok()?,
        rate: number("rate")?,
        epsilon: number("epsilon")?,
        decay: number("decay")?,
    };
    let slots = (0..slots).map(|_| None).collect();
    (field("compute")? == "f32")
        .then(|| Box::new(Step { metas: case.inputs.clone(), settings, slots }) as Box<dyn Work>)
}

impl Training {
    fn new(metas: &[protocol::Tensor], inputs: &[Vec<u8>], settings: Settings) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (meta, bytes) in metas.iter().zip(inputs) {
            let dtype = if meta.dtype == "u32" { DType::U32 } else { DType::F32 };
            tensors.insert(meta.name.clone(), Tensor::from_raw_buffer(bytes, dtype, &meta.dims, &Device::Cpu)?);
        }
        let mut take = |name: &str| tensors.remove(name).expect("a batch");
        let (tokens, targets) = (take("tokens"), take("targets"));
        let weights: BTreeMap<String, Var> =
            tensors.into_iter().map(|(name, t)| Ok((name, Var::from_tensor(&t)?))).collect::<Result<_>>()?;
        let optimizer = |decays: bool| {
            let own = weights.values().filter(|w| (w.dims().len() > 1) == decays).cloned().collect();
            let weight_decay = if decays { settings.decay } else { 0.0 };
            AdamW::new(
                own,
                ParamsAdamW { lr: settings.rate, beta1: 0.9, beta2: 0.999, eps: settings.epsilon, weight_decay },
            )
        };
        let optimizers = [optimizer(true)?, optimizer(false)?];
        Ok(Self { weights, optimizers, tokens, targets, heads: settings.heads, loss: None })
    }

    fn weight(&self, name: &str) -> &Tensor {
        &self.weights[name]
    }

    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let bias = self.weight(&format!("{name}.bias")).clone();
        Linear::new(self.weight(&format!("{name}.weight")).clone(), Some(bias)).forward(x)
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm_slow(x, self.weight(&format!("{name}.weight")), self.weight(&format!("{name}.bias")), 1e-5)
    }

    fn attention(&self, name: &str, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (rows, length, width) = x.dims3()?;
        let size = width / self.heads;
        let split = |part: &str| -> Result<Tensor> {
            let y = self.linear(&format!("{name}.{part}"), x)?;
            y.reshape((rows, length, self.heads, size))?.transpose(1, 2)?.contiguous()
        };
        let (q, k, v) = (split("query")?, split("key")?, split("value")?);
        let scores = (q.matmul(&k.t()?)? / (size as f64).sqrt())?.broadcast_add(mask)?;
        let y = ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        self.linear(&format!("{name}.output"), &y.transpose(1, 2)?.reshape((rows, length, width))?)
    }

    fn forward(&self) -> Result<Tensor> {
        let (_, length) = self.tokens.dims2()?;
        let table = self.weight("embedding.tokens");
        let width = table.dim(1)?;
        let embedded = Embedding::new(table.clone(), width).forward(&self.tokens)?;
        let positions = self.weight("embedding.positions").narrow(0, 0, length)?;
        let mut x = embedded.broadcast_add(&positions)?;
        let mask: Vec<f32> =
            (0..length * length).map(|at| if at % length > at / length { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (length, length), &Device::Cpu)?;
        for i in (0..).take_while(|i| self.weights.contains_key(&format!("blocks.{i}.ffn.in.weight"))) {
            let normed = self.norm(&format!("blocks.{i}.norm_attention"), &x)?;
            x = (&x + self.attention(&format!("blocks.{i}.attention"), &normed, &mask)?)?;
            let normed = self.norm(&format!("blocks.{i}.norm_ffn"), &x)?;
            let hidden = self.linear(&format!("blocks.{i}.ffn.in"), &normed)?.gelu()?;
            x = (&x + self.linear(&format!("blocks.{i}.ffn.out"), &hidden)?)?;
        }
        let hidden = self.norm("norm_final", &x)?.reshape(((), width))?;
        loss::cross_entropy(&hidden.matmul(&table.t()?)?, &self.targets)
    }

    fn step(&mut self) -> Result<()> {
        let loss = self.forward()?;
        let gradients = loss.backward()?;
        self.optimizers.iter_mut().try_for_each(|optimizer| optimizer.step(&gradients))?;
        self.loss = Some(loss.detach());
        Ok(())
    }
}

impl Work for Step {
    fn fill(&mut self, slot: usize, inputs: Vec<Vec<u8>>) {
        self.slots[slot] = None;
        self.slots[slot] = Some(Training::new(&self.metas, &inputs, self.settings).expect("a model"));
    }

    fn run(&mut self, slot: usize) {
        self.slots[slot].as_mut().expect("a filled slot").step().expect("a step");
    }

    fn read(&self, slot: usize) -> Vec<Vec<u8>> {
        let training = self.slots[slot].as_ref().expect("a filled slot");
        let values = |t: &Tensor| protocol::bytes(&t.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("values"));
        let loss = training.loss.as_ref().map_or(vec![0xFF; 4], values);
        let weights = self.metas.iter().filter_map(|meta| training.weights.get(&meta.name));
        std::iter::once(loss).chain(weights.map(|w| values(w))).collect()
    }

    fn kernel(&self) -> String {
        "candle_nn, backward, AdamW".into()
    }

    fn outputs(&self) -> Vec<usize> {
        (0..self.metas.len() - 1).collect()
    }
}
