//! One table, two renderings: aligned for a terminal, piped for Markdown.

use comfy_table::{Attribute, Cell, CellAlignment, ContentArrangement, presets};

use super::model::RunReport;
use super::plain::plain_text;

/// Which side of its column a cell stands on; numbers stand right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alignment {
    Left,
    Right,
}

/// A header and rows of finished text. The caller cleans names for the rendering it wants
/// ([`plain_text`](super::plain_text), [`markdown_text`](super::markdown_text)).
#[derive(Debug, Clone)]
pub struct Table {
    columns: Vec<(String, Alignment)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(columns: &[(&str, Alignment)]) -> Self {
        let columns = columns.iter().map(|&(name, alignment)| (name.to_string(), alignment)).collect();
        Self { columns, rows: Vec::new() }
    }

    /// Adds a row; missing cells are empty, surplus ones dropped.
    pub fn row(&mut self, mut cells: Vec<String>) {
        cells.resize(self.columns.len(), String::new());
        self.rows.push(cells);
    }

    /// Aligned text without a line break at its end. The header is bold where the output is a terminal that shows
    /// styles and `NO_COLOR` is not set. Rows are never wrapped: a pipe or a pager needs whole lines.
    pub fn terminal(&self) -> String {
        let styled = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            && crate::console::moves_cursor()
            && std::io::IsTerminal::is_terminal(&std::io::stdout());
        self.terminal_styled(styled)
    }

    fn terminal_styled(&self, styled: bool) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(presets::NOTHING);
        table.set_content_arrangement(ContentArrangement::Disabled);
        if styled {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        table.set_header(self.columns.iter().map(|(name, _)| Cell::new(name).add_attribute(Attribute::Bold)));
        for row in &self.rows {
            table.add_row(row);
        }
        for (column, (_, alignment)) in table.column_iter_mut().zip(&self.columns) {
            column.set_padding((0, 2));
            column.set_cell_alignment(match alignment {
                Alignment::Left => CellAlignment::Left,
                Alignment::Right => CellAlignment::Right,
            });
        }
        table.lines().map(|line| line.trim_end().to_string()).collect::<Vec<_>>().join("\n")
    }

    /// A Markdown table, columns padded so that the source reads as well, ending in a line break.
    pub fn markdown(&self) -> String {
        let width = |text: &str| text.chars().count();
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|index| {
                let cells = self.rows.iter().filter_map(|row| row.get(index)).map(|cell| width(cell));
                cells.chain(self.columns.get(index).map(|(name, _)| width(name))).max().unwrap_or(0).max(3)
            })
            .collect();
        let mut out = String::new();
        let mut line = |cells: &[String]| {
            for ((cell, (_, alignment)), &width_wanted) in cells.iter().zip(&self.columns).zip(&widths) {
                let fill = " ".repeat(width_wanted.saturating_sub(width(cell)));
                match alignment {
                    Alignment::Left => out.push_str(&format!("| {cell}{fill} ")),
                    Alignment::Right => out.push_str(&format!("| {fill}{cell} ")),
                }
            }
            out.push_str("|\n");
        };
        line(&self.columns.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>());
        let rule = |(&width, (_, alignment)): (&usize, &(String, Alignment))| match alignment {
            Alignment::Left => "-".repeat(width),
            Alignment::Right => "-".repeat(width - 1) + ":",
        };
        line(&widths.iter().zip(&self.columns).map(rule).collect::<Vec<_>>());
        for row in &self.rows {
            line(row);
        }
        out
    }
}

/// The stages of a report for a terminal, without a line break at the end; empty without stages.
pub fn stages(report: &RunReport) -> String {
    section(&super::sections::stages(report))
}

/// All that was measured on the models of a report, for a terminal: sizes, quality per direction, latency.
pub fn measured(report: &RunReport) -> String {
    let sections = super::sections::sections(report);
    let tables = sections.iter().map(|s| {
        let below: String = s.below.iter().map(|line| format!("\n{}", plain_text(line))).collect();
        format!("{}\n{}{below}", s.title, section(s))
    });
    tables.collect::<Vec<_>>().join("\n\n")
}

fn section(section: &super::sections::Section) -> String {
    if section.rows.is_empty() {
        return String::new();
    }
    let columns: Vec<_> = section.columns.iter().map(|(name, alignment)| (name.as_str(), *alignment)).collect();
    let mut table = Table::new(&columns);
    for row in &section.rows {
        table.row(row.cells.iter().map(|cell| plain_text(&cell.text)).collect());
    }
    table.terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Table {
        let mut table = Table::new(&[("stage", Alignment::Left), ("size", Alignment::Right)]);
        table.row(vec!["教师 teacher".into(), "23.4 MiB".into()]);
        table.row(vec!["int8".into(), "900 B".into()]);
        table
    }

    #[test]
    fn plain_output_is_aligned_and_free_of_escapes() {
        assert_eq!(
            sample().terminal_styled(false),
            "stage             size\n教师 teacher  23.4 MiB\nint8             900 B"
        );
        assert!(sample().terminal_styled(true).starts_with("\u{1b}[1m"));
    }

    #[test]
    fn markdown_is_a_table() {
        assert_eq!(
            sample().markdown(),
            "| stage      |     size |\n| ---------- | -------: |\n| 教师 teacher | 23.4 MiB |\n| int8       |    900 B |\n"
        );
    }

    #[test]
    fn rows_of_the_wrong_length_cannot_shift_columns() {
        let mut table = sample();
        table.row(vec!["short".into()]);
        table.row(vec!["long".into(), "1".into(), "2".into()]);
        assert!(table.markdown().lines().all(|line| line.matches('|').count() == 3));
    }
}
