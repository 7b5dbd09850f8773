//! A tokenizer with fewer tokens: those of a text, and what it takes that no text is unknown.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// Which of a larger vocabulary's tokens a smaller one has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VocabularyMap {
    /// Tokens of the larger one.
    pub before: usize,
    /// The larger one's id of each token of the smaller one, ascending.
    pub kept: Vec<u32>,
}

impl VocabularyMap {
    /// Id of a token of the larger vocabulary in the smaller one; `None`: it is gone.
    pub fn id(&self, old: u32) -> Option<u32> {
        self.kept.binary_search(&old).ok().map(|id| id as u32)
    }

    /// Ids in the smaller vocabulary, `unknown` (one of it) for what is gone.
    pub fn ids(&self, old: &[u32], unknown: u32) -> Vec<u32> {
        old.iter().map(|&id| self.id(id).unwrap_or(unknown)).collect()
    }

    /// Id in the larger vocabulary.
    pub fn before(&self, new: u32) -> Option<u32> {
        self.kept.get(new as usize).copied()
    }
}

impl Tokenizer {
    /// How often each token stands in `texts`.
    ///
    /// # Errors
    /// Those of encoding.
    pub fn counts<'a>(&self, texts: impl Iterator<Item = &'a str>) -> Result<Vec<usize>> {
        let mut counts = vec![0; self.vocabulary()];
        for text in texts {
            for id in self.encode(text)? {
                counts[id as usize] += 1;
            }
        }
        Ok(counts)
    }

    /// The tokenizer with the tokens that `counts` has at least `min_count` of, those that they are merged from, all bytes and
    /// all special tokens. Text of kept tokens gets the ids that the map gives them; a token that is gone is written as
    /// others, by the merges that are left.
    ///
    /// # Errors
    /// `Error::File` for a tokenizer whose form has no vocabulary and merges.
    pub fn narrowed(&self, counts: &[usize], min_count: usize) -> Result<(Tokenizer, VocabularyMap)> {
        let path = Path::new("tokenizer.json");
        let broken = |rule: &str| Error::file(path, "model", rule);
        let mut json: Value =
            serde_json::from_str(&self.to_json(path)?).map_err(|e| Error::file(path, "model", e.to_string()))?;
        let vocabulary: BTreeMap<String, u32> = serde_json::from_value(json["model"]["vocab"].clone())
            .map_err(|_| broken("has a vocabulary of names and ids"))?;
        let rules = json["model"]["merges"].as_array().ok_or_else(|| broken("has merges"))?.clone();
        let merges = rules
            .iter()
            .map(|rule| parts(rule).ok_or_else(|| broken("merges pairs of tokens")))
            .collect::<Result<Vec<[String; 2]>>>()?;
        let added: BTreeSet<u64> =
            json["added_tokens"].as_array().into_iter().flatten().filter_map(|token| token["id"].as_u64()).collect();
        let merged: BTreeSet<String> = merges.iter().map(|pair| pair.concat()).collect();
        let wanted = |(name, id): (&String, &u32)| {
            let counted = counts.get(*id as usize).is_some_and(|&count| count >= min_count.max(1));
            counted || added.contains(&u64::from(*id)) || !merged.contains(name)
        };
        let mut kept: BTreeSet<String> =
            vocabulary.iter().filter(|(name, id)| wanted((name, id))).map(|(name, _)| name.clone()).collect();
        // Later merges build on earlier ones.
        for pair in merges.iter().rev() {
            if kept.contains(&pair.concat()) {
                kept.extend(pair.iter().cloned());
            }
        }
        let mut map = VocabularyMap { before: self.vocabulary(), kept: Vec::new() };
        map.kept.extend(vocabulary.iter().filter(|(name, _)| kept.contains(*name)).map(|(_, id)| *id));
        map.kept.extend(added.iter().map(|&id| id as u32));
        map.kept.sort_unstable();
        map.kept.dedup();
        let names: serde_json::Map<String, Value> =
            vocabulary.iter().filter_map(|(name, id)| Some((name.clone(), Value::from(map.id(*id)?)))).collect();
        json["model"]["vocab"] = Value::Object(names);
        let stays = |(_, pair): &(&Value, &[String; 2])| {
            kept.contains(&pair.concat()) && pair.iter().all(|part| kept.contains(part))
        };
        let rules: Vec<Value> = rules.iter().zip(&merges).filter(stays).map(|(rule, _)| rule.clone()).collect();
        json["model"]["merges"] = Value::Array(rules);
        for token in json["added_tokens"].as_array_mut().into_iter().flatten() {
            if let Some(id) = token["id"].as_u64().and_then(|id| map.id(id as u32)) {
                token["id"] = id.into();
            }
        }
        Ok((Tokenizer::parse(path, json.to_string().as_bytes())?, map))
    }
}

/// The two tokens of a merge, in either form that files have.
fn parts(rule: &Value) -> Option<[String; 2]> {
    match rule {
        Value::String(line) => {
            let (a, b) = line.split_once(' ')?;
            Some([a.to_string(), b.to_string()])
        }
        Value::Array(pair) => match pair.as_slice() {
            [a, b] => Some([a.as_str()?.to_string(), b.as_str()?.to_string()]),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::split::Fractions;
    use super::super::terms::TermSet;
    use super::*;

    #[test]
    fn kept_text_gets_the_mapped_ids_and_no_text_is_unknown() {
        let sentences = TermSet::embedded().unwrap().expand(1, 3000, Fractions::default()).unwrap();
        let all: Vec<&str> = sentences.iter().flat_map(|s| [s.pair.source.as_str(), s.pair.target.as_str()]).collect();
        let tokenizer = Tokenizer::train(all.iter().copied(), 1500, &["en", "zh"]).unwrap();
        for min_count in [1, 20, usize::MAX] {
            let text = &all[..40];
            let counts = tokenizer.counts(text.iter().copied()).unwrap();
            let (small, map) = tokenizer.narrowed(&counts, min_count).unwrap();
            assert_eq!((small.vocabulary(), map.before), (map.kept.len(), 1500));
            assert!(map.kept.len() < 1000 && map.kept.len() >= 263, "{}", map.kept.len());
            assert_eq!(small.special(), tokenizer.special(), "special tokens come first in both");
            assert_eq!(small.language("zh").unwrap(), tokenizer.language("zh").unwrap());
            for line in &all {
                let old = tokenizer.encode(line).unwrap();
                let new = small.encode(line).unwrap();
                assert_eq!(small.decode(&new).unwrap(), *line);
                if old.iter().all(|&id| map.id(id).is_some()) {
                    assert_eq!(new, map.ids(&old, 1));
                    assert!(new.iter().zip(&old).all(|(&new, &old)| map.before(new) == Some(old)));
                }
            }
            if min_count == 1 {
                assert!(text.iter().all(|line| tokenizer.encode(line).unwrap().iter().all(|&id| map.id(id).is_some())));
            }
        }
    }
}
