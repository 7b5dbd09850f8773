//! `espalier train-tagger`.

use std::path::PathBuf;

use super::{Global, flow, say, say_json};
use crate::error::Result;
use crate::recipe::tagger::{TaggerOptions, run};

/// Train the BERT-like preset: a tagger of computer terms in English sentences (synthetic slots)
#[derive(clap::Args)]
pub struct TrainTagger {
    /// Folder of the training; it must be new, empty or of the same training, which then goes on
    #[arg(long, value_name = "FOLDER", default_value = "runs/tagger")]
    out: PathBuf,
    /// Steps of training
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    steps: u64,
    /// Seed of weights, sentences and batches
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Train anew where another tagger stands, or among other files; those stay
    #[arg(long)]
    overwrite: bool,
}

pub fn train_tagger(global: &Global, args: TrainTagger) -> Result<()> {
    flow::stop_on_signal();
    let device = global.open()?;
    let options = TaggerOptions {
        steps: args.steps,
        seed: args.seed,
        overwrite: args.overwrite,
        progress: !global.quiet,
        ..Default::default()
    };
    let result = run(&device, &args.out, &options)?;
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
