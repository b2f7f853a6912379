/** What an ONNX file says of itself, read from its bytes: ONNX Runtime Web does not give metadata away. */

const GRAPH = 7;
const METADATA = 14;
const INITIALIZER = 5;
const EXTERNAL_DATA = 13;
const VARINT = 0;
const FIXED64 = 1;
const BYTES = 2;
const FIXED32 = 5;

export interface OnnxFile {
  /** The metadata properties. */
  readonly properties: ReadonlyMap<string, string>;
  /** Names of the files that hold weights, relative to this one. */
  readonly weights: readonly string[];
}

interface Field {
  readonly number: number;
  readonly wire: number;
  /** Where the content lies, of fields that are bytes. */
  readonly start: number;
  readonly end: number;
}

/**
 * Read a model's metadata properties and the names of its files of weights.
 *
 * @param bytes the file.
 * @returns what it says.
 * @throws Error where the bytes are no ONNX file, or end too early.
 */
export function readOnnx(bytes: Uint8Array): OnnxFile {
  const properties = new Map<string, string>();
  const weights = new Set<string>();
  let graphs = 0;
  for (const field of fields(bytes, 0, bytes.length)) {
    if (field.wire === BYTES && field.number === METADATA) {
      const [key, value] = entry(bytes, field);
      properties.set(key, value);
    } else if (field.wire === BYTES && field.number === GRAPH) {
      graphs += 1;
      for (const name of weightsOf(bytes, field)) weights.add(name);
    }
  }
  if (graphs !== 1) throw notOnnx();
  return { properties, weights: [...weights] };
}

function* weightsOf(bytes: Uint8Array, graph: Field): Iterable<string> {
  for (const tensor of fields(bytes, graph.start, graph.end)) {
    if (tensor.number !== INITIALIZER || tensor.wire !== BYTES) continue;
    for (const field of fields(bytes, tensor.start, tensor.end)) {
      if (field.number !== EXTERNAL_DATA || field.wire !== BYTES) continue;
      const [key, value] = entry(bytes, field);
      if (key === "location") yield value;
    }
  }
}

/** Read a key and its value, fields 1 and 2. */
function entry(bytes: Uint8Array, field: Field): [string, string] {
  const found: [string, string] = ["", ""];
  for (const part of fields(bytes, field.start, field.end)) {
    if (part.wire === BYTES && (part.number === 1 || part.number === 2)) {
      found[part.number - 1] = new TextDecoder().decode(bytes.subarray(part.start, part.end));
    }
  }
  return found;
}

/** Go through the fields of a message; what is inside of them is not looked at. */
function* fields(bytes: Uint8Array, from: number, end: number): Iterable<Field> {
  let at = from;
  const varint = (): number => {
    let value = 0;
    for (let scale = 1; at < end; scale *= 128) {
      const byte = bytes[at++] as number;
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
    throw notOnnx();
  };
  while (at < end) {
    const tag = varint();
    const [number, wire] = [Math.floor(tag / 8), tag % 8];
    let start = at;
    if (wire === VARINT) varint();
    else if (wire === FIXED64) at += 8;
    else if (wire === FIXED32) at += 4;
    else if (wire === BYTES) {
      const length = varint();
      start = at;
      at += length;
    } else throw notOnnx();
    if (number === 0 || at > end) throw notOnnx();
    yield { number, wire, start, end: at };
  }
}

function notOnnx(): Error {
  return new Error("not an ONNX file, or not all of one");
}
