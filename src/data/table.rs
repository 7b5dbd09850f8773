//! Parallel text from TSV and JSON-lines files. Every line is judged by the same rules first (length, NUL, UTF-8, byte-order
//! mark, stray carriage return), then by those of its format; each broken rule names file, line, column and reason.
//!
//! TSV is split at tabs with no quoting at all: published sets hold bare quotes, and a quoting reader silently merges lines at
//! them.

use std::path::Path;

use super::card::DataCard;
use super::{Pair, json_line, persist};
use crate::error::{Error, Result};

/// What to do with a row that breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnBadRow {
    /// The first bad row is the result's error.
    Stop,
    /// Bad rows are left out and counted in the data card.
    Skip,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    Tsv,
    #[value(name = "jsonl")]
    JsonLines,
}

impl Format {
    /// By content, not by name: JSON lines start with a brace.
    pub fn detect(bytes: &[u8]) -> Self {
        let text = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
        match text.iter().find(|b| !b.is_ascii_whitespace()) {
            Some(b'{') => Format::JsonLines,
            _ => Format::Tsv,
        }
    }
}

/// A TSV column by its name in the first line or by its number from 0; a JSON field by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Column {
    Name(String),
    Number(usize),
}

#[derive(Clone, Debug)]
pub struct TableOptions {
    /// `None` looks at the content.
    pub format: Option<Format>,
    /// With a name on either side, the first line of a TSV is its header.
    pub source: Column,
    pub target: Column,
    pub on_bad_row: OnBadRow,
    pub max_line_bytes: usize,
    pub max_file_bytes: u64,
}

impl Default for TableOptions {
    fn default() -> Self {
        Self {
            format: None,
            source: Column::Name("source".into()),
            target: Column::Name("target".into()),
            on_bad_row: OnBadRow::Stop,
            max_line_bytes: 16 << 20,
            max_file_bytes: 4 << 30,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Table {
    pub pairs: Vec<Pair>,
    pub card: DataCard,
}

/// Reads one file; see [`parse`].
pub fn read(path: &Path, options: &TableOptions) -> Result<Table> {
    parse(path, &persist::read_capped(path, options.max_file_bytes)?, options)
}

/// Parses the bytes of one table; `path` only names it in errors.
///
/// Errors: a missing or doubled header name always; a bad row when `on_bad_row` is `Stop`. All are [`Error::File`].
pub fn parse(path: &Path, bytes: &[u8], options: &TableOptions) -> Result<Table> {
    let format = options.format.unwrap_or_else(|| Format::detect(bytes));
    let mut card = DataCard::new(path.display());
    card.blake3 = blake3::hash(bytes).to_hex().to_string();
    let mut lines = Lines { bytes: bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes), number: 0 };
    let mut row = match format {
        Format::Tsv => Row::tsv(path, &mut lines, options)?,
        Format::JsonLines => Row::json(path, options)?,
    };
    let mut pairs = Vec::new();
    for (number, line) in lines {
        let parsed = check_line(line, options.max_line_bytes).and_then(|line| row.parse(line));
        match parsed {
            Ok(pair) => {
                card.keep();
                pairs.push(pair);
            }
            Err(bad) if options.on_bad_row == OnBadRow::Stop => {
                let rule =
                    if bad.detail.is_empty() { bad.rule.into() } else { format!("{}: {}", bad.rule, bad.detail) };
                return Err(Error::file(path, format!("line {number}{}", bad.place), rule));
            }
            Err(bad) => card.drop_row(bad.rule, || format!("line {number}{}", bad.place)),
        }
    }
    Ok(Table { pairs, card })
}

/// Characters of a refused header that a message repeats.
const SHOWN: usize = 80;

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Why a line is refused: where in the line, a rule with a fixed name to count under, and the numbers of this case.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadRow {
    pub place: String,
    pub rule: &'static str,
    pub detail: String,
}

impl BadRow {
    pub fn new(rule: &'static str) -> Self {
        Self { place: String::new(), rule, detail: String::new() }
    }

    /// `byte` counts from 0 within the line; messages count from 1.
    pub fn at(byte: usize, rule: &'static str) -> Self {
        Self { place: format!(", byte {}", byte + 1), rule, detail: String::new() }
    }

    pub fn in_field(field: &str, rule: &'static str) -> Self {
        Self { place: format!(", field {field}"), rule, detail: String::new() }
    }

    pub fn detail(mut self, detail: impl ToString) -> Self {
        self.detail = detail.to_string();
        self
    }
}

/// Lines with their numbers from 1, split at line feeds; a last line without one counts, an empty rest does not.
struct Lines<'a> {
    bytes: &'a [u8],
    number: usize,
}

impl<'a> Iterator for Lines<'a> {
    type Item = (usize, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.bytes.is_empty() {
            return None;
        }
        self.number += 1;
        let end = self.bytes.iter().position(|&b| b == b'\n');
        let (line, rest) = match end {
            Some(end) => (&self.bytes[..end], &self.bytes[end + 1..]),
            None => (self.bytes, &[][..]),
        };
        self.bytes = rest;
        Some((self.number, line.strip_suffix(b"\r").unwrap_or(line)))
    }
}

fn check_line(line: &[u8], max_bytes: usize) -> Result<&str, BadRow> {
    if line.len() > max_bytes {
        return Err(BadRow::new("line too long").detail(format!("{} bytes, above the cap of {max_bytes}", line.len())));
    }
    let text = std::str::from_utf8(line).map_err(|e| BadRow::at(e.valid_up_to(), "not UTF-8"))?;
    for (character, rule) in
        [('\0', "NUL byte"), ('\r', "carriage return inside a line"), ('\u{feff}', "byte-order mark inside the file")]
    {
        if let Some(at) = text.find(character) {
            return Err(BadRow::at(at, rule));
        }
    }
    if text.trim().is_empty() {
        return Err(BadRow::new("empty line"));
    }
    Ok(text)
}

/// How a line of the chosen format becomes a pair.
enum Row<'a> {
    Tsv { source: usize, target: usize, columns: Option<usize> },
    Json { source: &'a str, target: &'a str },
}

impl<'a> Row<'a> {
    fn tsv(path: &Path, lines: &mut Lines, options: &TableOptions) -> Result<Self> {
        let named = [&options.source, &options.target].into_iter().any(|c| matches!(c, Column::Name(_)));
        let mut header = None;
        if named {
            let (number, line) =
                lines.next().ok_or_else(|| Error::file(path, "line 1", "no header: the file is empty"))?;
            let text = check_line(line, options.max_line_bytes)
                .map_err(|bad| Error::file(path, format!("line {number}{}", bad.place), bad.rule))?;
            header = Some(text.split('\t').map(str::trim).collect::<Vec<_>>());
        }
        let find = |column: &Column| match column {
            Column::Number(number) => Ok(*number),
            Column::Name(name) => {
                let names = header.as_deref().unwrap_or_default();
                let mut found = names.iter().enumerate().filter(|(_, n)| *n == name).map(|(i, _)| i);
                match (found.next(), found.next()) {
                    (Some(number), None) => Ok(number),
                    (Some(_), Some(second)) => Err(Error::file(
                        path,
                        format!("line 1, column {}", second + 1),
                        format!("second column {name}"),
                    )),
                    (None, _) => {
                        // The first line may be text of any length.
                        let mut header: String = names.join(", ").chars().take(SHOWN + 1).collect();
                        if header.chars().count() > SHOWN {
                            header = header.chars().take(SHOWN).chain(['…']).collect();
                        }
                        let form = "a TSV starts with a line that names its columns, source<TAB>target";
                        Err(Error::file(
                            path,
                            "line 1",
                            format!("no column {name}; the header names: {header} ({form})"),
                        ))
                    }
                }
            }
        };
        let (source, target) = (find(&options.source)?, find(&options.target)?);
        Ok(Row::Tsv { source, target, columns: header.map(|h| h.len()) })
    }

    fn json(path: &Path, options: &'a TableOptions) -> Result<Self> {
        match (&options.source, &options.target) {
            (Column::Name(source), Column::Name(target)) if source != target => Ok(Row::Json { source, target }),
            _ => Err(Error::file(path, "fields", "JSON lines need two different field names, not column numbers")),
        }
    }

    fn parse(&mut self, line: &str) -> Result<Pair, BadRow> {
        match self {
            Row::Json { source, target } => json_line::parse(line, source, target),
            Row::Tsv { source, target, columns } => {
                let fields: Vec<&str> = line.split('\t').collect();
                let expected = *columns.get_or_insert(fields.len());
                if fields.len() != expected {
                    let detail = format!("{} where the first line has {expected}", fields.len());
                    return Err(BadRow::new("ragged columns").detail(detail));
                }
                let side = |number: usize| match fields.get(number).map(|f| f.trim()) {
                    None => Err(BadRow::new("missing column").detail(format!("{} of {expected}", number + 1))),
                    Some("") => Err(BadRow { place: format!(", column {}", number + 1), ..BadRow::new("empty side") }),
                    Some(text) => Ok(text.to_string()),
                };
                Ok(Pair { source: side(*source)?, target: side(*target)? })
            }
        }
    }
}
