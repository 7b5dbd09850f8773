//! `[model]`: family and sizes of the teacher.

use serde::{Deserialize, Serialize};

use crate::data::batch::GmaskPosition;
use crate::data::layout::Layout;
use crate::error::Result;
use crate::nn::config::Size;
use crate::nn::{Activation, Config, Head};
use crate::recipe::check::refuse;

/// Which preset is trained, and on what: each source paper's kind of model is there small.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Prefix language model with 2-D rotary positions; translates.
    #[default]
    Glm,
    /// BERT-like encoder; tags the terms of generated sentences in both languages (synthetic slots).
    Tagger,
    /// T5-like encoder-decoder with relative bias; translates.
    T5,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    #[serde(default, skip_serializing_if = "is_glm")]
    pub family: Family,
    /// Of the FFNs, `relu` or `gelu`; without it ReLU, for the tagger GELU. Experts need ReLU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation: Option<Activation>,
    /// Blocks; of an encoder-decoder each stack has so many.
    pub layers: usize,
    pub heads: usize,
    pub head_size: usize,
    pub ffn_width: usize,
    pub max_positions: usize,
}

fn is_glm(family: &Family) -> bool {
    *family == Family::Glm
}

impl Architecture {
    pub fn size(&self) -> Size {
        let Self { layers, heads, head_size, ffn_width, max_positions, .. } = *self;
        Size { layers, heads, head_size, ffn_width, max_positions }
    }

    /// The model of this family with other sizes. `labels`: of a tagger.
    pub fn config(&self, size: Size, vocabulary: usize, labels: &[String]) -> Config {
        let mut config = match self.family {
            Family::Glm => Config::glm(size, vocabulary),
            Family::Tagger => Config::bert_tagger(size, vocabulary, labels.to_vec()),
            Family::T5 => Config::t5(size, vocabulary),
        };
        if let Some(activation) = self.activation {
            config.blocks.iter_mut().for_each(|block| block.activation = activation);
        }
        config
    }

    pub(in crate::recipe) fn activation(&self) -> Activation {
        let usual = if self.family == Family::Tagger { Activation::Gelu } else { Activation::Relu };
        self.activation.unwrap_or(usual)
    }

    pub(in crate::recipe) fn check(&self) -> Result<()> {
        match self.activation {
            Some(Activation::Geglu) => refuse("model.activation", "geglu", "relu or gelu"),
            _ => Ok(()),
        }
    }
}

impl Family {
    pub fn layout(self) -> Layout {
        match self {
            Family::Glm => Layout::Prefix(GmaskPosition::MaskIndex),
            Family::Tagger => Layout::Tagging,
            Family::T5 => Layout::EncoderDecoder,
        }
    }
}

/// How a model takes examples.
pub fn layout(config: &Config) -> Layout {
    let family = match config.head {
        Head::Tagging { .. } => Family::Tagger,
        _ if config.encoder > 0 => Family::T5,
        _ => Family::Glm,
    };
    family.layout()
}
