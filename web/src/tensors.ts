/** Numbers in the element types of ONNX Runtime, half precision included. */

import type { Tensor } from "onnxruntime-web";

/** What a tensor is, as far as it is read here: those of ONNX Runtime are. */
export interface TensorLike {
  readonly type: string;
  readonly dims: readonly number[];
  readonly data: unknown;
}

/**
 * Give a tensor's elements as numbers, in its order.
 *
 * @param tensor of a real type or of booleans.
 */
export function numbersOf(tensor: TensorLike): ArrayLike<number> {
  if (tensor.type === "float16" && tensor.data instanceof Uint16Array) return Float32Array.from(tensor.data, fromHalf);
  if (tensor.type === "int64" || tensor.type === "uint64") {
    return Float64Array.from(tensor.data as ArrayLike<bigint>, Number);
  }
  return tensor.data as ArrayLike<number>;
}

/**
 * Put numbers into an array of its own that a tensor of a type holds: runtimes may take arrays away from who gave them.
 *
 * @param type of the elements, as ONNX Runtime calls it.
 * @param values its elements.
 */
export function dataOf(type: string, values: ArrayLike<number>): Tensor["data"] {
  switch (type) {
    case "float32":
      return Float32Array.from(values);
    case "float64":
      return Float64Array.from(values);
    case "uint8":
    case "bool":
      return Uint8Array.from(values);
    case "int32":
      return Int32Array.from(values);
    case "int64":
      return BigInt64Array.from(values as ArrayLike<unknown> as ArrayLike<bigint>, (value) => BigInt(value));
    case "float16": {
      const halves = Uint16Array.from(values, toHalf);
      // Where there is a type of that name, ONNX Runtime wants it.
      const Half = (globalThis as { Float16Array?: new (buffer: ArrayBufferLike) => unknown }).Float16Array;
      return (Half ? new Half(halves.buffer) : halves) as Uint16Array;
    }
    default:
      throw new Error(`an input of type ${type} cannot be filled`);
  }
}

/** Widen half precision, given as its bits. */
export function fromHalf(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

/** Round to half precision, to even where it lies between two, and give its bits. */
export function toHalf(value: number): number {
  const sign = Object.is(value, -0) || value < 0 ? 0x8000 : 0;
  const size = Math.abs(value);
  if (Number.isNaN(value)) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  // The smallest numbers are all multiples of 2**-24; others keep ten bits behind the first.
  const exponent = size < 2 ** -14 ? -14 : Math.floor(Math.log2(size));
  const steps = roundToEven(size * 2 ** (10 - exponent));
  return sign | (size < 2 ** -14 ? steps : ((exponent + 15) << 10) + (steps - 1024));
}

function roundToEven(value: number): number {
  const below = Math.floor(value);
  const rest = value - below;
  if (rest !== 0.5) return Math.round(value);
  return below % 2 ? below + 1 : below;
}
