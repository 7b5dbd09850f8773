//! TSV and JSON-lines readers against a corpus of malformed input built here: each case names its line and rule.

use std::path::Path;

use espalier::data::Pair;
use espalier::data::table::{Column, Format, OnBadRow, Table, TableOptions, parse, read};
use espalier::{Error, Result};
use proptest::prelude::*;

fn options(on_bad_row: OnBadRow) -> TableOptions {
    TableOptions { on_bad_row, max_line_bytes: 1000, ..TableOptions::default() }
}

fn with(bytes: &[u8], on_bad_row: OnBadRow) -> Result<Table> {
    parse(Path::new("t"), bytes, &options(on_bad_row))
}

/// Position and rule of the first bad row.
fn refused(bytes: &[u8]) -> (String, String) {
    match with(bytes, OnBadRow::Stop) {
        Err(Error::File { position, rule, .. }) => (position, rule),
        other => panic!("expected a file error, got {other:?}"),
    }
}

fn pair(source: &str, target: &str) -> Pair {
    Pair { source: source.into(), target: target.into() }
}

const TSV: &str = "source\ttarget\tpackage\n";

/// Bad lines of a TSV with three columns, and the rule each breaks.
fn bad_tsv_lines() -> Vec<(Vec<u8>, &'static str)> {
    vec![
        (b"a".to_vec(), "ragged columns"),
        (b"a\tb".to_vec(), "ragged columns"),
        (b"a\tb\tc\td".to_vec(), "ragged columns"),
        (b"\t\t\t\t\t\t".to_vec(), "empty line"),
        (b"".to_vec(), "empty line"),
        (b"   ".to_vec(), "empty line"),
        (b"\tb\tc".to_vec(), "empty side"),
        (b"a\t\tc".to_vec(), "empty side"),
        (b"a\t  \tc".to_vec(), "empty side"),
        (b"a\0\tb\tc".to_vec(), "NUL byte"),
        (b"a\tb\tc\0".to_vec(), "NUL byte"),
        (b"\xff\tb\tc".to_vec(), "not UTF-8"),
        (b"g\xe9n\xe9\tb\tc".to_vec(), "not UTF-8"),
        (b"a\t\xe6\x96\tc".to_vec(), "not UTF-8"),
        (b"\xed\xa0\x80\tb\tc".to_vec(), "not UTF-8"),
        (b"\xc0\xaf\tb\tc".to_vec(), "not UTF-8"),
        ("\u{feff}a\tb\tc".into(), "byte-order mark inside the file"),
        (b"a\rb\tb\tc".to_vec(), "carriage return inside a line"),
        (b"a\tb\tc\r\r".to_vec(), "carriage return inside a line"),
        (b"x".repeat(1001), "line too long"),
    ]
}

/// Bad JSON lines, and the rule each breaks.
fn bad_json_lines() -> Vec<(Vec<u8>, &'static str)> {
    vec![
        (b"".to_vec(), "empty line"),
        (b"{".to_vec(), "not JSON"),
        (b"{}".to_vec(), "missing field"),
        (b"[]".to_vec(), "not JSON"),
        (b"1".to_vec(), "not JSON"),
        (b"null".to_vec(), "not JSON"),
        (b"\"text\"".to_vec(), "not JSON"),
        (br#"{"source":"a"}"#.to_vec(), "missing field"),
        (br#"{"target":"a"}"#.to_vec(), "missing field"),
        (br#"{"source":"a","target":1}"#.to_vec(), "field is not text"),
        (br#"{"source":null,"target":"b"}"#.to_vec(), "field is not text"),
        (br#"{"source":["a"],"target":"b"}"#.to_vec(), "field is not text"),
        (br#"{"source":"","target":"b"}"#.to_vec(), "empty side"),
        (br#"{"source":"a","target":" \n"}"#.to_vec(), "empty side"),
        (br#"{"source":"a","source":"a","target":"b"}"#.to_vec(), "field given twice"),
        (br#"{"source":"a","target":"b"}x"#.to_vec(), "not JSON"),
        (br#"{"source":"a","target":"b"}{"source":"a","target":"b"}"#.to_vec(), "not JSON"),
        (br#"{"source":"a","target":"b",}"#.to_vec(), "not JSON"),
        (br#"{'source':'a'}"#.to_vec(), "not JSON"),
        (br#"{"source":"\ud800","target":"b"}"#.to_vec(), "not JSON"),
        (br#"{"source":"a\u0000","target":"b"}"#.to_vec(), "NUL or byte-order mark"),
        (b"{\"source\":\"a\0\",\"target\":\"b\"}".to_vec(), "NUL byte"),
        (b"{\"source\":\"\xff\",\"target\":\"b\"}".to_vec(), "not UTF-8"),
        ([br#"{"source":"a","target":"b","x":"#.to_vec(), b"[".repeat(500)].concat(), "not JSON"),
        ([br#"{"source":"#.to_vec(), b"[".repeat(300)].concat(), "not JSON"),
        ([b"{\"source\":\"".to_vec(), b"a".repeat(1000), b"\",\"target\":\"b\"}".to_vec()].concat(), "line too long"),
    ]
}

#[test]
fn every_malformed_line_names_its_line_and_rule() {
    let cases = [(TSV, "a\tb\tc\n", bad_tsv_lines()), ("", "{\"source\":\"a\",\"target\":\"b\"}\n", bad_json_lines())];
    for (header, good, bad_lines) in cases {
        for (bad, rule) in bad_lines {
            let text = [header.as_bytes(), good.as_bytes(), &bad, b"\n", good.as_bytes()].concat();
            let shown = String::from_utf8_lossy(&bad).into_owned();
            let line = header.lines().count() + 2;
            let (position, found) = refused(&text);
            assert!(
                position == format!("line {line}") || position.starts_with(&format!("line {line},")),
                "{shown}: {position}"
            );
            assert!(found.starts_with(rule), "{shown}: {found} where {rule} is due");
            let table = with(&text, OnBadRow::Skip).unwrap();
            assert_eq!(table.pairs, vec![pair("a", "b"); 2], "{shown}");
            assert_eq!((table.card.rows, table.card.kept, table.card.dropped_by(rule)), (3, 2, 1), "{shown}");
        }
    }
}

#[test]
fn positions_are_exact() {
    let at = |line: &[u8]| refused(&[TSV.as_bytes(), line].concat()).0;
    assert_eq!(at(b"abc\xff\tb\tc"), "line 2, byte 4");
    assert_eq!(at(b"a\t\tc"), "line 2, column 2");
    assert_eq!(at(b"a\tb\tc\n\nx"), "line 3");
    assert_eq!(refused(br#"{"source":"a","target":7}"#).0, "line 1, field target");
    assert_eq!(refused(br#"{"source":"a" "target":7}"#).0, "line 1, byte 15");
}

#[test]
fn good_tables_in_every_dress() {
    let expected = vec![pair("a \"b", "甲\"乙"), pair("c", "丙")];
    let tsv = "source\tnote\ttarget\na \"b\tx\t甲\"乙\nc\t\t丙";
    let json = "{\"source\":\"a \\\"b\",\"note\":[1,{}],\"target\":\"甲\\\"乙\"}\n{\"target\":\"丙\",\"source\":\"c\"}";
    for text in [tsv, json] {
        for dress in [text.into(), format!("{text}\n"), text.replace('\n', "\r\n") + "\r\n", format!("\u{feff}{text}")]
        {
            let table = with(dress.as_bytes(), OnBadRow::Stop).unwrap();
            assert_eq!(table.pairs, expected, "{dress:?}");
            assert_eq!(table.card.blake3, blake3::hash(dress.as_bytes()).to_hex().to_string());
        }
    }
    assert_eq!(Format::detect(json.as_bytes()), Format::JsonLines);
    let numbered = TableOptions { source: Column::Number(2), target: Column::Number(0), ..options(OnBadRow::Stop) };
    assert_eq!(parse(Path::new("t"), b"zh\tx\ten\n", &numbered).unwrap().pairs, [pair("en", "zh")]);
    let named = TableOptions {
        source: Column::Name("en".into()),
        target: Column::Name("zh".into()),
        ..options(OnBadRow::Stop)
    };
    assert_eq!(parse(Path::new("t"), br#"{"en":"a","zh":"b","source":3}"#, &named).unwrap().pairs, [pair("a", "b")]);
}

#[test]
fn headers_and_options_are_checked_whatever_the_policy() {
    let refuse = |bytes: &[u8], options: &TableOptions| parse(Path::new("t"), bytes, options).unwrap_err().to_string();
    let skip = options(OnBadRow::Skip);
    assert_eq!(refuse(b"", &skip), "t: line 1: no header: the file is empty");
    assert_eq!(
        refuse(b"en\tzh\na\tb\n", &skip),
        "t: line 1: no column source; the header names: en, zh (a TSV starts with a line that names its columns, source<TAB>target)"
    );
    let long = refuse(format!("{}\tb\n", "x".repeat(100_000)).as_bytes(), &TableOptions::default());
    assert!(long.len() < 300 && long.contains('…'), "{long}");
    assert_eq!(refuse(b"source\ttarget\tsource\n", &skip), "t: line 1, column 3: second column source");
    assert!(refuse(b"\xff\n", &skip).contains("line 1, byte 1: not UTF-8"));
    let far = TableOptions { source: Column::Number(7), ..skip.clone() };
    assert_eq!(parse(Path::new("t"), b"source\ttarget\na\tb\n", &far).unwrap().card.dropped_by("missing column"), 1);
    assert!(refuse(b"{}", &far).contains("different field names"));
    assert_eq!(with(b"source\ttarget\n", OnBadRow::Stop).unwrap().pairs, []);
}

#[test]
fn files_are_measured_before_they_are_read() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("t.tsv");
    std::fs::write(&path, "source\ttarget\na\tb\n").unwrap();
    assert_eq!(read(&path, &TableOptions::default()).unwrap().pairs.len(), 1);
    let small = TableOptions { max_file_bytes: 5, ..TableOptions::default() };
    assert!(read(&path, &small).unwrap_err().to_string().contains("above the cap of 5"));
    assert!(matches!(read(&root.path().join("absent"), &small), Err(Error::Io { .. })));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), json: bool, skip: bool) {
        let format = Some(if json { Format::JsonLines } else { Format::Tsv });
        let policy = if skip { OnBadRow::Skip } else { OnBadRow::Stop };
        for prefix in [&b""[..], TSV.as_bytes(), b"{\"source\":\"a\",\"target\":"] {
            let text = [prefix, &bytes].concat();
            match parse(Path::new("t"), &text, &TableOptions { format, ..options(policy) }) {
                Ok(table) => {
                    let dropped: u64 = table.card.dropped.values().map(|d| d.count).sum();
                    prop_assert_eq!(table.card.rows, table.card.kept + dropped);
                    prop_assert_eq!(table.card.kept as usize, table.pairs.len());
                }
                Err(error) => prop_assert_eq!(error.code(), "E-FILE"),
            }
        }
    }

    #[test]
    fn json_text_round_trips(texts in proptest::collection::vec(("\\PC{1,20}", "\\PC{1,20}"), 1..10)) {
        let clean = |t: &str| format!("x{}", t.replace('\u{feff}', "").trim());
        let pairs: Vec<Pair> = texts.iter().map(|(s, t)| pair(&clean(s), &clean(t))).collect();
        let lines: Vec<String> = pairs
            .iter()
            .map(|p| serde_json::json!({"source": p.source, "target": p.target}).to_string())
            .collect();
        prop_assert_eq!(with(lines.join("\n").as_bytes(), OnBadRow::Stop).unwrap().pairs, pairs);
    }
}
