//! Byte-level BPE (GPT-2's form: every byte is in the alphabet, so no text is ever unknown), trained in-process.
//!
//! The tokenizer's ids are part of a model, so training must repeat exactly; of the trainers of the `tokenizers` crate
//! only BPE does (WordPiece and Unigram depend on hash-map order). The hash goes into every run's manifest.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::persist::read_capped;
use crate::atomic::write_atomic;
use crate::error::{Error, Result};

const MAX_FILE_BYTES: u64 = 256 << 20;
const MAX_VOCABULARY: usize = 4_000_000;
/// Pad is id 0, so a zeroed buffer is padding.
const SPECIAL: [&str; 5] = ["[pad]", "[unk]", "[bos]", "[eos]", "[gMASK]"];

/// Ids of the special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpecialIds {
    pub pad: u32,
    pub unk: u32,
    pub bos: u32,
    pub eos: u32,
    pub gmask: u32,
}

/// A trained tokenizer with its special tokens and language tags (`<en>`, `<zh>`, ...).
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: SpecialIds,
    languages: BTreeMap<String, u32>,
    hash: String,
}

impl Tokenizer {
    /// Trains on `texts` up to `vocabulary` tokens (fewer when the text offers no more pairs). `languages` become tags.
    ///
    /// Errors: a vocabulary that cannot hold 256 bytes, the special tokens and the tags; a language that is no short lower-case
    /// name.
    pub fn train<'a>(
        texts: impl Iterator<Item = &'a str> + Send,
        vocabulary: usize,
        languages: &[&str],
    ) -> Result<Self> {
        let parameter =
            |parameter, value: String, allowed| Error::Parameter { op: "tokenizer", parameter, value, allowed };
        for language in languages {
            if !is_language(language) {
                return Err(parameter("language", language.to_string(), "1 to 16 letters, digits, _ or -"));
            }
        }
        if vocabulary < 256 + SPECIAL.len() + languages.len() || vocabulary > MAX_VOCABULARY {
            return Err(parameter(
                "vocabulary",
                vocabulary.to_string(),
                "256 + special tokens + languages ..= 4000000",
            ));
        }
        let tags = languages.iter().map(|language| format!("<{language}>"));
        let special = SPECIAL.iter().map(|s| s.to_string()).chain(tags);
        let trainer = BpeTrainer::builder()
            .vocab_size(vocabulary)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(special.map(|s| AddedToken::from(s, true)).collect())
            .build();
        let mut inner = tokenizers::Tokenizer::new(BPE::default());
        // No space is put before the first word: decoding gives back exactly what was encoded.
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        inner.with_decoder(Some(ByteLevel::default()));
        let in_memory = Path::new("tokenizer.json");
        inner
            .train(&mut TrainerWrapper::BpeTrainer(trainer), texts)
            .map_err(|e| Error::file(in_memory, "training", e))?;
        Self::new(inner, in_memory)
    }

    /// Reads a `tokenizer.json` that holds this module's special tokens.
    pub fn load(path: &Path) -> Result<Self> {
        Self::parse(path, &read_capped(path, MAX_FILE_BYTES)?)
    }

    /// Parses the bytes of a `tokenizer.json`; `path` only names it in errors (all [`Error::File`]).
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        // The crate panics on broken JSON inside a decoder and on some normalizers (both found by damaging files), so
        // syntax is checked first and a normalizer, which this kind of tokenizer does not have, is refused.
        let json: serde_json::Value = serde_json::from_slice(bytes)
            .map_err(|e| Error::file(path, format!("line {}, column {}", e.line(), e.column()), e))?;
        if json.get("normalizer").is_some_and(|n| !n.is_null()) {
            return Err(Error::file(path, "normalizer", "must be null: byte-level BPE takes text as it is"));
        }
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| Error::file(path, "tokenizer", e))?;
        Self::new(inner, path)
    }

    pub fn save(&self, path: &Path) -> Result<()> {
        write_atomic(path, self.to_json(path)?.as_bytes())
    }

    fn new(mut inner: tokenizers::Tokenizer, path: &Path) -> Result<Self> {
        let broken = |rule: String| Error::file(path, "tokenizer", rule);
        if !matches!(inner.get_model(), ModelWrapper::BPE(_)) {
            return Err(broken("the model is not BPE".into()));
        }
        // Lengths are the batcher's business; files of other programs may bring their own.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| broken(e.to_string()))?;
        // Text that spells a special token is text: "[eos]" in a sentence must not end it.
        inner.set_encode_special_tokens(true);
        let size = inner.get_vocab_size(true);
        if size > MAX_VOCABULARY {
            return Err(broken(format!("{size} tokens, above the cap of {MAX_VOCABULARY}")));
        }
        if let Some((token, id)) = inner.get_vocab(true).iter().filter(|(_, id)| **id as usize >= size).min() {
            return Err(broken(format!("id {id} of token {token:?} leaves a gap: there are {size} tokens")));
        }
        let id = |token: &str| inner.token_to_id(token).ok_or_else(|| broken(format!("no token {token}")));
        let special = SpecialIds {
            pad: id(SPECIAL[0])?,
            unk: id(SPECIAL[1])?,
            bos: id(SPECIAL[2])?,
            eos: id(SPECIAL[3])?,
            gmask: id(SPECIAL[4])?,
        };
        let tag = |token: &AddedToken| {
            let name = token.content.strip_prefix('<')?.strip_suffix('>')?;
            (token.special && is_language(name)).then(|| name.to_string())
        };
        let added = inner.get_added_tokens_decoder();
        let languages = added.iter().filter_map(|(id, token)| Some((tag(token)?, *id))).collect();
        let mut tokenizer = Self { inner, special, languages, hash: String::new() };
        tokenizer.hash = blake3::hash(tokenizer.to_json(path)?.as_bytes()).to_hex().to_string();
        Ok(tokenizer)
    }

    /// Blake3 of the file that [`Tokenizer::save`] writes, hexadecimal.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Number of tokens; every id is below it.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    pub fn special(&self) -> SpecialIds {
        self.special
    }

    /// Id of a language's tag. Errors when the tokenizer was not trained with that language.
    pub fn language(&self, name: &str) -> Result<u32> {
        self.languages.get(name).copied().ok_or_else(|| Error::Parameter {
            op: "tokenizer",
            parameter: "language",
            value: name.to_string(),
            allowed: "one that the tokenizer was trained with",
        })
    }

    pub fn languages(&self) -> impl Iterator<Item = &str> {
        self.languages.keys().map(String::as_str)
    }

    /// Ids of a text; never a special one.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encoding(text)?.get_ids().to_vec())
    }

    /// Ids with the byte range of the text each stands for (a leading space belongs to its token).
    pub fn encode_with_ranges(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.encoding(text)?;
        let ranges = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(ranges).collect())
    }

    /// Text of ids; special tokens and ids above the vocabulary are left out, broken UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| Error::file("tokenizer", "decoding", e))
    }

    fn encoding(&self, text: &str) -> Result<tokenizers::Encoding> {
        self.inner.encode(text, false).map_err(|e| Error::file("tokenizer", "encoding", e))
    }

    /// As the file that [`Tokenizer::save`] writes; `path` only names it in errors.
    pub fn to_json(&self, path: &Path) -> Result<String> {
        self.inner.to_string(true).map_err(|e| Error::file(path, "tokenizer", e))
    }
}

/// Whether a name can be a language's tag.
pub fn is_language(name: &str) -> bool {
    (1..=16).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))
}

#[cfg(test)]
mod tests {
    use super::super::split::Fractions;
    use super::super::terms::TermSet;
    use super::*;

    fn corpus() -> Vec<String> {
        let sentences = TermSet::embedded().unwrap().expand(1, 4000, Fractions::default()).unwrap();
        sentences.into_iter().flat_map(|s| [s.pair.source, s.pair.target]).collect()
    }

    fn trained(vocabulary: usize) -> Tokenizer {
        Tokenizer::train(corpus().iter().map(String::as_str), vocabulary, &["en", "zh"]).unwrap()
    }

    #[test]
    fn training_twice_gives_the_same_hash() {
        let (first, second) = (trained(1500), trained(1500));
        assert_eq!(first.hash(), second.hash());
        assert_ne!(first.hash(), trained(1400).hash());
        assert_eq!(first.vocabulary(), 1500);
        assert_eq!(first.special(), SpecialIds { pad: 0, unk: 1, bos: 2, eos: 3, gmask: 4 });
        assert_eq!((first.language("en").unwrap(), first.language("zh").unwrap()), (5, 6));
        assert!(matches!(first.language("nl"), Err(Error::Parameter { .. })));
    }

    #[test]
    fn any_text_survives_and_specials_are_only_text() {
        let tokenizer = trained(1500);
        for text in ["The router", " leading", "重启路由器 3 次。", "emoji 🦀 \u{0} e\u{301}", "a [eos] <en> [pad]", ""]
        {
            let ids = tokenizer.encode(text).unwrap();
            assert!(ids.iter().all(|&id| id > 6), "{text:?} {ids:?}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
        let mut ids = vec![5, 2];
        ids.extend(tokenizer.encode("ok").unwrap());
        ids.extend([3, u32::MAX]);
        assert_eq!(tokenizer.decode(&ids).unwrap(), "ok");
        assert!(tokenizer.encode("The user opened the file.").unwrap().len() < 10, "merges were learnt");
    }

    #[test]
    fn ranges_cover_the_text_in_bytes() {
        let tokenizer = trained(1500);
        let text = "Open 文件 now";
        let mut end = 0;
        for (_, range) in tokenizer.encode_with_ranges(text).unwrap() {
            assert!(range.start <= end && range.end <= text.len() && text.is_char_boundary(range.start), "{range:?}");
            end = range.end;
        }
        assert_eq!(end, text.len());
    }

    #[test]
    fn files_round_trip_and_bad_ones_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("tokenizer.json");
        let tokenizer = trained(1000);
        tokenizer.save(&path).unwrap();
        let loaded = Tokenizer::load(&path).unwrap();
        assert_eq!(loaded.hash(), tokenizer.hash());
        assert_eq!(loaded.languages().collect::<Vec<_>>(), ["en", "zh"]);
        assert_eq!(loaded.encode("a [eos] 文").unwrap(), tokenizer.encode("a [eos] 文").unwrap());
        let text = std::fs::read_to_string(&path).unwrap();
        for (bad, rule) in [
            (text[..text.len() / 2].to_string(), ""),
            ("{}".to_string(), ""),
            (text.replace("[gMASK]", "[mask]"), "no token [gMASK]"),
            (text.replace("\"[pad]\": 0", "\"[pad]\": 99999999"), ""),
            (text.replace("\"BPE\"", "\"WordLevel\""), ""),
            (text.replace("\"decoder\": {", "\"decoder\": {,"), "line "),
            (text.replace("\"normalizer\": null", "\"normalizer\": {\"type\":\"Precompiled\"}"), "normalizer"),
        ] {
            let error = Tokenizer::parse(&path, bad.as_bytes()).unwrap_err();
            assert!(matches!(&error, Error::File { .. }) && error.to_string().contains(rule), "{error}");
        }
    }

    #[test]
    fn bad_parameters_are_refused() {
        let train = |vocabulary, languages: &[&str]| Tokenizer::train(["a"].into_iter(), vocabulary, languages);
        for (vocabulary, languages) in [(256, &["en"][..]), (usize::MAX, &["en"]), (1000, &["<en>"]), (1000, &[""])] {
            assert!(matches!(train(vocabulary, languages), Err(Error::Parameter { .. })), "{vocabulary} {languages:?}");
        }
        assert!(train(262, &["en"]).unwrap().vocabulary() <= 262);
    }
}
