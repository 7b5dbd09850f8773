//! `espalier run`, and what works on what it leaves: eval, translate, info, report.

use std::path::{Path, PathBuf};

use super::{Global, say, say_json};
use crate::data::batch;
use crate::data::table::{self, TableOptions};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::recipe::corpus::Corpus;
use crate::recipe::{Options, Recipe, evaluate, flow, plan, schema};
use crate::train::{store, trainer};

/// Train, compress, fine-tune, measure: the whole flow of a recipe
#[derive(clap::Args)]
pub struct Run {
    /// A recipe file; without one the embedded quick recipe runs
    recipe: Option<PathBuf>,
    /// Override a key, for example --set teacher.steps=100; --set experts=false leaves a stage out
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Print the plan with shapes, parameters, bytes and estimated memory; touch nothing
    #[arg(long)]
    dry_run: bool,
    /// Run folder [default: runs/NAME]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Start anew where a run stands already
    #[arg(long)]
    overwrite: bool,
    #[arg(long)]
    seed: Option<u64>,
}

pub fn run(global: &Global, args: Run) -> Result<()> {
    let mut sets = args.sets;
    sets.extend(args.seed.map(|s| format!("seed={s}")));
    let recipe = Recipe::load(args.recipe.as_deref(), &sets)?;
    if args.dry_run {
        return dry_run(global, &recipe);
    }
    let device = global.open()?;
    // A second signal finds the default handler's job done by the flag: stop at once.
    let _ = ctrlc::set_handler(|| {
        if trainer::STOP.swap(true, std::sync::atomic::Ordering::SeqCst) {
            std::process::exit(5);
        }
        eprintln!("stopping after this step; once more stops at once");
    });
    let out = args.out.unwrap_or_else(|| Path::new("runs").join(&recipe.name));
    let command = std::env::args().collect::<Vec<_>>().join(" ");
    let options = Options { out, overwrite: args.overwrite, progress: !global.quiet, command };
    let report = crate::recipe::run(&recipe, &device, &options)?;
    if global.json() {
        let path = report.with_extension("json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        say(text.split_whitespace().collect::<Vec<_>>().join(" "));
    } else {
        let path = report.with_extension("json");
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let run = crate::report::model::RunReport::from_json(&path, &bytes)?;
        say(crate::report::table::stages(&run));
        say(&run.summary);
        say(format!("report: {}", report.display()));
    }
    Ok(())
}

fn dry_run(global: &Global, recipe: &Recipe) -> Result<()> {
    let stages = plan::plan(recipe);
    if global.json() {
        say_json(&stages);
        return Ok(());
    }
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["stage", "shape", "steps", "parameters", "weights", "memory while training"]);
    let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64);
    for s in &stages {
        let numbers = [s.steps.to_string(), s.parameters.to_string(), mib(s.bytes), mib(s.estimated_memory)];
        table.add_row([s.stage.clone(), s.shape.clone()].into_iter().chain(numbers));
    }
    say(table);
    Ok(())
}

/// A model folder: the given one, or `model` inside a run folder.
fn model_folder(path: &Path) -> PathBuf {
    let inner = path.join("model");
    if !path.join(store::CONFIG).exists() && inner.join(store::CONFIG).exists() { inner } else { path.to_path_buf() }
}

fn load(global: &Global, path: &Path) -> Result<(Model, Tokenizer)> {
    let folder = model_folder(path);
    let device = global.open()?;
    let model = store::load_model(&folder, &device)?;
    let tokenizer = Tokenizer::load(&folder.join("tokenizer.json"))?;
    Ok((model, tokenizer))
}

/// Quality, sizes and latency of a saved model
#[derive(clap::Args)]
pub struct Eval {
    /// A run folder or a model folder
    model: PathBuf,
    /// Pairs as TSV or JSON lines; without it the embedded test set
    #[arg(long)]
    data: Option<PathBuf>,
    #[arg(long, default_value = "en")]
    source: String,
    #[arg(long, default_value = "zh")]
    target: String,
    /// Sentences per direction
    #[arg(long, default_value_t = 200)]
    sentences: usize,
    #[arg(long, default_value_t = 1)]
    beams: usize,
}

pub fn eval(global: &Global, args: Eval) -> Result<()> {
    let (model, tokenizer) = load(global, &args.model)?;
    let pairs = match &args.data {
        Some(path) => Some(table::read(path, &TableOptions::default())?.pairs),
        None => None,
    };
    let languages = (args.source.as_str(), args.target.as_str());
    let corpus = Corpus::for_evaluation(tokenizer, pairs, languages, model.config.max_positions)?;
    let settings = schema::Evaluate {
        sentences: args.sentences,
        decoded: args.sentences,
        beams: args.beams,
        ..Default::default()
    };
    let row = evaluate::evaluate(&model, &corpus, &settings, "model")?;
    if global.json() {
        say_json(&row);
        return Ok(());
    }
    let report = crate::report::model::RunReport { stages: vec![row], ..Default::default() };
    say(crate::report::table::stages(&report));
    Ok(())
}

/// Translate text with a saved model
#[derive(clap::Args)]
pub struct Translate {
    /// A run folder or a model folder
    model: PathBuf,
    /// Text; without any, lines of standard input
    text: Vec<String>,
    #[arg(long, default_value = "en")]
    from: String,
    #[arg(long, default_value = "zh")]
    to: String,
    #[arg(long, default_value_t = 1)]
    beams: usize,
}

pub fn translate(global: &Global, args: Translate) -> Result<()> {
    let (model, tokenizer) = load(global, &args.model)?;
    let texts: Vec<String> = if args.text.is_empty() {
        std::io::stdin().lines().collect::<std::io::Result<_>>().map_err(|e| Error::io("standard input", e))?
    } else {
        args.text
    };
    let contexts: Vec<Vec<u32>> =
        texts.iter().map(|t| batch::context(&tokenizer, &args.from, &args.to, t)).collect::<Result<_>>()?;
    let borrowed: Vec<&[u32]> = contexts.iter().map(Vec::as_slice).collect();
    let translations = evaluate::translate(&model, &tokenizer, &borrowed, args.beams)?;
    for (source, translation) in texts.iter().zip(&translations) {
        if global.json() {
            say_json(&serde_json::json!({ "source": source, "translation": translation }));
        } else {
            say(crate::report::plain_text(translation));
        }
    }
    Ok(())
}

/// What a model folder, checkpoint or run folder holds
#[derive(clap::Args)]
pub struct Info {
    path: PathBuf,
}

pub fn info(global: &Global, args: Info) -> Result<()> {
    let folder = model_folder(&args.path);
    let (manifest, files) = store::load(&folder)?;
    let device: std::sync::Arc<dyn crate::device::Device> =
        std::sync::Arc::new(crate::device::CpuDevice::new(Some(1))?);
    let model = store::model_from(&folder, &files, &device)?;
    let c = &model.config;
    if global.json() {
        say_json(&serde_json::json!({
            "manifest": manifest, "config": c, "parameters": model.parameter_count(),
            "total_bytes": model.total_bytes(), "activated_bytes": model.activated_bytes(),
        }));
        return Ok(());
    }
    let kib = |bytes: usize| format!("{:.1} KiB", bytes as f64 / 1024.0);
    say(format!(
        "{}: {} ({})",
        folder.display(),
        manifest.tool,
        manifest.summary.get("stage").map_or("model", String::as_str)
    ));
    say(format!(
        "width {}  vocabulary {}  positions {}  blocks {}",
        c.width,
        c.vocabulary,
        c.max_positions,
        c.blocks.len()
    ));
    say(format!(
        "{} parameters, {} in all, {} activated per token",
        model.parameter_count(),
        kib(model.total_bytes()),
        kib(model.activated_bytes())
    ));
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["tensor", "type", "shape", "bytes"]);
    for (name, tensor) in &model.tensors {
        let meta = tensor.meta();
        table.add_row([name.clone(), meta.dtype.to_string(), meta.shape.to_string(), meta.bytes().to_string()]);
    }
    say(table);
    Ok(())
}

/// Put finished runs side by side
#[derive(clap::Args)]
pub struct Report {
    /// Run folders
    #[arg(required = true)]
    runs: Vec<PathBuf>,
}

pub fn report(global: &Global, args: Report) -> Result<()> {
    for path in &args.runs {
        let stages = flow::rows(path)?;
        if global.json() {
            say_json(&serde_json::json!({ "run": path, "stages": stages }));
            continue;
        }
        say(path.display());
        say(crate::report::table::stages(&crate::report::model::RunReport { stages, ..Default::default() }));
    }
    Ok(())
}
