//! Share of zero weights per layer: blocks across, linears down.

use super::svg::{Anchor, Rect, Svg};
use super::{HALF, NAMES};
use crate::report::model::StageRow;
use crate::report::quantity::percent;

const HEAD: f64 = 22.0;
const ROW: f64 = 26.0;

/// The heat map of one stage; `None` when it has no sparsity to show. "blocks.3.ffn.up" stands in column 3, row
/// "ffn.up"; a name without a number has a column of its own at the right.
pub fn sparsity(stage: &StageRow) -> Option<String> {
    let mut columns: Vec<Option<u32>> = Vec::new();
    let mut rows: Vec<String> = Vec::new();
    let mut cells = Vec::new();
    for (name, share) in stage.sparsity.iter().filter(|(_, share)| share.is_finite()) {
        let (row, column) = place(name);
        if !rows.contains(&row) {
            rows.push(row.clone());
        }
        if !columns.contains(&column) {
            columns.push(column);
        }
        cells.push((name, row, column, *share));
    }
    if cells.is_empty() {
        return None;
    }
    columns.sort_by_key(|column| column.map_or(u64::MAX, u64::from));
    let width = ((HALF - NAMES) / columns.len() as f64).min(64.0);
    let label = format!("Share of zero weights per layer after {}", stage.name);
    let mut svg = Svg::new(HALF, HEAD + rows.len() as f64 * ROW + 2.0, &label);
    let every = (30.0 / width).ceil().max(1.0) as usize;
    for (index, column) in columns.iter().enumerate() {
        let text = column.map_or_else(|| "–".into(), |column| column.to_string());
        if index % every == 0 {
            svg.text("tick", (NAMES + (index as f64 + 0.5) * width, 14.0), Anchor::Middle, &text);
        }
    }
    for (index, row) in rows.iter().enumerate() {
        svg.name("name", (0.0, HEAD + index as f64 * ROW + 17.0), NAMES - 8.0, row);
    }
    for (name, row, column, share) in &cells {
        let at = |found: Option<usize>| found.unwrap_or(0) as f64;
        let x = NAMES + at(columns.iter().position(|c| c == column)) * width;
        let y = HEAD + at(rows.iter().position(|r| r == row)) * ROW;
        let cell = Rect { x: x + 1.0, y: y + 1.0, width: width - 2.0, height: ROW - 2.0 };
        svg.rect("cell", cell, 2.0);
        svg.shade("heat", cell, 2.0, Some(*share), &format!("{name}: {} zero", percent(*share)));
        if width >= 34.0 {
            let class = if *share > 0.6 { "in-cell on-dark" } else { "in-cell" };
            let text = format!("{:.0}", share * 100.0);
            svg.text(class, (x + width / 2.0, y + 17.0), Anchor::Middle, &text);
        }
    }
    Some(svg.finish())
}

/// Row name without the block, and the block's number.
fn place(name: &str) -> (String, Option<u32>) {
    let parts: Vec<&str> = name.split('.').collect();
    match parts.iter().position(|part| part.parse::<u32>().is_ok()) {
        Some(index) if parts.len() > index + 1 => {
            (parts.get(index + 1..).unwrap_or(&[]).join("."), parts.get(index).and_then(|part| part.parse().ok()))
        }
        _ => (name.to_string(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_find_their_place() {
        assert_eq!(place("blocks.3.ffn.up"), ("ffn.up".into(), Some(3)));
        assert_eq!(place("embedding.tokens"), ("embedding.tokens".into(), None));
        assert_eq!(place("7"), ("7".into(), None));
    }

    #[test]
    fn only_stages_with_sparsity_have_a_map() {
        assert_eq!(sparsity(&StageRow::default()), None);
        let sparsity_of = vec![("blocks.0.ffn.up".into(), 0.5), ("head".into(), f64::NAN)];
        let text = sparsity(&StageRow { sparsity: sparsity_of, ..StageRow::default() }).unwrap();
        assert!(text.contains("blocks.0.ffn.up: 50.0 % zero") && !text.contains("head"));
    }
}
