//! Writes `.mo` files, right ones and wrong ones.

/// One raw entry: source bytes (context, EOT and plural included) and translation bytes.
pub type RawEntry = (Vec<u8>, Vec<u8>);

pub const HEADER: &str = "Language: zh_CN\nContent-Type: text/plain; charset=UTF-8\n";

/// A header entry, then each pair of texts.
pub fn entries(pairs: &[(&str, &str)]) -> Vec<RawEntry> {
    let mut entries = vec![(Vec::new(), HEADER.as_bytes().to_vec())];
    entries.extend(pairs.iter().map(|(source, target)| (source.as_bytes().to_vec(), target.as_bytes().to_vec())));
    entries
}

pub fn word(value: u32, big_endian: bool) -> [u8; 4] {
    if big_endian { value.to_be_bytes() } else { value.to_le_bytes() }
}

/// The file as msgfmt lays it out: header, source table, translation table, sources, translations.
pub fn build(entries: &[RawEntry], big_endian: bool) -> Vec<u8> {
    let count = entries.len() as u32;
    let mut bytes = Vec::new();
    for value in [0x9504_12de, 0, count, 28, 28 + count * 8, 0, 28 + count * 16] {
        bytes.extend(word(value, big_endian));
    }
    let mut offset = 28 + count * 16;
    let sides = [entries.iter().map(|e| &e.0).collect::<Vec<_>>(), entries.iter().map(|e| &e.1).collect()];
    for text in sides.iter().flatten() {
        bytes.extend(word(text.len() as u32, big_endian));
        bytes.extend(word(offset, big_endian));
        offset += text.len() as u32 + 1;
    }
    for text in sides.iter().flatten() {
        bytes.extend(text.iter());
        bytes.push(0);
    }
    bytes
}

/// Overwrites one 32-bit word.
pub fn patch(bytes: &[u8], position: usize, value: u32) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[position..position + 4].copy_from_slice(&value.to_le_bytes());
    bytes
}
