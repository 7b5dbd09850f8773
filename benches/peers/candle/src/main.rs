//! candle as it ships, on the cases of `benches/peers/cpu`: products in f32 and bf16, a training step.

mod step;

#[path = "../../rust/src/protocol.rs"]
mod protocol;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use protocol::{Case, Peer, Work};

const PEERS: [Peer; 1] = [Peer::cpu("candle", "0.11.1")];

#[derive(Default)]
struct Slot {
    inputs: Vec<Tensor>,
    output: Option<Tensor>,
}

struct Product {
    metas: Vec<(DType, Vec<usize>)>,
    slots: Vec<Slot>,
}

fn open(_: &str, case: &Case, slots: usize) -> Option<Box<dyn Work>> {
    if case.op == "training_step" {
        return step::open(case, slots);
    }
    let plain = case.params.contains("transpose_a:false,transpose_b:false,epilogue:None,accumulate:false");
    let dtype = |t: &protocol::Tensor| if t.dtype == "bf16" { DType::BF16 } else { DType::F32 };
    let metas = case.inputs.iter().map(|t| (dtype(t), t.dims.clone())).collect();
    let slots = (0..slots).map(|_| Slot::default()).collect();
    plain.then(|| Box::new(Product { metas, slots }) as Box<dyn Work>)
}

impl Work for Product {
    fn fill(&mut self, slot: usize, inputs: Vec<Vec<u8>>) {
        let of = |(bytes, (dtype, dims)): (&Vec<u8>, &(DType, Vec<usize>))| {
            Tensor::from_raw_buffer(bytes, *dtype, dims, &Device::Cpu).expect("a tensor")
        };
        let inputs = inputs.iter().zip(&self.metas).map(of).collect();
        self.slots[slot] = Slot { inputs, output: None };
    }

    fn run(&mut self, slot: usize) {
        let Slot { inputs, output } = &mut self.slots[slot];
        *output = Some(inputs[0].matmul(&inputs[1]).expect("a product"));
    }

    fn read(&self, slot: usize) -> Vec<Vec<u8>> {
        // Nothing was computed: poison.
        let Some(output) = &self.slots[slot].output else { return vec![vec![0xFF; 4]] };
        let flat = output.flatten_all().expect("a view");
        if output.dtype() == DType::BF16 {
            let values = flat.to_vec1::<bf16>().expect("values");
            return vec![values.iter().flat_map(|x| x.to_le_bytes()).collect()];
        }
        vec![protocol::bytes(&flat.to_vec1::<f32>().expect("values"))]
    }

    fn kernel(&self) -> String {
        "Tensor::matmul".into()
    }
}

fn main() {
    protocol::serve(&PEERS, open);
}
