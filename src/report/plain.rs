//! Text from files and command lines made safe to show: names are data, wherever they end up.

/// Text for one line on a terminal: control characters (which could move the cursor or set colours) and bidirectional
/// overrides (which could reorder what is read) are taken out; line breaks and tabs become spaces.
pub fn plain_text(text: &str) -> String {
    text.chars().filter_map(|c| if matches!(c, '\n' | '\t') { Some(' ') } else { visible(c).then_some(c) }).collect()
}

/// As [`plain_text`], but line breaks stay.
pub(super) fn lines_text(text: &str) -> String {
    text.lines().map(plain_text).collect::<Vec<_>>().join("\n")
}

/// Text for a Markdown paragraph or table cell: cleaned as for a terminal, then everything that Markdown or HTML would
/// read as mark-up or as a link is escaped.
pub fn markdown_text(text: &str) -> String {
    let clean = plain_text(text);
    let mut out = String::with_capacity(clean.len());
    let mut rest = clean.as_str();
    while let Some(character) = rest.chars().next() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' | '@' | '$' | '#' => out.extend(['\\', character]),
            // Bare addresses become links in the common dialect; an escape inside stops that.
            ':' if rest.starts_with("://") => out.push_str("\\:"),
            '.' if out.to_ascii_lowercase().ends_with("www") => out.push_str("\\."),
            other => out.push(other),
        }
        rest = &rest[character.len_utf8()..];
    }
    out
}

/// Text for a CSV field (the csv writer does the quoting): cleaned, and prefixed with an apostrophe where a spreadsheet
/// would take it for a formula.
pub fn csv_text(text: &str) -> String {
    let clean = plain_text(text);
    if clean.trim_start().starts_with(['=', '+', '-', '@']) { format!("'{clean}") } else { clean }
}

/// A Markdown code block whose fence the content cannot close.
pub(super) fn markdown_block(language: &str, text: &str) -> String {
    let text = lines_text(text);
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{fence}{language}\n{text}\n{fence}\n")
}

fn visible(character: char) -> bool {
    !character.is_control()
        && !matches!(character,
            // Bidirectional marks, embeddings, overrides and isolates.
            '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
            // Line and paragraph separators, byte order mark, tag characters.
            | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_get_no_control_and_no_reordering() {
        assert_eq!(plain_text("a\u{1b}[31mred\u{7}\r\nb\u{9b}2J"), "a[31mred b2J");
        assert_eq!(plain_text("user\u{202e}gpj.exe\u{2066}x\u{2069}"), "usergpj.exex");
        assert_eq!(plain_text("层 é 🎉"), "层 é 🎉", "ordinary text of any language stays");
    }

    #[test]
    fn markdown_shows_mark_up_instead_of_obeying_it() {
        assert_eq!(markdown_text("<img src=x onerror=1>|*b*"), "&lt;img src=x onerror=1&gt;\\|\\*b\\*");
        assert_eq!(markdown_text("[a](http://x) www.x.y"), "\\[a\\](http\\://x) www\\.x.y");
        assert_eq!(markdown_text("blocks.0.ffn"), "blocks.0.ffn");
    }

    #[test]
    fn spreadsheets_get_no_formula() {
        assert_eq!(csv_text("=HYPERLINK(1)"), "'=HYPERLINK(1)");
        assert_eq!(csv_text("\t@SUM(1)"), "' @SUM(1)");
        assert_eq!(csv_text("prune-then-distil"), "prune-then-distil");
    }

    #[test]
    fn a_block_cannot_be_closed_from_inside() {
        let block = markdown_block("toml", "a = 1\n````\n# out\u{1b}[0m");
        assert_eq!(block, "`````toml\na = 1\n````\n# out[0m\n`````\n");
    }
}
