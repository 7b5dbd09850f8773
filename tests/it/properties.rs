//! What must hold whatever the numbers: each property on 256 seeded random cases. A failure names its case;
//! `ESPALIER_CASE=N` runs that one alone.

mod distilled;
mod experts;
mod gates;
mod grids;
mod masks;
mod recipes;
mod shapes;
mod structures;
mod updates;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use espalier::device::{self, Device};
use espalier::dispatch;
use espalier::op::Op;
use espalier::rng::Stream;
use espalier::tensor::Tensor;

const CASES: u64 = 256;

/// A random case: sizes and values come from its stream.
pub struct Draw {
    pub stream: Stream,
    pub device: Arc<dyn Device>,
}

impl Draw {
    pub fn below(&mut self, n: usize) -> usize {
        self.stream.below(n)
    }

    /// 1 to `most`.
    pub fn size(&mut self, most: usize) -> usize {
        1 + self.stream.below(most)
    }

    /// Values of one of the kinds that break things: normal, few different ones (ties), many zeros, of very different sizes.
    pub fn values(&mut self, count: usize) -> Vec<f32> {
        let kind = self.below(4);
        let mut value = || match kind {
            0 => self.stream.normal() as f32,
            1 => self.stream.below(5) as f32 - 2.0,
            2 => (self.stream.below(3) as f32 - 1.0) * self.stream.normal() as f32,
            _ => self.stream.normal() as f32 * (2.0f32).powi(self.stream.below(24) as i32 - 12),
        };
        (0..count).map(|_| value()).collect()
    }

    pub fn tensor(&self, dims: &[usize], values: &[f32]) -> Tensor {
        Tensor::from_slice(&self.device, dims, values).unwrap()
    }

    /// A matrix of such values.
    pub fn matrix(&mut self, dims: [usize; 2]) -> (Tensor, Vec<f32>) {
        let values = self.values(dims[0] * dims[1]);
        (self.tensor(&dims, &values), values)
    }

    pub fn run(&self, op: &dyn Op, inputs: &[&Tensor]) -> Vec<Tensor> {
        dispatch::run(op, inputs).unwrap()
    }
}

/// Runs a property on all of its cases.
pub fn holds(name: &str, property: impl Fn(&mut Draw)) {
    let only: Option<u64> = std::env::var("ESPALIER_CASE").ok().and_then(|n| n.parse().ok());
    let device = device::open("cpu:1").unwrap();
    let site = u32::from_le_bytes(blake3::hash(name.as_bytes()).as_bytes()[..4].try_into().unwrap());
    for case in (0..CASES).filter(|case| only.is_none_or(|only| only == *case)) {
        let mut draw = Draw { stream: Stream::new(case, site), device: device.clone() };
        if let Err(failure) = catch_unwind(AssertUnwindSafe(|| property(&mut draw))) {
            eprintln!("{name}: case {case} fails; ESPALIER_CASE={case} runs it alone");
            std::panic::resume_unwind(failure);
        }
    }
}
