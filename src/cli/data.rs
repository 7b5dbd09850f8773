//! `espalier data`: text that is already on this machine.

use std::path::{Path, PathBuf};

use super::{Global, say, say_json};
use crate::console;
use crate::data::collect::{CollectOptions, Roots, collect, languages};
use crate::data::table::{self, OnBadRow, TableOptions};
use crate::error::Result;
use crate::report::{Alignment, Table};

#[derive(clap::Subcommand)]
pub enum Data {
    /// Pair English with another language from the installed gettext catalogs, split by package
    Collect {
        /// Locale name: zh_CN, es, nl, ...
        #[arg(long, default_value = "zh_CN")]
        language: String,
        /// Folder for train.tsv, validation.tsv, test.tsv and the card [default: data/catalogs/LANGUAGE]
        #[arg(long, value_name = "FOLDER")]
        out: Option<PathBuf>,
        /// Where the catalogs are installed: LANGUAGE/LC_MESSAGES/*.mo
        #[arg(long, default_value = "/usr/share/locale")]
        root: PathBuf,
        /// Decides which packages are held out
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Replace the collection of another language, or write among other files; those stay
        #[arg(long)]
        overwrite: bool,
    },
    /// Languages of the installed catalogs, with their number of catalogs
    Languages {
        /// Where the catalogs are installed: LANGUAGE/LC_MESSAGES/*.mo
        #[arg(long, default_value = "/usr/share/locale")]
        root: PathBuf,
    },
    /// Check a TSV or JSON-lines file of pairs
    ///
    /// A TSV starts with a header line that names the columns source and target (source<TAB>target; further columns are
    /// passed over) and has one pair per line, without quoting. JSON lines have the fields "source" and "target".
    Inspect {
        /// The file
        path: PathBuf,
        /// Stop at the first bad row, or leave bad rows out and count them
        #[arg(long, value_enum, default_value = "stop")]
        on_bad_row: OnBadRow,
    },
}

pub fn run(global: &Global, command: Data) -> Result<()> {
    match command {
        Data::Collect { language, out, root, seed, overwrite } => {
            let out = out.unwrap_or_else(|| Path::new("data/catalogs").join(&language));
            let options = CollectOptions { seed, ..CollectOptions::new(language) };
            let collection = collect(&Roots { locale: root, ..Roots::default() }, &options)?;
            collection.write(&out, overwrite)?;
            let card = &collection.card;
            let empty = card.empty_parts();
            if !empty.is_empty() {
                let more =
                    "a recipe's run refuses such a folder; more packages with catalogs give more groups to split";
                console::warn(format_args!("no pair for {}: {more}", empty.join(" and ")));
            }
            if global.json() {
                say_json(card);
                return Ok(());
            }
            let mut table =
                Table::new(&[("part", Alignment::Left), ("pairs", Alignment::Right), ("packages", Alignment::Right)]);
            for (part, record) in &card.parts {
                table.row(vec![part.name().into(), record.rows.to_string(), record.groups.len().to_string()]);
            }
            say(format!(
                "{} catalogs read, {} skipped, {} translations",
                card.catalogs.len(),
                card.skipped.len(),
                card.unique_pairs
            ));
            say(table.terminal());
            for skipped in &card.skipped {
                say(format!("skipped {}: {}", skipped.path.display(), skipped.reason));
            }
            if !card.suggestions.is_empty() {
                say(format!("more text: apt-get install {}", card.suggestions.join(" ")));
            }
            say(format!("written to {}", out.display()));
            Ok(())
        }
        Data::Languages { root } => {
            let found = languages(&root);
            if global.json() {
                say_json(&found);
                return Ok(());
            }
            let mut table = Table::new(&[("language", Alignment::Left), ("catalogs", Alignment::Right)]);
            found.iter().for_each(|(language, n)| table.row(vec![language.clone(), n.to_string()]));
            say(table.terminal());
            Ok(())
        }
        Data::Inspect { path, on_bad_row } => {
            let table = table::read(&path, &TableOptions { on_bad_row, ..TableOptions::default() })?;
            say_json(&table.card);
            Ok(())
        }
    }
}
