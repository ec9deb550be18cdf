// SPDX-License-Identifier: Apache-2.0
/* Reads a pack of refmoe, and tells whether the values of an engine are legal. For Node and browsers, no dependency.

       import { compare, readCase } from "./refmoe_pack.mjs";
       const c = await readCase("pack/cases/window-1");
       const result = compare(c, "prefill", "layers.0.attention.q", "float32", q);
       if (result.status === OUTSIDE) console.log(result.index, result.found, result.low, result.high);

   In a browser fetch the four files of a case, and give their bytes to `openCase`. PACK.md defines the files.     */

export const PASS = "pass", OUTSIDE = "outside", ABSENT = "absent", LENGTH = "length", BROKEN = "broken";
/* ABSENT: the pack does not have this tap of this run.   LENGTH: the tap has another number of values, `judged` */

const MANTISSA = [
  1.0, 1.0905077326652577, 1.189207115002721, 1.2968395546510096, 1.4142135623730951, 1.5422108254079407,
  1.681792830507429, 1.8340080864093424,
];
const FILES = ["config.json", "case.json", "values.bin", "model.safetensors"];

/* A case from the bytes of its files: Uint8Array each. Throws where they are not a case of a pack. */
export function openCase(config, index, values, weights) {
  const json = (bytes) => JSON.parse(new TextDecoder().decode(bytes));
  const size = Number(view(weights).getBigUint64(0, true));
  const found = { config: json(config), ...json(index), values, weights, start: 8 + size };
  const fits = found.format === "1" && found.runs && found.config.hidden_size;
  if (!fits) throw new Error("these files are not a case of a pack in format 1");
  return { ...found, tensors: json(weights.subarray(8, found.start)) };
}

/* A case from its folder; Node only. */
export async function readCase(folder) {
  const { readFile } = await import("node:fs/promises");
  return openCase(...(await Promise.all(FILES.map((name) => readFile(`${folder}/${name}`)))));
}

function view(bytes) {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/* The values of a tensor as Float32Array, row-major. Throws where there is none of this name. */
export function weight(c, name) {
  const entry = c.tensors[name];
  if (!entry) throw new Error(`${c.case}: has no tensor ${name}`);
  const [first, end] = entry.data_offsets;
  const bytes = view(c.weights.subarray(c.start + first, c.start + end));
  const bits = new Uint32Array(bytes.byteLength / 2);
  for (let i = 0; i < bits.length; i++) bits[i] = bytes.getUint16(2 * i, true) << 16; // a bfloat16 is the upper half
  return new Float32Array(bits.buffer);
}

/* The radius of a code, and null where the value is not judged. */
function radius(code, base) {
  if (code === 0 || code === 255) return code ? null : 0;
  return MANTISSA[(code - 1) % 8] * 2 ** (base + Math.floor((code - 1) / 8));
}

function result(status, judged = 0) {
  return { status, judged, outside: 0, index: 0, found: NaN, low: NaN, high: NaN };
}

/* The entry of a tap in case.json, and the size of its values; or the result that says what is missing. */
function find(c, run, tap, dtype, width) {
  const entry = c.runs.find((each) => each.run === run)?.taps[tap];
  const place = c.dtypes.indexOf(dtype);
  if (!entry || place < 0) return { failed: result(ABSENT) };
  const size = entry.shape.reduce((a, b) => a * b, 1);
  if (!(entry.at + width * size <= c.values.length)) return { failed: result(BROKEN) };
  return { entry, place, size };
}

/* Holds the values of a tap against their intervals.

   values: numbers, row-major   experts: of a tap with slots the ids in the order of the engine's slots, T k of them; left
   out where the slots are in ascending order of ids already                                                          */
export function compare(c, run, tap, dtype, values, experts) {
  const { entry, place, size, failed } = find(c, run, tap, dtype, 7); // 4 bytes of centre and 3 codes
  if (failed) return failed;
  if (!entry.base) return result(BROKEN);
  if (values.length !== size) return result(LENGTH, size);
  const [tokens, slots = 1, width = 1] = entry.shape;
  if (experts && experts.length !== tokens * slots) return result(LENGTH, tokens * slots);
  const bytes = view(c.values), found = result(PASS);
  for (let i = 0; i < size; i++) {
    const j = experts ? placed(i, experts, slots, width) : i;
    const centre = bytes.getFloat32(entry.at + 4 * j, true);
    const r = radius(c.values[entry.at + size * (4 + place) + j], entry.base[place]);
    if (r === null) continue;
    found.judged++;
    const low = centre - r, high = centre + r;
    if (values[i] >= low && values[i] <= high) continue;
    if (!found.outside++) Object.assign(found, { status: OUTSIDE, index: i, found: values[i], low, high });
  }
  return found;
}

/* Where the interval of value i lies: its slot is the rank of the slot's expert. */
function placed(i, experts, slots, width) {
  const token = Math.floor(i / (slots * width)), slot = Math.floor(i / width) % slots;
  const ids = experts.slice(token * slots, (token + 1) * slots);
  const rank = ids.filter((id, s) => id < ids[slot] || (id === ids[slot] && s < slot)).length;
  return (token * slots + rank) * width + (i % width);
}

/* Judges the choice of experts of each token. ids: T k of them, in any order */
export function compareExperts(c, run, tap, dtype, ids) {
  const { entry, place, size, failed } = find(c, run, tap, dtype, 3);
  if (failed) return failed;
  const [tokens, E] = entry.shape, k = c.config.num_experts_per_tok;
  if (ids.length !== tokens * k) return result(LENGTH, tokens * k);
  const found = result(PASS, tokens);
  for (let t = 0; t < tokens; t++) {
    const states = c.values.subarray(entry.at + size * place + t * E, entry.at + size * place + (t + 1) * E);
    const own = [...ids.slice(t * k, (t + 1) * k)];
    const wrong = own.findIndex((id, j) => own.indexOf(id) !== j || !(id >= 0 && id < E) || !states[id]);
    const missing = states.findIndex((state, e) => state === 2 && !own.includes(e));
    if (wrong < 0 && missing < 0) continue;
    const index = t * k + Math.max(wrong, 0), expected = missing < 0 ? NaN : missing;
    if (!found.outside++) {
      Object.assign(found, { status: OUTSIDE, index, found: own[Math.max(wrong, 0)], low: expected, high: expected });
    }
  }
  return found;
}
