//! `kernels bench --break-even`: feed-forward blocks in compressed forms against the dense block, for one token and for many, all
//! forms taking turns in one run. Says from where on a form is worth its kernels on this device.

use std::sync::Arc;

use serde::Serialize;

use crate::cli::{Global, say, say_json};
use crate::compress::experts::{Router, Settings, Split, convert};
use crate::compress::freeze::{Form, freeze, skip_zeros};
use crate::compress::quantization::Format;
use crate::device::Device;
use crate::device::turns::take_turns;
use crate::dispatch;
use crate::error::Result;
use crate::nn::config::Size;
use crate::nn::{Activation, Batch, Config, Model, Pass};
use crate::ops::binary::MUL;
use crate::ops::select::KeepLargest;
use crate::ops::sparse24::{Form24, Mask24};
use crate::report::bench::quantile;
use crate::rng::Stream;
use crate::tape::Var;
use crate::tensor::Tensor;

/// Heads and head size (their product is the width) and neurons: the demo's student and teacher, and GPT-2 small.
const SHAPES: [[usize; 3]; 3] = [[4, 24, 384], [4, 32, 512], [12, 64, 3072]];
const TOKENS: [usize; 4] = [1, 8, 64, 512];
const EXPERT_SIZE: usize = 32;
const SHARES: [f64; 5] = [1.0, 0.5, 0.4, 0.3, 0.2];
const UNSTRUCTURED: [f64; 3] = [0.5, 0.8, 0.9];
const LINEARS: [&str; 2] = ["blocks.0.ffn.in", "blocks.0.ffn.out"];

/// One form at one shape.
#[derive(Serialize)]
struct Row {
    device: String,
    width: usize,
    ffn_width: usize,
    tokens: usize,
    dtype: &'static str,
    form: String,
    /// What executes it.
    runs: &'static str,
    /// Medians over the rounds, microseconds of one block.
    us: f64,
    dense_us: f64,
    /// Dense time over this form's, round by round: quartiles and median.
    speedup: [f64; 3],
    /// Of experts that are read where they lie: the same experts, sorted.
    sorted_us: Option<f64>,
}

/// A block to time.
struct Timed {
    form: String,
    runs: &'static str,
    model: Model,
    grouped: bool,
}

impl Timed {
    fn run(&self, x: &Var) -> Result<()> {
        Pass::inference(&self.model).grouped(self.grouped).ffn(0, x)?;
        Ok(())
    }
}

pub fn run(global: &Global, samples: usize, seed: u64) -> Result<()> {
    let device = global.open()?;
    if !global.json() {
        say(format!(
            "{} ({}): FFN blocks against the dense block of the same type, warm",
            device.info().id,
            device.info().name
        ));
        say(format!(
            "{:>5} x {:<5} {:>6} {:<5} {:<22} {:>10} {:>10} {:>7} {:>13}  runs on",
            "d", "ffn", "tokens", "type", "form", "us", "dense us", "faster", "quartiles"
        ));
    }
    let mut rows = Vec::new();
    for [heads, head_size, ffn_width] in SHAPES {
        let size = Size { layers: 1, heads, head_size, ffn_width, max_positions: 16 };
        for int8 in [false, true] {
            let forms = forms(&device, size, int8, seed)?;
            for tokens in TOKENS {
                for row in compare(&device, &forms, (tokens, samples, seed), int8)? {
                    if global.json() {
                        say_json(&row);
                    } else {
                        say(line(&row));
                    }
                    rows.push(row);
                }
            }
        }
    }
    if !global.json() {
        summary(&rows).into_iter().for_each(say);
    }
    Ok(())
}

/// The dense block first, then its forms.
fn forms(device: &Arc<dyn Device>, size: Size, int8: bool, seed: u64) -> Result<Vec<Timed>> {
    let mut config = Config::gpt(size, 64);
    config.blocks[0].activation = Activation::Relu;
    let dense = Model::init(config, device, seed)?;
    let quantized = int8.then(Format::default);
    let frozen = |model: &Model, sparse: bool| freeze(model, Form { sparse, quantized });
    let plain = |form: String, runs, model| Timed { form, runs, model, grouped: false };
    let mut all = vec![plain("dense".into(), "dense kernels", frozen(&dense, false)?)];
    let masked = masked(&dense, |w| dispatch::run_one(&Mask24 { form: Form24::OneDimensional }, &[w]))?;
    all.push(plain("2:4".into(), "2:4 kernels", frozen(&masked, true)?));
    for share in UNSTRUCTURED {
        let zeros = masked_by_size(&dense, share)?;
        let zeros = frozen(&zeros, false)?;
        let form = format!("unstructured {:.0} %", 100.0 * share);
        all.push(plain(form, "dense kernels: zeros are multiplied", zeros.duplicate()?));
        let form = format!("bitmap {:.0} % zeros", 100.0 * share);
        let mut skipped = zeros;
        LINEARS.iter().try_for_each(|linear| skip_zeros(&mut skipped, linear, f64::INFINITY))?;
        all.push(plain(form, "bitmap kernels: zeros are skipped", skipped));
    }
    let settings = Settings {
        expert_size: EXPERT_SIZE,
        share: 1.0,
        split: Split::Random,
        router: Router::Mlp,
        seed,
        ..Settings::default()
    };
    let ids: Vec<u32> = (0..8).collect();
    let ids = Tensor::from_slice(device, &[1, 8], &ids)?;
    let (positions, none) = (ids.clone(), None);
    let batch = Batch { tokens: ids, positions, block_positions: none, context: None, lengths: None, source: None };
    let (split, _) = convert(&dense, settings, &[batch])?;
    for share in SHARES {
        let mut model = frozen(&split, false)?;
        if let Some(experts) = &mut model.config.blocks[0].experts {
            experts.selected = ((experts.count as f64 * share).round() as usize).max(1);
        }
        let form = format!("experts {:.0} %", 100.0 * share);
        all.push(Timed { form: form.clone(), runs: "experts where they lie", model: model.clone(), grouped: false });
        all.push(Timed { form, runs: "experts sorted", model, grouped: true });
    }
    Ok(all)
}

/// The model with its FFN weights times masks of their own.
fn masked(model: &Model, mask: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Model> {
    let mut masked = model.duplicate()?;
    for name in LINEARS.map(|linear| format!("{linear}.weight")) {
        let weight = model.get(&name)?;
        let product = dispatch::run_one(&MUL, &[weight, &mask(weight)?])?;
        masked.tensors.insert(name, product);
    }
    Ok(masked)
}

fn masked_by_size(model: &Model, share: f64) -> Result<Model> {
    masked(model, |w| {
        let keep = w.count() - (w.count() as f64 * share).round() as usize;
        let flat = w.reshape(&[1, w.count()])?;
        dispatch::run_one(&KeepLargest { keep, magnitude: true }, &[&flat])?.reshape(w.dims())
    })
}

/// All forms in turn, round after round. A form is dispatched as it would be in a model: experts that are sorted either way are
/// one row.
fn compare(
    device: &Arc<dyn Device>,
    forms: &[Timed],
    (tokens, samples, seed): (usize, usize, u64),
    int8: bool,
) -> Result<Vec<Row>> {
    let config = &forms[0].model.config;
    let width = config.width;
    let mut stream = Stream::new(seed, tokens as u32);
    let values: Vec<f32> = (0..tokens * width).map(|_| stream.normal() as f32).collect();
    let x = Var::constant(Tensor::from_slice(device, &[tokens, width], &values)?);
    let works: Vec<_> = forms.iter().map(|form| || form.run(&x)).collect();
    let works: Vec<&dyn Fn() -> Result<()>> = works.iter().map(|work| work as &dyn Fn() -> Result<()>).collect();
    let mut times = take_turns(device, &works, samples)?;
    times.iter_mut().flatten().for_each(|seconds| *seconds *= 1e6);
    let middle = |of: &[f64], q| {
        let mut sorted = of.to_vec();
        sorted.sort_by(f64::total_cmp);
        quantile(&sorted, q).unwrap_or(0.0)
    };
    let mut rows: Vec<Row> = Vec::new();
    for (form, own) in forms.iter().zip(&times).skip(1) {
        let us = middle(own, 0.5);
        if form.grouped
            && let Some(before) = rows.last_mut()
        {
            before.sorted_us = Some(us);
            continue;
        }
        let ratios: Vec<f64> = times[0].iter().zip(own).map(|(dense, own)| dense / own).collect();
        let experts = form.model.config.blocks[0].experts.is_some();
        rows.push(Row {
            device: device.info().id.clone(),
            width,
            ffn_width: config.blocks[0].ffn_width,
            tokens,
            dtype: if int8 { "int8" } else { "f32" },
            form: form.form.clone(),
            runs: if experts && !Pass::gathers_tokens(&form.model, 0, tokens) { "experts sorted" } else { form.runs },
            us,
            dense_us: middle(&times[0], 0.5),
            speedup: [0.25, 0.5, 0.75].map(|q| middle(&ratios, q)),
            sorted_us: None,
        });
    }
    Ok(rows)
}

fn line(r: &Row) -> String {
    let sorted = r.sorted_us.map_or(String::new(), |us| format!(" (sorted: {us:.1} us)"));
    format!(
        "{:>5} x {:<5} {:>6} {:<5} {:<22} {:>10.1} {:>10.1} {:>6.2}x {:>5.2} to {:<5.2}  {}{sorted}",
        r.width,
        r.ffn_width,
        r.tokens,
        r.dtype,
        r.form,
        r.us,
        r.dense_us,
        r.speedup[1],
        r.speedup[0],
        r.speedup[2],
        r.runs
    )
}

/// For each form at which numbers of tokens it is at least as fast as dense.
fn summary(rows: &[Row]) -> Vec<String> {
    let mut lines = vec![String::new(), "at least as fast as dense (median) at so many tokens:".into()];
    let mut seen: Vec<(usize, usize, &str, &str)> = Vec::new();
    for r in rows {
        let key = (r.width, r.ffn_width, r.dtype, r.form.as_str());
        if seen.contains(&key) {
            continue;
        }
        seen.push(key);
        let same = |o: &&Row| (o.width, o.ffn_width, o.dtype, o.form.as_str()) == key && o.speedup[1] >= 1.0;
        let tokens: Vec<String> = rows.iter().filter(same).map(|o| o.tokens.to_string()).collect();
        let tokens = if tokens.is_empty() { "none of those measured: dense".into() } else { tokens.join(", ") };
        lines.push(format!("{:>5} x {:<5} {:<5} {:<22} {tokens}", r.width, r.ffn_width, r.dtype, r.form));
    }
    lines
}
