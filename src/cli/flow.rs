//! `espalier run`, and what works on what it leaves: eval, translate, info, report.

use std::path::{Path, PathBuf};

use super::{Global, say, say_json};
use crate::data::batch;
use crate::data::table::{self, TableOptions};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::recipe::corpus::Corpus;
use crate::recipe::{Options, Recipe, evaluate, plan, schema};
use crate::report::{self, Alignment, RunReport, Table};
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
    let html = crate::recipe::run(&recipe, &device, &options)?;
    let report = report::read(html.with_file_name("report.json"))?;
    if global.json() {
        say_json(&report);
    } else {
        say(report::table::stages(&report));
        say(&report.summary);
        say(format!("report: {}", html.display()));
    }
    Ok(())
}

fn dry_run(global: &Global, recipe: &Recipe) -> Result<()> {
    let stages = plan::plan(recipe);
    if global.json() {
        say_json(&stages);
        return Ok(());
    }
    use Alignment::{Left, Right};
    let columns = [("stage", Left), ("shape", Left), ("steps", Right), ("parameters", Right), ("weights", Right)];
    let mut table = Table::new(&[&columns[..], &[("memory while training", Right)]].concat());
    for s in &stages {
        table.row(vec![
            s.stage.clone(),
            s.shape.clone(),
            s.steps.to_string(),
            report::count(s.parameters as u64),
            report::bytes(s.bytes as u64),
            report::bytes(s.estimated_memory as u64),
        ]);
    }
    say(table.terminal());
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
    say(report::table::stages(&RunReport { stages: vec![row], ..RunReport::default() }));
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
            say(report::plain_text(translation));
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
    let stage = manifest.summary.get("stage").map_or("model", String::as_str);
    say(format!("{}: {} ({})", folder.display(), manifest.tool, report::plain_text(stage)));
    say(format!(
        "width {}  vocabulary {}  positions {}  blocks {}",
        c.width,
        c.vocabulary,
        c.max_positions,
        c.blocks.len()
    ));
    let (parameters, total, activated) = (model.parameter_count(), model.total_bytes(), model.activated_bytes());
    say(format!(
        "{} parameters, {} in all, {} activated per token",
        report::count(parameters as u64),
        report::bytes(total as u64),
        report::bytes(activated as u64)
    ));
    use Alignment::{Left, Right};
    let mut table = Table::new(&[("tensor", Left), ("type", Left), ("shape", Left), ("bytes", Right)]);
    for (name, tensor) in &model.tensors {
        let meta = tensor.meta();
        let name = report::plain_text(name);
        table.row(vec![name, meta.dtype.to_string(), meta.shape.to_string(), meta.bytes().to_string()]);
    }
    say(table.terminal());
    Ok(())
}

/// Put finished runs side by side
#[derive(clap::Args)]
pub struct Report {
    /// Run folders
    #[arg(required = true)]
    runs: Vec<PathBuf>,
}

pub fn compare_runs(global: &Global, args: Report) -> Result<()> {
    for path in &args.runs {
        let stages = report::read(path.join("report.json"))?.stages;
        if global.json() {
            say_json(&serde_json::json!({ "run": path, "stages": stages }));
            continue;
        }
        say(path.display());
        say(report::table::stages(&RunReport { stages, ..RunReport::default() }));
    }
    Ok(())
}

/// Train the BERT-like preset: a tagger of computer terms in English sentences (synthetic slots)
#[derive(clap::Args)]
pub struct TrainTagger {
    #[arg(long, default_value = "runs/tagger")]
    out: PathBuf,
    #[arg(long, default_value_t = 300)]
    steps: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

pub fn train_tagger(global: &Global, args: TrainTagger) -> Result<()> {
    let device = global.open()?;
    std::fs::create_dir_all(&args.out).map_err(|e| Error::io(&args.out, e))?;
    let options = crate::recipe::tagger::TaggerOptions {
        steps: args.steps.max(1),
        seed: args.seed,
        progress: !global.quiet,
        ..Default::default()
    };
    let result = crate::recipe::tagger::run(&device, &args.out, &options)?;
    if global.json() {
        say_json(&result);
        return Ok(());
    }
    say(format!(
        "entity F1 {:.4} (precision {:.4}, recall {:.4}) on {} held-out sentences with synthetic slots; loss {:.4}",
        result.f1, result.precision, result.recall, result.sentences, result.validation_loss
    ));
    say(format!("model: {}", args.out.join("model").display()));
    Ok(())
}
