//! One page that opens anywhere, offline: no script, no request, every text escaped.

use askama::Template;

use super::chart;
use super::model::RunReport;
use super::plain::{lines_text, plain_text};
use super::quantity::duration;
use super::sections::{Mark, facts, headline, sections};
use super::table::Alignment;
use crate::error::{Error, Result};

#[derive(Template)]
#[template(path = "report.html")]
struct Page {
    title: String,
    summary: String,
    meta: Vec<(&'static str, String)>,
    software: bool,
    cards: Vec<Card>,
    waterfall: Option<String>,
    tables: Vec<HtmlTable>,
    appendix: Vec<HtmlTable>,
    latency: Option<String>,
    curves: Vec<(String, String, String)>,
    heatmaps: Vec<(String, String)>,
    notes: Vec<String>,
    facts: Vec<(String, String, bool)>,
    reproduce: String,
    recipe: String,
}

struct Card {
    title: &'static str,
    value: String,
    detail: String,
    bad: bool,
}

struct HtmlTable {
    title: &'static str,
    lead: &'static str,
    columns: Vec<Column>,
    rows: Vec<HtmlRow>,
    below: Vec<String>,
    appendix: bool,
}

struct Column {
    name: String,
    left: bool,
}

struct HtmlRow {
    baseline: bool,
    cells: Vec<HtmlCell>,
}

struct HtmlCell {
    text: String,
    class: &'static str,
}

/// The report as one HTML document.
///
/// # Errors
/// `Error::Io` should the template fail to render.
pub fn render(report: &RunReport) -> Result<String> {
    let clean = |text: &String| plain_text(text);
    let curve = |curve: &super::model::LossCurve| {
        Some((plain_text(&curve.stage), plain_text(&curve.unit), chart::loss_curve(curve)?))
    };
    let (appendix, tables) = tables(report).into_iter().partition(|table| table.appendix);
    let mut meta = vec![("Finished", clean(&report.finished)), ("Took", duration(report.seconds))];
    meta.push(("Device", clean(&report.machine.device)));
    meta.retain(|(_, value)| !value.is_empty());
    let page = Page {
        title: if report.title.is_empty() { "Run report".into() } else { clean(&report.title) },
        summary: clean(&report.summary),
        meta,
        software: report.machine.software,
        cards: headline(report)
            .into_iter()
            .map(|(title, value, detail, bad)| Card { title, value, detail, bad })
            .collect(),
        waterfall: (!report.stages.is_empty()).then(|| chart::waterfall(&report.stages)),
        tables,
        appendix,
        latency: chart::latency(&report.stages),
        curves: report.curves.iter().filter_map(curve).collect(),
        heatmaps: heatmaps(report),
        notes: report.notes.iter().map(clean).collect(),
        facts: facts(report).iter().map(|(name, value, hash)| (clean(name), clean(value), *hash)).collect(),
        reproduce: lines_text(&report.reproduce),
        recipe: lines_text(&report.recipe),
    };
    page.render().map_err(|error| Error::io("report.html", std::io::Error::other(error)))
}

/// One map for stages in a row that left the same zeros.
fn heatmaps(report: &RunReport) -> Vec<(String, String)> {
    let mut maps: Vec<(String, String)> = Vec::new();
    let mut shown: Option<&Vec<(String, f64)>> = None;
    for stage in &report.stages {
        let name = plain_text(&stage.name);
        match maps.last_mut().filter(|_| shown == Some(&stage.sparsity)) {
            Some((names, _)) => *names += &format!(", {name}"),
            None => maps.extend(chart::sparsity(stage).map(|map| (name, map))),
        }
        shown = Some(&stage.sparsity);
    }
    maps
}

fn tables(report: &RunReport) -> Vec<HtmlTable> {
    let mut tables = Vec::new();
    for section in sections(report) {
        let alignments: Vec<Alignment> = section.columns.iter().map(|(_, alignment)| *alignment).collect();
        let mut above = "";
        let rows = section.rows.iter().map(|row| {
            let first = row.cells.first().map_or("", |cell| cell.text.as_str());
            let repeats = std::mem::replace(&mut above, first) == first;
            let cells = row.cells.iter().zip(&alignments).map(|(cell, alignment)| HtmlCell {
                text: plain_text(&cell.text),
                class: match (cell.mark, alignment) {
                    (Mark::Absent, _) => "none",
                    (Mark::Holds, _) => "left ok",
                    (Mark::Broken, _) => "left broken",
                    (Mark::Prose, _) => "left wrap",
                    (Mark::Plain, Alignment::Left) => "left",
                    (Mark::Plain, Alignment::Right) => "",
                },
            });
            let mut cells: Vec<HtmlCell> = cells.collect();
            if let Some(cell) = cells.first_mut().filter(|_| repeats) {
                cell.class = "left repeat";
            }
            HtmlRow { baseline: row.baseline, cells }
        });
        tables.push(HtmlTable {
            title: section.title,
            lead: section.lead,
            appendix: section.appendix,
            rows: rows.collect(),
            columns: section
                .columns
                .iter()
                .map(|(name, alignment)| Column { name: name.clone(), left: *alignment == Alignment::Left })
                .collect(),
            below: section.below.iter().map(|line| plain_text(line)).collect(),
        });
    }
    tables
}
