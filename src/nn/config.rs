//! A transformer described by data. Every block carries its own shapes, so a pruned model is an ordinary model.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// A learned vector per position, added to the token embedding.
    Learned,
    /// One-dimensional rotary, rotate-half.
    Rotary,
    /// GLM's: half of each head rotates by position, half by block position.
    Rotary2d,
    /// T5's: a learned bias on attention scores per head and bucket of distance, shared by the blocks of a stack
    /// (`ops::relative`). Buckets are for both sides; `farthest` is the first distance of no further bucket.
    Relative { buckets: usize, farthest: usize },
}

impl Positions {
    /// Whether queries and keys are rotated.
    pub fn rotary(self) -> bool {
        matches!(self, Positions::Rotary | Positions::Rotary2d)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionKind {
    Bidirectional,
    Causal,
    /// Bidirectional over each row's context, causal after it.
    Prefix,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Residual {
    /// Pre-norm: h = x + f(norm(x)).
    Sum,
    /// h = norm(x) * scale + f(norm(x)): GLM with scale sqrt(2 L), post-norm BERT with scale 1.
    Normalised { scale: f32 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    Layer,
    Rms,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    Relu,
    Gelu,
    /// Gated: gelu(x W_gate) * (x W_value); the in-projection has 2 x ffn_width rows.
    Geglu,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Head {
    /// Next-token logits; tied: with the token embedding.
    Language { tied: bool },
    /// One label per token.
    Tagging { labels: Vec<String> },
}

/// Sparse execution of a block's FFN: `count` experts of equal size, `selected` of them per token at most.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    pub count: usize,
    pub selected: usize,
    /// Of the selected ones only those are executed whose score is above this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// 0: the block has no attention.
    pub heads: usize,
    pub head_size: usize,
    /// Factor on attention scores; kept explicit because a pruned head keeps its teacher's.
    pub attention_scale: f32,
    /// 0: the block has no FFN.
    pub ffn_width: usize,
    pub activation: Activation,
    /// One per rotary pair of a head (head_size / 2); for `Rotary2d` the first half belongs to the position half.
    pub inverse_frequencies: Vec<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<Experts>,
    /// Heads of a decoder's cross-attention where they are not as many as `heads`; 0: it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cross_heads: Option<usize>,
    /// Where positions are relative: has a table of distances of its own, because its heads are not those of its stack's first
    /// block.
    #[serde(default, skip_serializing_if = "is_false")]
    pub own_distances: bool,
}

fn is_false(on: &bool) -> bool {
    !*on
}

impl Block {
    /// Whether it has (self-)attention.
    pub fn attends(&self) -> bool {
        self.heads > 0
    }

    /// Whether it has an FFN.
    pub fn feeds(&self) -> bool {
        self.ffn_width > 0
    }

    /// Heads with which a decoder's block looks at the source.
    pub fn heads_across(&self) -> usize {
        self.cross_heads.unwrap_or(self.heads)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub vocabulary: usize,
    pub width: usize,
    pub max_positions: usize,
    pub positions: Positions,
    pub attention: AttentionKind,
    pub residual: Residual,
    pub norm: NormKind,
    pub norm_epsilon: f32,
    pub head: Head,
    /// So many first blocks are an encoder that reads the source; the others decode and look at what it made of it. 0: there is
    /// one stack.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub encoder: usize,
    pub blocks: Vec<Block>,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// Rotary base of GLM, GPT-NeoX and LLaMA.
const ROTARY_BASE: f64 = 10_000.0;

/// base^(-2 j / n) for the n/2 pairs of an n-wide rotation.
fn frequencies(n: usize) -> impl Iterator<Item = f32> {
    (0..n / 2).map(move |j| ROTARY_BASE.powf(-2.0 * j as f64 / n as f64) as f32)
}

/// Sizes that a preset is built from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    pub layers: usize,
    pub heads: usize,
    pub head_size: usize,
    pub ffn_width: usize,
    pub max_positions: usize,
}

impl Config {
    /// The GLM prefix language model (ChatGLM-6B's block: scaled residual on the normalised input, 2-D rotary, prefix
    /// mask), with a ReLU FFN so that it can be split into experts.
    pub fn glm(size: Size, vocabulary: usize) -> Self {
        // Each half of a head has its own full set of frequencies.
        let half: Vec<f32> = frequencies(size.head_size / 2).collect();
        let inverse_frequencies = [half.clone(), half].concat();
        Self {
            vocabulary,
            width: size.heads * size.head_size,
            max_positions: size.max_positions,
            positions: Positions::Rotary2d,
            attention: AttentionKind::Prefix,
            residual: Residual::Normalised { scale: (2.0 * size.layers as f32).sqrt() },
            norm: NormKind::Layer,
            norm_epsilon: 1e-5,
            head: Head::Language { tied: false },
            encoder: 0,
            blocks: vec![block(size, Activation::Relu, inverse_frequencies); size.layers],
        }
    }

    /// A BERT-like encoder with a token-tagging head: learned positions, post-norm, GELU, bidirectional.
    pub fn bert_tagger(size: Size, vocabulary: usize, labels: Vec<String>) -> Self {
        Self {
            vocabulary,
            width: size.heads * size.head_size,
            max_positions: size.max_positions,
            positions: Positions::Learned,
            attention: AttentionKind::Bidirectional,
            residual: Residual::Normalised { scale: 1.0 },
            norm: NormKind::Layer,
            norm_epsilon: 1e-12,
            head: Head::Tagging { labels },
            encoder: 0,
            blocks: vec![block(size, Activation::Gelu, Vec::new()); size.layers],
        }
    }

    /// A T5-like encoder-decoder (Raffel et al. 2020): as many encoder as decoder blocks, relative bias in self-attention,
    /// cross-attention, RMSNorm before each sublayer, ReLU FFN, attention scores without a factor. Unlike T5 it has biases and a
    /// head of its own.
    pub fn t5(size: Size, vocabulary: usize) -> Self {
        let block = Block { attention_scale: 1.0, ..block(size, Activation::Relu, Vec::new()) };
        Self {
            positions: Positions::Relative { buckets: 32, farthest: 128 },
            attention: AttentionKind::Causal,
            residual: Residual::Sum,
            norm: NormKind::Rms,
            norm_epsilon: 1e-6,
            encoder: size.layers,
            blocks: vec![block; 2 * size.layers],
            ..Self::glm(size, vocabulary)
        }
    }

    /// A GPT-like decoder: 1-D rotary, pre-norm, causal.
    pub fn gpt(size: Size, vocabulary: usize) -> Self {
        Self {
            positions: Positions::Rotary,
            attention: AttentionKind::Causal,
            residual: Residual::Sum,
            head: Head::Language { tied: true },
            blocks: vec![block(size, Activation::Gelu, frequencies(size.head_size).collect()); size.layers],
            ..Self::glm(size, vocabulary)
        }
    }

    /// Cross-checks all sizes before anything is allocated; `path` is where the config came from.
    pub fn check(&self, path: &std::path::Path) -> Result<()> {
        let rule = |key: String, rule: &str| Err(Error::file(path, key, rule));
        for (key, n, most) in [
            ("vocabulary", self.vocabulary, 4_000_000),
            ("width", self.width, 65_536),
            ("max_positions", self.max_positions, 1_000_000),
            ("blocks", self.blocks.len(), 4_096),
        ] {
            if n == 0 || n > most {
                return rule(key.into(), &format!("{n} must be from 1 to {most}"));
            }
        }
        if !(self.norm_epsilon.is_finite() && self.norm_epsilon > 0.0) {
            return rule("norm_epsilon".into(), "must be finite and above 0");
        }
        if let Residual::Normalised { scale } = self.residual
            && !scale.is_finite()
        {
            return rule("residual.scale".into(), "must be finite");
        }
        let relative = matches!(self.positions, Positions::Relative { .. });
        if self.encoder >= self.blocks.len() || (self.encoder > 0) != relative {
            return rule(
                "encoder".into(),
                "fewer than all blocks, and relative positions exactly where there is an encoder",
            );
        }
        if let Positions::Relative { buckets, farthest } = self.positions
            && (!(2..=4096).contains(&buckets) || buckets % 2 != 0 || farthest == 0 || farthest > 1_000_000)
        {
            return rule("positions".into(), "an even number of buckets from 2 to 4096, farthest from 1 to 1000000");
        }
        for (i, b) in self.blocks.iter().enumerate() {
            let sizes = [b.heads, b.head_size, b.ffn_width, b.heads_across()];
            if sizes.iter().any(|&n| n > 1_000_000) || b.head_size == 0 {
                return rule(format!("blocks[{i}]"), "head_size from 1, heads and ffn_width from 0 to 1000000");
            }
            if (b.cross_heads.is_some() && !self.decodes(i)) || (b.own_distances && !(relative && b.attends())) {
                return rule(format!("blocks[{i}]"), "cross_heads in decoders, own_distances with relative positions");
            }
            let first = &self.blocks[self.stack(i)];
            if relative && b.attends() && !b.own_distances && b.heads != first.heads {
                return rule(
                    format!("blocks[{i}].heads"),
                    "as many as its stack's first block, whose distances it reads",
                );
            }
            let pairs = if self.positions.rotary() { b.head_size / 2 } else { 0 };
            if b.inverse_frequencies.len() != pairs {
                let got = b.inverse_frequencies.len();
                return rule(
                    format!("blocks[{i}].inverse_frequencies"),
                    &format!("{got} values where {pairs} are needed"),
                );
            }
            if self.positions == Positions::Rotary2d && b.head_size % 4 != 0 {
                return rule(format!("blocks[{i}].head_size"), "2-D rotary needs a multiple of 4");
            }
            let finite = b.attention_scale.is_finite() && b.inverse_frequencies.iter().all(|f| f.is_finite());
            if !finite || self.max_positions.saturating_mul(pairs) > 1 << 26 {
                return rule(
                    format!("blocks[{i}]"),
                    "a finite attention_scale and frequencies; rotary tables of at most 2^26 entries",
                );
            }
            if let Some(e) = b.experts
                && (e.count == 0 || e.selected == 0 || e.selected > e.count || b.ffn_width % e.count != 0 || !b.feeds())
            {
                return rule(format!("blocks[{i}].experts"), "1 <= selected <= count, and count divides ffn_width");
            }
            if b.experts.and_then(|e| e.threshold).is_some_and(|t| !t.is_finite()) {
                return rule(format!("blocks[{i}].experts.threshold"), "must be finite");
            }
        }
        Ok(())
    }

    /// Rows of the FFN's in-projection.
    pub fn ffn_rows(block: &Block) -> usize {
        if block.activation == Activation::Geglu { 2 * block.ffn_width } else { block.ffn_width }
    }

    /// Names of every linear layer of every block.
    pub fn all_linears(&self) -> Vec<String> {
        let of_block = |(i, block): (usize, &Block)| {
            let [query, key, value, output, ffn_in, ffn_out] = Self::linears(i);
            let attention = [query, key, value, output].into_iter().filter(|_| block.attends());
            let ffn = [ffn_in, ffn_out].into_iter().filter(|_| block.feeds());
            attention.chain(ffn).chain(self.cross(i).into_iter().flatten()).collect::<Vec<_>>()
        };
        self.blocks.iter().enumerate().flat_map(of_block).collect()
    }

    /// Whether block `i` is one of a decoder behind an encoder.
    pub fn decodes(&self, i: usize) -> bool {
        self.encoder > 0 && i >= self.encoder
    }

    /// Names of the linear layers by which block `i` looks at the source, where it does.
    pub fn cross(&self, i: usize) -> Option<[String; 4]> {
        let parts = ["cross.query", "cross.key", "cross.value", "cross.output"];
        let looks = self.decodes(i) && self.blocks[i].heads_across() > 0;
        looks.then(|| parts.map(|part| format!("blocks.{i}.{part}")))
    }

    /// The block whose table of distances block `i` reads unless it has one of its own: the first of its stack.
    pub fn stack(&self, i: usize) -> usize {
        if i < self.encoder { 0 } else { self.encoder }
    }

    /// Names of the linear layers of block `i` alone, in execution order; those of a sublayer that it lacks name nothing.
    pub fn linears(i: usize) -> [String; 6] {
        ["attention.query", "attention.key", "attention.value", "attention.output", "ffn.in", "ffn.out"]
            .map(|part| format!("blocks.{i}.{part}"))
    }
}

fn block(size: Size, activation: Activation, inverse_frequencies: Vec<f32>) -> Block {
    Block {
        heads: size.heads,
        head_size: size.head_size,
        attention_scale: 1.0 / (size.head_size as f32).sqrt(),
        ffn_width: size.ffn_width,
        activation,
        inverse_frequencies,
        experts: None,
        cross_heads: None,
        own_distances: false,
    }
}
