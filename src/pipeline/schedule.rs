//! Schedules as data: what every stage of a pipeline does, in which order. Pure functions of stages and micro-batches.
//!
//! A model is cut into chunks, a stage owns one or more of them. Most kinds give stage i chunk i; the interleaved kind deals
//! chunks out in turns, the V lays them down and back up again, so that the first stage also holds the last chunk.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::v_shape::{self, Pace};
use crate::error::{Error, Result};

/// What a stage can be asked to do for one micro-batch and chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    Forward,
    /// Gradients of inputs and weights in one go.
    Backward,
    BackwardInput,
    BackwardWeight,
    /// The chunk's output to the stage of the next chunk.
    SendForward,
    /// The chunk's input from the stage of the chunk before.
    ReceiveForward,
    /// The gradient of the chunk's input to the stage of the chunk before.
    SendBackward,
    /// The gradient of the chunk's output from the stage of the next chunk.
    ReceiveBackward,
}

impl Work {
    /// As in PyTorch's pipeline schedules, whose CSV files can be read.
    pub const fn letters(self) -> &'static str {
        match self {
            Work::Forward => "F",
            Work::Backward => "B",
            Work::BackwardInput => "I",
            Work::BackwardWeight => "W",
            Work::SendForward => "SEND_F",
            Work::ReceiveForward => "RECV_F",
            Work::SendBackward => "SEND_B",
            Work::ReceiveBackward => "RECV_B",
        }
    }

    pub const ALL: [Work; 8] = [
        Work::Forward,
        Work::Backward,
        Work::BackwardInput,
        Work::BackwardWeight,
        Work::SendForward,
        Work::ReceiveForward,
        Work::SendBackward,
        Work::ReceiveBackward,
    ];

    pub const fn computes(self) -> bool {
        matches!(self, Work::Forward | Work::Backward | Work::BackwardInput | Work::BackwardWeight)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Event {
    pub work: Work,
    pub chunk: u32,
    pub micro: u32,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}{}{}", self.chunk, self.work.letters(), self.micro)
    }
}

impl FromStr for Event {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is no event; an event is CHUNK, F B I W SEND_F RECV_F SEND_B or RECV_B, MICRO-BATCH");
        let letters = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let micro = text.rfind(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)? + 1;
        let work = Work::ALL.into_iter().find(|w| w.letters() == &text[letters..micro]).ok_or_else(wrong)?;
        let number = |part: &str| part.parse().map_err(|_| wrong());
        Ok(Event { work, chunk: number(&text[..letters])?, micro: number(&text[micro..])? })
    }
}

/// The published orders. Sources: LightChatGLM Algorithm 1; GPipe (Huang et al. 2019); 1F1B (PipeDream-Flush, Narayanan et
/// al. 2021) with its interleaved form; DAPPLE (Fan et al. 2021); zero bubble (Qi et al. 2023) and the V's (Qi et al. 2024).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Kind {
    /// Algorithm 1 to the letter: each micro-batch through all stages and back before the next one enters.
    Sequential,
    GPipe,
    OneForwardOneBackward,
    /// Stage i takes in min(S - i, cap) micro-batches, then alternates: for links that cost nothing. Cap 0: none.
    DappleA {
        cap: usize,
    },
    /// min(2 (S - i) - 1, cap) micro-batches: for links whose time is comparable to the work's.
    DappleB {
        cap: usize,
    },
    /// Several chunks a stage, dealt out in turns.
    Interleaved {
        chunks: usize,
    },
    /// Weight gradients fill the bubbles, memory as 1F1B.
    ZeroBubbleH1,
    /// No bubbles between a stage's first and last work, about twice the memory of 1F1B.
    ZeroBubbleH2,
    /// No bubbles and the memory of 1F1B: two chunks a stage, in a V.
    ZeroBubbleV,
    /// Half the memory and half the bubbles of 1F1B, in a V.
    VHalf,
    /// A third of the memory and two thirds of the bubbles of 1F1B, in a V.
    VMin,
}

impl Kind {
    /// All kinds with their usual settings.
    pub const ALL: [Kind; 11] = [
        Kind::Sequential,
        Kind::GPipe,
        Kind::OneForwardOneBackward,
        Kind::DappleA { cap: 0 },
        Kind::DappleB { cap: 0 },
        Kind::Interleaved { chunks: 2 },
        Kind::ZeroBubbleH1,
        Kind::ZeroBubbleH2,
        Kind::ZeroBubbleV,
        Kind::VHalf,
        Kind::VMin,
    ];

    /// Chunks of the model for so many stages.
    pub const fn chunks(self, stages: usize) -> usize {
        match self {
            Kind::Interleaved { chunks } => stages * chunks,
            Kind::ZeroBubbleV | Kind::VHalf | Kind::VMin => stages * 2,
            _ => stages,
        }
    }

    /// The stage that owns a chunk.
    pub const fn home(self, stages: usize, chunk: usize) -> usize {
        match self {
            Kind::ZeroBubbleV | Kind::VHalf | Kind::VMin if chunk >= stages => 2 * stages - 1 - chunk,
            _ => chunk % stages,
        }
    }

    /// Whether it needs backward in two parts.
    pub const fn splits_backward(self) -> bool {
        matches!(self, Kind::ZeroBubbleH1 | Kind::ZeroBubbleH2 | Kind::ZeroBubbleV | Kind::VHalf | Kind::VMin)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Kind::Sequential => f.write_str("sequential"),
            Kind::GPipe => f.write_str("gpipe"),
            Kind::OneForwardOneBackward => f.write_str("1f1b"),
            Kind::DappleA { cap: 0 } => f.write_str("dapple-a"),
            Kind::DappleA { cap } => write!(f, "dapple-a:{cap}"),
            Kind::DappleB { cap: 0 } => f.write_str("dapple-b"),
            Kind::DappleB { cap } => write!(f, "dapple-b:{cap}"),
            Kind::Interleaved { chunks: 2 } => f.write_str("interleaved"),
            Kind::Interleaved { chunks } => write!(f, "interleaved:{chunks}"),
            Kind::ZeroBubbleH1 => f.write_str("zb-h1"),
            Kind::ZeroBubbleH2 => f.write_str("zb-h2"),
            Kind::ZeroBubbleV => f.write_str("zb-v"),
            Kind::VHalf => f.write_str("v-half"),
            Kind::VMin => f.write_str("v-min"),
        }
    }
}

/// What names a kind, for messages.
pub const KINDS: &str = "sequential, gpipe, 1f1b, dapple-a[:CAP], dapple-b[:CAP], interleaved[:CHUNKS], zb-h1, zb-h2, zb-v, v-half or v-min";

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no schedule: {KINDS}");
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => {
                (name, Some(number.parse().ok().filter(|n| (1..=1024).contains(n)).ok_or_else(wrong)?))
            }
            None => (text, None),
        };
        match (name, number) {
            ("sequential", None) => Ok(Kind::Sequential),
            ("gpipe", None) => Ok(Kind::GPipe),
            ("1f1b", None) => Ok(Kind::OneForwardOneBackward),
            ("dapple-a", cap) => Ok(Kind::DappleA { cap: cap.unwrap_or(0) }),
            ("dapple-b", cap) => Ok(Kind::DappleB { cap: cap.unwrap_or(0) }),
            ("interleaved", chunks) => Ok(Kind::Interleaved { chunks: chunks.unwrap_or(2) }),
            ("zb-h1", None) => Ok(Kind::ZeroBubbleH1),
            ("zb-h2", None) => Ok(Kind::ZeroBubbleH2),
            ("zb-v", None) => Ok(Kind::ZeroBubbleV),
            ("v-half", None) => Ok(Kind::VHalf),
            ("v-min", None) => Ok(Kind::VMin),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for Kind {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Kind> for String {
    fn from(kind: Kind) -> Self {
        kind.to_string()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// How messages name it.
    pub name: String,
    pub micros: usize,
    /// The stage of each chunk.
    pub homes: Vec<usize>,
    /// What each stage does.
    pub stages: Vec<Vec<Event>>,
}

/// Stages and micro-batches at most: beyond, a typing mistake is likelier than a plan.
pub const MAX_STAGES: usize = 65_536;
pub const MAX_MICROS: usize = 1 << 20;
/// Work of chunks on micro-batches at most: more does not fit into memory.
const MAX_WORK: usize = 1 << 26;

impl Schedule {
    /// # Errors
    /// `Parameter` for no stages, no micro-batches or too many of them.
    pub fn new(kind: Kind, stages: usize, micros: usize) -> Result<Self> {
        let refuse = |parameter, value: usize, allowed| {
            Err(Error::Parameter { op: "schedule", parameter, value: value.to_string(), allowed })
        };
        if !(1..=MAX_STAGES).contains(&stages) {
            return refuse("stages", stages, "1 to 65536");
        }
        if !(1..=MAX_MICROS).contains(&micros) {
            return refuse("micro_batches", micros, "1 to 1048576");
        }
        if kind.chunks(stages).saturating_mul(micros) > MAX_WORK {
            return refuse("micro_batches", micros, "at most 2^26 over the number of chunks");
        }
        let mut paced = match kind {
            Kind::VHalf => v_shape::paced(Pace::half(stages), stages, micros),
            Kind::VMin => v_shape::paced(Pace::least(stages), stages, micros),
            _ => Vec::new(),
        };
        let mut build = |i: usize| match kind {
            Kind::Sequential => (0..micros).flat_map(|m| [(Work::Forward, i, m), (Work::Backward, i, m)]).collect(),
            Kind::GPipe => alternating(i, micros, micros),
            Kind::OneForwardOneBackward => alternating(i, stages - i, micros),
            Kind::DappleA { cap } => alternating(i, capped(stages - i, cap), micros),
            Kind::DappleB { cap } => alternating(i, capped(2 * (stages - i) - 1, cap), micros),
            Kind::Interleaved { chunks } => interleaved(i, stages, chunks, micros),
            Kind::ZeroBubbleH1 => deferred(i, stages - i, i, micros),
            Kind::ZeroBubbleH2 => deferred(i, 2 * (stages - i) - 1, 2 * i, micros),
            Kind::ZeroBubbleV => v_shape::zero_bubble(i, stages, micros),
            Kind::VHalf | Kind::VMin => std::mem::take(&mut paced[i]),
        };
        let event =
            |(work, chunk, micro): (Work, usize, usize)| Event { work, chunk: chunk as u32, micro: micro as u32 };
        Ok(Self {
            name: kind.to_string(),
            micros,
            homes: (0..kind.chunks(stages)).map(|c| kind.home(stages, c)).collect(),
            stages: (0..stages).map(|i| build(i).into_iter().map(event).collect()).collect(),
        })
    }

    pub fn chunks(&self) -> usize {
        self.homes.len()
    }

    /// Whether sends and receives stand in it.
    pub fn has_messages(&self) -> bool {
        self.stages.iter().flatten().any(|e| !e.work.computes())
    }

    /// Whether backward comes in two parts.
    pub fn splits_backward(&self) -> bool {
        self.stages.iter().flatten().any(|e| e.work == Work::BackwardInput)
    }

    /// The same schedule with a receive before each event that needs another stage's result and a send after each that has
    /// one to give. Sends wait for nobody, so this adds no way to a deadlock.
    #[must_use]
    pub fn with_messages(&self) -> Self {
        let last = self.chunks() - 1;
        let crosses = |chunk: u32, other: u32| self.homes[chunk as usize] != self.homes[other as usize];
        let lower = |events: &Vec<Event>| {
            let mut lowered = Vec::with_capacity(events.len() * 3);
            for &e in events.iter().filter(|e| e.work.computes()) {
                let with = |work| Event { work, ..e };
                let (before, after) = match e.work {
                    Work::Forward => {
                        let receives = e.chunk > 0 && crosses(e.chunk, e.chunk - 1);
                        let sends = (e.chunk as usize) < last && crosses(e.chunk, e.chunk + 1);
                        (receives.then(|| with(Work::ReceiveForward)), sends.then(|| with(Work::SendForward)))
                    }
                    Work::Backward | Work::BackwardInput => {
                        let receives = (e.chunk as usize) < last && crosses(e.chunk, e.chunk + 1);
                        let sends = e.chunk > 0 && crosses(e.chunk, e.chunk - 1);
                        (receives.then(|| with(Work::ReceiveBackward)), sends.then(|| with(Work::SendBackward)))
                    }
                    _ => (None, None),
                };
                lowered.extend(before.into_iter().chain([e]).chain(after));
            }
            lowered
        };
        Self { stages: self.stages.iter().map(lower).collect(), ..self.clone() }
    }
}

fn capped(count: usize, cap: usize) -> usize {
    if cap == 0 { count } else { count.min(cap) }
}

/// Work of a chunk on a micro-batch.
pub(super) type Item = (Work, usize, usize);

/// `ahead` forwards, then one backward and one forward in turns. Backwards come in the order of the micro-batches, so gradients
/// are summed in one order whatever the kind.
fn alternating(chunk: usize, ahead: usize, micros: usize) -> Vec<Item> {
    let ahead = ahead.min(micros);
    let warm = (0..ahead).map(|m| (Work::Forward, chunk, m));
    let rest = (0..micros).flat_map(|m| {
        let next = (m + ahead < micros).then_some((Work::Forward, chunk, m + ahead));
        [(Work::Backward, chunk, m)].into_iter().chain(next)
    });
    warm.chain(rest).collect()
}

/// As `alternating` with backward in two parts, weight gradients `late` micro-batches after input gradients.
fn deferred(chunk: usize, ahead: usize, late: usize, micros: usize) -> Vec<Item> {
    let ahead = ahead.min(micros);
    let mut items: Vec<Item> = (0..ahead).map(|m| (Work::Forward, chunk, m)).collect();
    for m in 0..micros {
        items.push((Work::BackwardInput, chunk, m));
        items.extend(m.checked_sub(late).map(|m| (Work::BackwardWeight, chunk, m)));
        items.extend((m + ahead < micros).then_some((Work::Forward, chunk, m + ahead)));
    }
    items.extend((micros.saturating_sub(late)..micros).map(|m| (Work::BackwardWeight, chunk, m)));
    items
}

/// Interleaved 1F1B for whole rounds of `stages` micro-batches; those of the last round that do not exist are left out, which
/// takes no order from the others.
fn interleaved(i: usize, stages: usize, chunks: usize, micros: usize) -> Vec<Item> {
    let each = micros.div_ceil(stages) * stages * chunks;
    let round = stages * chunks;
    let item = |k: usize, work: Work| {
        let turn = k % round / stages;
        let local = if work == Work::Forward { turn } else { chunks - 1 - turn };
        (work, local * stages + i, k / round * stages + k % stages)
    };
    let ahead = ((chunks - 1) * stages + 2 * (stages - 1 - i) + 1).min(each);
    let mut items: Vec<Item> = (0..ahead).map(|k| item(k, Work::Forward)).collect();
    for k in 0..each {
        items.push(item(k, Work::Backward));
        items.extend((k + ahead < each).then(|| item(k + ahead, Work::Forward)));
    }
    items.retain(|&(_, _, micro)| micro < micros);
    items
}
