//! A sentence frame in English and Chinese: literal text with typed slots, and the grammar needed to fill them.
//!
//! A slot is written `{category}`, `{category.form}` or, for a second one of the same category, `{category2.form}`. English forms: none
//! (bare), `the`, `a` (a or an), `s` (plural), `this`. Chinese forms: none, `one` (一 + measure word + term), `this` (这 ...), `each`
//! (每 ...), `m` (the measure word alone). `{n}` is a number.

use super::clean::is_han;

/// One term in both languages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Term {
    /// Index into the term set's list of categories.
    pub category: usize,
    pub english: String,
    /// `None` for uncountable terms.
    pub plural: Option<String>,
    pub chinese: String,
    /// Chinese measure word; `None` for terms that are not counted.
    pub measure: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Bare,
    The,
    A,
    Plural,
    This,
    One,
    Each,
    Measure,
}

#[derive(Clone, Debug)]
enum Piece {
    Text(String),
    /// Index into the frame's slots.
    Term(usize, Form),
    Number,
}

/// A frame; `slots` holds the category of each term slot.
#[derive(Clone, Debug)]
pub struct Frame {
    pub slots: Vec<usize>,
    english: Vec<Piece>,
    chinese: Vec<Piece>,
}

/// Where a term stands in the English text (byte range, without its article).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    pub start: usize,
    pub end: usize,
    pub category: usize,
}

const ENGLISH: &[(&str, Form)] =
    &[("", Form::Bare), ("the", Form::The), ("a", Form::A), ("s", Form::Plural), ("this", Form::This)];
const CHINESE: &[(&str, Form)] =
    &[("", Form::Bare), ("one", Form::One), ("this", Form::This), ("each", Form::Each), ("m", Form::Measure)];

/// A filled frame, and where the terms stand in both sides.
pub struct Rendered {
    pub english: String,
    pub chinese: String,
    pub spans: Vec<Span>,
    pub chinese_spans: Vec<Span>,
}

impl Frame {
    /// Parses both sides; the error is the rule that breaks.
    pub fn parse(english: &str, chinese: &str, categories: &[String]) -> Result<Self, String> {
        let mut names = Vec::new();
        let english = pieces(english, ENGLISH, &mut names)?;
        let slots = names.len();
        let chinese = pieces(chinese, CHINESE, &mut names)?;
        if let Some(name) = names.get(slots) {
            return Err(format!("slot {name} is in the Chinese text only"));
        }
        for (i, name) in names.iter().enumerate() {
            if !chinese.iter().any(|p| matches!(p, Piece::Term(slot, form) if *slot == i && *form != Form::Measure)) {
                return Err(format!("slot {name} is in the English text only"));
            }
        }
        let numbers = |pieces: &[Piece]| pieces.iter().filter(|p| matches!(p, Piece::Number)).count();
        if numbers(&english) != numbers(&chinese) || numbers(&english) > 1 {
            return Err("{n} must stand once in both texts or in neither".into());
        }
        let slots = names
            .iter()
            .map(|name| {
                let category = name.trim_end_matches(|c: char| c.is_ascii_digit());
                categories.iter().position(|c| c == category).ok_or_else(|| format!("no terms of category {category}"))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { slots, english, chinese })
    }

    pub fn has_number(&self) -> bool {
        self.english.iter().any(|p| matches!(p, Piece::Number))
    }

    /// The first slot whose term lacks a form that this frame uses, with what it lacks.
    pub fn lacks(&self, slot: usize, term: &Term) -> Option<&'static str> {
        self.english.iter().chain(&self.chinese).find_map(|piece| match piece {
            Piece::Term(s, Form::A | Form::Plural) if *s == slot && term.plural.is_none() => Some("plural"),
            Piece::Term(s, Form::One | Form::Each | Form::Measure) if *s == slot && term.measure.is_none() => {
                Some("measure word")
            }
            _ => None,
        })
    }

    /// Fills the slots; `terms` are in slot order, `number` is at least 2 (English uses the plural after it).
    pub fn render(&self, terms: &[&Term], number: usize) -> Rendered {
        let (mut english, mut chinese) = (String::new(), String::new());
        let (mut spans, mut chinese_spans) = (Vec::new(), Vec::new());
        for piece in &self.english {
            match piece {
                Piece::Text(text) => english.push_str(text),
                Piece::Number => english.push_str(&number.to_string()),
                Piece::Term(slot, form) => {
                    let Some(term) = terms.get(*slot) else { continue };
                    let mut word = term.english.as_str();
                    match form {
                        Form::The => english.push_str("the "),
                        Form::This => english.push_str("this "),
                        Form::A => english.push_str(article(word)),
                        Form::Plural => word = term.plural.as_deref().unwrap_or(word),
                        _ => {}
                    }
                    let start = english.len();
                    english.push_str(word);
                    spans.push(Span { start, end: english.len(), category: term.category });
                }
            }
        }
        if let Some(first) = english.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        for piece in &self.chinese {
            match piece {
                Piece::Text(text) => push_spaced(&mut chinese, text),
                Piece::Number => push_spaced(&mut chinese, &number.to_string()),
                Piece::Term(slot, form) => {
                    let Some(term) = terms.get(*slot) else { continue };
                    let measure = term.measure.as_deref().unwrap_or_default();
                    match form {
                        Form::One => push_spaced(&mut chinese, &format!("一{measure}")),
                        Form::This => push_spaced(&mut chinese, &format!("这{measure}")),
                        Form::Each => push_spaced(&mut chinese, &format!("每{measure}")),
                        Form::Measure => push_spaced(&mut chinese, measure),
                        _ => {}
                    }
                    if *form != Form::Measure {
                        push_spaced(&mut chinese, &term.chinese);
                        let end = chinese.len();
                        let start = end - term.chinese.len();
                        chinese_spans.push(Span { start, end, category: term.category });
                    }
                }
            }
        }
        Rendered { english, chinese, spans, chinese_spans }
    }
}

fn pieces(text: &str, forms: &[(&str, Form)], names: &mut Vec<String>) -> Result<Vec<Piece>, String> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some((literal, after)) = rest.split_once('{') {
        let (slot, after) = after.split_once('}').ok_or("a slot is not closed")?;
        if !literal.is_empty() {
            found.push(Piece::Text(literal.to_string()));
        }
        rest = after;
        let (name, form) = slot.split_once('.').unwrap_or((slot, ""));
        if name == "n" {
            found.push(Piece::Number);
            continue;
        }
        let (_, form) = forms.iter().find(|(f, _)| *f == form).ok_or_else(|| format!("no form {form}"))?;
        let slot = names.iter().position(|n| n == name).unwrap_or_else(|| {
            names.push(name.to_string());
            names.len() - 1
        });
        found.push(Piece::Term(slot, *form));
    }
    if !rest.is_empty() {
        found.push(Piece::Text(rest.to_string()));
    }
    Ok(found)
}

/// "a " or "an ", by sound: abbreviations by the name of their first letter, words by their first letter but for the few
/// spellings where that misleads.
fn article(word: &str) -> &'static str {
    let first = word.split([' ', '-']).next().unwrap_or_default();
    let starts = |prefixes: &[&str]| prefixes.iter().any(|p| first.starts_with(p));
    let vowel = if first.len() > 1 && first.chars().all(|c| c.is_ascii_uppercase()) {
        first.starts_with(['A', 'E', 'F', 'H', 'I', 'L', 'M', 'N', 'O', 'R', 'S', 'X'])
    } else if starts(&["uni", "use", "usu", "uti", "eu", "one"]) {
        false
    } else {
        first.starts_with(['a', 'e', 'i', 'o', 'u', 'A', 'E', 'I', 'O', 'U']) || starts(&["hour", "honest"])
    };
    if vowel { "an " } else { "a " }
}

/// Appends with the space that Chinese typesetting puts between ideographs and Latin letters or digits.
fn push_spaced(text: &mut String, next: &str) {
    let latin = |c: char| c.is_ascii_alphanumeric() || c == '+';
    if let (Some(before), Some(after)) = (text.chars().next_back(), next.chars().next())
        && ((is_han(before) && latin(after)) || (latin(before) && is_han(after)))
    {
        text.push(' ');
    }
    text.push_str(next);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn term(english: &str, plural: &str, chinese: &str, measure: &str) -> Term {
        Term {
            category: 0,
            english: english.into(),
            plural: Some(plural.into()),
            chinese: chinese.into(),
            measure: Some(measure.into()),
        }
    }

    #[test]
    fn articles_follow_the_sound() {
        for word in
            ["array", "index", "IP address", "unauthorized login", "unused import", "update", "HTML page", "hour"]
        {
            assert_eq!(article(word), "an ", "{word}");
        }
        for word in
            ["user", "unique index", "USB port", "one-time code", "VPN connection", "DNS record", "hub", "utility"]
        {
            assert_eq!(article(word), "a ", "{word}");
        }
    }

    #[test]
    fn slots_are_filled_in_both_languages_with_exact_spans() {
        let categories = ["part".to_string()];
        let frame =
            Frame::parse("{part.a} and {n} {part2.s}.", "{part.one}和{n}{part2.m}{part2}。", &categories).unwrap();
        let (array, key) = (term("array", "arrays", "数组", "个"), term("USB key", "USB keys", "USB 闪存盘", "个"));
        let Rendered { english, chinese, spans, chinese_spans } = frame.render(&[&key, &array], 12);
        assert!(
            chinese_spans
                .iter()
                .all(|s| [&key.chinese, &array.chinese].contains(&&chinese[s.start..s.end].to_string()))
        );
        assert_eq!((english.as_str(), chinese.as_str()), ("A USB key and 12 arrays.", "一个 USB 闪存盘和 12 个数组。"));
        let words: Vec<&str> = spans.iter().map(|s| &english[s.start..s.end]).collect();
        assert_eq!(words, ["USB key", "arrays"]);
    }

    #[test]
    fn broken_frames_are_refused() {
        let categories = ["part".to_string()];
        for (english, chinese) in [
            ("{part", "{part}"),
            ("{part.an}", "{part}"),
            ("{cat}", "{cat}"),
            ("{part}", "x"),
            ("x", "{part}"),
            ("{part}", "{part.m}"),
            ("{n} {part.s}", "{part}"),
        ] {
            assert!(Frame::parse(english, chinese, &categories).is_err(), "{english} | {chinese}");
        }
    }
}
