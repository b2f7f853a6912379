import assert from "node:assert";
import test from "node:test";

import * as api from "../dist/index.js";
import * as resize from "../dist/resize.js";
import * as tensors from "../dist/tensors.js";
import { cases } from "./cases.mjs";

const base = process.env.DETPOST_FILES;
if (!base) {
  test("the cases", { skip: "no DETPOST_FILES: `make web-test` serves them" }, () => undefined);
} else {
  const all = await cases({ ...api, ...resize, ...tensors }, base);
  assert(all.length > 20);
  for (const [name, run] of all) test(name, run);
}
