//! Ops that move elements: permute, slice, pad, concat, rows by index, fill.

mod cases;
mod moves;
mod rows;

pub use moves::{Concat, Fill, Pad, Permute, Slice};
pub use rows::{GatherRows, ScatterAddRows};

use crate::dtype::DType;
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, source};
use crate::op::Family;
use crate::shape::Meta;

pub static FAMILY: Family = Family { name: "layout", cases: cases::cases, source: Some(SOURCE) };

const SOURCE: Source = source!("layout");
const BLOCK: u32 = 64;

/// Types that are moved, by the word that stands for them: see [`words`].
const WORDS: &[DType] = &[DType::F16, DType::Bf16, DType::U32];

/// The element type of an op that only moves: 4-byte elements are words, so that every bit pattern survives.
fn words(meta: &Meta) -> DType {
    if meta.dtype == DType::F32 { DType::U32 } else { meta.dtype }
}

fn movable(dtype: DType) -> bool {
    dtype.is_float() || dtype == DType::U32
}

/// Whether every argument fits one binding.
fn bindable(p: &Problem) -> bool {
    p.inputs.iter().chain(p.outputs).all(|m| m.bytes() as u64 <= p.info.limits.binding_bytes)
}

const fn wgsl(
    name: &'static str,
    dtypes: &'static [DType],
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry: name, constants: &[] };
    Kernel { name, code, dtypes, fits, plan }
}

/// The parameter block that all entries but `permute_fwd` share.
#[derive(Clone, Copy, Default)]
struct Block {
    count: usize,
    base: usize,
    width: usize,
    stride: usize,
    offset: usize,
    rows: usize,
    flag: bool,
    bits: u32,
}

impl Block {
    fn launch(self, items: usize) -> Launch {
        let params = Params::new().u(self.count).u(self.base).u(self.width).u(self.stride).u(self.offset).u(self.rows);
        Launch::linear(items, BLOCK, params.flag(self.flag).word(self.bits))
    }
}
