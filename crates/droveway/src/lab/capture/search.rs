//! Whether a text is in a frame, or across frames that are pieces of one stream or packet.

use std::collections::BTreeMap;

use memchr::memmem::Finder;

use super::look::{Seen, Whole};

/// How many streams are followed at once. If there are more, all are begun anew: a text across two frames may be missed
/// then, one within a frame never is.
const WHOLES_MAX: usize = 1024;

/// Texts to search for.
pub(super) struct Search {
    finders: Vec<Finder<'static>>,
    /// One less than the longest text.
    overlap: usize,
    /// The end of the last piece of each whole.
    ends: BTreeMap<Whole, Vec<u8>>,
}

impl Search {
    pub(super) fn new(texts: &[Vec<u8>]) -> Self {
        let finders = texts.iter().map(|text| Finder::new(text).into_owned()).collect();
        let overlap = texts.iter().map(Vec::len).max().unwrap_or_default().saturating_sub(1);
        Self { finders, overlap, ends: BTreeMap::new() }
    }

    /// The first text that is in the frame, or in it and the piece before it, by its number.
    pub(super) fn find(&mut self, frame: &[u8], seen: &Seen) -> Option<usize> {
        let within = self.finders.iter().position(|finder| finder.find(frame).is_some());
        let piece = frame.get(seen.payload..seen.end).unwrap_or_default();
        let Some(whole) = seen.part_of.filter(|_| self.overlap > 0 && !piece.is_empty()) else {
            return within;
        };
        if self.ends.len() >= WHOLES_MAX && !self.ends.contains_key(&whole) {
            self.ends.clear();
        }
        let end = self.ends.entry(whole).or_default();
        let before = end.len();
        end.extend(&piece[..piece.len().min(self.overlap)]);
        // A text that ended in the piece before was found there.
        let over = |finder: &Finder<'_>| {
            let reach = finder.needle().len().saturating_sub(1);
            let joint = end.get(before.saturating_sub(reach)..end.len().min(before + reach));
            finder.find(joint.unwrap_or_default()).is_some()
        };
        let across = || self.finders.iter().position(over);
        let found = within.or_else(across);
        end.truncate(before);
        end.extend(&piece[piece.len().saturating_sub(self.overlap)..]);
        let surplus = end.len().saturating_sub(self.overlap);
        end.drain(..surplus);
        found
    }
}

/// Bytes as they can be on a command line.
pub(super) fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.filter_map(|digit| char::from_digit(digit.into(), 16)).collect()
}

/// [`hex`] backwards.
pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u32>> = text.chars().map(|digit| digit.to_digit(16)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    Some(digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect())
}

#[cfg(test)]
mod tests {
    use super::super::look::{Ports, look};
    use super::*;

    /// A TCP segment of a stream of that port.
    fn segment(port: u8, text: &str) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([
            8,
            0,
            0x45,
            0,
            0,
            40 + text.len() as u8,
            0,
            1,
            0,
            0,
            64,
            6,
            0,
            0,
            10,
            0,
            0,
            5,
            10,
            0,
            0,
            6,
        ]);
        frame.extend([0, port, 0, 99, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0, 0, 0, 0]);
        frame.extend(text.as_bytes());
        frame
    }

    fn finds(search: &mut Search, frame: &[u8]) -> Option<usize> {
        search.find(frame, &look(frame, &mut Ports::new(7443)))
    }

    #[test]
    fn a_text_is_found_within_a_frame_and_across_the_segments_of_its_stream() {
        let mut search = Search::new(&[b"needle".to_vec(), b"pin".to_vec()]);
        assert_eq!(finds(&mut search, &segment(1, "a haystack with a needle in it")), Some(0));
        assert_eq!(finds(&mut search, &segment(1, "with a pin")), Some(1));
        assert_eq!(finds(&mut search, &segment(1, "...nee")), None);
        assert_eq!(finds(&mut search, &segment(2, "dle")), None, "of another stream");
        assert_eq!(finds(&mut search, &segment(1, "dle...")), Some(0));
        for piece in ["n", "e", "e", "d", "l"] {
            assert_eq!(finds(&mut search, &segment(3, piece)), None);
        }
        assert_eq!(finds(&mut search, &segment(3, "e")), Some(0), "byte by byte");
        assert_eq!(finds(&mut search, &segment(3, "edle")), None);
        assert_eq!(finds(&mut search, b"runt with a needle"), Some(0));
        assert_eq!(finds(&mut Search::new(&[]), &segment(1, "needle")), None);
    }

    #[test]
    fn bytes_come_back_from_hexadecimal() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(unhex(&hex(&bytes)), Some(bytes));
        assert_eq!((unhex("abc"), unhex("zz")), (None, None));
    }
}
