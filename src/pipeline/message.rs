//! What stages send each other: tensors with everything that tells whether they are the ones waited for.

use bytemuck::{Pod, Zeroable};

use crate::dtype::DType;
use crate::error::Result;
use crate::shape::{MAX_RANK, Meta};
use crate::tensor::Tensor;

/// What a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Purpose {
    /// A chunk's input.
    Forward = 1,
    /// The gradient of a chunk's output.
    Backward = 2,
    /// Sums of squares of gradients, and of losses.
    Totals = 3,
    /// Gradients of a replica: `chunk` is the optimizer's group.
    Gradients = 4,
    /// A teacher's hidden states.
    Teacher = 5,
}

impl Purpose {
    fn from_number(number: u32) -> Option<Self> {
        [Self::Forward, Self::Backward, Self::Totals, Self::Gradients, Self::Teacher]
            .into_iter()
            .find(|p| *p as u32 == number)
    }
}

/// What a receiver waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag {
    pub step: u64,
    pub purpose: Purpose,
    pub chunk: u32,
    pub micro: u32,
    /// Which tensor of the ones that belong together.
    pub part: u32,
}

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Tag { step, purpose, chunk, micro, part } = self;
        write!(f, "{purpose:?} of step {step}, chunk {chunk}, micro-batch {micro}, tensor {part}")
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Header {
    magic: u32,
    /// Of everything behind this field, payload included.
    checksum: u32,
    run: u64,
    step: u64,
    /// How many messages the sender had sent to this receiver before.
    sequence: u64,
    length: u64,
    purpose: u32,
    chunk: u32,
    micro: u32,
    part: u32,
    dtype: u32,
    rank: u16,
    /// 1: the payload comes by a road of the devices' own, behind this header.
    direct: u16,
    dims: [u32; MAX_RANK],
}

const MAGIC: u32 = 0x4553_5031;
const HEADER: usize = size_of::<Header>();
/// Where the checksummed part starts.
const CHECKED: usize = 8;

pub(super) const TYPES: [DType; 5] = [DType::F32, DType::F16, DType::Bf16, DType::I8, DType::U32];

/// A message as received.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    pub tag: Tag,
    pub sequence: u64,
    pub meta: Meta,
    /// Whether the payload comes by a road of the devices' own.
    pub direct: bool,
    frame: Vec<u8>,
}

impl Message {
    pub fn payload(&self) -> &[u8] {
        &self.frame[HEADER..]
    }
}

/// A frame whose payload `fill` writes.
///
/// # Errors
/// Those of `fill`.
pub fn encode(
    run: u64,
    tag: Tag,
    sequence: u64,
    meta: Meta,
    fill: impl FnOnce(&mut [u8]) -> Result<()>,
) -> Result<Vec<u8>> {
    let mut frame = vec![0; HEADER + meta.bytes()];
    fill(&mut frame[HEADER..])?;
    seal(&mut frame, header_of(run, tag, sequence, meta));
    Ok(frame)
}

/// What announces a tensor that goes by a road.
pub fn announce(run: u64, tag: Tag, sequence: u64, meta: Meta) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    seal(&mut frame, Header { direct: 1, ..header_of(run, tag, sequence, meta) });
    frame
}

/// Writes the header, with the checksum of all that follows it.
fn seal(frame: &mut [u8], mut header: Header) {
    frame[..HEADER].copy_from_slice(bytemuck::bytes_of(&header));
    header.checksum = crc32c::crc32c(&frame[CHECKED..]);
    frame[..HEADER].copy_from_slice(bytemuck::bytes_of(&header));
}

fn header_of(run: u64, tag: Tag, sequence: u64, meta: Meta) -> Header {
    let mut dims = [0; MAX_RANK];
    dims.iter_mut().zip(meta.dims()).for_each(|(to, &from)| *to = from as u32);
    Header {
        magic: MAGIC,
        checksum: 0,
        run,
        step: tag.step,
        sequence,
        length: meta.bytes() as u64,
        purpose: tag.purpose as u32,
        chunk: tag.chunk,
        micro: tag.micro,
        part: tag.part,
        dtype: TYPES.iter().position(|t| *t == meta.dtype).unwrap_or_default() as u32,
        rank: meta.dims().len() as u16,
        direct: 0,
        dims,
    }
}

/// Holds a frame against its checksum and its own figures.
///
/// # Errors
/// What is wrong with it.
pub fn decode(run: u64, frame: Vec<u8>) -> Result<Message, String> {
    let Some(head) = frame.get(..HEADER) else {
        return Err(format!("a message of {} bytes is shorter than its header of {HEADER}", frame.len()));
    };
    let header: Header = bytemuck::pod_read_unaligned(head);
    let checksum = crc32c::crc32c(&frame[CHECKED..]);
    if header.magic != MAGIC || header.checksum != checksum {
        return Err(format!("a message is corrupted: checksum {checksum:08x} where {:08x} was sent", header.checksum));
    }
    if header.run != run {
        return Err(format!("a message of run {:016x} where this is run {run:016x}", header.run));
    }
    let dims: Vec<usize> = header.dims.iter().take(header.rank as usize).map(|&d| d as usize).collect();
    let dtype = TYPES.get(header.dtype as usize);
    let meta = dtype.and_then(|&dtype| Meta::new(&dims, dtype).ok());
    let purpose = Purpose::from_number(header.purpose);
    let (Some(meta), Some(purpose)) = (meta, purpose) else {
        return Err(format!("a message of unknown purpose {} or type {}", header.purpose, header.dtype));
    };
    let direct = header.direct == 1;
    let here = if direct { 0 } else { meta.bytes() };
    if here != frame.len() - HEADER || header.length != meta.bytes() as u64 {
        return Err(format!("a message of {} bytes where its shape {meta} has {}", header.length, meta.bytes()));
    }
    let Header { step, chunk, micro, part, sequence, .. } = header;
    Ok(Message { tag: Tag { step, purpose, chunk, micro, part }, sequence, meta, direct, frame })
}

/// The run's number in messages, from its name.
pub fn run_number(name: &str) -> u64 {
    let hash = blake3::hash(name.as_bytes());
    hash.as_bytes().iter().take(8).fold(0, |n, &b| n << 8 | u64::from(b))
}

/// A tensor as a frame.
pub fn frame_of(run: u64, tag: Tag, sequence: u64, tensor: &Tensor) -> Result<Vec<u8>> {
    encode(run, tag, sequence, tensor.meta(), |bytes| tensor.device().download(tensor.buffer(), tensor.offset(), bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_and_damage_is_seen() {
        let tag = Tag { step: 7, purpose: Purpose::Backward, chunk: 3, micro: 2, part: 1 };
        let meta = Meta::new(&[2, 3], DType::Bf16).unwrap();
        let fill = |bytes: &mut [u8]| {
            bytes.iter_mut().enumerate().for_each(|(i, b)| *b = i as u8);
            Ok(())
        };
        let frame = encode(42, tag, 9, meta, fill).unwrap();
        let announced = announce(42, tag, 9, meta);
        for (frame, payload) in [(frame, (0..12).collect::<Vec<u8>>()), (announced, Vec::new())] {
            let message = decode(42, frame.clone()).unwrap();
            assert_eq!((message.tag, message.sequence, message.meta), (tag, 9, meta));
            assert_eq!((message.payload(), message.direct), (&payload[..], payload.is_empty()));
            assert!(decode(43, frame.clone()).is_err());
            for at in 0..frame.len() {
                let mut damaged = frame.clone();
                damaged[at] ^= 0x10;
                assert!(decode(42, damaged).is_err(), "byte {at}");
                assert!(decode(42, frame[..at].to_vec()).is_err(), "cut at {at}");
            }
        }
    }
}
