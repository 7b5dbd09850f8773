//! One pass through a model: on a recording tape for training, on a plain one for inference.

use std::collections::BTreeMap;

use super::config::{Activation, AttentionKind, Positions};
use super::encoder::Memory;
use super::model::{GATE, Model, missing};
use super::taps::Taps;
use crate::device::{Class, Kind};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::attention::{Attention, Mask};
use crate::ops::binary::{ADD, MUL};
use crate::ops::embed::Embed;
use crate::ops::ffn::{Ffn, FfnActivation};
use crate::ops::layout::Slice;
use crate::ops::random::Dropout;
use crate::ops::relative::Span;
use crate::ops::requantize::Between;
use crate::ops::rope::{Rope, RopeKind};
use crate::ops::unary::{Cast, Function, Unary};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Token ids and what positions and masks need. All u32.
#[derive(Clone)]
pub struct Batch {
    /// `[B, T]`
    pub tokens: Tensor,
    /// `[B, T]`
    pub positions: Tensor,
    /// `[B, T]`, for 2-D rotary.
    pub block_positions: Option<Tensor>,
    /// `[B]` leading tokens that everyone sees, for the prefix mask.
    pub context: Option<Tensor>,
    /// `[B]` valid tokens.
    pub lengths: Option<Tensor>,
    /// What an encoder reads.
    pub source: Option<Source>,
}

/// The encoder's side of a batch. All u32.
#[derive(Clone)]
pub struct Source {
    /// `[B, S]`
    pub tokens: Tensor,
    /// `[B]` valid tokens.
    pub lengths: Tensor,
}

/// The life-cycle's first hook: changes how a dense weight (and its input) enters an output, or what a structure of the
/// model gives. Quantization-aware training is one. What a hook learns beside the weights it keeps in the model's tensors
/// and takes by [`Pass::parameter`].
pub trait OutputHook {
    /// `x` is `[.., k]`, `weight` `[n, k]` (experts: `[E, n, k]`).
    fn on_output(&self, _pass: &mut Pass, _linear: &str, x: Var, weight: Var) -> Result<(Var, Var)> {
        Ok((x, weight))
    }

    /// `x` as the structure at `place` gives it, in the pass's type; what comes back has the same shape.
    fn on_structure(&self, _pass: &mut Pass, _place: Place, x: Var) -> Result<Var> {
        Ok(x)
    }

    /// 0/1 f32 `[d]`: the channels that norms count, where the hidden stream is 0 in the others; `None`: all of them. A model
    /// that has lost those others computes the same.
    fn channels(&self, _pass: &mut Pass) -> Result<Option<Var>> {
        Ok(None)
    }
}

/// Structures of a model whose outputs hooks may gate, by block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// What is added to the hidden stream `[B, T, d]`: the embedding, and each sublayer's output, behind the place of that.
    Hidden,
    /// The heads' contexts `[B, T, H D]` of an attention, before its output projection.
    Heads(usize),
    /// The same of a decoder's attention to the source.
    CrossHeads(usize),
    /// The activated hidden of a dense FFN, `[.., ffn_width]`; a gated FFN's product. Experts have none.
    Neurons(usize),
    /// The output of an attention, `[B, T, d]`.
    Attention(usize),
    /// The output of a decoder's attention to the source, `[B, T, d]`.
    Cross(usize),
    /// The output of an FFN or of experts, `[B, T, d]`.
    Ffn(usize),
}

/// Keys and values of one block so far: `[B, S, H, D]`.
#[derive(Clone)]
pub struct KeyValue {
    pub key: Tensor,
    pub value: Tensor,
}

/// How a pass attends to a cache.
pub(super) enum Cache<'c> {
    None,
    /// Keep this pass's keys and values.
    Collect(&'c mut BTreeMap<usize, KeyValue>),
    /// Attend to caches that the callback has just extended with this pass's keys and values.
    Extend(&'c mut dyn FnMut(usize, &Tensor, &Tensor) -> Result<KeyValue>, Reach),
}

/// How far cached keys go.
pub(super) struct Reach {
    /// `[B]` valid keys.
    pub lengths: Tensor,
    /// Position of this pass's token, where the bias goes by it: all rows' then.
    pub position: usize,
}

/// What goes from one block to the next, `[B, T, d]` each.
pub struct States {
    /// Enters the next sublayer.
    pub normed: Var,
    /// Is added to its output; the same variable where the model adds to normalised states.
    pub residual: Var,
}

pub struct Pass<'m> {
    pub tape: Tape,
    pub model: &'m Model,
    leaves: BTreeMap<String, Var>,
    /// Parameters as they enter products: the leaves, or their casts.
    entered: BTreeMap<String, Var>,
    compute: Option<DType>,
    pub(super) hooks: Vec<&'m dyn OutputHook>,
    /// What hooks made once for the whole pass.
    shared: BTreeMap<&'static str, Var>,
    pub(super) dropout: Option<(Dropout, Var)>,
    split_ffn: bool,
    pub(super) grouped: bool,
    /// Bias by distance of a stack's table over a span.
    pub(super) biases: Vec<(usize, Span, Var)>,
    pub(super) memory: Option<Memory<'m>>,
    /// Rows that the next linear may have too, and what they are rounded to by their own ranges, with the scales.
    pub(super) rounded: Option<(Var, Vec<Var>)>,
    /// Whether the model has parameters beside its own (see `tuning`).
    pub(super) tuned: bool,
    prefix: usize,
    pub(super) taps: Option<Box<Taps>>,
    /// When set, the FFN inputs `[rows, d]` of every block are kept here, also of one that has no FFN.
    pub ffn_inputs: Option<Vec<Tensor>>,
}

impl<'m> Pass<'m> {
    /// A pass that records gradients of every f32 parameter.
    pub fn training(model: &'m Model) -> Self {
        Self::on(model, Tape::new())
    }

    pub fn inference(model: &'m Model) -> Self {
        Self::on(model, Tape::inference())
    }

    fn on(model: &'m Model, tape: Tape) -> Self {
        let (leaves, entered, tuned) = (BTreeMap::new(), BTreeMap::new(), model.tuned());
        Self {
            tape,
            model,
            leaves,
            entered,
            compute: None,
            hooks: Vec::new(),
            shared: BTreeMap::new(),
            dropout: None,
            split_ffn: false,
            grouped: false,
            biases: Vec::new(),
            memory: None,
            rounded: None,
            tuned,
            prefix: if tuned { model.prefix_length() } else { 0 },
            taps: None,
            ffn_inputs: None,
        }
    }

    #[must_use]
    pub fn hooks(mut self, hooks: impl IntoIterator<Item = &'m dyn OutputHook>) -> Self {
        self.hooks.extend(hooks);
        self
    }

    /// Computes in a 16-bit type. Parameters stay f32 and are cast where they are used, so their gradients are f32.
    #[must_use]
    pub fn computing(mut self, dtype: Option<DType>) -> Self {
        self.compute = dtype;
        self
    }

    /// The type that it computes in, where that is not the parameters'.
    pub fn computes(&self) -> Option<DType> {
        self.compute
    }

    /// FFNs as two linears: the fused one computes input and weight gradients at once, which backward in two parts cannot use.
    #[must_use]
    pub fn split_ffn(mut self, split: bool) -> Self {
        self.split_ffn = split;
        self
    }

    /// Whether what follows `x` runs as plain products where there is an op that fuses them: FFNs and the loss of a language
    /// head. So in f32 on a software adapter: its products run on subgroup lanes at 17 to 33 GFLOP/s (measured on llvmpipe),
    /// the fused ops, which take their products tile by tile themselves, at 3 to 7, and the memory that fusing saves is the
    /// host's. Everywhere else, and in 16 bits, the fused ops are the fast ones. A pass in parts asks the same, so that its
    /// sums are those of a whole one.
    pub fn by_products(&self, x: &Var) -> bool {
        let info = x.tensor.device().info();
        (info.kind, info.class, x.tensor.dtype()) == (Kind::Wgpu, Class::Cpu, DType::F32)
    }

    /// A tensor that is no parameter, in the type that this pass computes in.
    pub fn constant(&mut self, tensor: &Tensor) -> Result<Var> {
        self.entering(Var::constant(tensor.clone()))
    }

    pub(super) fn entering(&mut self, var: Var) -> Result<Var> {
        match self.compute {
            Some(to) if var.tensor.dtype() == DType::F32 => self.tape.first(Cast { to }, &[&var]),
            _ => Ok(var),
        }
    }

    /// Dropout after the embedding, each attention and each FFN, at the sites after that of `first`; `step` is u32 `[1]`.
    #[must_use]
    pub fn dropout(mut self, first: Dropout, step: &Tensor) -> Self {
        self.dropout = (first.probability > 0.0).then(|| (first, Var::constant(step.clone())));
        self
    }

    /// A parameter as a variable: the same one however often it is used.
    pub fn parameter(&mut self, name: &str) -> Result<Var> {
        self.optional(name)?.ok_or_else(|| missing(name))
    }

    pub(super) fn optional(&mut self, name: &str) -> Result<Option<Var>> {
        if let Some(var) = self.entered.get(name) {
            return Ok(Some(var.clone()));
        }
        let Some(tensor) = self.model.tensors.get(name) else {
            return Ok(None);
        };
        let learns = tensor.dtype().is_float() && self.model.learns(name);
        let leaf = if learns { self.tape.leaf(tensor) } else { Var::constant(tensor.clone()) };
        self.leaves.insert(name.to_string(), leaf.clone());
        // Scales of integer weights belong to integer products, which are f32 outside, and steps to rounding; gates decide,
        // they are no factors.
        let as_is = [".scale", ".step", ".input_step", GATE].iter().any(|end| name.ends_with(end));
        let entered = if as_is { leaf } else { self.entering(leaf)? };
        self.entered.insert(name.to_string(), entered.clone());
        Ok(Some(entered))
    }

    /// Parameters used so far.
    pub fn into_leaves(self) -> (Tape, BTreeMap<String, Var>) {
        (self.tape, self.leaves)
    }

    /// A variable that is made once in a pass, however often hooks and losses ask for it.
    pub fn shared(&mut self, name: &'static str, make: impl FnOnce(&mut Self) -> Result<Var>) -> Result<Var> {
        if let Some(var) = self.shared.get(name) {
            return Ok(var.clone());
        }
        let var = make(self)?;
        self.shared.insert(name, var.clone());
        Ok(var)
    }

    /// What [`Pass::shared`] made under this name.
    pub fn made(&self, name: &str) -> Option<&Var> {
        self.shared.get(name)
    }

    pub(super) fn hooked(&mut self, name: &str, mut x: Var, mut weight: Var) -> Result<(Var, Var)> {
        for hook in self.hooks.clone() {
            (x, weight) = hook.on_output(self, name, x, weight)?;
        }
        Ok((x, weight))
    }

    /// A structure's output as the hooks leave it.
    pub(super) fn gated(&mut self, place: Place, mut x: Var) -> Result<Var> {
        for hook in self.hooks.clone() {
            x = hook.on_structure(self, place, x)?;
        }
        Ok(x)
    }

    /// The output of a sublayer on its way into the hidden stream.
    fn sublayer(&mut self, place: Place, x: Var) -> Result<Var> {
        let x = self.gated(place, x)?;
        self.gated(Place::Hidden, x)
    }

    /// Dropout of the sublayer that comes as number `sublayer` in the whole model, wherever a pass starts.
    pub(super) fn dropped(&mut self, x: Var, sublayer: u32) -> Result<Var> {
        let Some((dropout, step)) = &self.dropout else {
            return Ok(x);
        };
        let dropout = Dropout { site: dropout.site + 1 + sublayer, ..*dropout };
        self.tape.first(dropout, &[&x, step])
    }

    pub(super) fn run(&mut self, batch: &Batch, mut cache: Cache) -> Result<Var> {
        let config = &self.model.config;
        if config.encoder > 0 && self.memory.is_none() {
            self.encoded(batch)?;
        }
        let mut states = self.enter(batch)?;
        for i in config.encoder..config.blocks.len() {
            states = self.block(i, states, batch, &mut cache)?;
        }
        Ok(states.normed)
    }

    /// Embedding and first norm; of the decoder where there are two stacks.
    pub fn enter(&mut self, batch: &Batch) -> Result<States> {
        // The decoder's site comes after those of all sublayers.
        let config = &self.model.config;
        let sublayer = if config.encoder > 0 { 3 * config.blocks.len() + 1 } else { 0 };
        self.enter_stack(config.encoder, batch, sublayer as u32)
    }

    pub(super) fn enter_stack(&mut self, first: usize, batch: &Batch, sublayer: u32) -> Result<States> {
        let table = self.parameter("embedding.tokens")?;
        let mut x = self.tape.first(Embed, &[&table, &Var::constant(batch.tokens.clone())])?;
        self.tape.mark_activation(&x);
        if self.model.config.positions == Positions::Learned {
            let table = self.parameter("embedding.positions")?;
            let positions = self.tape.first(Embed, &[&table, &Var::constant(batch.positions.clone())])?;
            x = self.tape.first(ADD, &[&x, &positions])?;
        }
        x = self.gated(Place::Hidden, x)?;
        x = self.dropped(x, sublayer)?;
        let states = self.first_norm(&format!("blocks.{first}.norm_attention"), &x)?;
        // Layers are counted along the decoder where there are two stacks.
        if first == self.model.config.encoder {
            self.keep_hidden(0, &states);
        }
        Ok(states)
    }

    /// Block `i` and the norm after it: that of the next block's attention, or the final one.
    pub fn pass_block(&mut self, i: usize, states: States, batch: &Batch) -> Result<States> {
        self.block(i, states, batch, &mut Cache::None)
    }

    pub(super) fn block(&mut self, i: usize, states: States, batch: &Batch, cache: &mut Cache) -> Result<States> {
        let States { normed, mut residual } = states;
        let block = &self.model.config.blocks[i];
        let mut added = None;
        if block.attends() {
            let attended = self.attention(i, &normed, batch, cache)?;
            let attended = self.adapted(i, "attention", attended)?;
            let attended = self.sublayer(Place::Attention(i), attended)?;
            added = Some(self.dropped(attended, 2 * i as u32 + 1)?);
        }
        if self.model.config.decodes(i) {
            let states = self.add_norm(&format!("blocks.{i}.norm_cross"), added.as_ref(), &residual)?;
            (added, residual) = (None, states.residual);
            if self.model.config.cross(i).is_some() {
                let looked = self.look(i, &states.normed)?;
                let looked = self.sublayer(Place::Cross(i), looked)?;
                let site = 2 * self.model.config.blocks.len() + 1 + i;
                added = Some(self.dropped(looked, site as u32)?);
            }
        }
        let States { normed, residual } = self.add_norm(&format!("blocks.{i}.norm_ffn"), added.as_ref(), &residual)?;
        if self.ffn_inputs.is_some() {
            let rows = self.rows(&normed)?.tensor;
            self.ffn_inputs.iter_mut().for_each(|list| list.push(rows.clone()));
        }
        let mut added = None;
        if block.feeds() {
            let fed = self.ffn(i, &normed)?;
            let fed = self.adapted(i, "ffn", fed)?;
            let fed = self.sublayer(Place::Ffn(i), fed)?;
            added = Some(self.dropped(fed, 2 * i as u32 + 2)?);
        }
        let config = &self.model.config;
        let next = match i + 1 {
            end if end == config.blocks.len() => "norm_final".into(),
            end if end == config.encoder => "norm_encoder".into(),
            next => format!("blocks.{next}.norm_attention"),
        };
        let first = config.encoder;
        let states = self.add_norm(&next, added.as_ref(), &residual)?;
        if i >= first {
            self.keep_hidden(i + 1 - first, &states);
        }
        Ok(states)
    }

    fn attention(&mut self, i: usize, x: &Var, batch: &Batch, cache: &mut Cache) -> Result<Var> {
        let model = self.model;
        let block = &model.config.blocks[i];
        let (b, t) = (x.dims()[0], x.dims()[1]);
        let heads = [b, t, block.heads, block.head_size];
        let mut project = |part: &str| self.linear(&format!("blocks.{i}.attention.{part}"), x)?.reshape(&heads);
        let (query, key, value) = (project("query")?, project("key")?, project("value")?);
        let (query, key) = (self.rotated(i, &query, batch)?, self.rotated(i, &key, batch)?);
        self.keep_heads(i, [&query, &key, &value]);
        let before = self.prefix;
        let longer;
        let (key, value, batch) = match cache {
            // A cache begins with the prefix already.
            Cache::None | Cache::Collect(_) if before > 0 => {
                let (key, value, batch) = self.prefixed(i, key, value, batch)?;
                longer = batch;
                (key, value, &longer)
            }
            _ => (key, value, batch),
        };
        let mut op = Attention {
            mask: match model.config.attention {
                _ if i < model.config.encoder => Mask::None,
                AttentionKind::Bidirectional => Mask::None,
                AttentionKind::Causal => Mask::Causal,
                AttentionKind::Prefix => Mask::Prefix,
            },
            lengths: batch.lengths.is_some(),
            bias: false,
            scale: block.attention_scale,
            query_offset: before,
        };
        let constant = |t: &Option<Tensor>| t.iter().cloned().map(Var::constant).collect::<Vec<_>>();
        let (key, value, mut extra) = match cache {
            Cache::Extend(extend, reach) => {
                // The newest token sees everything cached: no mask but the valid lengths.
                let all = extend(i, &key.tensor, &value.tensor)?;
                op = Attention { mask: Mask::None, lengths: true, query_offset: reach.position, ..op };
                (Var::constant(all.key), Var::constant(all.value), vec![Var::constant(reach.lengths.clone())])
            }
            _ => {
                if let Cache::Collect(caches) = cache {
                    caches.insert(i, KeyValue { key: key.tensor.clone(), value: value.tensor.clone() });
                }
                let context = if op.mask == Mask::Prefix { constant(&batch.context) } else { Vec::new() };
                if op.mask == Mask::Prefix && context.is_empty() {
                    return Err(Error::Shape {
                        op: "attention",
                        rule: "a prefix model needs context lengths",
                        got: "none".into(),
                    });
                }
                (key, value, [context, constant(&batch.lengths)].concat())
            }
        };
        if let Some(bias) = self.distances(i, (t, key.dims()[1]), op.query_offset)? {
            op.bias = true;
            extra.push(bias);
        }
        let inputs: Vec<&Var> = [&query, &key, &value].into_iter().chain(&extra).collect();
        let y = self.tape.first(op, &inputs)?;
        let y = self.gated(Place::Heads(i), y.reshape(&[b, t, block.heads * block.head_size])?)?;
        self.linear(&format!("blocks.{i}.attention.output"), &y)
    }

    fn rotated(&mut self, i: usize, x: &Var, batch: &Batch) -> Result<Var> {
        let Some(tables) = self.model.rotary(i) else {
            return Ok(x.clone());
        };
        let tables = [Var::constant(tables.cos.clone()), Var::constant(tables.sin.clone())];
        let positions = Var::constant(batch.positions.clone());
        if self.model.config.positions == Positions::Rotary {
            let op = Rope { kind: RopeKind::Half, inverse: false };
            return self.tape.first(op, &[x, &tables[0], &tables[1], &positions]);
        }
        let Some(blocks) = &batch.block_positions else {
            return Err(Error::Shape { op: "rope", rule: "2-D rotary needs block positions", got: "none".into() });
        };
        let op = Rope { kind: RopeKind::Glm2d, inverse: false };
        self.tape.first(op, &[x, &tables[0], &tables[1], &positions, &Var::constant(blocks.clone())])
    }

    /// The FFN of block `i` alone, with its experts where it has any: x `[.., d]` to `[.., d]`.
    pub fn ffn(&mut self, i: usize, x: &Var) -> Result<Var> {
        let block = &self.model.config.blocks[i];
        if block.experts.is_some() {
            return self.experts(i, x);
        }
        let (inner, outer) = (format!("blocks.{i}.ffn.in"), format!("blocks.{i}.ffn.out"));
        let dense = self.model.tensors.contains_key(&format!("{inner}.weight"));
        if dense
            && self.model.tensors.contains_key(&format!("{outer}.weight"))
            && ![&inner, &outer].iter().any(|l| self.model.tensors.contains_key(&format!("{l}.smooth")))
            && self.hooks.is_empty()
            && !(self.split_ffn || self.tuned || self.by_products(x))
        {
            let activation = match block.activation {
                Activation::Relu => FfnActivation::Relu,
                Activation::Gelu => FfnActivation::Gelu,
                Activation::Geglu => FfnActivation::Geglu,
            };
            let names = [
                format!("{inner}.weight"),
                format!("{inner}.bias"),
                format!("{outer}.weight"),
                format!("{outer}.bias"),
            ];
            let [w1, b1, w2, b2] = names.map(|n| self.parameter(&n));
            return self.tape.first(Ffn { activation }, &[x, &w1?, &b1?, &w2?, &b2?]);
        }
        let between = match block.activation {
            Activation::Relu => Some(Between::Relu),
            Activation::Gelu => Some(Between::Gelu),
            Activation::Geglu => None,
        };
        if let Some(between) = between
            && let Some(y) = self.int8_pair([&inner, &outer], between, x)?
        {
            return Ok(y);
        }
        let h = self.linear(&inner, x)?;
        let h = match block.activation {
            Activation::Relu => self.tape.first(Unary(Function::Relu), &[&h])?,
            Activation::Gelu => self.tape.first(Unary(Function::GeluTanh), &[&h])?,
            Activation::Geglu => {
                let axis = h.dims().len() - 1;
                let gate = self.tape.first(Slice { axis, start: 0, length: block.ffn_width }, &[&h])?;
                let value = self.tape.first(Slice { axis, start: block.ffn_width, length: block.ffn_width }, &[&h])?;
                let gate = self.tape.first(Unary(Function::GeluTanh), &[&gate])?;
                self.tape.first(MUL, &[&gate, &value])?
            }
        };
        let h = self.gated(Place::Neurons(i), h)?;
        self.linear(&outer, &h)
    }
}
