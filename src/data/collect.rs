//! Bilingual text from the gettext catalogs that are installed on the machine: find, pair, clean, split by package, write.
//!
//! The text follows the licences of its programs and stays on the machine; every pair carries its package, version and
//! licence, so that a user can see what a model was trained on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::card::DataCard;
use super::package::{self, PackageIndex};
use super::split::{self, Fractions, HeldOut, Split};
use super::{catalog, clean, persist};
use crate::error::{Error, Result};
use crate::json;

/// Name of the card in a written collection; also the mark by which an earlier collection is known.
pub const CARD_FILE: &str = "card.json";

/// Where the machine keeps what a collection reads.
#[derive(Clone, Debug)]
pub struct Roots {
    pub locale: PathBuf,
    pub dpkg: PathBuf,
    pub doc: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            locale: PathBuf::from("/usr/share/locale"),
            dpkg: PathBuf::from("/var/lib/dpkg"),
            doc: PathBuf::from("/usr/share/doc"),
        }
    }
}

#[derive(Clone, Debug)]
pub struct CollectOptions {
    /// Name of the locale folder: zh_CN, es, nl, ...
    pub language: String,
    pub seed: u64,
    pub fractions: Fractions,
}

impl CollectOptions {
    pub fn new(language: impl ToString) -> Self {
        Self { language: language.to_string(), seed: 1, fractions: Fractions::default() }
    }
}

/// One cleaned pair; `catalog` indexes [`CollectionCard::catalogs`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogPair {
    pub source: String,
    pub target: String,
    pub catalog: usize,
}

/// Everything known of a collection but its text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollectionCard {
    pub language: String,
    pub seed: u64,
    pub fractions: Fractions,
    /// Distinct translated pairs before cleaning.
    pub unique_pairs: u64,
    /// One row per catalog entry.
    pub rows: DataCard,
    pub catalogs: Vec<CatalogCard>,
    /// Catalogs that could not be read, with the reason.
    pub skipped: Vec<SkippedCatalog>,
    /// Catalogs that an installed package lists but the disk lacks: slim images strip them.
    pub stripped: u64,
    pub parts: BTreeMap<Split, PartCard>,
    /// Packages that would bring more text.
    pub suggestions: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CatalogCard {
    pub path: PathBuf,
    /// Binary package, or the catalog's own name when no package owns it.
    pub package: String,
    pub version: String,
    pub licence: String,
    /// What is kept together when splitting: the source package, or the catalog's own name.
    pub group: String,
    pub entries: u64,
    pub kept: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SkippedCatalog {
    pub path: PathBuf,
    pub reason: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PartCard {
    pub rows: u64,
    pub groups: Vec<String>,
    /// Blake3 of the part's TSV file.
    pub blake3: String,
}

#[derive(Clone, Debug)]
pub struct Collection {
    pub parts: BTreeMap<Split, Vec<CatalogPair>>,
    pub card: CollectionCard,
}

const MAX_CARD: u64 = 256 << 20;

impl CollectionCard {
    /// The card of a written collection.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(CARD_FILE);
        let bytes = persist::read_capped(&path, MAX_CARD)?;
        json::read(&path, &bytes)
    }

    /// Parts that hold no pair: text of a single package cannot be split by package.
    pub fn empty_parts(&self) -> Vec<&'static str> {
        let rows = |part: &Split| self.parts.get(part).map_or(0, |p| p.rows);
        Split::ALL.iter().filter(|part| rows(part) == 0).map(|part| part.name()).collect()
    }
}

/// Reads every catalog of one language under `roots.locale`.
///
/// Errors: a language name that is no folder name ([`Error::Usage`]); no usable catalog ([`Error::File`], naming what was
/// found and which packages to install); bad fractions. A catalog that breaks its format is skipped and listed.
pub fn collect(roots: &Roots, options: &CollectOptions) -> Result<Collection> {
    check_language(&options.language)?;
    options.fractions.check()?;
    let folder = roots.locale.join(&options.language).join("LC_MESSAGES");
    let paths = catalogs_in(&folder);
    let index = PackageIndex::read(&roots.dpkg, &roots.locale);
    let stripped = index.paths().filter(|path| path.starts_with(&folder) && !path.exists()).count() as u64;
    let mut card = CollectionCard {
        language: options.language.clone(),
        seed: options.seed,
        fractions: options.fractions,
        unique_pairs: 0,
        rows: DataCard::new(folder.display()),
        catalogs: Vec::new(),
        skipped: Vec::new(),
        stripped,
        parts: BTreeMap::new(),
        suggestions: suggestions(&paths),
    };
    let pairs = read_catalogs(roots, &index, &paths, &mut card)?;
    if pairs.is_empty() {
        return Err(nothing_found(roots, &card, paths.len()));
    }
    let mut collection = Collection { parts: split_pairs(pairs, &mut card)?, card };
    for part in Split::ALL {
        let blake3 = blake3::hash(&collection.tsv(part)).to_hex().to_string();
        collection.card.parts.entry(part).or_default().blake3 = blake3;
    }
    Ok(collection)
}

/// The languages that have at least one catalog, with their number of catalogs.
pub fn languages(locale: &Path) -> BTreeMap<String, usize> {
    let Ok(folders) = fs::read_dir(locale) else { return BTreeMap::new() };
    let names = folders.filter_map(|f| f.ok()?.file_name().into_string().ok());
    names
        .map(|name| {
            let count = catalogs_in(&locale.join(&name).join("LC_MESSAGES")).len();
            (name, count)
        })
        .filter(|(_, count)| *count > 0)
        .collect()
}

impl Collection {
    /// Writes `train.tsv`, `validation.tsv`, `test.tsv` and the card, the card last; what else the folder holds stays.
    /// Columns (named in the first line): source, target, package, version, licence.
    ///
    /// An earlier collection of the same language is replaced. One of another language, or a folder that holds other
    /// things, is refused unless `overwrite`: a name typed wrongly must cost nothing.
    pub fn write(&self, directory: &Path, overwrite: bool) -> Result<()> {
        if !overwrite {
            self.check_place(directory)?;
        }
        let card = serde_json::to_vec_pretty(&self.card)
            .map_err(|e| Error::file(directory.join(CARD_FILE), format!("line {}", e.line()), e))?;
        let mut files = vec![(CARD_FILE, card)];
        for (part, name) in Split::ALL.into_iter().zip(["train.tsv", "validation.tsv", "test.tsv"]) {
            files.push((name, self.tsv(part)));
        }
        persist::put_files(directory, CARD_FILE, &files)
    }

    fn check_place(&self, directory: &Path) -> Result<()> {
        let refused = |rule: String| {
            let rule = format!("{rule}; name another folder, or replace its collection with --overwrite");
            Err(Error::Usage { argument: "--out", value: directory.display().to_string(), rule })
        };
        if directory.symlink_metadata().is_err() {
            return Ok(());
        }
        if !directory.is_dir() {
            return refused("is no folder".into());
        }
        if !directory.join(CARD_FILE).exists() {
            let first = fs::read_dir(directory).map_err(|e| Error::io(directory, e))?.next();
            return first.map_or(Ok(()), |_| refused(format!("is not empty and holds no {CARD_FILE}")));
        }
        match CollectionCard::read(directory) {
            Ok(card) if card.language == self.card.language => Ok(()),
            Ok(card) => refused(format!("holds the collection of {}, not of {}", card.language, self.card.language)),
            Err(error) => refused(format!("holds a card of something else ({error})")),
        }
    }

    fn tsv(&self, part: Split) -> Vec<u8> {
        let mut text = String::from("source\ttarget\tpackage\tversion\tlicence\n");
        for pair in self.parts.get(&part).into_iter().flatten() {
            // Cleaning left neither tabs nor line breaks in the text; the facts of a package are made to follow.
            let Some(CatalogCard { package, version, licence, .. }) = self.card.catalogs.get(pair.catalog) else {
                continue;
            };
            for (field, end) in
                [(&pair.source, '\t'), (&pair.target, '\t'), (package, '\t'), (version, '\t'), (licence, '\n')]
            {
                text.extend(field.chars().map(|c| if c.is_control() { ' ' } else { c }));
                text.push(end);
            }
        }
        text.into_bytes()
    }
}

fn check_language(language: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '@' | '.' | '-');
    if language.is_empty() || language.len() > 64 || language.starts_with('.') || !language.chars().all(allowed) {
        let rule = "a locale folder name such as zh_CN, es or nl".to_string();
        return Err(Error::Usage { argument: "language", value: language.to_string(), rule });
    }
    Ok(())
}

fn catalogs_in(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "mo"));
    paths.sort();
    paths
}

/// Reads and cleans; every entry is counted once, under "kept" or under the first rule it breaks.
fn read_catalogs(
    roots: &Roots,
    index: &PackageIndex,
    paths: &[PathBuf],
    card: &mut CollectionCard,
) -> Result<Vec<CatalogPair>> {
    let mut pairs = Vec::new();
    let mut seen = BTreeSet::new();
    let mut unique = BTreeSet::new();
    let mut hasher = blake3::Hasher::new();
    for path in paths {
        // The card is text: a name that is none would make it unwritable, and with it the whole collection.
        if path.to_str().is_none() {
            let path = PathBuf::from(path.to_string_lossy().into_owned());
            card.skipped.push(SkippedCatalog { path, reason: "its file name is not UTF-8".into() });
            continue;
        }
        let parsed = match catalog::read(path) {
            Ok(parsed) => parsed,
            Err(error) => {
                card.skipped.push(SkippedCatalog { path: path.clone(), reason: error.to_string() });
                continue;
            }
        };
        let number = card.catalogs.len();
        let mut about = describe(roots, index, path, &card.language);
        for entry in parsed.entries {
            about.entries += 1;
            let position = || format!("{}: byte {}", path.display(), entry.position);
            let target = entry.targets.first().map(String::as_str).unwrap_or_default();
            for side in [&entry.source, target] {
                hasher.update(side.as_bytes()).update(&[0]);
            }
            if !target.is_empty() {
                unique.insert(blake3::hash(format!("{}\0{target}", entry.source).as_bytes()).as_bytes().to_owned());
            }
            match clean::clean(&card.language, &entry.source, target) {
                Err(rule) => card.rows.drop_row(rule, position),
                Ok(pair) if !seen.insert(pair.clone()) => card.rows.drop_row("duplicate pair", position),
                Ok((source, target)) => {
                    card.rows.keep();
                    about.kept += 1;
                    pairs.push(CatalogPair { source, target, catalog: number });
                }
            }
        }
        card.catalogs.push(about);
    }
    card.unique_pairs = unique.len() as u64;
    card.rows.blake3 = hasher.finalize().to_hex().to_string();
    Ok(pairs)
}

fn describe(roots: &Roots, index: &PackageIndex, path: &Path, language: &str) -> CatalogCard {
    let domain = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let (package, version, licence, group) = match index.owner(path) {
        Some(package) => (
            package.to_string(),
            index.version(package).unwrap_or("unknown").to_string(),
            package::licence(&roots.doc, package, language),
            index.source(package).to_string(),
        ),
        None => (domain.clone(), "unknown".into(), package::SEE_COPYRIGHT.into(), domain),
    };
    CatalogCard { path: path.to_path_buf(), package, version, licence, group, entries: 0, kept: 0 }
}

/// Splits by group, then takes out of the larger part what looks like a pair of a held-out part.
fn split_pairs(pairs: Vec<CatalogPair>, card: &mut CollectionCard) -> Result<BTreeMap<Split, Vec<CatalogPair>>> {
    let mut sizes: BTreeMap<String, usize> = BTreeMap::new();
    for pair in &pairs {
        *sizes.entry(card.catalogs[pair.catalog].group.clone()).or_default() += 1;
    }
    let assigned = split::by_group(&sizes, card.fractions, card.seed)?;
    let mut parts: BTreeMap<Split, Vec<CatalogPair>> = Split::ALL.into_iter().map(|s| (s, Vec::new())).collect();
    for pair in pairs {
        let part = assigned.get(&card.catalogs[pair.catalog].group).copied().unwrap_or(Split::Train);
        parts.entry(part).or_default().push(pair);
    }
    let mut held_out = HeldOut::default();
    for part in [Split::Test, Split::Validation, Split::Train] {
        let rows = parts.entry(part).or_default();
        rows.retain(|pair| match held_out.leak(&pair.source, &pair.target) {
            None => true,
            Some(rule) => {
                let about = &mut card.catalogs[pair.catalog];
                about.kept -= 1;
                card.rows.drop_kept(rule, || format!("{}: {:?}", about.path.display(), pair.source));
                false
            }
        });
        for pair in rows.iter().filter(|_| part != Split::Train) {
            held_out.insert(&pair.source, &pair.target);
        }
        let groups = assigned.iter().filter(|(_, s)| **s == part).map(|(name, _)| name.clone()).collect();
        card.parts.insert(part, PartCard { rows: rows.len() as u64, groups, blake3: String::new() });
    }
    Ok(parts)
}

/// Debian packages with much computer text, by the catalog they bring. `*` ends a name that carries a version.
const KNOWN: &[(&str, &str)] = &[
    ("git", "git"),
    ("coreutils", "coreutils"),
    ("libc", "libc-l10n"),
    ("dpkg", "dpkg"),
    ("bash", "bash"),
    ("gettext-tools", "gettext"),
    ("gnupg2", "gnupg-l10n"),
    ("binutils", "binutils-common"),
    ("iso_3166-2", "iso-codes"),
    ("glib20", "libglib2.0-data"),
    ("xkeyboard-config", "xkb-data"),
    ("wget", "wget"),
    ("postgres-*", "postgresql"),
    ("psql-*", "postgresql-client"),
    ("gtk20-properties", "libgtk2.0-common"),
    ("gcc-*", "gcc-12-locales"),
    ("gimp20", "gimp-data"),
    ("inkscape", "inkscape"),
    ("gnucash", "gnucash-common"),
];

fn suggestions(paths: &[PathBuf]) -> Vec<String> {
    let domains: Vec<&str> = paths.iter().filter_map(|p| p.file_stem()?.to_str()).collect();
    let present = |pattern: &str| match pattern.strip_suffix('*') {
        Some(prefix) => domains.iter().any(|d| d.starts_with(prefix)),
        None => domains.contains(&pattern),
    };
    KNOWN.iter().filter(|(domain, _)| !present(domain)).map(|(_, package)| package.to_string()).collect()
}

fn nothing_found(roots: &Roots, card: &CollectionCard, catalogs: usize) -> Error {
    let mut rule = format!("no usable pair in {catalogs} catalogs");
    if let Some(skipped) = card.skipped.first() {
        rule += &format!("; {} skipped, the first because of: {}", card.skipped.len(), skipped.reason);
    }
    if card.stripped > 0 {
        rule += &format!(
            "; {} catalogs of installed packages were stripped from this system (see path-exclude in /etc/dpkg/dpkg.cfg.d)",
            card.stripped
        );
    }
    let mut others: Vec<(String, usize)> = languages(&roots.locale).into_iter().collect();
    others.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let others: Vec<String> = others.into_iter().take(8).map(|(name, count)| format!("{name} ({count})")).collect();
    rule += &match others.as_slice() {
        [] => "; no language has catalogs here".to_string(),
        others => format!("; languages with catalogs: {}", others.join(", ")),
    };
    rule += &format!("; on Debian install for example: {}", card.suggestions.join(" "));
    Error::file(roots.locale.join(&card.language), format!("language {}", card.language), rule)
}
