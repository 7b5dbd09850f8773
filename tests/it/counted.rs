//! Work that is counted, not timed: what a training step launches, hands over and holds. Exact, whatever else a machine does.

use std::sync::Arc;

use espalier::compress::freeze::{Form, freeze};
use espalier::compress::quantization::Format;
use espalier::device::{self, Class, CpuDevice, Device, Kind, Limits, NullDevice, Stats};
use espalier::nn::config::{Activation, Size};
use espalier::nn::{Config, Model, Pass};
use espalier::ops::unary::{Function, Unary};
use espalier::tape::Var;
use espalier::tensor::Tensor;
use espalier::train::optimizer::Optimizer;
use espalier::train::trainer::step;

use crate::model::{VOCABULARY, assemble, cpu, examples, micro, settings};

/// Launches of one command buffer at most (`device/wgpu/batch.rs`).
const LAUNCHES: u64 = 128;

/// What the third training step of a GPT of that many blocks adds to a device's counts; what it held.
fn third_step(device: &Arc<dyn Device>, size: Size) -> Stats {
    let mut model = Model::init(Config::gpt(size, VOCABULARY), device, 1).unwrap();
    let mut optimizer = Optimizer::new(&mut model, settings(1e-3), |_| true).unwrap();
    let micro = micro(device, &assemble(&examples(24, 4)));
    let mut run = || step(&model, &mut optimizer, std::slice::from_ref(&micro), &[], (0.0, 1, 80)).map(|_| ());
    for _ in 0..2 {
        run().unwrap();
    }
    device.reset_peak();
    let before = device.stats();
    run().unwrap();
    let after = device.stats();
    Stats {
        launches: after.launches - before.launches,
        submits: after.submits - before.submits,
        allocations: after.allocations - before.allocations,
        ..after
    }
}

fn size(layers: usize) -> Size {
    Size { layers, heads: 2, head_size: 16, ffn_width: 128, max_positions: 32 }
}

fn null() -> Arc<dyn Device> {
    Arc::new(NullDevice::new(Kind::Cpu, Class::Cpu, Limits::unbounded()))
}

/// A block costs as many launches as the one before it; what is left is the embedding, the loss and the update.
#[test]
fn a_step_launches_alike_for_every_block() {
    let launches = |layers| third_step(&cpu(), size(layers)).launches;
    let [one, two, three, eight] = [1, 2, 3, 8].map(launches);
    assert_eq!(three - two, two - one, "{one} {two} {three}");
    assert_eq!(eight, one + 7 * (two - one));
    assert!(two - one <= 50, "{} launches of one block", two - one);
}

/// A step is one command buffer, and its loss the only thing that is read: a device is never waited for within one. Only what
/// would keep the device idle for long is handed over in parts.
#[test]
fn a_step_is_handed_over_once() {
    // Its own: others' work counts too.
    let opened = device::open("wgpu").map_err(|e| e.to_string());
    let Some(device) = crate::device::present("a_step_is_handed_over_once", opened) else { return };
    for layers in [1, 2, 4] {
        let Stats { launches, submits, .. } = third_step(&device, size(layers));
        assert_eq!(submits, launches.div_ceil(LAUNCHES), "{launches} launches of {layers} blocks");
    }
}

/// What the classes of the pool add to what a step holds at its fullest, to the byte: at most a tenth.
#[test]
fn a_step_holds_what_its_tensors_need() {
    for layers in [1, 4] {
        let wide = Size { heads: 4, head_size: 32, ffn_width: 512, ..size(layers) };
        let need = third_step(&null(), wide).bytes_peak as f64;
        let held = third_step(&cpu(), wide).bytes_peak as f64;
        assert!(held >= need && held <= 1.1 * need, "{layers} blocks: {held} bytes for {need}");
    }
}

/// Query, key and value round the same rows to integers: once.
#[test]
fn rows_are_rounded_to_integers_once() {
    let device = cpu();
    let model = Model::init(Config::gpt(size(1), VOCABULARY), &device, 1).unwrap();
    let form = Form { sparse: false, quantized: Some(Format::default()) };
    let model = freeze(&model, form).unwrap();
    let rows = |value: f32| Var::constant(Tensor::from_slice(&device, &[3, 32], &[value; 96]).unwrap());
    let mut pass = Pass::inference(&model);
    let mut launches = |part: &str, x: &Var| {
        let before = device.stats().launches;
        let y = pass.linear(&format!("blocks.0.attention.{part}"), x).unwrap();
        (device.stats().launches - before, y.tensor.to_vec::<f32>().unwrap())
    };
    let (one, other) = (rows(1.0), rows(2.0));
    let (first, query) = launches("query", &one);
    let (second, _) = launches("key", &one);
    let (third, doubled) = launches("query", &other);
    assert_eq!((second, third), (first - 1, first));
    assert_ne!(query, doubled);
}

/// An int8 FFN is three launches: its hidden layer is rounded by the kernel that makes it. The bits are those of five, which it
/// falls back to where the second layer's input is not rounded by its own range.
#[test]
fn the_hidden_layer_of_an_int8_ffn_is_rounded_where_it_is_made() {
    for (threads, rows) in [(1, 3), (2, 40), (3, 40)] {
        let device: Arc<dyn Device> = Arc::new(CpuDevice::new(Some(threads)).unwrap());
        for activation in [Activation::Relu, Activation::Gelu] {
            let mut config = Config::bert_tagger(size(1), VOCABULARY, Vec::new());
            config.blocks[0].activation = activation;
            let model = Model::init(config, &device, 1).unwrap();
            let mut model = freeze(&model, Form { sparse: false, quantized: Some(Format::default()) }).unwrap();
            let values: Vec<f32> = (0..rows * 32).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
            let x = Var::constant(Tensor::from_slice(&device, &[rows, 32], &values).unwrap());
            let counted = |model: &Model, apart: bool| {
                let (mut pass, before) = (Pass::inference(model), device.stats().launches);
                let y = if apart {
                    let h = pass.linear("blocks.0.ffn.in", &x).unwrap();
                    let function = if activation == Activation::Relu { Function::Relu } else { Function::GeluTanh };
                    let h = pass.tape.first(Unary(function), &[&h]).unwrap();
                    pass.linear("blocks.0.ffn.out", &h).unwrap()
                } else {
                    pass.ffn(0, &x).unwrap()
                };
                (device.stats().launches - before, y.tensor.to_bytes().unwrap())
            };
            let ((three, fused), (five, chain)) = (counted(&model, false), counted(&model, true));
            assert_eq!((three, five), (3, 5));
            assert!(fused == chain, "{activation:?} on {threads} threads");
            for (part, length) in [("input_step", 1), ("smooth", 128)] {
                let name = format!("blocks.0.ffn.out.{part}");
                let tensor = Tensor::from_slice(&device, &[length], &vec![0.5f32; length]).unwrap();
                model.tensors.insert(name.clone(), tensor);
                assert_eq!(counted(&model, false), counted(&model, true), "{part}");
                model.tensors.remove(&name);
            }
        }
    }
}

/// A model of small weights and wide activations takes a batch in parts, of two sequences and of three with a rest, and gives the same.
#[test]
fn a_large_batch_goes_through_small_weights_in_parts() {
    let device = cpu();
    let batch = micro(&device, &assemble(&examples(16, 20))).batch;
    let run = |model: &Model, whole: bool| {
        let mut pass = Pass::inference(model);
        // Who asks for the FFNs' inputs gets those of the whole batch.
        pass.ffn_inputs = whole.then(Vec::new);
        let before = device.stats().launches;
        let hidden = pass.hidden(&batch).unwrap();
        (device.stats().launches - before, hidden.tensor.to_bytes().unwrap())
    };
    for (ffn_width, parts) in [(16_384, 8), (10_240, 6)] {
        let float = Model::init(Config::glm(Size { ffn_width, ..size(1) }, VOCABULARY), &device, 1).unwrap();
        let small = freeze(&float, Form { sparse: false, quantized: Some(Format::default()) }).unwrap();
        let ((in_parts, taken), (once, whole)) = (run(&small, false), run(&small, true));
        assert!(in_parts > (parts - 1) * once, "{in_parts} launches in {parts} parts, {once} at once");
        assert!(in_parts < (parts + 4) * once, "{in_parts} launches in {parts} parts, {once} at once");
        assert!(taken == whole);
        // Weights that every part would read anew.
        assert_eq!(run(&float, false).0, run(&float, true).0);
    }
}
