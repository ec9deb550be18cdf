// SPDX-License-Identifier: Apache-2.0
/* The same as check.c, in JavaScript. */
import { readFileSync } from "node:fs";
import { compare, compareExperts, readCase } from "./refmoe_pack.mjs";

const content = (path, kind) => new kind(new Uint8Array(readFileSync(path)).buffer);
let c;
try {
  c = await readCase(process.argv[2]);
} catch (error) {
  console.log(error.message);
  process.exit(2);
}
for (const line of readFileSync(0, "utf8").trim().split("\n")) {
  const [run, tap, dtype, values, experts] = line.split(" ");
  const r = tap.includes("router.experts")
    ? compareExperts(c, run, tap, dtype, content(values, Int32Array))
    : compare(c, run, tap, dtype, content(values, Float32Array), experts === "-" ? undefined : content(experts, Int32Array));
  console.log(r.status, r.judged, r.outside, r.index, r.found, r.low, r.high);
}
