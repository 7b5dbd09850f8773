//! What works on a saved model: eval, translate, info.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::{Global, say, say_json};
use crate::compress::fastest;
use crate::console;
use crate::data::batch;
use crate::data::table::{self, TableOptions};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::nn::{Head, Model};
use crate::recipe::corpus::{Corpus, tagging};
use crate::recipe::{contents, evaluate, run_folder, schema};
use crate::report::{self, Alignment, RunReport, Table};
use crate::train::store;

/// A model folder: the given one, or `model` inside a run folder.
fn model_folder(path: &Path) -> Result<PathBuf> {
    if !std::fs::metadata(path).map_err(|e| Error::io(path, e))?.is_dir() {
        return Err(Error::file(path, "file", "is no folder; a run folder, a model folder or a checkpoint is needed"));
    }
    let inner = path.join(run_folder::MODEL);
    let found = [path, inner.as_path()].into_iter().find(|folder| folder.join(store::CONFIG).exists());
    found.map(Path::to_path_buf).ok_or_else(|| without_result(path, "model"))
}

/// Why a folder has no model or no report.
pub fn without_result(path: &Path, what: &str) -> Error {
    if !path.join(run_folder::RECIPE).exists() {
        return Error::file(path, "folder", format!("holds no {what} and no run"));
    }
    let finished = contents::finished_stages(path);
    let finished = if finished.is_empty() { "none yet".into() } else { finished.join(", ") };
    let rule = format!("is not finished; finished stages: {finished}; the same command that started it goes on");
    Error::file(path, "run", rule)
}

/// A model that can be used, and its tokenizer.
fn load(global: &Global, path: &Path, as_stored: bool) -> Result<(Model, Tokenizer)> {
    let folder = model_folder(path)?;
    let device = global.open()?;
    let (model, choices) = fastest::load(&folder, &device)?;
    let model = if as_stored { model.as_stored() } else { model };
    if !global.quiet && !as_stored {
        fastest::notes(&choices).iter().for_each(console::tell);
    }
    for (name, tensor) in model.tensors.iter().filter(|(_, t)| t.dtype().is_float()) {
        let values = tensor.to_f64()?;
        if let Some(first) = values.iter().position(|x| !x.is_finite()) {
            let count = values.iter().filter(|x| !x.is_finite()).count();
            let rule = format!("{count} values are not finite, the first at index {first}: nothing can be computed");
            return Err(Error::file(folder.join(store::WEIGHTS), name, rule));
        }
    }
    let tokenizer = Tokenizer::load(&folder.join("tokenizer.json"))?;
    Ok((model, tokenizer))
}

/// Refuses languages that the model does not know, and a pair of equal ones.
fn check_languages(tokenizer: &Tokenizer, languages: [(&'static str, &str); 2]) -> Result<()> {
    for (argument, language) in languages {
        if tokenizer.language(language).is_err() {
            let known: Vec<&str> = tokenizer.languages().collect();
            let rule = format!("one of the model's languages: {}", known.join(", "));
            return Err(Error::Usage { argument, value: language.into(), rule });
        }
    }
    let [(_, from), (argument, to)] = languages;
    if from == to {
        return Err(Error::Usage { argument, value: to.into(), rule: "two different languages".into() });
    }
    Ok(())
}

/// Quality, sizes and latency of a saved model: a translator's on pairs, a tagger's on generated sentences
#[derive(clap::Args)]
pub struct Eval {
    /// A run folder or a model folder
    model: PathBuf,
    /// Pairs as TSV or JSON lines, of a translator; without it the embedded English-Chinese test set. A TSV starts with a header line that
    /// names the columns source and target (source<TAB>target); JSON lines have fields of these names
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Language of the pairs' source side, as the model's recipe names it
    #[arg(long, default_value = "en")]
    source: String,
    /// Language of the pairs' target side
    #[arg(long, default_value = "zh")]
    target: String,
    /// Sentences per direction, 0 for all
    #[arg(long, default_value_t = 200)]
    sentences: usize,
    /// Hypotheses kept while decoding; 1 is greedy search
    #[arg(long, default_value_t = 1, value_parser = beams)]
    beams: usize,
    /// Compute every layer as it is stored, also where another way was measured to be faster
    #[arg(long)]
    as_stored: bool,
}

/// A beam width: each hypothesis has a cache of its own.
fn beams(text: &str) -> std::result::Result<usize, String> {
    let allowed = || format!("1 to {}", schema::MAX_BEAMS);
    text.parse().ok().filter(|n| (1..=schema::MAX_BEAMS).contains(n)).ok_or_else(allowed)
}

pub fn eval(global: &Global, args: Eval) -> Result<()> {
    let (model, tokenizer) = load(global, &args.model, args.as_stored)?;
    let corpus = match &model.config.head {
        Head::Tagging { labels } => {
            if let Some(path) = &args.data {
                let rule = "a tagger is measured on generated sentences, whose tags are known: leave it out".into();
                return Err(Error::Usage { argument: "--data", value: path.display().to_string(), rule });
            }
            tagging::for_evaluation(tokenizer, labels, model.config.max_positions)?
        }
        _ => translations(&args, &model, tokenizer)?,
    };
    let settings = schema::Evaluate {
        sentences: args.sentences,
        decoded: if args.sentences == 0 { usize::MAX } else { args.sentences },
        beams: args.beams,
        ..Default::default()
    };
    let row = evaluate::evaluate(&model, &corpus, &settings, "model")?;
    if global.json() {
        say_json(&row);
        return Ok(());
    }
    say(report::table::measured(&RunReport { stages: vec![row], ..RunReport::default() }));
    Ok(())
}

/// The pairs that a translator is measured on.
fn translations(args: &Eval, model: &Model, tokenizer: Tokenizer) -> Result<Corpus> {
    check_languages(&tokenizer, [("--source", &args.source), ("--target", &args.target)])?;
    let languages = (args.source.as_str(), args.target.as_str());
    let pairs = match &args.data {
        Some(path) => Some(table::read(path, &TableOptions::default())?.pairs),
        None if languages == ("en", "zh") => None,
        None => {
            let value = format!("{} to {}", args.source, args.target);
            let rule = "the embedded test set is English to Chinese (en, zh); --data takes other text".into();
            return Err(Error::Usage { argument: "--source, --target", value, rule });
        }
    };
    let rows = pairs.as_ref().map_or(0, Vec::len);
    let longest = model.config.max_positions;
    let corpus = Corpus::for_evaluation(tokenizer, pairs, languages, (schema::layout(&model.config), longest))?;
    if corpus.held_out.iter().any(|h| h.test.is_empty()) {
        let path = args.data.clone().unwrap_or_else(|| "the embedded test set".into());
        let rule = format!("none of {rows} pairs can be measured: each needs at most {longest} tokens in all");
        return Err(Error::file(path, "rows", rule));
    }
    Ok(corpus)
}

/// Translate text with a saved model
#[derive(clap::Args)]
pub struct Translate {
    /// A run folder or a model folder
    model: PathBuf,
    /// Text; without any, lines of standard input
    text: Vec<String>,
    /// Language of the text, as the model's recipe names it
    #[arg(long, default_value = "en")]
    from: String,
    /// Language to translate into
    #[arg(long, default_value = "zh")]
    to: String,
    /// Hypotheses kept while decoding; 1 is greedy search
    #[arg(long, default_value_t = 1, value_parser = beams)]
    beams: usize,
    /// Compute every layer as it is stored, also where another way was measured to be faster
    #[arg(long)]
    as_stored: bool,
}

/// Lines of standard input; one that is not UTF-8 costs only itself.
fn standard_input() -> Result<Vec<std::result::Result<String, String>>> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes).map_err(|e| Error::io("standard input", e))?;
    let whole = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let text = |line: &[u8]| match std::str::from_utf8(line.strip_suffix(b"\r").unwrap_or(line)) {
        Ok(text) => Ok(text.to_string()),
        Err(e) => Err(format!("byte {}: not UTF-8", e.valid_up_to() + 1)),
    };
    Ok(whole.split(|&byte| byte == b'\n').map(text).collect())
}

pub fn translate(global: &Global, args: Translate) -> Result<()> {
    let (model, tokenizer) = load(global, &args.model, args.as_stored)?;
    if matches!(model.config.head, Head::Tagging { .. }) {
        let rule = "is that of a tagger, which translates nothing; espalier eval measures it";
        return Err(Error::file(model_folder(&args.model)?.join(store::CONFIG), "head", rule));
    }
    check_languages(&tokenizer, [("--from", &args.from), ("--to", &args.to)])?;
    let place = if args.text.is_empty() { "standard input" } else { "command line" };
    let texts = if args.text.is_empty() { standard_input()? } else { args.text.into_iter().map(Ok).collect() };
    let mut contexts: Vec<(usize, Vec<u32>)> = Vec::new();
    let mut refused: Vec<Option<String>> = vec![None; texts.len()];
    let longest = model.config.max_positions.saturating_sub(1);
    for (index, text) in texts.iter().enumerate() {
        let context = match text {
            // A blank line has a blank translation, so that lines of the two files stay beside each other.
            Ok(text) if text.trim().is_empty() => continue,
            Ok(text) => batch::context(&tokenizer, &args.from, &args.to, text).map_err(|e| e.to_string()),
            Err(rule) => Err(rule.clone()),
        };
        match context {
            Ok(context) if context.len() <= longest => contexts.push((index, context)),
            Ok(context) => {
                refused[index] =
                    Some(format!("{} tokens with its tags where this model takes {longest}", context.len()));
            }
            Err(rule) => refused[index] = Some(rule),
        }
    }
    let borrowed: Vec<&[u32]> = contexts.iter().map(|(_, context)| context.as_slice()).collect();
    let translations = evaluate::translate(&model, &tokenizer, &borrowed, args.beams)?;
    let mut results = vec![String::new(); texts.len()];
    for ((index, _), translation) in contexts.iter().zip(translations) {
        results[*index] = translation;
    }
    for (index, ((source, translation), refusal)) in texts.iter().zip(&results).zip(&refused).enumerate() {
        if let Some(rule) = refusal {
            console::warn(format_args!("{place}: line {}: {rule}", index + 1));
        }
        let source = source.as_deref().unwrap_or_default();
        match (global.json(), refusal) {
            (true, None) => say_json(&serde_json::json!({ "source": source, "translation": translation })),
            (true, Some(rule)) => {
                say_json(&serde_json::json!({ "source": source, "translation": null, "error": rule }));
            }
            (false, _) => say(report::plain_text(translation)),
        }
    }
    let failed = refused.iter().flatten().count();
    match refused.iter().position(Option::is_some) {
        None => Ok(()),
        Some(first) => {
            let rule = format!("{failed} of {} lines were not translated; the others were", texts.len());
            Err(Error::file(place, format!("line {}", first + 1), rule))
        }
    }
}

/// What a model folder, checkpoint or run folder holds
#[derive(clap::Args)]
pub struct Info {
    /// A run folder, a model folder or a checkpoint
    path: PathBuf,
}

pub fn info(global: &Global, args: Info) -> Result<()> {
    let folder = model_folder(&args.path)?;
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
