//! The text of a run: pairs from a recipe's corpus as token examples of two streams, split, with a tokenizer.

pub mod tagging;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::schema::{self, Family, Recipe};
use crate::data::Pair;
use crate::data::batch::{Batch, BatchOptions, Direction, Example, GmaskPosition, OverLength, Stream};
use crate::data::collect::{CARD_FILE, CollectOptions, CollectionCard, Roots, collect};
use crate::data::layout::Layout;
use crate::data::order;
use crate::data::persist::read_capped;
use crate::data::split::{Fractions, Split};
use crate::data::table::{self, TableOptions};
use crate::data::terms::TermSet;
use crate::data::tokenizer::{SpecialIds, Tokenizer};
use crate::data::vocabulary::VocabularyMap;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::nn;
use crate::tensor::Tensor;

/// A held-out sentence: its example and the text that a translation is held against.
#[derive(Clone, Debug)]
pub struct Sentence {
    pub example: Example,
    pub reference: String,
}

/// One language direction of the held-out text.
#[derive(Clone, Debug)]
pub struct HeldOut {
    /// "en-zh"
    pub name: String,
    pub target_language: String,
    pub validation: Vec<Example>,
    pub test: Vec<Sentence>,
}

pub struct Corpus {
    pub tokenizer: Tokenizer,
    /// D_s: source language -> target language, every training pair.
    pub source: Stream,
    /// D_d: target language -> source language, a share of the training pairs.
    pub target: Stream,
    pub held_out: Vec<HeldOut>,
    /// How the model takes examples.
    pub layout: Layout,
    /// Tag names by id, where tokens are tagged.
    pub labels: Vec<String>,
    /// Of all pairs of the three parts: what a model learned from and is measured on.
    pub hash: String,
    /// What a reader of the report must know of the text.
    pub notes: Vec<String>,
    /// The same text in the tokens that the recipe's structured pruning leaves.
    pub narrowed: Option<Box<Narrowed>>,
}

/// Text in a part of the tokens.
pub struct Narrowed {
    pub corpus: Corpus,
    pub map: VocabularyMap,
}

struct Parts {
    train: Vec<Pair>,
    validation: Vec<Pair>,
    test: Vec<Pair>,
    notes: Vec<String>,
}

impl Parts {
    /// The training text.
    fn texts(&self) -> impl Iterator<Item = &str> {
        self.train.iter().flat_map(|p| [p.source.as_str(), p.target.as_str()])
    }

    fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for part in [&self.train, &self.validation, &self.test] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            for side in part.iter().flat_map(|pair| [&pair.source, &pair.target]) {
                hasher.update(&(side.len() as u64).to_le_bytes()).update(side.as_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// A corpus, and with it the one in the tokens that `[structure]` keeps.
fn with_narrowed(
    recipe: &Recipe,
    parts: &Parts,
    tokenizer: Tokenizer,
    encode: impl Fn(Tokenizer) -> Result<Corpus>,
) -> Result<Corpus> {
    let mut corpus = encode(tokenizer)?;
    if let Some(settings) = recipe.structure.as_ref().and_then(|s| s.vocabulary.as_ref()) {
        let counts = match &settings.text {
            Some(path) => corpus.tokenizer.counts(read_text(Path::new(path))?.lines())?,
            None => corpus.tokenizer.counts(parts.texts())?,
        };
        let (tokenizer, map) = corpus.tokenizer.narrowed(&counts, settings.min_count)?;
        corpus.narrowed = Some(Box::new(Narrowed { corpus: encode(tokenizer)?, map }));
    }
    Ok(corpus)
}

const MAX_TEXT: u64 = 1 << 30;

fn read_text(path: &Path) -> Result<String> {
    let text = String::from_utf8(read_capped(path, MAX_TEXT)?);
    text.map_err(|e| {
        Error::file(path, "text", format!("is not UTF-8 from byte {} on", e.utf8_error().valid_up_to() + 1))
    })
}

impl Corpus {
    /// Reads the text, trains the tokenizer, encodes both streams.
    pub fn prepare(recipe: &Recipe, folder: &Path) -> Result<Self> {
        let data = &recipe.data;
        if let (Family::Tagger, schema::Corpus::Terms { pairs }) = (recipe.model.family, &data.corpus) {
            return tagging::prepare(recipe, *pairs);
        }
        let mut parts = read(recipe, folder)?;
        if data.limit > 0 {
            parts.train = super::evaluate::sample(&parts.train, data.limit).into_iter().cloned().collect();
        }
        if parts.train.is_empty() || parts.test.is_empty() || parts.validation.is_empty() {
            let counts = format!("{} / {} / {}", parts.train.len(), parts.validation.len(), parts.test.len());
            return Err(Error::file(
                folder,
                "corpus",
                format!("{counts} pairs for training, validation, test: each needs some"),
            ));
        }
        let tokenizer = Tokenizer::train(parts.texts(), data.vocabulary, &[&data.source, &data.target])?;
        with_narrowed(recipe, &parts, tokenizer, |tokenizer| Self::encoded(recipe, &parts, tokenizer))
    }

    /// Both streams and the held-out text in a tokenizer's ids.
    fn encoded(recipe: &Recipe, parts: &Parts, tokenizer: Tokenizer) -> Result<Self> {
        let data = &recipe.data;
        let languages = (data.source.as_str(), data.target.as_str());
        let options = options(recipe);
        let encode = |name: &str, pairs: &[Pair], direction| {
            Stream::translation(name, &tokenizer, pairs, languages, direction, &options)
        };
        let labelled = labelled(&parts.train, data.target_share, recipe.seed);
        let source = encode("source language", &parts.train, Direction::Forward)?;
        let target = encode("target language", &labelled, Direction::Backward)?;
        let mut notes = parts.notes.clone();
        notes.push(format!(
            "{} examples {}-{}, {} examples {}-{} for training; {} left out as longer than {} tokens",
            source.examples.len(),
            languages.0,
            languages.1,
            target.examples.len(),
            languages.1,
            languages.0,
            source.dropped + target.dropped,
            data.max_length,
        ));
        let hash = parts.hash();
        let (layout, labels, held_out) = (recipe.model.family.layout(), Vec::new(), Vec::new());
        let narrowed = None;
        let mut corpus = Self { tokenizer, source, target, held_out, layout, labels, hash, notes, narrowed };
        corpus.held_out = corpus.hold_out(&parts.validation, &parts.test, languages, &options)?;
        corpus.check_survivors(recipe, parts, labelled.len())?;
        Ok(corpus)
    }

    /// Refuses text of which the length filter leaves nothing in some part: training or measuring would fail on it later.
    fn check_survivors(&self, recipe: &Recipe, parts: &Parts, labelled: usize) -> Result<()> {
        let hybrid = recipe.hybrid.is_some();
        let mut counts = vec![("training", parts.train.len(), self.source.examples.len())];
        if labelled > 0 || hybrid {
            counts.push(("target-language training", labelled, self.target.examples.len()));
        }
        for held_out in &self.held_out {
            counts.push(("validation", parts.validation.len(), held_out.validation.len()));
            counts.push(("test", parts.test.len(), held_out.test.len()));
        }
        let Some((part, all, _)) = counts.into_iter().find(|(_, _, left)| *left == 0) else {
            return Ok(());
        };
        if all == 0 {
            let (key, allowed) = ("data.target_share", "a share that chooses at least one of the training pairs");
            return Err(Error::Recipe {
                key: key.into(),
                value: recipe.data.target_share.to_string(),
                allowed: allowed.into(),
            });
        }
        let pairs = match part {
            "validation" => &parts.validation,
            "test" => &parts.test,
            _ => &parts.train,
        };
        let shortest = self.shortest(pairs, (&recipe.data.source, &recipe.data.target))?;
        let allowed =
            format!("at least {shortest}: the shortest of the {all} {part} pairs, both sides and tags together");
        Err(Error::Recipe { key: "data.max_length".into(), value: recipe.data.max_length.to_string(), allowed })
    }

    /// Tokens of the shortest of `pairs`.
    fn shortest(&self, pairs: &[Pair], languages: (&str, &str)) -> Result<usize> {
        let options = BatchOptions { max_length: usize::MAX, ..BatchOptions::default() };
        let all = Stream::translation("all", &self.tokenizer, pairs, languages, Direction::Forward, &options)?;
        Ok(all.examples.iter().map(|e| e.context.len() + e.labels.len()).min().unwrap_or(0))
    }

    /// Held-out text for a model that is already trained; without `pairs`, the test part of the embedded terms.
    pub fn for_evaluation(
        tokenizer: Tokenizer,
        pairs: Option<Vec<Pair>>,
        languages: (&str, &str),
        (layout, max_length): (Layout, usize),
    ) -> Result<Self> {
        let (test, notes) = match pairs {
            Some(pairs) => (pairs, Vec::new()),
            None => {
                let parts = terms(1, crate::data::terms::DEFAULT_COUNT)?;
                (parts.test, parts.notes)
            }
        };
        let options = BatchOptions { max_length, ..BatchOptions::default() };
        let (source, target) = (Stream::default(), Stream::default());
        let (held_out, labels, hash) = (Vec::new(), Vec::new(), String::new());
        let narrowed = None;
        let mut corpus = Self { tokenizer, source, target, held_out, layout, labels, hash, notes, narrowed };
        corpus.held_out = corpus.hold_out(&[], &test, languages, &options)?;
        Ok(corpus)
    }

    /// Both directions of held-out pairs.
    fn hold_out(
        &self,
        validation: &[Pair],
        test: &[Pair],
        languages: (&str, &str),
        options: &BatchOptions,
    ) -> Result<Vec<HeldOut>> {
        let encode = |name: &str, pairs: &[Pair], direction| -> Result<Vec<Example>> {
            Ok(Stream::translation(name, &self.tokenizer, pairs, languages, direction, options)?.examples)
        };
        let mut held_out = Vec::new();
        for (direction, (from, to)) in
            [(Direction::Forward, languages), (Direction::Backward, (languages.1, languages.0))]
        {
            let mut sentences = Vec::new();
            for pair in test {
                let reference = if direction == Direction::Forward { &pair.target } else { &pair.source };
                let examples = encode("test", std::slice::from_ref(pair), direction)?;
                sentences
                    .extend(examples.into_iter().map(|example| Sentence { example, reference: reference.clone() }));
            }
            held_out.push(HeldOut {
                name: format!("{from}-{to}"),
                target_language: to.into(),
                validation: encode("validation", validation, direction)?,
                test: sentences,
            });
        }
        Ok(held_out)
    }

    /// Lays out examples as the model takes them.
    pub fn assemble(&self, examples: &[&Example]) -> Batch {
        self.layout.assemble(examples, self.special())
    }

    pub fn special(&self) -> SpecialIds {
        self.tokenizer.special()
    }

    /// Training example by its index over both streams, the source stream first.
    pub fn example(&self, index: usize) -> Option<&Example> {
        let boundary = self.source.examples.len();
        if index < boundary { self.source.examples.get(index) } else { self.target.examples.get(index - boundary) }
    }

    pub fn examples(&self) -> usize {
        self.source.examples.len() + self.target.examples.len()
    }

    pub fn is_source(&self, index: usize) -> bool {
        index < self.source.examples.len()
    }
}

pub fn options(recipe: &Recipe) -> BatchOptions {
    BatchOptions {
        rows: recipe.teacher.batch,
        max_length: recipe.data.max_length,
        gmask: GmaskPosition::MaskIndex,
        over_length: OverLength::Drop,
        seed: recipe.seed,
    }
}

/// A fixed share of the pairs, chosen by hash so that a larger share contains a smaller one.
fn labelled<T: Clone>(pairs: &[T], share: f64, seed: u64) -> Vec<T> {
    let chosen = |(i, _): &(usize, &T)| order::unit(seed, *i as u64) < share;
    pairs.iter().enumerate().filter(chosen).map(|(_, p)| p.clone()).collect()
}

fn read(recipe: &Recipe, folder: &Path) -> Result<Parts> {
    match &recipe.data.corpus {
        schema::Corpus::Terms { pairs } => terms(recipe.seed, *pairs),
        schema::Corpus::Folder { path } => tables(Path::new(path), &recipe.data),
        schema::Corpus::Catalogs { root } => catalogs(recipe, root, folder),
    }
}

fn terms(seed: u64, count: usize) -> Result<Parts> {
    let mut parts = Parts { train: Vec::new(), validation: Vec::new(), test: Vec::new(), notes: Vec::new() };
    for sentence in TermSet::embedded()?.expand(seed, count, Fractions::default())? {
        match sentence.split {
            Split::Train => parts.train.push(sentence.pair),
            Split::Validation => parts.validation.push(sentence.pair),
            Split::Test => parts.test.push(sentence.pair),
        }
    }
    parts.notes.push(format!(
        "text: the embedded English-Chinese computer terms, {count} generated pairs ({} / {} / {} train / validation / test); term combinations do not cross the split",
        parts.train.len(), parts.validation.len(), parts.test.len()
    ));
    Ok(parts)
}

fn tables(folder: &Path, data: &schema::Data) -> Result<Parts> {
    if folder.join(CARD_FILE).exists() {
        let card = CollectionCard::read(folder)?;
        let has = card.language.split(['_', '@', '.']).next().unwrap_or_default();
        if data.source != "en" || (data.target != has && data.target != card.language) {
            let (key, value) = ("data.source, data.target".into(), format!("{}, {}", data.source, data.target));
            let allowed = format!("en, {has}: {} holds the collection of {}", folder.display(), card.language);
            return Err(Error::Recipe { key, value, allowed });
        }
    }
    let part =
        |name: &str| -> Result<Vec<Pair>> { Ok(table::read(&folder.join(name), &TableOptions::default())?.pairs) };
    let (train, validation, test) = (part("train.tsv")?, part("validation.tsv")?, part("test.tsv")?);
    Ok(Parts { train, validation, test, notes: vec![format!("text: {}", folder.display())] })
}

/// Locale folder of a language code.
fn locale(language: &str) -> &str {
    if language == "zh" { "zh_CN" } else { language }
}

fn catalogs(recipe: &Recipe, root: &str, folder: &Path) -> Result<Parts> {
    let roots = Roots { locale: PathBuf::from(root), ..Roots::default() };
    let options = CollectOptions { seed: recipe.seed, ..CollectOptions::new(locale(&recipe.data.target)) };
    let collection = collect(&roots, &options)?;
    collection.write(&folder.join("data"), false)?;
    let card = &collection.card;
    let part = |split: Split| -> Vec<Pair> {
        let pairs = collection.parts.get(&split).map_or(&[][..], Vec::as_slice);
        pairs.iter().map(|p| Pair { source: p.source.clone(), target: p.target.clone() }).collect()
    };
    let (train, validation, test) = (part(Split::Train), part(Split::Validation), part(Split::Test));
    let note = format!(
        "text: {} installed gettext catalogs ({} translations read, {} / {} / {} pairs train / validation / test), split by package; it stays on this machine",
        card.catalogs.len(),
        card.unique_pairs,
        train.len(),
        validation.len(),
        test.len()
    );
    Ok(Parts { train, validation, test, notes: vec![note] })
}

/// A batch on a device, as a model takes it.
pub fn upload(device: &Arc<dyn Device>, batch: &Batch) -> Result<nn::Batch> {
    let (b, t) = (batch.rows, batch.columns);
    Ok(nn::Batch {
        tokens: Tensor::from_slice(device, &[b, t], &batch.tokens)?,
        positions: Tensor::from_slice(device, &[b, t], &batch.positions)?,
        block_positions: Some(Tensor::from_slice(device, &[b, t], &batch.blocks)?),
        context: Some(Tensor::from_slice(device, &[b], &batch.context_lengths)?),
        lengths: Some(Tensor::from_slice(device, &[b], &batch.lengths)?),
        source: match &batch.source {
            Some(source) => Some(nn::Source {
                tokens: Tensor::from_slice(device, &[b, source.columns], &source.tokens)?,
                lengths: Tensor::from_slice(device, &[b], &source.lengths)?,
            }),
            None => None,
        },
    })
}
