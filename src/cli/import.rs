//! `espalier import`.

use std::path::PathBuf;

use super::{Global, say, say_json};
use crate::atomic::write_atomic;
use crate::console;
use crate::error::Result;
use crate::recipe::Recipe;
use crate::recipe::import::{self, System};

#[derive(clap::Subcommand)]
pub enum Import {
    /// A JSON config of BMCook, by the keys that its code reads
    Bmcook(Config),
    /// A JSON config of TextPruner (one config_class)
    Textpruner(Config),
}

#[derive(clap::Args)]
pub struct Config {
    /// The config
    file: PathBuf,
    /// Recipe whose data, model, teacher and trainings are taken; without it those of the quick recipe
    #[arg(long, value_name = "RECIPE")]
    base: Option<PathBuf>,
    /// Where the recipe goes; without it standard output
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub fn run(global: &Global, command: Import) -> Result<()> {
    let (system, args) = match command {
        Import::Bmcook(args) => (System::Bmcook, args),
        Import::Textpruner(args) => (System::Textpruner, args),
    };
    let base = Recipe::load(args.base.as_deref(), &[])?;
    let imported = import::import(system, &args.file, &base)?;
    let recipe = imported.recipe.to_toml()?;
    if global.json() {
        say_json(&serde_json::json!({ "recipe": &recipe, "ignored": &imported.ignored }));
    } else {
        for ignored in &imported.ignored {
            console::tell(format_args!("not as it stands: {} = {}: {}", ignored.key, ignored.value, ignored.reason));
        }
    }
    match &args.out {
        Some(path) => write_atomic(path, recipe.as_bytes()),
        None => {
            if !global.json() {
                say(recipe.trim_end());
            }
            Ok(())
        }
    }
}
