//! How a model family takes an example: one text with a prefix, two texts, or one text with a label for each token.

use super::batch::{Batch, Example, GmaskPosition, IGNORE, LENGTH_MULTIPLE, SourceRows};
use super::tokenizer::SpecialIds;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Context and labels in one row: a GLM prefix-LM.
    Prefix(GmaskPosition),
    /// The context is the source, `[bos]` and the labels but the last the decoder's row: an encoder-decoder.
    EncoderDecoder,
    /// The context is the row, the labels are its tokens' tags: an encoder with a tagging head.
    Tagging,
}

impl Layout {
    /// Positions of an example in its row.
    pub fn length(self, example: &Example) -> usize {
        match self {
            Layout::Prefix(_) => example.length(),
            Layout::EncoderDecoder => example.labels.len(),
            Layout::Tagging => example.context.len(),
        }
    }

    /// Lays out examples in the given order.
    pub fn assemble(self, examples: &[&Example], special: SpecialIds) -> Batch {
        if let Layout::Prefix(gmask) = self {
            return Batch::assemble(examples, special, gmask);
        }
        let inputs: Vec<Vec<u32>> = examples
            .iter()
            .map(|e| match self {
                Layout::Tagging => e.context.clone(),
                _ => [special.bos].into_iter().chain(e.labels.iter().copied()).take(e.labels.len()).collect(),
            })
            .collect();
        let (columns, tokens, lengths) = padded(inputs.iter().map(Vec::as_slice), special.pad);
        let size = tokens.len();
        let mut batch = Batch {
            rows: examples.len(),
            columns,
            tokens,
            context_lengths: vec![0; examples.len()],
            lengths,
            targets: vec![IGNORE; size],
            positions: (0..size).map(|i| (i % columns) as u32).collect(),
            blocks: vec![0; size],
            source: None,
            token_count: 0,
        };
        for (row, example) in examples.iter().enumerate() {
            let labels = example.labels.iter().take(batch.lengths[row] as usize);
            for (target, &label) in batch.targets[row * columns..].iter_mut().zip(labels) {
                *target = label;
                batch.token_count += 1;
            }
        }
        if self == Layout::EncoderDecoder {
            let (columns, tokens, lengths) = padded(examples.iter().map(|e| e.context.as_slice()), special.pad);
            batch.source = Some(SourceRows { columns, tokens, lengths });
        }
        batch
    }
}

/// Rows of equal width: columns, tokens, and each row's own length.
fn padded<'r>(rows: impl Iterator<Item = &'r [u32]> + Clone, pad: u32) -> (usize, Vec<u32>, Vec<u32>) {
    let lengths: Vec<u32> = rows.clone().map(|row| row.len() as u32).collect();
    let columns = (lengths.iter().copied().max().unwrap_or(0) as usize).next_multiple_of(LENGTH_MULTIPLE);
    let filled = rows.flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(pad, columns - row.len())));
    (columns, filled.collect(), lengths)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPECIAL: SpecialIds = SpecialIds { pad: 0, unk: 1, bos: 2, eos: 3, gmask: 4 };

    fn examples() -> [Example; 2] {
        let of = |context: &[u32], labels: &[u32]| Example { context: context.to_vec(), labels: labels.to_vec() };
        [of(&[7, 8, 9, 4], &[10, 11, 3]), of(&[7; 9], &[12, 3])]
    }

    #[test]
    fn an_encoder_decoder_reads_the_context_and_predicts_the_labels_shifted() {
        let [a, b] = examples();
        let batch = Layout::EncoderDecoder.assemble(&[&a, &b], SPECIAL);
        assert_eq!(
            (batch.columns, &batch.tokens[..4], &batch.targets[..4]),
            (8, &[2, 10, 11, 0][..], &[10, 11, 3, IGNORE][..])
        );
        assert_eq!((batch.token_count, &batch.lengths[..]), (5, &[3, 2][..]));
        let source = batch.source.as_ref().unwrap();
        assert_eq!((source.columns, &source.lengths[..], &source.tokens[..5]), (16, &[4, 9][..], &[7, 8, 9, 4, 0][..]));
        let second = batch.rows_of(1..2);
        assert_eq!((second.token_count, second.source.unwrap().lengths), (2, vec![9]));
    }

    #[test]
    fn a_tagger_has_a_label_for_each_token() {
        let example = Example { context: vec![5, 6, 7], labels: vec![0, 1, 2] };
        let batch = Layout::Tagging.assemble(&[&example], SPECIAL);
        assert_eq!((&batch.tokens[..4], &batch.targets[..4]), (&[5, 6, 7, 0][..], &[0, 1, 2, IGNORE][..]));
        assert_eq!((batch.source, batch.token_count, Layout::Tagging.length(&example)), (None, 3, 3));
    }
}
