//! burn as it ships, in f32, on the cases of `benches/peers/cpu`: its CPU backends, or where PEER_DEVICE is `wgpu` that one, on
//! the adapter that it takes by itself.

#[path = "../../rust/src/protocol.rs"]
mod protocol;
mod step;

use burn::backend::wgpu::graphics::AutoGraphicsApi;
use burn::backend::wgpu::{RuntimeOptions, WgpuDevice, init_setup};
use burn::backend::{Flex, NdArray, Wgpu};
use burn::module::Param;
use burn::nn::LayerNormConfig;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData, activation};
use protocol::{Case, Peer, Work};

const VERSION: &str = "0.21.0";
const ON_CPU: [Peer; 2] = [Peer::cpu("burn flex", VERSION), Peer::cpu("burn ndarray", VERSION)];

/// Fetches a result.
type Read = Box<dyn Fn() -> Vec<u8>>;
/// Computes on inputs that it holds.
type Call = Box<dyn Fn() -> Read>;
/// Takes a case's inputs.
type Prepare = fn(&Case, &[Vec<u8>]) -> Call;

struct Slot {
    call: Option<Call>,
    result: Option<Read>,
}

struct Burn<B: Backend> {
    case: Case,
    kernel: &'static str,
    prepare: Prepare,
    slots: Vec<Slot>,
    device: B::Device,
}

/// Backends put work off, on the way in too.
fn wait<B: Backend>(device: &B::Device) {
    B::sync(device).expect("a device that goes on");
}

fn input<B: Backend, const D: usize>(case: &Case, bytes: &[Vec<u8>], index: usize) -> Tensor<B, D> {
    let mut values = vec![0.0; bytes[index].len() / 4];
    protocol::floats(&mut values, &bytes[index]);
    Tensor::from_data(TensorData::new(values, case.inputs[index].dims.clone()), &B::Device::default())
}

fn read<B: Backend, const D: usize>(result: &Tensor<B, D>) -> Vec<u8> {
    protocol::bytes(&result.to_data().to_vec::<f32>().expect("floats"))
}

fn kept<B: Backend, const D: usize>(result: Tensor<B, D>) -> Read {
    Box::new(move || read(&result))
}

fn rows<B: Backend>(case: &Case, bytes: &[Vec<u8>], function: fn(Tensor<B, 2>) -> Tensor<B, 2>) -> Call {
    let x = input::<B, 2>(case, bytes, 0);
    Box::new(move || kept(function(x.clone())))
}

fn product<B: Backend>(case: &Case, bytes: &[Vec<u8>]) -> Call {
    let (a, b) = (input::<B, 2>(case, bytes, 0), input::<B, 2>(case, bytes, 1));
    Box::new(move || kept(a.clone().matmul(b.clone())))
}

fn sum<B: Backend>(case: &Case, bytes: &[Vec<u8>]) -> Call {
    let (a, b) = (input::<B, 2>(case, bytes, 0), input::<B, 2>(case, bytes, 1));
    Box::new(move || kept(a.clone() + b.clone()))
}

fn layer_norm<B: Backend>(case: &Case, bytes: &[Vec<u8>]) -> Call {
    let x = input::<B, 2>(case, bytes, 0);
    let config = LayerNormConfig::new(case.inputs[0].dims[1]).with_epsilon(number(case, "epsilon"));
    let mut norm = config.init(&B::Device::default());
    norm.gamma = Param::from_tensor(input::<B, 1>(case, bytes, 1));
    norm.beta = Some(Param::from_tensor(input::<B, 1>(case, bytes, 2)));
    Box::new(move || kept(norm.forward(x.clone())))
}

/// Of products and a softmax, by heads: `[1, S, H, D]` is turned before and after.
fn attention<B: Backend>(case: &Case, bytes: &[Vec<u8>]) -> Call {
    let [q, k, v] = [0, 1, 2].map(|i| {
        let turned: Tensor<B, 4> = input::<B, 4>(case, bytes, i).swap_dims(1, 2);
        // Packed, as whoever splits heads would have it.
        Tensor::<B, 4>::from_data(turned.to_data(), &B::Device::default())
    });
    let scale = number(case, "scale");
    Box::new(move || {
        let scores = q.clone().matmul(k.clone().swap_dims(2, 3)).mul_scalar(scale);
        let y = activation::softmax(scores, 3).matmul(v.clone());
        Box::new(move || read(&y.clone().swap_dims(1, 2)))
    })
}

/// A number among the op's parameters.
fn number(case: &Case, name: &str) -> f64 {
    let text = case.params.split_once(&format!("{name}:")).map_or("", |(_, rest)| rest);
    text.split([',', '}']).next().and_then(|t| t.parse().ok()).expect("a parameter that the op has")
}

/// `None` where the library has nothing for the case.
fn counterpart<B: Backend>(case: &Case) -> Option<(&'static str, Prepare)> {
    let has = |params: &str| case.params.contains(params);
    let found: (&str, Prepare) = match case.op.as_str() {
        "matmul" if has("transpose_a:false,transpose_b:false,epilogue:None,accumulate:false") => {
            ("Tensor::matmul", product::<B>)
        }
        "softmax" => ("activation::softmax", |case, x| rows::<B>(case, x, |x| activation::softmax(x, 1))),
        "layernorm" => ("nn::LayerNorm", layer_norm::<B>),
        "add" => ("Tensor::add", sum::<B>),
        "gelu_erf" => ("activation::gelu", |case, x| rows::<B>(case, x, activation::gelu)),
        "gelu_tanh" => ("activation::gelu_approximate", |case, x| rows::<B>(case, x, activation::gelu_approximate)),
        "attention" if has("mask:None,lengths:false,bias:false") => ("matmul, softmax, matmul", attention::<B>),
        _ => return None,
    };
    case.inputs.iter().all(|t| t.dtype == "f32").then_some(found)
}

fn on<B: Backend + 'static>(case: &Case, slots: usize) -> Option<Box<dyn Work>> {
    if case.op == "training_step" {
        return step::open::<B>(case, slots);
    }
    let (kernel, prepare) = counterpart::<B>(case)?;
    let slots = (0..slots).map(|_| Slot { call: None, result: None }).collect();
    Some(Box::new(Burn::<B> { case: case.clone(), kernel, prepare, slots, device: Default::default() }))
}

impl<B: Backend> Work for Burn<B> {
    fn fill(&mut self, slot: usize, inputs: Vec<Vec<u8>>) {
        self.slots[slot] = Slot { call: Some((self.prepare)(&self.case, &inputs)), result: None };
        wait::<B>(&self.device);
    }

    fn run(&mut self, slot: usize) {
        let Slot { call, result } = &mut self.slots[slot];
        *result = call.as_ref().map(|call| call());
        wait::<B>(&self.device);
    }

    fn read(&self, slot: usize) -> Vec<Vec<u8>> {
        // Nothing was computed: poison.
        vec![self.slots[slot].result.as_ref().map_or_else(|| vec![0xFF; 4], |read| read())]
    }

    fn kernel(&self) -> String {
        self.kernel.into()
    }
}

fn open(peer: &str, case: &Case, slots: usize) -> Option<Box<dyn Work>> {
    match peer {
        "burn wgpu" => on::<Wgpu>(case, slots),
        "burn flex" => on::<Flex>(case, slots),
        _ => on::<NdArray>(case, slots),
    }
}

/// The wgpu backend with its adapter's name; nobody where there is no adapter.
fn on_adapter() -> Vec<Peer> {
    let setup = || init_setup::<AutoGraphicsApi>(&WgpuDevice::default(), RuntimeOptions::default());
    let adapter = std::panic::catch_unwind(|| setup().adapter.get_info().name).ok();
    adapter.into_iter().map(|name| Peer { name: "burn wgpu", version: VERSION, adapter: Some(name) }).collect()
}

fn main() {
    if std::env::var("PEER_DEVICE").is_ok_and(|device| device == "wgpu") {
        protocol::serve(&on_adapter(), open);
    } else {
        protocol::serve(&ON_CPU, open);
    }
}
