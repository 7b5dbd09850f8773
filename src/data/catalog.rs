//! GNU gettext binary catalogs (`.mo`), read as a pure function from bytes.
//!
//! Layout (gettext manual, "The Format of GNU MO Files"): seven 32-bit words (magic, revision, string count, offset of the
//! source table, offset of the translation table, size and offset of a hash table), both tables as (length, offset)
//! pairs, every string followed by NUL. Either byte order. A source string may start with a context and byte 4 (EOT), and
//! may hold a plural after a NUL; a translation then holds its forms separated by NUL.

use std::path::Path;

use encoding_rs::Encoding;

use super::persist::read_capped;
use crate::error::{Error, Result};

const MAGIC: u32 = 0x9504_12de;
const HEADER_BYTES: usize = 28;
/// A catalog of this size would hold a few hundred times more than the largest one known.
const MAX_FILE_BYTES: u64 = 256 << 20;
const MAX_ENTRIES: u32 = 1_000_000;

/// One message and its translations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub context: Option<String>,
    pub source: String,
    pub plural: Option<String>,
    /// One translation, or one per plural form. Empty strings mean untranslated.
    pub targets: Vec<String>,
    /// Byte position of the source string in the file.
    pub position: usize,
}

/// A whole catalog without its header entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Catalog {
    /// Name of the encoding that the header declares; UTF-8 when it declares none.
    pub charset: &'static str,
    pub entries: Vec<Entry>,
    /// Entries whose text depends on the platform (minor revision 1); they are counted, not read.
    pub system_dependent: u32,
}

/// Reads and parses one file.
pub fn read(path: &Path) -> Result<Catalog> {
    parse(path, &read_capped(path, MAX_FILE_BYTES)?)
}

/// Parses the bytes of one catalog; `path` only names the file in errors.
///
/// Errors (all [`Error::File`] with a byte position): wrong magic or revision, counts, tables or strings outside the file,
/// a missing NUL, strings over each other, stray plural forms, an unknown charset, or text that is not in the
/// declared charset (seen in the wild: such a catalog as a whole cannot be trusted).
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Catalog> {
    let file = Reader::new(path, bytes)?;
    let revision = file.word(4)?;
    if revision >> 16 > 1 {
        return Err(file.broken(4, format!("major revision {} where 0 or 1 is known", revision >> 16)));
    }
    let count = file.word(8)?;
    if count > MAX_ENTRIES {
        return Err(file.broken(8, format!("{count} entries, above the cap of {MAX_ENTRIES}")));
    }
    let sources = file.table(12, count)?;
    let targets = file.table(16, count)?;
    let table_bytes = count as usize * 8;
    if count > 0 && sources < targets + table_bytes && targets < sources + table_bytes {
        return Err(file.broken(16, "source and translation tables overlap"));
    }

    let mut raw = Vec::with_capacity(count as usize);
    let mut total = 0usize;
    for i in 0..count as usize {
        let (source, position) = file.string(sources + i * 8)?;
        let (target, _) = file.string(targets + i * 8)?;
        // No tool lets strings share bytes; without this rule a small file could expand to the square of its size.
        total += source.len() + target.len() + 2;
        if total > bytes.len() {
            return Err(file.broken(sources + i * 8, "strings overlap: together they are longer than the file"));
        }
        raw.push((source, target, position));
    }

    let header = raw.iter().find(|(source, ..)| source.is_empty());
    let encoding = match header {
        Some(&(_, header, position)) => charset(&file, header, position)?,
        None => encoding_rs::UTF_8,
    };
    let mut entries = Vec::with_capacity(raw.len());
    for (source, target, position) in raw {
        if !source.is_empty() {
            entries.push(entry(&file, encoding, source, target, position)?);
        }
    }
    // Revision x.1 adds five words; the third is the number of system dependent strings.
    let system_dependent = if revision & 0xffff >= 1 { file.word(36)? } else { 0 };
    Ok(Catalog { charset: encoding.name(), entries, system_dependent })
}

struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    big_endian: bool,
}

impl<'a> Reader<'a> {
    fn new(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let mut reader = Self { path, bytes, big_endian: false };
        if bytes.len() < HEADER_BYTES {
            return Err(reader.broken(0, format!("{} bytes, shorter than the header of 28", bytes.len())));
        }
        let magic = reader.word(0)?;
        reader.big_endian = match magic {
            MAGIC => false,
            m if m.swap_bytes() == MAGIC => true,
            other => return Err(reader.broken(0, format!("magic number {other:#010x} is not that of a .mo file"))),
        };
        Ok(reader)
    }

    fn broken(&self, position: usize, rule: impl ToString) -> Error {
        Error::file(self.path, format!("byte {position}"), rule)
    }

    fn word(&self, position: usize) -> Result<u32> {
        let word = position.checked_add(4).and_then(|end| self.bytes.get(position..end));
        match word.and_then(|w| <[u8; 4]>::try_from(w).ok()) {
            Some(word) if self.big_endian => Ok(u32::from_be_bytes(word)),
            Some(word) => Ok(u32::from_le_bytes(word)),
            None => Err(self.broken(position, "a 32-bit word is outside the file")),
        }
    }

    /// Offset of a table of `count` descriptors, checked to lie between the header and the end of the file.
    fn table(&self, position: usize, count: u32) -> Result<usize> {
        let start = self.word(position)? as usize;
        let end = start as u64 + u64::from(count) * 8;
        if count > 0 && (start < HEADER_BYTES || end > self.bytes.len() as u64) {
            let rule = format!("table at {start}..{end} is outside {HEADER_BYTES}..{}", self.bytes.len());
            return Err(self.broken(position, rule));
        }
        Ok(start)
    }

    /// The string behind the descriptor at `position`, and where it starts.
    fn string(&self, position: usize) -> Result<(&'a [u8], usize)> {
        let (length, start) = (self.word(position)? as usize, self.word(position + 4)? as usize);
        let end = start as u64 + length as u64;
        if start < HEADER_BYTES || end >= self.bytes.len() as u64 {
            let rule = format!("string at {start}..={end} is outside {HEADER_BYTES}..{}", self.bytes.len());
            return Err(self.broken(position, rule));
        }
        let end = end as usize;
        match (self.bytes.get(start..end), self.bytes.get(end)) {
            (Some(text), Some(0)) => Ok((text, start)),
            _ => Err(self.broken(end, "string does not end in NUL")),
        }
    }
}

/// The encoding that the header's Content-Type declares.
fn charset(file: &Reader, header: &[u8], position: usize) -> Result<&'static Encoding> {
    const KEY: &[u8] = b"charset=";
    let Some(at) = header.windows(KEY.len()).position(|w| w.eq_ignore_ascii_case(KEY)) else {
        return Ok(encoding_rs::UTF_8);
    };
    let rest = &header[at + KEY.len()..];
    let end = rest.iter().position(|b| b.is_ascii_whitespace() || *b == b';').unwrap_or(rest.len());
    let label = &rest[..end];
    match Encoding::for_label(label) {
        // The unfilled template of a catalog: its authors wrote no charset, so only ASCII and UTF-8 can be meant.
        None if label == b"CHARSET" => Ok(encoding_rs::UTF_8),
        Some(encoding) if encoding.is_ascii_compatible() && encoding != encoding_rs::REPLACEMENT => Ok(encoding),
        _ => Err(file.broken(position, format!("charset {} is not known", String::from_utf8_lossy(label)))),
    }
}

fn entry(file: &Reader, encoding: &'static Encoding, source: &[u8], target: &[u8], position: usize) -> Result<Entry> {
    let decode = |text: &[u8]| match encoding.decode_without_bom_handling_and_without_replacement(text) {
        Some(text) => Ok(text.into_owned()),
        None => Err(file.broken(position, format!("text is not in the declared charset {}", encoding.name()))),
    };
    let mut forms = source.split(|&b| b == 0);
    let singular = forms.next().unwrap_or_default();
    let plural = forms.next();
    if forms.next().is_some() {
        return Err(file.broken(position, "source holds more than a singular and a plural"));
    }
    if plural.is_none() && target.contains(&0) {
        return Err(file.broken(position, "translation holds several forms of a source without plural"));
    }
    let (context, singular) = match singular.iter().position(|&b| b == 4) {
        Some(at) => (Some(decode(&singular[..at])?), &singular[at + 1..]),
        None => (None, singular),
    };
    Ok(Entry {
        context,
        source: decode(singular)?,
        plural: plural.map(decode).transpose()?,
        targets: target.split(|&b| b == 0).map(decode).collect::<Result<_>>()?,
        position,
    })
}
