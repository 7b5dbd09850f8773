//! From the embedded sentences to GLM batches: every field against its definition, in both position conventions.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use espalier::Error;
use espalier::data::Pair;
use espalier::data::batch::{
    Batch, BatchOptions, Batches, Direction, GmaskPosition, IGNORE, OverLength, Stream, context,
};
use espalier::data::split::{Fractions, Split};
use espalier::data::terms::{TermSentence, TermSet};
use espalier::data::tokenizer::Tokenizer;

struct Setup {
    sentences: Vec<TermSentence>,
    pairs: Vec<Pair>,
    tokenizer: Tokenizer,
}

static SETUP: LazyLock<Setup> = LazyLock::new(|| {
    let sentences = TermSet::embedded().unwrap().expand(1, 2000, Fractions::default()).unwrap();
    let pairs: Vec<Pair> = sentences.iter().map(|s| s.pair.clone()).collect();
    let texts = pairs.iter().flat_map(|p| [p.source.as_str(), p.target.as_str()]);
    let tokenizer = Tokenizer::train(texts, 1200, &["en", "zh"]).unwrap();
    Setup { sentences, pairs, tokenizer }
});

fn stream(direction: Direction, options: &BatchOptions) -> Stream {
    Stream::translation("terms", &SETUP.tokenizer, &SETUP.pairs, ("en", "zh"), direction, options).unwrap()
}

fn batches(options: BatchOptions) -> Batches {
    Batches::new(stream(Direction::Both, &options), SETUP.tokenizer.special(), options).unwrap()
}

/// Checks one row against the definitions and gives back (from tag, source, target).
fn check_row(batch: &Batch, row: usize, gmask: GmaskPosition) -> (u32, String, String) {
    let special = SETUP.tokenizer.special();
    let place = row * batch.columns..(row + 1) * batch.columns;
    let (tokens, targets) = (&batch.tokens[place.clone()], &batch.targets[place.clone()]);
    let (positions, blocks) = (&batch.positions[place.clone()], &batch.blocks[place]);
    let (context, length) = (batch.context_lengths[row] as usize, batch.lengths[row] as usize);
    assert_eq!(tokens[context - 1], special.gmask);
    assert_eq!(tokens[context], special.bos);
    for i in 0..batch.columns {
        match i {
            i if i < context => assert_eq!((positions[i], blocks[i], targets[i]), (i as u32, 0, IGNORE)),
            i if i < length => {
                let position = if gmask == GmaskPosition::MaskIndex { context - 1 } else { i };
                assert_eq!((positions[i], blocks[i]), (position as u32, (i - context + 1) as u32));
                let next = if i + 1 < length { tokens[i + 1] } else { special.eos };
                assert_eq!(targets[i], next, "labels are the input shifted by one, and end in eos");
            }
            i => assert_eq!((tokens[i], targets[i], positions[i], blocks[i]), (special.pad, IGNORE, 0, 0)),
        }
    }
    let text = |ids: &[u32]| SETUP.tokenizer.decode(ids).unwrap();
    (tokens[0], text(&tokens[2..context - 1]), text(&tokens[context + 1..length]))
}

#[test]
fn every_field_of_every_batch_and_every_pair_in_both_directions() {
    let known: BTreeMap<&str, &str> = SETUP
        .pairs
        .iter()
        .flat_map(|p| [(p.source.as_str(), p.target.as_str()), (p.target.as_str(), p.source.as_str())])
        .collect();
    let (en, zh) = (SETUP.tokenizer.language("en").unwrap(), SETUP.tokenizer.language("zh").unwrap());
    for gmask in [GmaskPosition::MaskIndex, GmaskPosition::Continue] {
        let mut batches = batches(BatchOptions { gmask, rows: 24, ..BatchOptions::default() });
        let mut seen = BTreeMap::new();
        let (mut padded, mut places) = (0, 0);
        for step in 0..batches.steps_per_epoch() {
            let batch = batches.batch(step);
            assert_eq!(batch.columns % 8, 0);
            assert_eq!(batch.tokens.len(), batch.rows * batch.columns);
            assert_eq!(batch.targets.iter().filter(|&&t| t != IGNORE).count(), batch.token_count);
            for row in 0..batch.rows {
                let (from, source, target) = check_row(&batch, row, gmask);
                assert_eq!(known[source.as_str()], target);
                assert_eq!(from, if source.is_ascii() { en } else { zh });
                *seen.entry(source).or_insert(0) += 1;
                padded += batch.columns - batch.lengths[row] as usize;
                places += batch.columns;
            }
        }
        assert_eq!((seen.len(), seen.values().max()), (4000, Some(&1)));
        assert!(padded * 4 < places, "{padded} of {places} places are padding");
    }
}

#[test]
fn a_step_number_is_all_that_resuming_needs() {
    let options = BatchOptions { rows: 16, seed: 9, ..BatchOptions::default() };
    let mut running = batches(options.clone());
    let all: Vec<Batch> = (0..running.steps_per_epoch() * 2 + 3).map(|step| running.batch(step)).collect();
    for step in [0, 1, running.steps_per_epoch() - 1, running.steps_per_epoch(), running.steps_per_epoch() * 2 + 2] {
        assert_eq!(batches(options.clone()).batch(step), all[step as usize], "step {step}");
    }
    assert_eq!(running.batch(0), all[0], "also backwards");
    assert_ne!(all[0], all[running.steps_per_epoch() as usize], "epochs differ");
    assert_ne!(batches(BatchOptions { seed: 10, ..options }).batch(0), all[0], "seeds differ");
}

#[test]
fn long_examples_are_dropped_or_cut_and_counted() {
    let special = SETUP.tokenizer.special();
    let total = SETUP.pairs.len() as u64;
    for max_length in [8, 15, 20] {
        let with = |over_length| BatchOptions { max_length, over_length, ..BatchOptions::default() };
        let dropped = stream(Direction::Forward, &with(OverLength::Drop));
        assert_eq!(dropped.examples.len() as u64 + dropped.dropped, total);
        assert!(dropped.dropped > 0 && dropped.truncated == 0);
        let cut = stream(Direction::Forward, &with(OverLength::Truncate));
        assert_eq!((cut.examples.len() as u64, cut.dropped, cut.truncated), (total, 0, dropped.dropped));
        for example in dropped.examples.iter().chain(&cut.examples) {
            assert!(example.length() <= max_length && !example.labels.is_empty());
            assert_eq!(example.context.iter().filter(|&&t| t == special.gmask).count(), 1);
            assert_eq!(example.context.last(), Some(&special.gmask));
        }
        assert!(cut.examples.iter().all(|e| e.length() == max_length || e.labels.last() == Some(&special.eos)));
    }
}

#[test]
fn parts_of_the_embedded_set_do_not_overlap() {
    let options = BatchOptions::default();
    let part = |split| {
        let pairs: Vec<Pair> = SETUP.sentences.iter().filter(|s| s.split == split).map(|s| s.pair.clone()).collect();
        Stream::translation("part", &SETUP.tokenizer, &pairs, ("en", "zh"), Direction::Both, &options).unwrap()
    };
    let (train, test) = (part(Split::Train), part(Split::Test));
    assert_eq!((train.overlap(&test), test.overlap(&train)), (0, 0));
    assert_eq!(test.overlap(&test), test.examples.len());
}

#[test]
fn contexts_for_generation_and_bad_options() {
    let ids = context(&SETUP.tokenizer, "en", "zh", "The router").unwrap();
    assert_eq!((ids[0], ids[1]), (SETUP.tokenizer.language("en").unwrap(), SETUP.tokenizer.language("zh").unwrap()));
    assert_eq!(ids.last(), Some(&SETUP.tokenizer.special().gmask));
    assert!(matches!(context(&SETUP.tokenizer, "en", "fr", "x"), Err(Error::Parameter { .. })));
    for bad in
        [BatchOptions { rows: 0, ..BatchOptions::default() }, BatchOptions { max_length: 7, ..BatchOptions::default() }]
    {
        let refused =
            Stream::translation("x", &SETUP.tokenizer, &[], ("en", "zh"), Direction::Forward, &bad).map(|_| ());
        assert!(matches!(refused, Err(Error::Parameter { .. })), "{bad:?}");
    }
    let empty = Batches::new(Stream::default(), SETUP.tokenizer.special(), BatchOptions::default()).map(|_| ());
    assert!(matches!(empty, Err(Error::Parameter { .. })));
}
