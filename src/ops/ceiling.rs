//! The yardstick of `kernels bench`: how many multiply-adds a device does when nothing else stands in the way.

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, always, source};
use crate::op::{Array, Case, Cost, Family, Op, Tolerance};
use crate::shape::{self, Meta};

pub static FAMILY: Family = Family { name: "ceiling", cases, source: Some(SOURCE) };

const SOURCE: Source = source!("ceiling");
/// Invocations per workgroup, and elements each of them handles.
const BLOCK: u32 = 64;
const PER_INVOCATION: usize = 16;

/// y_0 = 0; y_{t+1} = y_t / 2 + x, `steps` times; x f32[..] to y of the same shape.
#[derive(Clone, Copy, Debug)]
pub struct MultiplyAddChain {
    pub steps: u32,
}

impl Op for MultiplyAddChain {
    fn name(&self) -> &'static str {
        "multiply_add_chain"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs {
            [x] if x.dtype == DType::F32 => Ok(vec![*x]),
            _ => Err(Error::Shape { op: self.name(), rule: "one f32 input", got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        // The sum of the geometric series: x (2 - 2^(1 - steps)).
        let factor = 2.0 - 2f64.powi(1 - self.steps as i32);
        vec![inputs[0].data.iter().map(|x| x * factor).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("multiply_add_chain_fwd", &[DType::F32], cpu::multiply_add_chain),
            Kernel {
                name: "multiply_add_chain_fwd",
                code: Code::Gpu { source: SOURCE, entry: "multiply_add_chain_fwd", constants: &[] },
                dtypes: &[DType::F32],
                fits: always,
                plan,
            },
        ];
        KERNELS
    }

    fn params(&self, _: &[Meta], outputs: &[Meta]) -> Params {
        Params::new().u(outputs[0].count()).word(self.steps)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let n = outputs[0].count() as f64;
        Cost { flops: 2.0 * n * f64::from(self.steps), bytes: (inputs[0].bytes() + outputs[0].bytes()) as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn plan(p: &Problem) -> Plan {
    let steps = p.op::<MultiplyAddChain>().map_or(0, |op| op.steps as usize);
    let items = p.outputs[0].count().div_ceil(PER_INVOCATION);
    Plan::of(Launch::linear(items, BLOCK, p.params()).trips(steps))
}

fn cases() -> Vec<Case> {
    // Errors of later steps are halved with the value: the sum stays within that of eight roundings.
    let case = |steps: u32, n: usize| {
        Case::new(MultiplyAddChain { steps }, Tolerance::Contraction { k: 8 }).normal(&[n], DType::F32)
    };
    let mut cases: Vec<Case> =
        [1, 15, 16, 17, 129, 1024, 1031].into_iter().flat_map(|n| [case(1, n), case(3, n), case(40, n)]).collect();
    cases.push(case(8192, 32_768).bench());
    cases
}
