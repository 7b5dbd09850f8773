//! The report as Markdown, for a repository page or a terminal pager.

use super::model::RunReport;
use super::plain::{markdown_block, markdown_text};
use super::quantity::{duration, number, percent};
use super::sections::{Mark, facts, headline, sections};
use super::table::{Alignment, Table};

/// The whole report as one Markdown document.
pub fn render(report: &RunReport) -> String {
    let mut out = String::new();
    let mut paragraph = |text: &str| {
        if !text.is_empty() {
            out.push_str(text.trim_end());
            out.push_str("\n\n");
        }
    };
    let title = if report.title.is_empty() { "Run report".into() } else { markdown_text(&report.title) };
    paragraph(&format!("# {title}"));
    paragraph(&markdown_text(&report.summary));
    let mut where_and_when = format!("Took {} on {}", duration(report.seconds), markdown_text(&report.machine.device));
    if !report.finished.is_empty() {
        where_and_when += &format!(", finished {}", markdown_text(&report.finished));
    }
    if report.machine.software {
        where_and_when += ". Software adapter: times are not comparable with hardware";
    }
    paragraph(&format!("{where_and_when}."));

    let cards = headline(report);
    let card =
        |(title, value, detail, _): &(&str, String, String, bool)| format!("- {title}: **{value}** ({detail})\n");
    paragraph(&cards.iter().map(card).collect::<String>());

    for section in sections(report) {
        let columns: Vec<(&str, Alignment)> =
            section.columns.iter().map(|(name, alignment)| (name.as_str(), *alignment)).collect();
        let mut table = Table::new(&columns);
        for row in &section.rows {
            table.row(row.cells.iter().map(|cell| cell_text(&cell.text, cell.mark)).collect());
        }
        paragraph(&format!("## {}\n\n{}\n\n{}", section.title, section.lead, table.markdown()));
        paragraph(&section.below.iter().map(|line| format!("- {}\n", markdown_text(line))).collect::<String>());
    }
    if let Some(table) = losses(report) {
        paragraph(&format!("## Losses\n\n{}", table.markdown()));
    }
    if let Some(table) = sparsity(report) {
        paragraph(&format!("## Sparsity per layer\n\n{}", table.markdown()));
    }
    if !report.notes.is_empty() {
        let notes: String = report.notes.iter().map(|note| format!("- {}\n", markdown_text(note))).collect();
        paragraph(&format!("## Notes\n\n{notes}"));
    }
    let mut machine = Table::new(&[("Measured on", Alignment::Left), ("", Alignment::Left)]);
    for (name, value, _) in facts(report) {
        machine.row(vec![markdown_text(&name), markdown_text(&value)]);
    }
    paragraph(&machine.markdown());
    if !report.reproduce.is_empty() {
        paragraph(&format!("## Reproduce\n\n{}", markdown_block("sh", &report.reproduce)));
    }
    if !report.recipe.is_empty() {
        paragraph(&format!("Resolved recipe:\n\n{}", markdown_block("toml", &report.recipe)));
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

fn cell_text(text: &str, mark: Mark) -> String {
    match mark {
        Mark::Broken => format!("**{}**", markdown_text(text)),
        _ => markdown_text(text),
    }
}

/// First and last losses of every curve; the pictures are in the HTML page.
fn losses(report: &RunReport) -> Option<Table> {
    let mut table = Table::new(&[
        ("Stage", Alignment::Left),
        ("Unit", Alignment::Left),
        ("Steps", Alignment::Right),
        ("Training, first", Alignment::Right),
        ("last", Alignment::Right),
        ("Validation, first", Alignment::Right),
        ("last", Alignment::Right),
    ]);
    let show = |value: Option<f64>| value.map_or_else(|| "–".into(), number);
    for curve in &report.curves {
        let steps = curve.points.last().map_or(0, |point| point.0);
        let train = || curve.points.iter().filter_map(|point| point.1);
        let validation = || curve.points.iter().filter_map(|point| point.2);
        table.row(vec![
            markdown_text(&curve.stage),
            markdown_text(&curve.unit),
            steps.to_string(),
            show(train().next()),
            show(train().next_back()),
            show(validation().next()),
            show(validation().next_back()),
        ]);
    }
    (!report.curves.is_empty()).then_some(table)
}

fn sparsity(report: &RunReport) -> Option<Table> {
    let mut table =
        Table::new(&[("Stage", Alignment::Left), ("Layer", Alignment::Left), ("Zero weights", Alignment::Right)]);
    let mut any = false;
    for stage in &report.stages {
        for (layer, share) in &stage.sparsity {
            any = true;
            table.row(vec![markdown_text(&stage.name), markdown_text(layer), percent(*share)]);
        }
    }
    any.then_some(table)
}
