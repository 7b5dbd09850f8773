//! What a part of a model reads of a micro-batch: only that is brought to its device or sent to its process.

use std::ops::Range;
use std::sync::Arc;

use crate::device::Device;
use crate::error::Result;
use crate::nn::Config;
use crate::nn::config::{AttentionKind, Positions};
use crate::nn::pieces;
use crate::train::lifecycle::Micro;

/// Which of [`Micro::tensors`], by their places.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reads([bool; Micro::PLACES]);

impl Reads {
    pub const ALL: Self = Self([true; Micro::PLACES]);

    /// Of these pieces of a model: what `Pass::enter`, `Pass::pass_block` and the losses ask of a batch.
    pub fn of<'a>(config: &Config, chunks: impl IntoIterator<Item = &'a Range<usize>>) -> Self {
        let head = pieces::pieces(config) - 1;
        let (mut enters, mut passes, mut ends) = (false, false, false);
        for piece in chunks.into_iter().flat_map(Range::clone) {
            enters |= piece == 0;
            passes |= (1..head).contains(&piece);
            ends |= piece == head;
        }
        let learned = enters && config.positions == Positions::Learned;
        let rotary = passes && config.positions != Positions::Learned;
        let blocks = passes && config.positions == Positions::Rotary2d;
        let context = passes && config.attention == AttentionKind::Prefix;
        let batch = [enters, learned || rotary, blocks, context, passes];
        // Targets, weights and the teacher's states; and the text of an encoder, which no model in stages has.
        Self(std::array::from_fn(|at| batch.get(at).copied().unwrap_or(ends)))
    }

    /// Whether the tensor at this place is read.
    pub fn contains(&self, place: usize) -> bool {
        self.0.get(place).copied().unwrap_or(false)
    }

    /// A micro-batch whose tensors lie on `device` as far as they are read. The others stay where they are: an op that reads
    /// one all the same is refused.
    pub fn bring(&self, micro: &Micro, device: &Arc<dyn Device>) -> Result<Micro> {
        let stays = |t: &crate::tensor::Tensor| Arc::ptr_eq(t.device(), device);
        micro.map(|place, t| if self.contains(place) && !stays(t) { t.to_device(device) } else { Ok(t.clone()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::config::Size;

    const SIZE: Size = Size { layers: 3, heads: 2, head_size: 8, ffn_width: 32, max_positions: 32 };

    fn read(config: &Config, pieces: Range<usize>) -> Vec<usize> {
        let reads = Reads::of(config, [&pieces]);
        (0..Micro::PLACES).filter(|place| reads.contains(*place)).collect()
    }

    #[test]
    fn each_part_reads_its_own() {
        let glm = Config::glm(SIZE, 37);
        assert_eq!(read(&glm, 0..1), [0]);
        assert_eq!(read(&glm, 1..4), [1, 2, 3, 4]);
        assert_eq!(read(&glm, 4..5), (5..Micro::PLACES).collect::<Vec<_>>());
        assert_eq!(read(&glm, 0..5), (0..Micro::PLACES).collect::<Vec<_>>());
        let tagger = Config::bert_tagger(SIZE, 37, vec!["O".into(), "B".into()]);
        assert_eq!(read(&tagger, 0..1), [0, 1]);
        assert_eq!(read(&tagger, 2..4), [4]);
        assert_eq!(Reads::of(&glm, []), Reads::default());
    }
}
