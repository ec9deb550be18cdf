// SPDX-License-Identifier: Apache-2.0
//! Reads a pack of refmoe, and tells whether the values of an engine are legal. One file, the standard library alone.
//!
//! ```text
//! #[path = "refmoe_pack.rs"]
//! mod refmoe_pack;
//! let case = refmoe_pack::Case::open("pack/cases/window-1")?;
//! let result = case.compare("prefill", "layers.0.attention.q", "float32", &q, None);
//! if result.status == Status::Outside { println!("{} {}", result.index, result.found) }
//! ```
//!
//! PACK.md defines the files.

use std::fs;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Status {
    Pass,
    /// A value is outside its interval, or an expert must not be chosen.
    Outside,
    /// The pack does not have this tap of this run.
    Absent,
    /// The tap has another number of values: `judged` of the result.
    Length,
    /// case.json and values.bin do not fit each other.
    Broken,
}

#[derive(Clone, Copy, Debug)]
pub struct Judgement {
    pub status: Status,
    /// The values, or tokens, that were judged; of `Status::Length` the number that was expected.
    pub judged: usize,
    pub outside: usize,
    /// The first wrong value, in the order of your slice.
    pub index: usize,
    pub found: f64,
    /// The interval; of a choice of experts the id of one that is missing, or NaN.
    pub low: f64,
    pub high: f64,
}

impl Judgement {
    fn new(status: Status, judged: usize) -> Self {
        Judgement { status, judged, outside: 0, index: 0, found: f64::NAN, low: f64::NAN, high: f64::NAN }
    }

    fn wrong(&mut self, index: usize, found: f64, low: f64, high: f64) {
        if self.outside == 0 {
            (self.index, self.found, self.low, self.high) = (index, found, low, high);
        }
        self.status = Status::Outside;
        self.outside += 1;
    }
}

// ---- JSON

#[derive(Clone, Debug)]
pub enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// The value of a text. `None` where it is not JSON.
    pub fn parse(text: &[u8]) -> Option<Json> {
        let mut reader = Reader { text, at: 0 };
        let value = reader.value(0)?;
        reader.blank();
        (reader.at == text.len()).then_some(value)
    }

    pub fn get(&self, name: &str) -> Option<&Json> {
        match self {
            Json::Object(fields) => fields.iter().find(|(key, _)| key == name).map(|(_, value)| value),
            _ => None,
        }
    }

    pub fn list(&self) -> &[Json] {
        if let Json::List(items) = self { items } else { &[] }
    }

    pub fn number(&self) -> Option<f64> {
        if let Json::Number(x) = self { Some(*x) } else { None }
    }

    /// An integer from 0; 0 where it is none.
    pub fn size(&self) -> usize {
        self.number().map_or(0, |x| x as usize)
    }

    pub fn text(&self) -> &str {
        if let Json::Text(text) = self { text } else { "" }
    }
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn blank(&mut self) {
        while self.text.get(self.at).is_some_and(|c| b" \t\r\n".contains(c)) {
            self.at += 1;
        }
    }

    fn take(&mut self, c: u8) -> Option<()> {
        self.blank();
        (self.text.get(self.at) == Some(&c)).then(|| self.at += 1)
    }

    fn word(&mut self, word: &str, value: Json) -> Option<Json> {
        self.text[self.at..].starts_with(word.as_bytes()).then(|| {
            self.at += word.len();
            value
        })
    }

    fn value(&mut self, depth: usize) -> Option<Json> {
        self.blank();
        match *self.text.get(self.at)? {
            _ if depth > 64 => None,
            b'{' => {
                let mut fields = Vec::new();
                self.items(b'{', b'}', |reader| {
                    reader.blank();
                    let name = reader.string()?;
                    reader.take(b':')?;
                    fields.push((name, reader.value(depth + 1)?));
                    Some(())
                })?;
                Some(Json::Object(fields))
            }
            b'[' => {
                let mut items = Vec::new();
                self.items(b'[', b']', |reader| {
                    items.push(reader.value(depth + 1)?);
                    Some(())
                })?;
                Some(Json::List(items))
            }
            b'"' => self.string().map(Json::Text),
            b't' => self.word("true", Json::Bool(true)),
            b'f' => self.word("false", Json::Bool(false)),
            b'n' => self.word("null", Json::Null),
            _ => {
                let end = self.text[self.at..].iter().position(|c| !b"+-.0123456789eE".contains(c));
                let end = end.map_or(self.text.len(), |n| self.at + n);
                let number = std::str::from_utf8(&self.text[self.at..end]).ok()?.parse().ok()?;
                self.at = end;
                Some(Json::Number(number))
            }
        }
    }

    fn items(&mut self, open: u8, close: u8, mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        self.take(open)?;
        if self.take(close).is_some() {
            return Some(());
        }
        loop {
            item(self)?;
            if self.take(b',').is_none() {
                return self.take(close);
            }
        }
    }

    fn string(&mut self) -> Option<String> {
        self.take(b'"')?;
        let mut bytes = Vec::new();
        loop {
            let c = *self.text.get(self.at)?;
            self.at += 1;
            match c {
                b'"' => return String::from_utf8(bytes).ok(),
                b'\\' => {
                    let c = *self.text.get(self.at)?;
                    self.at += 1;
                    match c {
                        b'n' => bytes.push(b'\n'),
                        b't' => bytes.push(b'\t'),
                        b'u' => {
                            // a pack has characters beyond ASCII only in prose
                            let code = std::str::from_utf8(self.text.get(self.at..self.at + 4)?).ok()?;
                            let c = char::from_u32(u32::from_str_radix(code, 16).ok()?).unwrap_or('?');
                            bytes.extend(c.to_string().bytes());
                            self.at += 4;
                        }
                        other => bytes.push(other),
                    }
                }
                other => bytes.push(other),
            }
        }
    }
}

// ---- a case

pub struct Case {
    pub config: Json,
    pub index: Json,
    tensors: Json,
    values: Vec<u8>,
    weights: Vec<u8>,
    start: usize,
}

impl Case {
    /// A case from its folder, or what is wrong with it.
    pub fn open(folder: &str) -> Result<Case, String> {
        let read = |name: &str| fs::read(format!("{folder}/{name}")).map_err(|e| format!("{folder}/{name}: {e}"));
        let parse = |name: &str, text: &[u8]| Json::parse(text).ok_or(format!("{folder}/{name}: is not JSON"));
        let weights = read("model.safetensors")?;
        let length = weights.get(..8).map_or(u64::MAX, |n| u64::from_le_bytes(n.try_into().unwrap()));
        let start = usize::try_from(length).ok().and_then(|n| n.checked_add(8)).unwrap_or(usize::MAX);
        let header = weights.get(8..start).ok_or(format!("{folder}/model.safetensors: is cut off"))?;
        let case = Case {
            config: parse("config.json", &read("config.json")?)?,
            index: parse("case.json", &read("case.json")?)?,
            tensors: parse("model.safetensors", header)?,
            values: read("values.bin")?,
            weights,
            start,
        };
        let fits = case.index.get("format").is_some_and(|format| format.text() == "1");
        let whole = fits && case.index.get("runs").is_some() && case.config.get("hidden_size").is_some();
        if whole { Ok(case) } else { Err(format!("{folder}: is not a case of a pack in format 1")) }
    }

    pub fn runs(&self) -> &[Json] {
        self.index.get("runs").map_or(&[], Json::list)
    }

    /// The values of a tensor, row-major. `None` where there is none of this name.
    pub fn weight(&self, name: &str) -> Option<Vec<f32>> {
        let at = self.tensors.get(name)?.get("data_offsets")?.list();
        let bytes = self.weights.get(self.start + at.first()?.size()..self.start + at.get(1)?.size())?;
        // a bfloat16 is the upper half of a float32
        let wide = |two: &[u8]| f32::from_bits((u16::from_le_bytes([two[0], two[1]]) as u32) << 16);
        Some(bytes.chunks_exact(2).map(wide).collect())
    }

    /// The shape of a tap, its first byte, its entry, and the place of the dtype; or what is missing.
    fn find(&self, run: &str, tap: &str, dtype: &str, width: usize) -> Result<(Vec<usize>, usize, &Json, usize), Status> {
        let entry = self.runs().iter().find(|each| each.get("run").is_some_and(|name| name.text() == run));
        let entry = entry.and_then(|each| each.get("taps")?.get(tap)).ok_or(Status::Absent)?;
        let dtypes = self.index.get("dtypes").map_or(&[][..], Json::list);
        let place = dtypes.iter().position(|each| each.text() == dtype).ok_or(Status::Absent)?;
        let shape: Vec<usize> = entry.get("shape").map_or(&[][..], Json::list).iter().map(Json::size).collect();
        let at = entry.get("at").map_or(0, Json::size);
        let size = shape.iter().try_fold(width, |n, each| n.checked_mul(*each)).and_then(|n| n.checked_add(at));
        if shape.len() < 2 || size.is_none_or(|n| n > self.values.len()) {
            return Err(Status::Broken);
        }
        Ok((shape, at, entry, place))
    }

    /// Holds the values of a tap against their intervals.
    ///
    /// experts: of a tap with slots the ids in the order of the engine's slots, `[T, k]`; `None` where the slots are in
    /// ascending order of ids already.
    pub fn compare(&self, run: &str, tap: &str, dtype: &str, values: &[f32], experts: Option<&[i32]>) -> Judgement {
        let (shape, at, entry, place) = match self.find(run, tap, dtype, 7) {
            Ok(found) => found, // 4 bytes of centre and 3 codes
            Err(status) => return Judgement::new(status, 0),
        };
        let size: usize = shape.iter().product();
        let Some(base) = entry.get("base").and_then(|bases| bases.list().get(place)?.number()) else {
            return Judgement::new(Status::Broken, 0);
        };
        if values.len() != size {
            return Judgement::new(Status::Length, size);
        }
        let (slots, width) = (shape[1], shape.get(2).copied().unwrap_or(1));
        if experts.is_some_and(|ids| ids.len() != shape[0] * slots) {
            return Judgement::new(Status::Length, shape[0] * slots);
        }
        let mut result = Judgement::new(Status::Pass, 0);
        for (i, value) in values.iter().enumerate() {
            let j = experts.map_or(i, |ids| placed(i, ids, slots, width));
            let code = self.values[at + size * (4 + place) + j];
            let centre = &self.values[at + 4 * j..at + 4 * j + 4];
            let centre = f32::from_le_bytes(centre.try_into().unwrap()) as f64;
            let Some(radius) = radius(code, base as i32) else { continue };
            let (low, high, value) = (centre - radius, centre + radius, *value as f64);
            result.judged += 1;
            if !(value >= low && value <= high) {
                result.wrong(i, value, low, high);
            }
        }
        result
    }

    /// Judges the choice of experts of each token.   ids: `[T, k]`, in any order
    pub fn compare_experts(&self, run: &str, tap: &str, dtype: &str, ids: &[i32]) -> Judgement {
        let (shape, at, _, place) = match self.find(run, tap, dtype, 3) {
            Ok(found) => found,
            Err(status) => return Judgement::new(status, 0),
        };
        let (tokens, experts) = (shape[0], shape[1]);
        let k = self.config.get("num_experts_per_tok").map_or(0, Json::size);
        if k == 0 {
            return Judgement::new(Status::Broken, 0);
        }
        if ids.len() != tokens * k {
            return Judgement::new(Status::Length, tokens * k);
        }
        let mut result = Judgement::new(Status::Pass, tokens);
        for (t, own) in ids.chunks_exact(k).enumerate() {
            let states = &self.values[at + experts * (tokens * place + t)..][..experts];
            let refused = |id: i32| id < 0 || id as usize >= experts || states[id as usize] == 0;
            let wrong = (0..k).find(|&j| own[..j].contains(&own[j]) || refused(own[j]));
            let missing = (0..experts).find(|&e| states[e] == 2 && !own.contains(&(e as i32)));
            if wrong.is_some() || missing.is_some() {
                let (j, expected) = (wrong.unwrap_or(0), missing.map_or(f64::NAN, |e| e as f64));
                result.wrong(t * k + j, own[j] as f64, expected, expected);
            }
        }
        result
    }
}

const MANTISSA: [f64; 8] = [
    1.0, 1.0905077326652577, 1.189207115002721, 1.2968395546510096, 1.4142135623730951, 1.5422108254079407,
    1.681792830507429, 1.8340080864093424,
];

/// The radius of a code; `None` where the value is not judged.
fn radius(code: u8, base: i32) -> Option<f64> {
    match code {
        0 => Some(0.0),
        255 => None,
        _ => Some(MANTISSA[(code as usize - 1) % 8] * 2f64.powi(base + (code as i32 - 1) / 8)),
    }
}

/// Where the interval of value i lies: its slot is the rank of the slot's expert.
fn placed(i: usize, experts: &[i32], slots: usize, width: usize) -> usize {
    let (token, slot) = (i / (slots * width), i / width % slots);
    let ids = &experts[token * slots..(token + 1) * slots];
    let rank = (0..slots).filter(|&s| ids[s] < ids[slot] || (ids[s] == ids[slot] && s < slot)).count();
    (token * slots + rank) * width + i % width
}
