//! The `.mo` reader: round trips in both byte orders, every malformed case a typed error, no input panics.

use std::path::Path;

use espalier::data::catalog::{Catalog, parse};
use espalier::{Error, Result};
use proptest::prelude::*;

use super::mo::{HEADER, build, entries, patch};

fn read(bytes: &[u8]) -> Result<Catalog> {
    parse(Path::new("test.mo"), bytes)
}

fn rule(bytes: &[u8]) -> String {
    match read(bytes) {
        Err(Error::File { path, position, rule }) => {
            assert_eq!(path, Path::new("test.mo"));
            assert!(position.starts_with("byte "), "{position}");
            rule
        }
        other => panic!("expected a file error, got {other:?}"),
    }
}

#[test]
fn contexts_plurals_and_both_byte_orders() {
    let pairs =
        [("File", "文件"), ("menu\u{4}Open", "打开"), ("%d file\0%d files", "%d 个文件\0%d 个文件们"), ("none", "")];
    for big_endian in [false, true] {
        let catalog = read(&build(&entries(&pairs), big_endian)).unwrap();
        assert_eq!(catalog.charset, "UTF-8");
        assert_eq!(catalog.entries.len(), 4, "the header is no entry");
        assert_eq!((catalog.entries[0].source.as_str(), catalog.entries[0].targets[0].as_str()), ("File", "文件"));
        assert_eq!(catalog.entries[1].context.as_deref(), Some("menu"));
        assert_eq!(catalog.entries[1].source, "Open");
        assert_eq!(catalog.entries[2].plural.as_deref(), Some("%d files"));
        assert_eq!(catalog.entries[2].targets, ["%d 个文件", "%d 个文件们"]);
        assert_eq!(catalog.entries[3].targets, [""]);
    }
}

#[test]
fn charsets_are_those_of_the_header() {
    let with = |charset: &str, text: &[u8]| {
        let header = format!("Content-Type: text/plain; charset={charset}\n");
        build(&[(Vec::new(), header.into_bytes()), (b"file".to_vec(), text.to_vec())], false)
    };
    let target = |bytes: &[u8]| read(bytes).unwrap().entries[0].targets[0].clone();
    assert_eq!(target(&with("GB2312", &[0xce, 0xc4, 0xbc, 0xfe])), "文件");
    assert_eq!(target(&with("iso-8859-1", &[b'g', 0xe9, b'n', 0xe9])), "géné");
    assert_eq!(target(&with("CHARSET", "文件".as_bytes())), "文件");
    assert_eq!(target(&build(&[(b"file".to_vec(), "文件".as_bytes().to_vec())], false)), "文件", "no header at all");
    // Latin-1 text that claims to be UTF-8: seen in the wild.
    assert!(rule(&with("UTF-8", &[b'D', 0xfc])).contains("declared charset UTF-8"));
    assert!(rule(&with("klingon", b"x")).contains("charset klingon is not known"));
    assert!(
        rule(&with("UTF-16", b"x")).contains("not known"),
        "no catalog can be in a charset that is not ASCII based"
    );
}

#[test]
fn every_malformed_case_is_a_typed_error() {
    let good = build(&entries(&[("File", "文件"), ("Open", "打开")]), false);
    assert!(read(&good).is_ok());
    // Word positions: 4 revision, 8 count, 12 and 16 tables; 28.. the source table of three entries, 52.. the targets.
    let end = good.len() as u32;
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (Vec::new(), "shorter than the header"),
        (good[..27].to_vec(), "shorter than the header"),
        (patch(&good, 0, 0x1234_5678), "magic"),
        (patch(&good, 0, 0), "magic"),
        (patch(&good, 4, 2 << 16), "major revision 2"),
        (patch(&good, 4, 0xffff_ffff), "major revision 65535"),
        (patch(&good, 8, 1_000_001), "above the cap"),
        (patch(&good, 8, u32::MAX), "above the cap"),
        (patch(&good[..28], 8, 1_000_000), "outside"),
        (patch(&good, 12, u32::MAX), "table at"),
        (patch(&good, 12, u32::MAX - 7), "table at"),
        (patch(&good, 12, 0), "table at"),
        (patch(&good, 12, end - 8), "table at"),
        (patch(&good, 16, u32::MAX), "table at"),
        (patch(&good, 16, 27), "table at"),
        (patch(&good, 16, 28), "overlap"),
        (patch(&good, 16, 36), "overlap"),
        (patch(&good, 36, u32::MAX), "string at"),
        (patch(&good, 40, u32::MAX), "string at"),
        (patch(&good, 40, 0), "string at"),
        (patch(&good, 40, end), "string at"),
        (patch(&good, 36, end), "string at"),
        (patch(&good, 36, 3), "does not end in NUL"),
        (patch(&good, 60, 7), "does not end in NUL"),
        (good[..good.len() - 1].to_vec(), "string at"),
        (good[..good.len() - 3].to_vec(), "string at"),
        (good[..60].to_vec(), "table at"),
        (patch(&good, 4, 1), "text"),
    ];
    for (number, (bytes, expected)) in cases.iter().enumerate().take(cases.len() - 1) {
        assert!(rule(bytes).contains(expected), "case {number}: {} lacks {expected:?}", rule(bytes));
    }
    // Minor revision 1 is fine: its additional strings are counted.
    assert!(read(&cases[cases.len() - 1].0).is_ok());

    let odd = |pairs: &[(&str, &str)]| rule(&build(&entries(pairs), false));
    assert!(odd(&[("a\0b\0c", "x")]).contains("more than a singular and a plural"));
    assert!(odd(&[("a", "x\0y")]).contains("several forms"));
}

#[test]
fn overlapping_strings_cannot_multiply_a_small_file() {
    // A thousand descriptors over one string of 1,000 bytes would expand to a megabyte.
    let text = vec![b'a'; 1000];
    let mut bytes = build(&vec![(b"k".to_vec(), text); 2], false);
    let many = 1000u32;
    let string = bytes.len() as u32 - 1001;
    let table = bytes.len() as u32;
    for _ in 0..many * 2 {
        bytes.extend(1000u32.to_le_bytes());
        bytes.extend(string.to_le_bytes());
    }
    let bytes = patch(&patch(&patch(&bytes, 8, many), 12, table), 16, table + many * 8);
    assert!(rule(&bytes).contains("strings overlap"));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = read(&bytes);
    }

    /// Random damage to a right file reaches deeper than random bytes do.
    #[test]
    fn damaged_catalogs_never_panic(
        damage in proptest::collection::vec((0usize..200, any::<u8>()), 1..6),
        cut in 0usize..200,
        big_endian: bool,
    ) {
        let mut bytes = build(&entries(&[("menu\u{4}File", "文件"), ("%d a\0%d b", "甲\0乙"), ("Open", "打开")]), big_endian);
        for (position, value) in damage {
            let length = bytes.len();
            bytes[position % length] = value;
        }
        bytes.truncate(bytes.len().saturating_sub(cut / 4));
        match read(&bytes) {
            Ok(catalog) => prop_assert!(catalog.entries.len() <= 1000),
            Err(error) => prop_assert_eq!(error.code(), "E-FILE"),
        }
    }

    #[test]
    fn what_was_written_is_read_back(
        texts in proptest::collection::vec(("[a-zA-Z %]{1,20}", "[^\\x00]{0,20}"), 0..20),
        big_endian: bool,
    ) {
        let raw: Vec<_> = std::iter::once((Vec::new(), HEADER.as_bytes().to_vec()))
            .chain(texts.iter().map(|(s, t)| (s.as_bytes().to_vec(), t.as_bytes().to_vec())))
            .collect();
        let catalog = read(&build(&raw, big_endian)).unwrap();
        let back: Vec<_> = catalog.entries.into_iter().map(|e| (e.source, e.targets.concat())).collect();
        prop_assert_eq!(back, texts);
    }
}
