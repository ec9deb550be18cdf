// SPDX-License-Identifier: Apache-2.0
//! A small Mixtral in Rust and float32 that judges itself by a pack of refmoe. Plain loops, easy to read, not fast.
//!
//!     rustc --edition 2021 -O engine.rs && ./engine pack
//!
//! Letters of dimensions: T new tokens, S cached ones with the new ones included, D dim, H query heads, K key/value
//! heads, d head_dim, E experts, k chosen ones, F hidden_dim, V vocabulary.
#![allow(non_snake_case)]

#[path = "refmoe_pack.rs"]
#[allow(dead_code)]
mod refmoe_pack;

use refmoe_pack::{Case, Json, Judgement, Status};
use std::collections::HashMap;
use std::{env, fs, process};

type Outcome<T> = Result<T, String>;

// ---- steps

/// x [T, in] times the transpose of a matrix [out, in]
fn multiply(x: &[f32], matrix: &[f32], inputs: usize) -> Vec<f32> {
    let row = |x: &[f32], w: &[f32]| x.iter().zip(w).fold(0f32, |sum, (a, b)| sum + a * b);
    x.chunks(inputs).flat_map(|x| matrix.chunks(inputs).map(move |w| row(x, w))).collect()
}

fn norm(x: &[f32], gain: &[f32], eps: f32) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks(gain.len()) {
        let mean_square = row.iter().fold(0f32, |sum, a| sum + a * a) / gain.len() as f32;
        let root = (mean_square + eps).sqrt();
        y.extend(row.iter().zip(gain).map(|(a, g)| a / root * g));
    }
    y
}

/// element i of each head turns with element i + d/2; x: [T, heads, d]   first: the position of the first token
fn rotate(x: &[f32], heads: usize, d: usize, theta: f64, first: usize) -> Vec<f32> {
    let mut y = vec![0f32; x.len()];
    for row in 0..x.len() / d {
        for i in 0..d / 2 {
            let angle = (first + row / heads) as f64 * theta.powf(-2.0 * i as f64 / d as f64);
            let (cosine, sine, at, half) = (angle.cos() as f32, angle.sin() as f32, row * d + i, d / 2);
            y[at] = x[at] * cosine - x[at + half] * sine;
            y[at + half] = x[at + half] * cosine + x[at] * sine;
        }
    }
    y
}

/// in place; what is -infinity becomes 0
fn softmax(x: &mut [f32]) {
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|a| *a = (*a - largest).exp());
    let sum = x.iter().fold(0f32, |sum, a| sum + a);
    x.iter_mut().for_each(|a| *a /= sum);
}

fn add(x: &[f32], y: &[f32]) -> Vec<f32> {
    x.iter().zip(y).map(|(a, b)| a + b).collect()
}

// ---- the model

struct Config {
    D: usize, H: usize, K: usize, d: usize, E: usize, k: usize, F: usize,
    layers: usize,
    /// 0: none
    window: usize,
    eps: f32,
    theta: f64,
}

/// k, v: [S, K, d]
#[derive(Clone, Default)]
struct Cache {
    k: Vec<f32>,
    v: Vec<f32>,
}

struct Engine<'a> {
    case: &'a Case,
    config: Config,
    run: String,
    judged: usize,
    outside: usize,
}

impl Engine<'_> {
    fn take(&mut self, tap: &str, r: Judgement) -> Outcome<()> {
        if matches!(r.status, Status::Length | Status::Broken) {
            return Err(format!("{}/{tap}: {:?}, expected {} values", self.run, r.status, r.judged));
        }
        if r.outside > 0 && self.outside == 0 {
            println!("  first wrong: {}/{tap}: value {} is {}, legal are {} to {}; {} of {} are wrong",
                     self.run, r.index, r.found, r.low, r.high, r.outside, r.judged);
        }
        (self.judged, self.outside) = (self.judged + r.judged, self.outside + r.outside);
        Ok(())
    }

    /// Holds a tap against the pack. `ids`: where it has a slot for each chosen expert
    fn check(&mut self, tap: &str, values: &[f32], ids: Option<&[i32]>) -> Outcome<()> {
        let judgement = self.case.compare(&self.run, tap, "float32", values, ids);
        self.take(tap, judgement)
    }

    fn weight(&self, module: &str) -> Outcome<Vec<f32>> {
        self.case.weight(&format!("{module}.weight")).ok_or(format!("{module}.weight is not there"))
    }

    fn linear(&mut self, tap: &str, x: &[f32], module: &str, inputs: usize) -> Outcome<Vec<f32>> {
        let y = multiply(x, &self.weight(module)?, inputs);
        self.check(tap, &y, None)?;
        Ok(y)
    }

    fn norm(&mut self, tap: &str, x: &[f32], module: &str) -> Outcome<Vec<f32>> {
        let y = norm(x, &self.weight(module)?, self.config.eps);
        self.check(tap, &y, None)?;
        Ok(y)
    }

    fn rotated(&mut self, tap: &str, x: &[f32], heads: usize, first: usize) -> Outcome<Vec<f32>> {
        let y = rotate(x, heads, self.config.d, self.config.theta, first);
        self.check(tap, &y, None)?;
        Ok(y)
    }

    fn forward(&mut self, tokens: &[usize], caches: &mut [Cache], past: usize, first: usize) -> Outcome<()> {
        let (D, table) = (self.config.D, self.weight("model.embed_tokens")?);
        let mut x: Vec<f32> = tokens.iter().flat_map(|&id| table[id * D..(id + 1) * D].to_vec()).collect();
        self.check("embedding", &x, None)?;
        for l in 0..self.config.layers {
            let (at, tap) = (format!("model.layers.{l}"), format!("layers.{l}"));
            let normed = self.norm(&format!("{tap}.attention_norm"), &x, &format!("{at}.input_layernorm"))?;
            x = add(&x, &self.attention(&normed, &at, &tap, &mut caches[l], past, first)?);
            self.check(&format!("{tap}.attention_residual"), &x, None)?;
            let normed = self.norm(&format!("{tap}.moe_norm"), &x, &format!("{at}.post_attention_layernorm"))?;
            x = add(&x, &self.experts(&normed, &at, &tap)?);
            self.check(&format!("{tap}.residual"), &x, None)?;
        }
        let normed = self.norm("final_norm", &x, "model.norm")?;
        self.linear("logits", &normed, "lm_head", D).map(|_| ())
    }

    fn attention(
        &mut self, x: &[f32], at: &str, tap: &str, cache: &mut Cache, past: usize, first: usize,
    ) -> Outcome<Vec<f32>> {
        let Config { D, H, K, d, window, .. } = self.config;
        let (T, row, tap) = (x.len() / D, K * d, format!("{tap}.attention"));
        let S = past + T;
        let q = self.linear(&format!("{tap}.q"), x, &format!("{at}.self_attn.q_proj"), D)?;
        let k = self.linear(&format!("{tap}.k"), x, &format!("{at}.self_attn.k_proj"), D)?;
        let v = self.linear(&format!("{tap}.v"), x, &format!("{at}.self_attn.v_proj"), D)?;
        let q_rope = self.rotated(&format!("{tap}.q_rope"), &q, H, first)?;
        let k_rope = self.rotated(&format!("{tap}.k_rope"), &k, K, first)?;
        cache.k.truncate(past * row);
        cache.v.truncate(past * row);
        cache.k.extend(k_rope);
        cache.v.extend(v);
        let (mut scores, mut probs) = (vec![0f32; H * T * S], vec![0f32; H * T * S]);
        let mut context = vec![0f32; T * H * d];
        for h in 0..H {
            let shared = h / (H / K) * d; // consecutive query heads read one key/value head
            for t in 0..T {
                let (from, query) = ((h * T + t) * S, (t * H + h) * d);
                for s in 0..S {
                    let key = &cache.k[s * row + shared..][..d];
                    let dot = q_rope[query..query + d].iter().zip(key).fold(0f32, |sum, (a, b)| sum + a * b);
                    let visible = s <= past + t && (window == 0 || past + t - s < window);
                    scores[from + s] = dot / (d as f32).sqrt();
                    probs[from + s] = if visible { scores[from + s] } else { f32::NEG_INFINITY };
                }
                softmax(&mut probs[from..from + S]);
                for s in 0..S {
                    for i in 0..d {
                        context[query + i] += probs[from + s] * cache.v[s * row + shared + i];
                    }
                }
            }
        }
        self.check(&format!("{tap}.scores"), &scores, None)?;
        self.check(&format!("{tap}.probs"), &probs, None)?;
        self.check(&format!("{tap}.context"), &context, None)?;
        self.linear(&format!("{tap}.output"), &context, &format!("{at}.self_attn.o_proj"), H * d)
    }

    fn experts(&mut self, x: &[f32], at: &str, tap: &str) -> Outcome<Vec<f32>> {
        let Config { D, E, k, F, .. } = self.config;
        let (T, moe) = (x.len() / D, format!("{at}.block_sparse_moe"));
        let logits = self.linear(&format!("{tap}.router.logits"), x, &format!("{moe}.gate"), D)?;
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for own in logits.chunks(E) {
            let mut order: Vec<usize> = (0..E).collect();
            order.sort_by(|&a, &b| own[b].total_cmp(&own[a])); // stable: of equal logits the lower id comes first
            let mut chosen: Vec<f32> = order[..k].iter().map(|&e| own[e]).collect();
            softmax(&mut chosen);
            ids.extend(order[..k].iter().map(|&e| e as i32));
            weights.extend(chosen);
        }
        let judgement = self.case.compare_experts(&self.run, &format!("{tap}.router.experts"), "float32", &ids);
        self.take(&format!("{tap}.router.experts"), judgement)?;
        let (mut gate, mut up, mut hidden) = (Vec::new(), Vec::new(), Vec::new());
        let (mut output, mut sum) = (Vec::new(), vec![0f32; T * D]);
        for (j, expert) in ids.iter().enumerate() {
            let (row, name) = (&x[j / k * D..(j / k + 1) * D], format!("{moe}.experts.{expert}"));
            let own_gate = multiply(row, &self.weight(&format!("{name}.w1"))?, D);
            let own_up = multiply(row, &self.weight(&format!("{name}.w3"))?, D);
            let own: Vec<f32> = own_gate.iter().zip(&own_up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let result = multiply(&own, &self.weight(&format!("{name}.w2"))?, F);
            for (total, value) in sum[j / k * D..].iter_mut().zip(&result) {
                *total += weights[j] * value;
            }
            gate.extend(own_gate);
            up.extend(own_up);
            hidden.extend(own);
            output.extend(result);
        }
        self.check(&format!("{tap}.router.weights"), &weights, Some(&ids))?;
        for (name, values) in [("gate", &gate), ("up", &up), ("hidden", &hidden), ("output", &output)] {
            self.check(&format!("{tap}.expert.{name}"), values, Some(&ids))?;
        }
        self.check(&format!("{tap}.moe.output"), &sum, None)?;
        Ok(sum)
    }
}

// ---- cases

fn judge(folder: &str, name: &str) -> Outcome<bool> {
    let case = Case::open(folder)?;
    let number = |name: &str| case.config.get(name).and_then(Json::number).unwrap_or(0.0);
    let size = |name: &str| number(name) as usize;
    let config = Config {
        D: size("hidden_size"), H: size("num_attention_heads"), K: size("num_key_value_heads"), d: size("head_dim"),
        E: size("num_local_experts"), k: size("num_experts_per_tok"), F: size("intermediate_size"),
        layers: size("num_hidden_layers"), window: size("sliding_window"), eps: number("rms_norm_eps") as f32,
        theta: number("rope_theta"),
    };
    let layers = config.layers;
    let mut engine = Engine { case: &case, config, run: String::new(), judged: 0, outside: 0 };
    let mut caches: HashMap<usize, Vec<Cache>> = HashMap::new();
    for run in case.runs() {
        let integer = |name: &str| run.get(name).map_or(0, Json::size);
        let tokens: Vec<usize> = run.get("tokens").map_or(&[][..], Json::list).iter().map(Json::size).collect();
        engine.run = run.get("run").map_or("", Json::text).to_string();
        let cache = caches.entry(integer("sequence")).or_insert_with(|| vec![Cache::default(); layers]);
        engine.forward(&tokens, cache, integer("past"), integer("first"))?;
    }
    let verdict = if engine.outside > 0 { "not conformant" } else { "conformant" };
    println!("{name}: {verdict}, {} values judged", engine.judged);
    Ok(engine.outside > 0)
}

fn judge_all(pack: &str) -> Outcome<bool> {
    let text = fs::read(format!("{pack}/pack.json")).map_err(|error| format!("{pack}/pack.json: {error}"))?;
    let list = Json::parse(&text).ok_or(format!("{pack}/pack.json: is not JSON"))?;
    let cases = list.get("cases").map_or(&[][..], Json::list);
    let mut wrong = 0;
    for name in cases.iter().map(Json::text) {
        wrong += judge(&format!("{pack}/cases/{name}"), name)? as usize;
    }
    println!("{} cases, {wrong} not conformant", cases.len());
    Ok(wrong > 0 || cases.is_empty())
}

fn main() {
    match judge_all(&env::args().nth(1).unwrap_or("pack".to_string())) {
        Ok(wrong) => process::exit(wrong as i32),
        Err(what) => {
            eprintln!("{what}");
            process::exit(2)
        }
    }
}
