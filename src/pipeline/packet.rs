//! What goes into a letter between processes: a value as JSON and tensors, under one checksum.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::message::TYPES;
use crate::shape::Meta;

/// A tensor's bytes on their way.
pub type Loose = (Meta, Vec<u8>);

const MAGIC: &[u8; 4] = b"ESPC";
/// Magic, checksum and the length of the text.
const HEADER: usize = 16;

/// Extents and type of each tensor.
type Metas = Vec<(Vec<usize>, usize)>;

/// # Errors
/// What JSON cannot say.
pub fn encode<'a>(value: &impl Serialize, tensors: impl Iterator<Item = &'a Loose> + Clone) -> Result<Vec<u8>, String> {
    let kind = |meta: &Meta| TYPES.iter().position(|t| *t == meta.dtype).unwrap_or(usize::MAX);
    let metas: Metas = tensors.clone().map(|(meta, _)| (meta.dims().to_vec(), kind(meta))).collect();
    let text = serde_json::to_vec(&(value, metas)).map_err(|e| e.to_string())?;
    let mut bytes = vec![0; HEADER];
    bytes.extend_from_slice(&text);
    tensors.for_each(|(_, content)| bytes.extend_from_slice(content));
    bytes[8..HEADER].copy_from_slice(&(text.len() as u64).to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[8..]);
    bytes[..4].copy_from_slice(MAGIC);
    bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
    Ok(bytes)
}

/// # Errors
/// What is wrong with the bytes.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, Vec<Loose>), String> {
    let broken = || format!("a letter of {} bytes is corrupted", bytes.len());
    let (head, rest) = bytes.split_at_checked(HEADER).ok_or_else(broken)?;
    let number = |from: usize, to: usize| head[from..to].iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b));
    if &head[..4] != MAGIC || number(4, 8) != u64::from(crc32c::crc32c(&bytes[8..])) {
        return Err(broken());
    }
    let (text, mut content) = rest.split_at_checked(number(8, HEADER) as usize).ok_or_else(broken)?;
    let (value, metas): (T, Metas) = serde_json::from_slice(text).map_err(|e| format!("a letter that says {e}"))?;
    let mut tensors = Vec::new();
    for (dims, kind) in metas {
        let meta = TYPES.get(kind).and_then(|&dtype| Meta::new(&dims, dtype).ok()).ok_or_else(broken)?;
        let (own, others) = content.split_at_checked(meta.bytes()).ok_or_else(broken)?;
        tensors.push((meta, own.to_vec()));
        content = others;
    }
    if content.is_empty() { Ok((value, tensors)) } else { Err(broken()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    #[test]
    fn packets_come_back_and_damage_is_seen() {
        let value = ("order".to_string(), 0.1f64, vec![1e-8f32]);
        let tensors =
            [(Meta::new(&[3], DType::F16).unwrap(), vec![1u8; 6]), (Meta::new(&[], DType::U32).unwrap(), vec![7; 4])];
        let bytes = encode(&value, tensors.iter()).unwrap();
        let (back, content) = decode::<(String, f64, Vec<f32>)>(&bytes).unwrap();
        assert_eq!((back, content), (value, tensors.to_vec()));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 4;
            assert!(decode::<(String, f64, Vec<f32>)>(&damaged).is_err(), "byte {at}");
            assert!(decode::<(String, f64, Vec<f32>)>(&bytes[..at]).is_err(), "cut at {at}");
        }
    }
}
