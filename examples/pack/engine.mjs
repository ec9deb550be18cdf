// SPDX-License-Identifier: Apache-2.0
/* A small Mixtral in JavaScript and float32 that judges itself by a pack of refmoe: node engine.mjs pack

   Letters of dimensions: T new tokens, S cached ones with the new ones included, D dim, H query heads, K key/value
   heads, d head_dim, E experts, k chosen ones, F hidden_dim, V vocabulary. `Math.fround` rounds to float32.         */
import { readFile } from "node:fs/promises";
import { BROKEN, LENGTH, compare, compareExperts, readCase, weight } from "./refmoe_pack.mjs";

const f = Math.fround;

/* ---- steps */

/* x [T, in] times the transpose of a matrix [out, in] */
function linear(x, matrix, inputs) {
  const T = x.length / inputs, out = matrix.length / inputs, y = new Float32Array(T * out);
  for (let t = 0; t < T; t++) {
    for (let o = 0; o < out; o++) {
      let sum = 0;
      for (let i = 0; i < inputs; i++) sum = f(sum + f(x[t * inputs + i] * matrix[o * inputs + i]));
      y[t * out + o] = sum;
    }
  }
  return y;
}

function norm(x, gain, eps) {
  const D = gain.length, y = new Float32Array(x.length);
  for (let t = 0; t < x.length / D; t++) {
    let sum = 0;
    for (let i = 0; i < D; i++) sum = f(sum + f(x[t * D + i] * x[t * D + i]));
    const root = f(Math.sqrt(f(f(sum / D) + eps)));
    for (let i = 0; i < D; i++) y[t * D + i] = f(f(x[t * D + i] / root) * gain[i]);
  }
  return y;
}

/* element i of each head turns with element i + d/2; x: [T, heads, d]   first: the position of the first token */
function rotate(x, heads, d, theta, first) {
  const y = new Float32Array(x.length), half = d / 2;
  for (let row = 0; row < x.length / d; row++) {
    for (let i = 0; i < half; i++) {
      const angle = (first + Math.floor(row / heads)) * theta ** ((-2 * i) / d);
      const cosine = f(Math.cos(angle)), sine = f(Math.sin(angle)), at = row * d + i;
      y[at] = f(f(x[at] * cosine) - f(x[at + half] * sine));
      y[at + half] = f(f(x[at + half] * cosine) + f(x[at] * sine));
    }
  }
  return y;
}

/* in place; what is -Infinity becomes 0 */
function softmax(x) {
  const largest = x.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum = f(sum + (x[i] = f(Math.exp(f(x[i] - largest)))));
  for (let i = 0; i < x.length; i++) x[i] = f(x[i] / sum);
}

function join(a, b) {
  const whole = new Float32Array(a.length + b.length);
  whole.set(a), whole.set(b, a.length);
  return whole;
}

const add = (x, y) => x.map((value, i) => value + y[i]); // a Float32Array rounds what it keeps

/* ---- the model */

class Model {
  constructor(c, check) {
    const g = c.config;
    Object.assign(this, { c, check, D: g.hidden_size, H: g.num_attention_heads, K: g.num_key_value_heads });
    Object.assign(this, { d: g.head_dim, F: g.intermediate_size, E: g.num_local_experts, k: g.num_experts_per_tok });
    Object.assign(this, { eps: f(g.rms_norm_eps), theta: g.rope_theta, window: g.sliding_window ?? Infinity });
    this.layers = g.num_hidden_layers;
  }

  weight(module) {
    return weight(this.c, `${module}.weight`);
  }

  /* tokens: ids   cache: per layer { k, v }, [S, K, d]   past: tokens in it   first: the position of the first new one */
  forward(tokens, cache, past, first) {
    const { D, eps } = this, table = this.weight("model.embed_tokens"), T = tokens.length;
    let x = new Float32Array(T * D);
    tokens.forEach((id, t) => x.set(table.subarray(id * D, (id + 1) * D), t * D));
    this.check("embedding", x);
    for (let l = 0; l < this.layers; l++) {
      const at = `model.layers.${l}`, tap = (name, values, ids) => this.check(`layers.${l}.${name}`, values, ids);
      const normed = tap("attention_norm", norm(x, this.weight(`${at}.input_layernorm`), eps));
      x = tap("attention_residual", add(x, this.attention(normed, at, tap, cache[l], past, first)));
      const second = tap("moe_norm", norm(x, this.weight(`${at}.post_attention_layernorm`), eps));
      x = tap("residual", add(x, this.experts(second, at, tap)));
    }
    const last = this.check("final_norm", norm(x, this.weight("model.norm"), eps));
    this.check("logits", linear(last, this.weight("lm_head"), D));
  }

  attention(x, at, tap, cache, past, first) {
    const { D, H, K, d, theta } = this, T = x.length / D, S = past + T, row = K * d;
    const [q, k, v] = ["q", "k", "v"].map((name) =>
      tap(`attention.${name}`, linear(x, this.weight(`${at}.self_attn.${name}_proj`), D)));
    const qRope = tap("attention.q_rope", rotate(q, H, d, theta, first));
    const kRope = tap("attention.k_rope", rotate(k, K, d, theta, first));
    cache.k = join(cache.k.subarray(0, past * row), kRope);
    cache.v = join(cache.v.subarray(0, past * row), v);
    const scores = new Float32Array(H * T * S), probs = new Float32Array(H * T * S);
    const context = new Float32Array(T * H * d), root = f(Math.sqrt(d));
    for (let h = 0; h < H; h++) {
      for (let t = 0; t < T; t++) {
        const shared = Math.floor(h / (H / K)) * d; // consecutive query heads read one key/value head
        const score = scores.subarray((h * T + t) * S, (h * T + t + 1) * S), query = (t * H + h) * d;
        const prob = probs.subarray((h * T + t) * S, (h * T + t + 1) * S);
        for (let s = 0; s < S; s++) {
          const distance = past + t - s;
          let sum = 0;
          for (let i = 0; i < d; i++) sum = f(sum + f(qRope[query + i] * cache.k[s * row + shared + i]));
          score[s] = f(sum / root);
          prob[s] = distance >= 0 && distance < this.window ? score[s] : -Infinity;
        }
        softmax(prob);
        for (let i = 0; i < d; i++) {
          let sum = 0;
          for (let s = 0; s < S; s++) sum = f(sum + f(prob[s] * cache.v[s * row + shared + i]));
          context[query + i] = sum;
        }
      }
    }
    tap("attention.scores", scores), tap("attention.probs", probs), tap("attention.context", context);
    return tap("attention.output", linear(context, this.weight(`${at}.self_attn.o_proj`), H * d));
  }

  experts(x, at, tap) {
    const { D, E, F, k } = this, T = x.length / D, moe = `${at}.block_sparse_moe`;
    const logits = tap("router.logits", linear(x, this.weight(`${moe}.gate`), D));
    const ids = new Int32Array(T * k), weights = new Float32Array(T * k), sum = new Float32Array(T * D);
    for (let t = 0; t < T; t++) {
      const own = logits.subarray(t * E, (t + 1) * E), order = [...own.keys()].sort((a, b) => own[b] - own[a]);
      ids.set(order.slice(0, k), t * k); // a stable sort: of equal logits the lower id comes first
      weights.set(order.slice(0, k).map((e) => own[e]), t * k);
      softmax(weights.subarray(t * k, (t + 1) * k));
    }
    const [gate, up, hidden] = [0, 0, 0].map(() => new Float32Array(T * k * F)), output = new Float32Array(T * k * D);
    for (let j = 0; j < T * k; j++) {
      const t = Math.floor(j / k), row = x.subarray(t * D, (t + 1) * D);
      const [w1, w2, w3] = [1, 2, 3].map((n) => this.weight(`${moe}.experts.${ids[j]}.w${n}`));
      gate.set(linear(row, w1, D), j * F), up.set(linear(row, w3, D), j * F);
      for (let i = j * F; i < (j + 1) * F; i++) hidden[i] = f(f(gate[i] / f(1 + f(Math.exp(-gate[i])))) * up[i]);
      output.set(linear(hidden.subarray(j * F, (j + 1) * F), w2, F), j * D);
      for (let i = 0; i < D; i++) sum[t * D + i] += f(weights[j] * output[j * D + i]);
    }
    tap("router.experts", ids), tap("router.weights", weights, ids);
    tap("expert.gate", gate, ids), tap("expert.up", up, ids), tap("expert.hidden", hidden, ids);
    tap("expert.output", output, ids);
    return tap("moe.output", sum);
  }
}

/* ---- cases */

async function judge(folder) {
  const c = await readCase(folder), caches = new Map();
  let judged = 0, outside = 0, run;
  const check = (tap, values, ids) => {
    const chosen = tap.endsWith("router.experts");
    const r = chosen ? compareExperts(c, run.run, tap, "float32", values) : compare(c, run.run, tap, "float32", values, ids);
    if (r.status === LENGTH || r.status === BROKEN) throw new Error(`${run.run}/${tap}: ${r.status}, expected ${r.judged}`);
    if (r.outside && !outside) {
      console.log(`  first wrong: ${run.run}/${tap}: value ${r.index} is ${r.found}, legal are ${r.low} to ${r.high}; ` +
        `${r.outside} of ${r.judged} are wrong`);
    }
    judged += r.judged, outside += r.outside;
    return values;
  };
  const model = new Model(c, check), nothing = () => ({ k: new Float32Array(0), v: new Float32Array(0) });
  for (run of c.runs) {
    if (!caches.has(run.sequence)) caches.set(run.sequence, Array.from({ length: model.layers }, nothing));
    model.forward(run.tokens, caches.get(run.sequence), run.past, run.first);
  }
  console.log(`${c.case}: ${outside ? "not conformant" : "conformant"}, ${judged} values judged`);
  return outside;
}

async function judgeAll(pack) {
  const { cases } = JSON.parse(await readFile(`${pack}/pack.json`, "utf8"));
  let wrong = 0;
  for (const name of cases) wrong += (await judge(`${pack}/cases/${name}`)) > 0;
  console.log(`${cases.length} cases, ${wrong} not conformant`);
  return wrong || !cases.length ? 1 : 0;
}

try {
  process.exitCode = await judgeAll(process.argv[2] ?? "pack");
} catch (error) {
  console.error(error.message);
  process.exitCode = 2;
}
