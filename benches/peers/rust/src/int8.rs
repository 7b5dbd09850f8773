//! rten-gemm's product of u8 activations and i8 weights, packed ahead as a model's are: i32 sums, no scales.

use rten_gemm::{GemmExecutor, GemmInputA, GemmInputB, GemmOptions, PackedBMatrix, QuantParams};
use rten_tensor::NdTensorView;

use crate::protocol::{Case, Work};

/// What is added to an i8 to make it a u8.
const ZERO: u8 = 128;

struct Slot {
    a: Vec<u8>,
    b: Option<PackedBMatrix<i8>>,
    c: Vec<i32>,
}

pub struct Int8 {
    executor: GemmExecutor<u8, i8, i32>,
    m: usize,
    n: usize,
    k: usize,
    /// One per row of activations and per weight column.
    zeros: (Vec<u8>, Vec<i8>),
    slots: Vec<Slot>,
}

impl Int8 {
    pub fn new(case: &Case, slots: usize) -> Self {
        let (m, k, n) = (case.inputs[0].dims[0], case.inputs[0].dims[1], case.inputs[2].dims[0]);
        let slot = || Slot { a: vec![0; m * k], b: None, c: vec![0; m * n] };
        let zeros = (vec![ZERO; m], vec![0; n]);
        Self { executor: GemmExecutor::new(), m, n, k, zeros, slots: (0..slots).map(|_| slot()).collect() }
    }
}

impl Work for Int8 {
    fn fill(&mut self, slot: usize, inputs: Vec<Vec<u8>>) {
        let slot = &mut self.slots[slot];
        for (x, b) in slot.a.iter_mut().zip(&inputs[0]) {
            *x = b.wrapping_add(ZERO);
        }
        let b: Vec<i8> = inputs[2].iter().map(|&b| b as i8).collect();
        let view = NdTensorView::from_data([self.n, self.k], &b[..]).transposed();
        slot.b = Some(self.executor.prepack_b(view));
        slot.c.fill(-1);
    }

    fn run(&mut self, slot: usize) {
        let Slot { a, b, c } = &mut self.slots[slot];
        let a = GemmInputA::Unpacked(NdTensorView::from_data([self.m, self.k], &a[..]));
        let b = GemmInputB::Packed(b.as_ref().expect("filled"));
        let a_quant = Some(QuantParams { zero_point: &self.zeros.0[..] });
        let b_quant = Some(QuantParams { zero_point: &self.zeros.1[..] });
        let options = GemmOptions { a_quant, b_quant, ..GemmOptions::default() };
        self.executor.gemm(c, a, b, options).expect("shapes that fit");
    }

    fn read(&self, slot: usize) -> Vec<Vec<u8>> {
        vec![self.slots[slot].c.iter().flat_map(|x| x.to_le_bytes()).collect()]
    }

    fn kernel(&self) -> String {
        format!("{}, packed weights, no scales", self.executor.kernel_name())
    }

    fn computes(&self) -> Option<&'static str> {
        Some("integer product")
    }
}
