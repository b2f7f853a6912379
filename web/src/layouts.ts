/** Detections read out of a file's outputs, as its layout says. */

import type { BoxFormat, Layout } from "./metadata.js";
import { numbersOf, type TensorLike } from "./tensors.js";

export type Box = readonly [x1: number, y1: number, x2: number, y2: number];

/** One slot of a file's outputs. */
export interface Slot {
  readonly score: number;
  readonly label: number;
  /** In pixels of the image. */
  readonly box: Box;
  /** Which of the network's queries it is; null where the file does not say. */
  readonly query: number | null;
}

/** Height and width, in pixels. */
export type Size = readonly [height: number, width: number];

interface Part {
  readonly values: ArrayLike<number>;
  /** Of the output that it stands in. */
  readonly columns: number;
  readonly first: number;
}

/**
 * Read the detections of a batch.
 *
 * @param layout of the file.
 * @param outputs of one run, by name.
 * @param imageSizes of each image.
 * @param inputSize of the network's input, in whose pixels boxes are where the file takes no sizes.
 * @returns for each image what is valid, best first.
 */
export function readDetections(
  layout: Layout,
  outputs: Readonly<Record<string, TensorLike>>,
  imageSizes: readonly Size[],
  inputSize: Size,
): Slot[][] {
  const parts = partsOf(layout, outputs);
  const boxes = parts.get("boxes");
  if (!boxes) throw new Error(`the layout ${layout.name} has no boxes`);
  const kept = Math.round(boxes.values.length / (boxes.columns * imageSizes.length));
  const valid = validity(layout, parts, kept);
  return imageSizes.map((size, image) => {
    const found: Slot[] = [];
    for (let slot = 0; slot < kept; slot += 1) {
      if (!valid(image, slot)) continue;
      const row = image * kept + slot;
      const { score, label } = best(parts, row);
      const box = placed(layout, cornersOf(boxes, row, layout.box_format), size, inputSize);
      const query = parts.get("queries");
      found.push({ score, label, box, query: query ? at(query, row) : null });
    }
    return found;
  });
}

function partsOf(layout: Layout, outputs: Readonly<Record<string, TensorLike>>): Map<string, Part> {
  const found = new Map<string, Part>();
  const held = { ...layout.outputs, ...("queries" in outputs ? { queries: ["queries"] } : {}) };
  for (const [name, parts] of Object.entries(held)) {
    const output = outputs[name];
    if (!output) throw new Error(`no output ${name}, which its layout ${layout.name} names`);
    const values = numbersOf(output);
    const wide = parts.length > 1 || parts[0] === "boxes" || parts[0] === "class_logits";
    const columns = wide ? (output.dims[output.dims.length - 1] as number) : 1;
    let first = 0;
    for (const part of parts) {
      found.set(part, { values, columns, first });
      first += part === "boxes" ? 4 : 1;
    }
  }
  return found;
}

function at(part: Part, row: number, column = 0): number {
  return part.values[row * part.columns + part.first + column] as number;
}

function best(parts: ReadonlyMap<string, Part>, row: number): { score: number; label: number } {
  const logits = parts.get("class_logits");
  if (!logits) return { score: at(parts.get("scores") as Part, row), label: at(parts.get("labels") as Part, row) };
  let label = 0;
  for (let other = 1; other < logits.columns; other += 1) {
    if (at(logits, row, other) > at(logits, row, label)) label = other;
  }
  return { score: Math.fround(1 / (1 + Math.exp(-at(logits, row, label)))), label };
}

function validity(
  layout: Layout,
  parts: ReadonlyMap<string, Part>,
  kept: number,
): (image: number, slot: number) => boolean {
  const [valid, count, labels] = [parts.get("valid"), parts.get("count"), parts.get("labels")];
  const boxes = parts.get("boxes") as Part;
  if (valid) return (image, slot) => at(valid, image * kept + slot) !== 0;
  if (count) return (image, slot) => slot < at(count, image);
  if (labels && layout.empty_label < 0) return (image, slot) => at(labels, image * kept + slot) >= 0;
  return (image, slot) => {
    const row = image * kept + slot;
    return best(parts, row).score > 0 || [0, 1, 2, 3].some((side) => at(boxes, row, side) !== 0);
  };
}

/** Give a box's corners, rounded to float32 as PyTorch rounds them. */
function cornersOf(boxes: Part, row: number, format: BoxFormat): Box {
  const round = Math.fround;
  const [a, b, c, d] = [0, 1, 2, 3].map((side) => at(boxes, row, side)) as [number, number, number, number];
  if (format === "xyxy") return [a, b, c, d];
  if (format === "xywh") return [a, b, round(a + c), round(b + d)];
  return [round(a - c / 2), round(b - d / 2), round(a + c / 2), round(b + d / 2)];
}

/** Bring a box into pixels of the image. */
function placed(layout: Layout, box: Box, image: Size, input: Size): Box {
  if (layout.sizes !== null) return box;
  const round = Math.fround;
  const [height, width] = layout.normalised ? image : [round(image[0] / input[0]), round(image[1] / input[1])];
  return [round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height)];
}
