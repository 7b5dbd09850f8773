//! Where heads and neurons are: the attentions and FFNs of a model, each with its units.

use super::keep::{Keep, KeepHeads};
use crate::nn::{Config, Place};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Heads,
    Neurons,
}

/// One attention or FFN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    pub kind: Kind,
    pub block: usize,
    /// A decoder's attention to the source.
    pub cross: bool,
    pub units: usize,
    /// Columns of a unit: a head's dimensions, 1 for a neuron.
    pub size: usize,
}

impl Site {
    /// All of a model, in execution order.
    pub fn of(config: &Config, kind: Kind) -> Vec<Site> {
        let mut sites = Vec::new();
        for (block, b) in config.blocks.iter().enumerate() {
            let mut push = |cross: bool, units: usize, size: usize| {
                if units > 0 {
                    sites.push(Site { kind, block, cross, units, size });
                }
            };
            match kind {
                Kind::Heads => {
                    push(false, b.heads, b.head_size);
                    push(true, if config.decodes(block) { b.heads_across() } else { 0 }, b.head_size);
                }
                Kind::Neurons => push(false, b.ffn_width, 1),
            }
        }
        sites
    }

    pub(super) fn place(&self) -> Place {
        match (self.kind, self.cross) {
            (Kind::Heads, false) => Place::Heads(self.block),
            (Kind::Heads, true) => Place::CrossHeads(self.block),
            (Kind::Neurons, _) => Place::Neurons(self.block),
        }
    }

    /// Name of the linear that its units enter.
    pub(super) fn output(&self) -> String {
        let part = match (self.kind, self.cross) {
            (Kind::Heads, false) => "attention.output",
            (Kind::Heads, true) => "cross.output",
            (Kind::Neurons, _) => "ffn.out",
        };
        format!("blocks.{}.{part}", self.block)
    }

    /// Leaves only the units at these places of those that `keep` has left.
    pub(super) fn narrow(&self, keep: &mut Keep, stay: &[usize]) {
        let block = &mut keep.blocks[self.block];
        let chosen = |left: &[usize]| stay.iter().filter_map(|&at| left.get(at).copied()).collect::<Vec<_>>();
        match self.kind {
            Kind::Heads => {
                let attention = if self.cross { &mut block.cross } else { &mut block.attention };
                if let Some(left) = attention {
                    *left = KeepHeads::whole(&chosen(&left.heads), self.size);
                }
            }
            Kind::Neurons => block.neurons = block.neurons.take().map(|left| chosen(&left)),
        }
    }
}
