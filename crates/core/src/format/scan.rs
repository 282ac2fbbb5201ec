//! JSON as serializers write it, scanned several times faster than it is parsed.
//!
//! Headers of tens of thousands of tensors are one form over and over. Whoever scans knows the form that comes next; at
//! anything else, be it allowed (escapes, keys in another order) or an error, a scan gives nothing, and `serde_json`
//! decides. So a scan only ever gives what parsing gives, and errors are told in one way.

use std::sync::Arc;

use serde::Deserialize;

use crate::pool::SharedText;

/// A text, or a piece of one that was cut before items of its list. Who scans all pieces up to their ends has scanned the
/// text, wherever it was cut: a piece begins where the one before it was seen to end.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    pub(crate) text: Arc<SharedText>,
    pub(crate) is_first: bool,
    pub(crate) is_last: bool,
}

/// Where, in all likelihood, the first item begins that follows a comma after one that ends with `end`. Items begin with a
/// string.
pub(crate) fn next_item(text: &[u8], end: u8) -> Option<usize> {
    memchr::memchr_iter(end, text).find_map(|at| {
        let after = |at: usize| Some(at + text.get(at..)?.iter().position(|byte| !byte.is_ascii_whitespace())?);
        let comma = after(at + 1).filter(|&comma| text[comma] == b',')?;
        after(comma + 1).filter(|&item| text[item] == b'"')
    })
}

/// A place in a text.
pub(super) struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Scanner { text, at: 0 }
    }

    /// The first byte after white space.
    #[inline]
    fn peek(&mut self) -> Option<u8> {
        loop {
            let byte = *self.text.as_bytes().get(self.at)?;
            if !matches!(byte, b' ' | b'\n' | b'\r' | b'\t') {
                return Some(byte);
            }
            self.at += 1;
        }
    }

    /// Whether `byte` comes next; then it is passed.
    #[inline]
    pub(super) fn has(&mut self, byte: u8) -> bool {
        let has = self.peek() == Some(byte);
        self.at += usize::from(has);
        has
    }

    /// Passes `byte`.
    #[inline]
    pub(super) fn pass(&mut self, byte: u8) -> Option<()> {
        self.has(byte).then_some(())
    }

    /// A string without escapes.
    #[inline]
    pub(super) fn string(&mut self) -> Option<&'a str> {
        self.pass(b'"')?;
        let rest = self.text.get(self.at..)?;
        let string = rest.get(..memchr::memchr(b'"', rest.as_bytes())?)?;
        self.at += string.len() + 1;
        // All of them, since that is faster than to stop at the first.
        let odd = string.bytes().fold(0, |odd, byte| odd | u8::from(byte < b' ') | u8::from(byte == b'\\'));
        (odd == 0).then_some(string)
    }

    /// A string and the colon after it.
    #[inline]
    pub(super) fn key(&mut self) -> Option<&'a str> {
        let key = self.string()?;
        self.pass(b':').map(|()| key)
    }

    /// Passes this key, which needs no escapes, and the colon after it.
    #[inline]
    pub(super) fn pass_key(&mut self, key: &str) -> Option<()> {
        self.pass(b'"')?;
        let rest = self.text.as_bytes().get(self.at..)?.strip_prefix(key.as_bytes())?;
        self.at = self.text.len() - rest.len();
        // Directly after it.
        (rest.first() == Some(&b'"')).then(|| self.at += 1)?;
        self.pass(b':')
    }

    /// A whole number of 64 bits.
    #[inline]
    pub(super) fn number(&mut self) -> Option<u64> {
        let first = self.peek()?;
        let digits = self.text.as_bytes().get(self.at..)?;
        let mut number: u64 = 0;
        let mut len = 0;
        while let Some(digit) = digits.get(len).map(|byte| byte.wrapping_sub(b'0')).filter(|&digit| digit < 10) {
            number = number.checked_mul(10)?.checked_add(digit.into())?;
            len += 1;
        }
        self.at += len;
        (len == 1 || len > 1 && first != b'0').then_some(number)
    }

    /// Whatever value comes next, parsed.
    pub(super) fn value<T: Deserialize<'a>>(&mut self) -> Option<T> {
        let mut values = serde_json::Deserializer::from_str(self.text.get(self.at..)?).into_iter();
        let value = values.next()?.ok()?;
        self.at += values.byte_offset();
        Some(value)
    }

    /// Whether nothing but white space is left.
    pub(super) fn is_at_end(&mut self) -> bool {
        self.peek().is_none()
    }

    /// Scans what stands between two brackets by `item`, after the first of which was passed, to the second, `close`.
    #[inline]
    pub(super) fn items(&mut self, close: u8, mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        if self.has(close) {
            return Some(());
        }
        loop {
            item(self)?;
            if !self.has(b',') {
                return self.pass(close);
            }
        }
    }

    /// The same of the items that are in a piece of a text: to `close` in the last one, in others to where it was cut.
    #[inline]
    pub(super) fn items_in(
        &mut self,
        piece: &Piece,
        close: u8,
        mut item: impl FnMut(&mut Self) -> Option<()>,
    ) -> Option<()> {
        if piece.is_last {
            return self.items(close, item);
        }
        while !self.is_at_end() {
            item(self)?;
            self.pass(b',')?;
        }
        Some(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A text, and every text that has one byte more, fewer, or another one of those that JSON gives a meaning.
    pub(in crate::format) fn changed(text: &str) -> Vec<String> {
        let mut texts = vec![text.to_owned()];
        for at in (0..text.len()).filter(|&at| text.is_char_boundary(at) && text.is_char_boundary(at + 1)) {
            let (before, after) = (&text[..at], &text[at + 1..]);
            texts.push([before, after].concat());
            texts.push(before.to_owned());
            for byte in " \n\t\"\\{}[],:0159-e.ax\u{1f}\u{7f}é".chars().map(String::from) {
                texts.push([before, &byte, after].concat());
                texts.push([before, &byte, &text[at..]].concat());
            }
        }
        texts
    }

    /// A text whole, and in two pieces, wherever it can be cut.
    pub(in crate::format) fn cuts(text: &str, end: u8) -> Vec<Vec<Piece>> {
        let piece = |text: &str, is_first, is_last| Piece { text: Arc::new(text.to_owned().into()), is_first, is_last };
        let mut places: Vec<usize> =
            (0..text.len()).filter_map(|from| Some(from + next_item(&text.as_bytes()[from..], end)?)).collect();
        places.dedup();
        let cut = places.into_iter().map(|at| vec![piece(&text[..at], true, false), piece(&text[at..], false, true)]);
        cut.chain([vec![piece(text, true, true)]]).collect()
    }

    #[test]
    fn a_scan_gives_what_parsing_gives_or_nothing() {
        for text in [
            "0",
            " 7",
            "10",
            "007",
            "00",
            "",
            "-1",
            "1.0",
            "1e2",
            "18446744073709551615",
            "18446744073709551616",
            "1 2",
            "\"",
            "\"a\"",
            "\"\"",
            " \"é\"",
            "\"a\\n\"",
            "\"a\nb\"",
            "\"a\u{1f}\"",
            "\"\u{7f}\"",
            "\"a",
            "x",
        ] {
            let whole = |scanner: &mut Scanner<'_>| scanner.is_at_end().then_some(());
            let mut scanner = Scanner::new(text);
            let number = scanner.number().and_then(|number| whole(&mut scanner).map(|()| number));
            assert_eq!(number, serde_json::from_str::<u64>(text).ok(), "{text}");
            let mut scanner = Scanner::new(text);
            let string = scanner.string().and_then(|string| whole(&mut scanner).map(|()| string));
            let parsed = serde_json::from_str::<String>(text).ok();
            assert_eq!(string, parsed.as_deref().filter(|_| !text.contains('\\')), "{text}");
        }
    }

    #[test]
    fn a_key_is_passed_if_it_is_this_one() {
        for (text, passed) in [
            ("\"ab\":1", true),
            (" \"ab\" :1", true),
            ("\"ab \":1", false),
            ("\"abc\":1", false),
            ("\"a\":1", false),
            ("\"ab:1", false),
            ("\"ab\" 1", false),
            ("ab:1", false),
            ("\"ab", false),
        ] {
            let mut scanner = Scanner::new(text);
            assert_eq!(scanner.pass_key("ab").is_some(), passed, "{text}");
            assert!(!passed || scanner.number() == Some(1));
        }
    }

    #[test]
    fn lists_are_scanned_to_their_end() {
        for (text, items, rest) in [
            ("]", Some(0), ""),
            (" ] x", Some(0), " x"),
            ("1]", Some(1), ""),
            ("1 , 2\n]]", Some(2), "]"),
            ("1,]", None, ""),
            (",1]", None, ""),
            ("1 2]", None, ""),
            ("1}", None, ""),
            ("1,2", None, ""),
        ] {
            let mut count = 0;
            let mut scanner = Scanner::new(text);
            let scanned = scanner.items(b']', |scanner| {
                count += 1;
                scanner.number().map(drop)
            });
            assert_eq!(scanned.map(|()| count), items, "{text}");
            assert!(items.is_none() || &text[scanner.at..] == rest, "{text}");
        }
    }
}
