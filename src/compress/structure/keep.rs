//! What survives of a model, block by block: blocks may differ in heads and neurons and may lose a sublayer whole.

use crate::error::{Error, Result};
use crate::nn::{Block, Config, Positions};

/// What survives of one attention; indices into the teacher's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeepHeads {
    pub heads: Vec<usize>,
    /// Rows of the query and key projections, head by head: as many of each.
    pub query_key: Vec<usize>,
    /// Rows of the value projection, as many.
    pub value: Vec<usize>,
}

impl KeepHeads {
    /// These heads with all their dimensions.
    pub fn whole(heads: &[usize], head_size: usize) -> Self {
        let rows: Vec<usize> = heads.iter().flat_map(|h| h * head_size..(h + 1) * head_size).collect();
        Self { heads: heads.to_vec(), query_key: rows.clone(), value: rows }
    }

    /// Dimensions that each head keeps.
    pub fn head_size(&self) -> usize {
        self.value.len() / self.heads.len().max(1)
    }
}

/// What survives of one block; indices into the teacher's. `None`: the sublayer goes whole, its output bias with it, and adds
/// nothing any more; the norms between sublayers stay.
#[derive(Clone, Debug, PartialEq)]
pub struct KeepBlock {
    pub index: usize,
    pub attention: Option<KeepHeads>,
    /// Of a decoder's attention to the source.
    pub cross: Option<KeepHeads>,
    pub neurons: Option<Vec<usize>>,
    pub inverse_frequencies: Vec<f32>,
}

/// What survives of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Keep {
    pub channels: Vec<usize>,
    pub blocks: Vec<KeepBlock>,
}

impl Keep {
    /// Everything: the start of a narrower one.
    pub fn all(config: &Config) -> Self {
        let every = |n: usize| (0..n).collect::<Vec<_>>();
        let heads = |n: usize, size: usize| (n > 0).then(|| KeepHeads::whole(&every(n), size));
        let block = |(index, b): (usize, &Block)| KeepBlock {
            index,
            attention: heads(b.heads, b.head_size),
            cross: if config.decodes(index) { heads(b.heads_across(), b.head_size) } else { None },
            neurons: b.feeds().then(|| every(b.ffn_width)),
            inverse_frequencies: b.inverse_frequencies.clone(),
        };
        Self { channels: every(config.width), blocks: config.blocks.iter().enumerate().map(block).collect() }
    }

    /// Everything of these blocks.
    pub fn blocks(config: &Config, indices: &[usize]) -> Self {
        let mut keep = Self::all(config);
        keep.blocks.retain(|block| indices.contains(&block.index));
        keep
    }

    /// Sizes of what is left. Positions, norms and factors stay the teacher's.
    ///
    /// # Errors
    /// `Error::Parameter` naming the structure that this model does not have or that cannot be left so.
    pub fn config(&self, teacher: &Config) -> Result<Config> {
        self.check(teacher)?;
        let own = self.own_distances(teacher);
        let block = |(place, kept): (usize, &KeepBlock)| {
            let old = &teacher.blocks[kept.index];
            let heads = |kept: &Option<KeepHeads>| kept.as_ref().map_or(0, |kept| kept.heads.len());
            let (inner, across) = (heads(&kept.attention), heads(&kept.cross));
            Block {
                heads: inner,
                head_size: kept.attention.as_ref().or(kept.cross.as_ref()).map_or(old.head_size, KeepHeads::head_size),
                ffn_width: kept.neurons.as_ref().map_or(0, Vec::len),
                inverse_frequencies: kept.inverse_frequencies.clone(),
                cross_heads: (teacher.decodes(kept.index) && across != inner).then_some(across),
                own_distances: own[place],
                ..old.clone()
            }
        };
        Ok(Config {
            width: self.channels.len(),
            encoder: self.blocks.iter().filter(|kept| kept.index < teacher.encoder).count(),
            blocks: self.blocks.iter().enumerate().map(block).collect(),
            ..teacher.clone()
        })
    }

    /// Whether each block needs a table of distances of its own: the blocks of a stack share one while all of them have the
    /// heads of its first block.
    fn own_distances(&self, teacher: &Config) -> Vec<bool> {
        if !matches!(teacher.positions, Positions::Relative { .. }) {
            return vec![false; self.blocks.len()];
        }
        let heads = |kept: &KeepBlock| kept.attention.as_ref().map(|kept| kept.heads.clone());
        let of_stack = |encoder: bool| self.blocks.iter().filter(move |kept| (kept.index < teacher.encoder) == encoder);
        let apart = [true, false].map(|encoder| {
            let first = of_stack(encoder).next().and_then(heads);
            of_stack(encoder).any(|kept| {
                teacher.blocks[kept.index].own_distances || (kept.attention.is_some() && heads(kept) != first)
            })
        });
        let apart = |kept: &KeepBlock| apart[usize::from(kept.index >= teacher.encoder)];
        self.blocks.iter().map(|kept| kept.attention.is_some() && apart(kept)).collect()
    }

    fn check(&self, teacher: &Config) -> Result<()> {
        let refuse =
            |parameter, value: String, allowed| Err(Error::Parameter { op: "prune", parameter, value, allowed });
        let ascending = |of: &[usize], n: usize| {
            !of.is_empty() && of.windows(2).all(|pair| pair[0] < pair[1]) && of.iter().all(|&i| i < n)
        };
        if !ascending(&self.channels, teacher.width) {
            let value = format!("{} of {}", self.channels.len(), teacher.width);
            return refuse("channels", value, "some of the model's, each once, ascending");
        }
        let indices: Vec<usize> = self.blocks.iter().map(|kept| kept.index).collect();
        let encoding = indices.iter().filter(|&&i| i < teacher.encoder).count();
        let stacks = teacher.encoder == 0 || (encoding > 0 && encoding < indices.len());
        if !ascending(&indices, teacher.blocks.len()) || !stacks {
            return refuse("blocks", format!("{indices:?}"), "some of each stack, each once, ascending");
        }
        for kept in &self.blocks {
            let old = &teacher.blocks[kept.index];
            let value = || format!("block {}", kept.index);
            if old.experts.is_some() {
                return refuse("neurons", value(), "dense FFNs: those of experts are not pruned");
            }
            let decodes = teacher.decodes(kept.index);
            let attentions =
                [(&kept.attention, old.heads), (&kept.cross, if decodes { old.heads_across() } else { 0 })];
            for (kept, heads) in attentions.iter().filter_map(|(kept, heads)| Some((kept.as_ref()?, *heads))) {
                let size = kept.head_size();
                let whole = |rows: &[usize]| {
                    let mut own = rows.chunks(size.max(1)).zip(&kept.heads);
                    rows.len() == kept.heads.len() * size
                        && own.all(|(rows, &h)| {
                            let mut sorted = rows.to_vec();
                            sorted.sort_unstable();
                            sorted.dedup();
                            sorted.len() == size && rows.iter().all(|row| row / old.head_size == h)
                        })
                };
                if !ascending(&kept.heads, heads) || size == 0 || !whole(&kept.query_key) || !whole(&kept.value) {
                    let allowed =
                        "heads of the block, each once, ascending, with as many rows of each; none: no attention";
                    return refuse("heads", value(), allowed);
                }
            }
            if let (Some(own), Some(cross)) = (&kept.attention, &kept.cross)
                && own.head_size() != cross.head_size()
            {
                return refuse("heads", value(), "equal head sizes in both attentions of a block");
            }
            if kept.neurons.as_ref().is_some_and(|neurons| !ascending(neurons, old.ffn_width)) {
                return refuse("neurons", value(), "neurons of the block, each once, ascending; none: no FFN");
            }
        }
        Ok(())
    }
}
