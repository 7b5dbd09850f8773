//! `data collect` on a made-up machine, and on this one when it has catalogs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use espalier::Error;
use espalier::data::clean::{clean, is_han};
use espalier::data::collect::{CARD_FILE, CollectOptions, CollectionCard, Roots, collect, languages};
use espalier::data::split::{Fractions, Split, near_duplicate_form};
use espalier::data::table::{self, TableOptions};

use proptest::prelude::*;

use super::mo;

/// A machine with three packages of two sources, one catalog without a package and one broken catalog.
struct Machine {
    root: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let machine = Self { root: tempfile::tempdir().unwrap() };
        for (domain, package, rows) in
            [("alpha", "alpha-bin", 60), ("beta", "beta-bin", 30), ("gamma", "gamma-bin", 12)]
        {
            machine.catalog(domain, &sentences(domain, rows));
            let list = format!("/.\n/usr\n{}\n", machine.catalog_path(domain).display());
            machine.write(&format!("dpkg/info/{package}:amd64.list"), &list);
        }
        machine.catalog("orphan", &sentences("orphan", 5));
        machine.write("locale/zh_CN/LC_MESSAGES/broken.mo", "not a catalog at all, but longer than a header");
        machine.write(
            "dpkg/status",
            "Package: alpha-bin\nVersion: 1.2-3\n\nPackage: beta-bin\nSource: alpha (9)\nVersion: 2\n\nPackage: gamma-bin\n",
        );
        machine.write(
            "doc/alpha-bin/copyright",
            "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\nFiles: *\nLicense: GPL-2+\n text\n",
        );
        machine.write("doc/beta-bin/copyright", "This package was debianized by somebody.\n");
        machine
    }

    fn roots(&self) -> Roots {
        let at = |name: &str| self.root.path().join(name);
        Roots { locale: at("locale"), dpkg: at("dpkg"), doc: at("doc") }
    }

    fn catalog_path(&self, domain: &str) -> PathBuf {
        self.root.path().join(format!("locale/zh_CN/LC_MESSAGES/{domain}.mo"))
    }

    fn catalog(&self, domain: &str, pairs: &[(String, String)]) {
        let pairs: Vec<(&str, &str)> = pairs.iter().map(|(s, t)| (s.as_str(), t.as_str())).collect();
        let path = self.catalog_path(domain);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, mo::build(&mo::entries(&pairs), false)).unwrap();
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

/// Distinct sentences whose words differ between catalogs (a number alone would make near-duplicates).
fn sentences(domain: &str, rows: usize) -> Vec<(String, String)> {
    let letters =
        |i: usize| -> String { format!("{}{}", (b'a' + (i / 26) as u8) as char, (b'a' + (i % 26) as u8) as char) };
    let han = |i: usize| char::from_u32(0x4e00 + i as u32).unwrap();
    let base = domain.bytes().map(usize::from).sum::<usize>() * 100;
    (0..rows).map(|i| (format!("{domain} word {}", letters(i)), format!("词{}{}", han(base + i), domain))).collect()
}

#[test]
fn packages_versions_licences_and_parts() {
    let machine = Machine::new();
    let mut options = CollectOptions::new("zh_CN");
    options.fractions = Fractions { validation: 0.1, test: 0.15 };
    let collection = collect(&machine.roots(), &options).unwrap();
    let card = &collection.card;

    let facts: Vec<_> = card
        .catalogs
        .iter()
        .map(|c| (c.package.as_str(), c.version.as_str(), c.licence.as_str(), c.group.as_str(), c.kept))
        .collect();
    assert_eq!(
        facts,
        [
            ("alpha-bin", "1.2-3", "GPL-2+", "alpha-bin", 60),
            ("beta-bin", "2", "see copyright", "alpha", 30),
            ("gamma-bin", "unknown", "see copyright", "gamma-bin", 12),
            ("orphan", "unknown", "see copyright", "orphan", 5),
        ]
    );
    assert_eq!(card.skipped.len(), 1);
    assert!(card.skipped[0].reason.contains("broken.mo: byte 0: magic"), "{}", card.skipped[0].reason);
    assert_eq!((card.rows.rows, card.rows.kept, card.unique_pairs), (107, 107, 107));

    // Every group is in one part; parts hold all rows.
    let groups: Vec<&String> = card.parts.values().flat_map(|p| &p.groups).collect();
    assert_eq!(groups.len(), 4);
    assert_eq!(groups.iter().collect::<BTreeSet<_>>().len(), 4);
    assert_eq!(card.parts.values().map(|p| p.rows).sum::<u64>(), 107);
    for split in Split::ALL {
        assert!(card.parts[&split].rows > 0, "{split:?}");
    }
    assert_eq!(collection.card, collect(&machine.roots(), &options).unwrap().card, "same seed, same collection");
}

#[test]
fn near_duplicates_leave_the_larger_part_and_are_counted() {
    let machine = Machine::new();
    let mut pairs = sentences("alpha", 60);
    pairs.push(("Gamma word: aa (%d)".into(), "完全不同（%d）".into()));
    pairs.push(("something else".into(), "词".to_string() + &sentences("gamma", 1)[0].1[3..]));
    pairs.push(("alpha word aa".into(), sentences("alpha", 1)[0].1.clone()));
    pairs.push(("cannot open %s".into(), "无法打开".into()));
    machine.catalog("alpha", &pairs);
    let mut options = CollectOptions::new("zh_CN");
    options.fractions = Fractions { validation: 0.1, test: 0.15 };
    let collection = collect(&machine.roots(), &options).unwrap();
    let rows = &collection.card.rows;
    assert_eq!(rows.rows, rows.kept + rows.dropped.values().map(|d| d.count).sum::<u64>());
    assert_eq!(rows.dropped_by("placeholders differ"), 1);
    assert_eq!(rows.dropped_by("duplicate pair"), 1);
    assert_eq!(rows.dropped_by("source near-duplicate of a held-out pair"), 1);
    assert_eq!(rows.dropped_by("target near-duplicate of a held-out pair"), 1);
    let forms = |split: Split| -> BTreeSet<String> {
        collection.parts[&split].iter().map(|p| near_duplicate_form(&p.source)).collect()
    };
    assert!(forms(Split::Train).is_disjoint(&forms(Split::Test)));
    assert!(forms(Split::Train).is_disjoint(&forms(Split::Validation)));
    assert!(forms(Split::Validation).is_disjoint(&forms(Split::Test)));
}

#[test]
fn what_is_written_reads_back_and_replaces_only_itself() {
    let machine = Machine::new();
    let collection = collect(&machine.roots(), &CollectOptions::new("zh_CN")).unwrap();
    let out = machine.root.path().join("out");
    collection.write(&out, false).unwrap();
    fs::write(out.join("notes.txt"), "mine").unwrap();
    collection.write(&out, false).unwrap();
    assert!(out.join("notes.txt").exists(), "a user's own file stays");
    let card: CollectionCard = serde_json::from_slice(&fs::read(out.join(CARD_FILE)).unwrap()).unwrap();
    assert_eq!(card, collection.card);
    for split in Split::ALL {
        let table = table::read(&out.join(format!("{}.tsv", split.name())), &TableOptions::default()).unwrap();
        let expected: Vec<_> = collection.parts[&split].iter().map(|p| (&p.source, &p.target)).collect();
        assert_eq!(table.pairs.iter().map(|p| (&p.source, &p.target)).collect::<Vec<_>>(), expected);
        assert_eq!(table.card.blake3, card.parts[&split].blake3);
    }
    let foreign = machine.root.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("mine.txt"), "x").unwrap();
    assert!(matches!(collection.write(&foreign, false), Err(Error::Usage { .. })));
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1);
    collection.write(&foreign, true).unwrap();
    assert!(foreign.join("mine.txt").exists() && foreign.join(CARD_FILE).exists());
    // Another language's collection took its time too.
    let mut other = collection.clone();
    other.card.language = "nl".into();
    let error = other.write(&out, false).unwrap_err();
    assert!(error.to_string().contains("zh_CN") && error.to_string().contains("--overwrite"), "{error}");
    other.write(&out, true).unwrap();
}

#[test]
fn a_machine_without_catalogs_is_told_what_to_install() {
    let machine = Machine::new();
    // Listed by a package, absent on disk: what a slim image looks like.
    machine.write(
        "dpkg/info/git.list",
        &format!("{}\n", machine.root.path().join("locale/nl/LC_MESSAGES/git.mo").display()),
    );
    let error = collect(&machine.roots(), &CollectOptions::new("nl")).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    let text = error.to_string();
    for part in [
        "language nl",
        "0 catalogs",
        "1 catalogs of installed packages were stripped",
        "zh_CN (5)",
        "install",
        "git",
        "gcc-12-locales",
    ] {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
    for bad in ["", "../etc", "zh/CN", ".", "a b", "zh\0"] {
        assert!(matches!(collect(&machine.roots(), &CollectOptions::new(bad)), Err(Error::Usage { .. })), "{bad:?}");
    }
}

/// Counts on the machine that runs the tests; nothing is asserted about what is installed, only that what is found is sound.
#[test]
fn catalogs_of_this_machine() {
    let roots = Roots::default();
    let found = languages(&roots.locale);
    println!("{} languages, {} catalogs", found.len(), found.values().sum::<usize>());
    for language in ["zh_CN", "es", "nl"] {
        match collect(&roots, &CollectOptions::new(language)) {
            Ok(collection) => {
                let card = &collection.card;
                println!(
                    "{language}: {} catalogs ({} skipped, {} stripped), {} entries, {} unique pairs, {} kept",
                    card.catalogs.len(),
                    card.skipped.len(),
                    card.stripped,
                    card.rows.rows,
                    card.unique_pairs,
                    card.rows.kept
                );
                for (rule, dropped) in &card.rows.dropped {
                    println!("    {:>6} {rule} (first: {})", dropped.count, dropped.first);
                }
                for (split, part) in &card.parts {
                    println!("    {:>6} {} from {} sources", part.rows, split.name(), part.groups.len());
                }
                let dropped: u64 = card.rows.dropped.values().map(|d| d.count).sum();
                assert_eq!(card.rows.rows, card.rows.kept + dropped);
                assert!(collection.parts.values().flatten().all(|p| !p.source.is_empty() && !p.source.contains('\t')));
            }
            Err(error) => println!("{language}: {error}"),
        }
    }
    // Every catalog of every language: read, or refused with a reason.
    let mut refused = 0;
    for language in found.keys() {
        let folder: &Path = &roots.locale.join(language).join("LC_MESSAGES");
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|e| e == "mo")
                && let Err(error) = espalier::data::catalog::read(&entry.path())
            {
                println!("refused: {error}");
                refused += 1;
            }
        }
    }
    println!("{refused} catalogs refused");
}

proptest! {
    #[test]
    fn cleaning_keeps_its_promises_on_any_text(source in "[\\PC\n\t%a-z{}]{0,40}", target in "[\\PC\r\n%d文件]{0,40}", noise: String) {
        for (source, target) in [(&source, &target), (&noise, &target), (&source, &noise)] {
            near_duplicate_form(source);
            if let Ok((source, target)) = clean("zh_CN", source, target) {
                for side in [&source, &target] {
                    prop_assert!(!side.is_empty() && side.trim() == side);
                    prop_assert!(!side.contains(char::is_control), "{:?}", side);
                }
                prop_assert!(source != target && target.chars().any(is_han));
            }
        }
    }
}
