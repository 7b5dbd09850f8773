//! Which gates a model has: one tensor for each level, all blocks' in a row.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::nn::{Config, Model};

/// A granularity of gates, from coarse to fine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// A whole attention.
    Attention,
    /// A whole FFN.
    Ffn,
    Heads,
    /// Of FFNs.
    Neurons,
    /// Channels of the hidden stream, in all blocks at once.
    Hidden,
}

impl Level {
    pub const ALL: [Level; 5] = [Level::Attention, Level::Ffn, Level::Heads, Level::Neurons, Level::Hidden];

    /// Name of its log alphas among the model's tensors while they learn.
    pub fn tensor(self) -> &'static str {
        match self {
            Level::Attention => "structure.attention.gate",
            Level::Ffn => "structure.ffn.gate",
            Level::Heads => "structure.heads.gate",
            Level::Neurons => "structure.neurons.gate",
            Level::Hidden => "structure.hidden.gate",
        }
    }

    /// log alpha at the start: all but neurons begin open.
    pub fn start(self) -> f32 {
        if self == Level::Neurons { 0.0 } else { 10.0 }
    }

    /// Which stream of random numbers its samples are.
    pub(super) fn site(self) -> u32 {
        0x9a7e_0000 + self as u32
    }
}

/// One attention, of a block or of a decoder's block to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attention {
    pub block: usize,
    pub cross: bool,
    pub heads: usize,
    pub head_size: usize,
    /// Its first head among all.
    pub first: usize,
}

/// One dense FFN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ffn {
    pub block: usize,
    pub neurons: usize,
    /// Rows of the in-projection for each neuron.
    pub copies: usize,
    /// Its first neuron among all.
    pub first: usize,
}

/// The sublayers of a model with the places of their gates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub attentions: Vec<Attention>,
    pub ffns: Vec<Ffn>,
    pub width: usize,
}

impl Layout {
    /// # Errors
    /// `Error::Parameter` for a model with experts, and for one without a sublayer.
    pub fn of(config: &Config) -> Result<Self> {
        let refuse = |value: String, allowed| {
            Err(Error::Parameter { op: "structure gates", parameter: "model", value, allowed })
        };
        if let Some(block) = config.blocks.iter().position(|b| b.experts.is_some()) {
            return refuse(
                format!("experts in block {block}"),
                "dense FFNs: experts have no neurons of their own to gate",
            );
        }
        let (mut attentions, mut ffns) = (Vec::new(), Vec::new());
        let (mut first_head, mut first_neuron) = (0, 0);
        for (i, block) in config.blocks.iter().enumerate() {
            let cross = if config.decodes(i) { block.heads_across() } else { 0 };
            for (heads, cross) in [(block.heads, false), (cross, true)] {
                if heads > 0 {
                    attentions.push(Attention {
                        block: i,
                        cross,
                        heads,
                        head_size: block.head_size,
                        first: first_head,
                    });
                    first_head += heads;
                }
            }
            if block.feeds() {
                let copies = Config::ffn_rows(block) / block.ffn_width;
                ffns.push(Ffn { block: i, neurons: block.ffn_width, copies, first: first_neuron });
                first_neuron += block.ffn_width;
            }
        }
        if attentions.is_empty() && ffns.is_empty() {
            return refuse("no sublayer".into(), "a model with an attention or an FFN");
        }
        Ok(Self { attentions, ffns, width: config.width })
    }

    /// Gates of a level.
    pub fn count(&self, level: Level) -> usize {
        match level {
            Level::Attention => self.attentions.len(),
            Level::Ffn => self.ffns.len(),
            Level::Heads => self.attentions.iter().map(|a| a.heads).sum(),
            Level::Neurons => self.ffns.iter().map(|f| f.neurons).sum(),
            Level::Hidden => self.width,
        }
    }

    /// The levels that a model has gates of, and how many.
    pub(super) fn check(&self, model: &Model, levels: &[Level]) -> Result<()> {
        for &level in levels {
            let gates = model.get(level.tensor())?;
            if gates.count() != self.count(level) {
                let rule = format!("{} where {} gates are needed", gates.meta(), self.count(level));
                return Err(Error::file("model", level.tensor(), rule));
            }
        }
        Ok(())
    }
}
