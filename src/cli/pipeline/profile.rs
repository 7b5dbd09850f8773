//! `espalier pipeline profile`: what each piece of a recipe's model costs on a device.

use std::path::PathBuf;

use super::super::{Global, refuse_collisions, say, say_json};
use crate::data::batch::Example;
use crate::data::layout::Layout;
use crate::data::tokenizer::SpecialIds;
use crate::error::{Error, Result};
use crate::nn::{Head, Model};
use crate::pipeline::measure;
use crate::recipe::Recipe;
use crate::recipe::corpus::{tagging, upload};
use crate::recipe::schema::layout;
use crate::report::{Alignment, Table};
use crate::rng::Stream;
use crate::tensor::Tensor;
use crate::train::lifecycle::Micro;

#[derive(clap::Args)]
pub struct Args {
    /// A recipe whose model is measured; without one that of the embedded quick recipe
    recipe: Option<PathBuf>,
    /// Sequences of a micro-batch
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=65536))]
    rows: u32,
    /// Tokens of a sequence [default: the recipe's longest]
    #[arg(long, value_name = "TOKENS")]
    columns: Option<usize>,
    /// Devices like this one that work at the same time, as the other stages will where they share memory and clock
    #[arg(long, default_value_t = 0, value_name = "STAGES", value_parser = clap::value_parser!(u32).range(0..=1024))]
    beside: u32,
    /// Where the profile goes
    #[arg(long, default_value = "profile.json", value_name = "FILE")]
    out: PathBuf,
}

pub fn run(global: &Global, args: &Args) -> Result<()> {
    refuse_collisions(&[("RECIPE", args.recipe.as_deref())], &[("--out", Some(&args.out))])?;
    let recipe = Recipe::load(args.recipe.as_deref(), &[])?;
    let longest = recipe.data.max_length;
    let columns = args.columns.unwrap_or(longest);
    if !(2..=recipe.model.max_positions).contains(&columns) {
        let rule = format!("2 to the model's {} positions", recipe.model.max_positions);
        return Err(Error::Usage { argument: "--columns", value: columns.to_string(), rule });
    }
    let device = global.open()?;
    let config = recipe.model.config(recipe.model.size(), recipe.data.vocabulary, &tagging::labels()?);
    if config.encoder > 0 {
        let allowed = "glm or tagger: an encoder-decoder is not one chain of blocks".into();
        return Err(Error::Recipe { key: "model.family".into(), value: "t5".into(), allowed });
    }
    let model = Model::init(config.clone(), &device, recipe.seed)?;
    let special = SpecialIds { pad: 0, unk: 1, bos: 2, eos: 3, gmask: 4 };
    let mut stream = Stream::new(recipe.seed, 0);
    let mut tokens = |n: usize| -> Vec<u32> {
        (0..n).map(|_| 5 + stream.below(recipe.data.vocabulary.saturating_sub(5).max(1)) as u32).collect()
    };
    let labels = if let Head::Tagging { labels } = &config.head { labels.len() as u32 } else { u32::MAX };
    let layout = layout(&config);
    // A tagger has a label for each token, a language model a text and its continuation.
    let mut example = || match layout {
        Layout::Tagging => {
            let context = tokens(columns);
            let labels = context.iter().map(|token| token % labels).collect();
            Example { context, labels }
        }
        _ => Example { context: tokens(columns / 2), labels: tokens(columns - columns / 2) },
    };
    let examples: Vec<Example> = (0..args.rows).map(|_| example()).collect();
    let batch = layout.assemble(&examples.iter().collect::<Vec<_>>(), special);
    let n = batch.targets.len();
    let micro = Micro {
        batch: upload(&device, &batch)?,
        targets: Tensor::from_slice(&device, &[n], &batch.targets)?,
        weights: Tensor::from_slice(&device, &[n], &vec![1.0f32; n])?,
        weight: batch.token_count as f64,
        gold: true,
        tokens: batch.token_count,
        teacher: None,
    };
    let neighbours = (0..args.beside).map(|_| global.open()).collect::<Result<Vec<_>>>()?;
    let profile =
        measure::profile(&model, &device, &micro, recipe.teacher.settings(), &|_| Ok(Vec::new()), &neighbours)?;
    profile.write(&args.out)?;
    if global.json() {
        say_json(&profile);
        return Ok(());
    }
    let mut table = Table::new(&[
        ("piece", Alignment::Left),
        ("forward", Alignment::Right),
        ("backward", Alignment::Right),
        ("in two parts", Alignment::Right),
        ("activations", Alignment::Right),
        ("parameters", Alignment::Right),
    ]);
    for piece in &profile.pieces {
        let (one, two) = (piece.cost, piece.split.unwrap_or(piece.cost));
        let milliseconds = |s: f64| format!("{:.2} ms", 1e3 * s);
        let mebibytes = |b: f64| format!("{:.2} MiB", b / f64::from(1 << 20));
        table.row(vec![
            piece.name.clone(),
            milliseconds(one.forward),
            milliseconds(one.backward_input + one.backward_weight),
            format!("{} + {}", milliseconds(two.backward_input), milliseconds(two.backward_weight)),
            mebibytes(one.activation_bytes),
            mebibytes(piece.parameter_bytes),
        ]);
    }
    say(format!("{}, {} x {} tokens on {}", profile.model, profile.rows, profile.columns, profile.device));
    say(table.terminal());
    say(format!("written to {}", args.out.display()));
    Ok(())
}
