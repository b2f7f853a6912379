/** A detector out of one file: images in, detections out. */

import type { InferenceSession, Tensor } from "onnxruntime-web";

import { openImage, type ImageSource } from "./images.js";
import { readDetections, type Box, type Size, type Slot } from "./layouts.js";
import type { Metadata, Preprocessing } from "./metadata.js";
import { planesOf, resize, type Rows } from "./resize.js";
import { dataOf, numbersOf, type TensorLike } from "./tensors.js";

export type Backend = "webgpu" | "wasm";

/** ONNX Runtime Web, as far as it is used. */
export type Runtime = Pick<typeof import("onnxruntime-web"), "InferenceSession" | "Tensor">;

/** One detection. */
export interface Detection extends Slot {
  readonly name: string;
}

/** The detections of one image, best first, whatever their score. */
export interface Detections {
  readonly detections: readonly Detection[];
  /** Of the image, in pixels. */
  readonly width: number;
  readonly height: number;
  /** Milliseconds: pixels into the network's input, and the network with its decode. */
  readonly times: { readonly prepare: number; readonly network: number };
}

export interface DetectOptions {
  /** Most pixels that an image file may have. */
  readonly maxPixels?: number;
  /** Of a tensor: (height, width) of the image that it was made of; the tensor's own by default. */
  readonly imageSize?: Size;
}

interface Input {
  readonly type: string;
  readonly shape: readonly (number | string)[];
}

/** A file that is ready to run; {@link load} makes one. */
export class Detector {
  /** The name of each label. */
  readonly names: ReadonlyMap<number, string>;
  /** What the file says of itself. */
  readonly metadata: Metadata;
  /** What runs it. */
  readonly backend: Backend;
  /** Why it does not run where it was to, in one line each. */
  readonly notes: readonly string[];
  /** The network's input, in pixels; null where the file takes images of any size, or none. */
  readonly inputSize: { readonly height: number; readonly width: number } | null;
  private readonly inputs: ReadonlyMap<string, Input>;
  private last: Promise<unknown> = Promise.resolve();

  /** @ignore */
  constructor(
    private readonly runtime: Runtime,
    private readonly session: InferenceSession,
    metadata: Metadata,
    backend: Backend,
    notes: readonly string[],
  ) {
    this.metadata = metadata;
    this.backend = backend;
    this.notes = notes;
    this.names = new Map(Object.entries(metadata.class_names).map(([label, name]) => [Number(label), name]));
    this.inputs = new Map(
      session.inputMetadata.map((input) => [
        input.name,
        input.isTensor ? { type: input.type, shape: input.shape } : { type: "no tensor", shape: [] },
      ]),
    );
    const { preprocessing } = metadata;
    this.inputSize =
      preprocessing && this.takesImages && metadata.preprocess_inside !== "full"
        ? { height: preprocessing.height, width: preprocessing.width }
        : null;
  }

  /** Whether it takes images, and not a network's raw outputs. */
  get takesImages(): boolean {
    return this.inputs.has(this.metadata.feed.images);
  }

  /**
   * Detect in one image.
   *
   * @param image pixels, a file, anything that a canvas draws; or a tensor (1, 3, H, W) as the network takes it.
   * @param options see there.
   * @returns the detections.
   * @throws Error an image that cannot be read, or a file that takes none.
   */
  async detect(image: ImageSource | TensorLike, options: DetectOptions = {}): Promise<Detections> {
    this.refuseRawOutputs();
    const started = performance.now();
    let input: { size: Size; dims: number[]; pixels: ArrayLike<number> };
    if ("dims" in image) {
      if (image.dims.length !== 4 || image.dims[0] !== 1 || image.dims[1] !== 3) {
        throw new Error(`a tensor must have shape (1, 3, H, W); got (${image.dims.join(", ")})`);
      }
      const [, , height, width] = image.dims as [number, number, number, number];
      const size = options.imageSize ?? [height, width];
      input = { size, dims: [...image.dims], pixels: numbersOf(image) };
    } else {
      const opened = await openImage(image, options.maxPixels);
      try {
        input = this.prepared(opened);
      } finally {
        opened.close();
      }
    }
    const prepared = performance.now();
    const { dims, size } = input;
    const outputs = await this.run(this.fed(dims, input.pixels, size));
    const inputSize: Size = [dims[2] as number, dims[3] as number];
    const batch = this.batch;
    const sizes = Array.from({ length: batch }, () => size);
    const [slots] = readDetections(this.metadata.layout, outputs, sizes, inputSize);
    return {
      detections: this.named(slots ?? []),
      height: size[0],
      width: size[1],
      times: { prepare: prepared - started, network: performance.now() - prepared },
    };
  }

  /**
   * Decode raw outputs: of a file that is a post-processor alone.
   *
   * @param logits (B, Q, C).
   * @param boxes (B, Q, 4).
   * @param imageSizes (height, width) of each image.
   * @returns the detections of each image.
   * @throws Error a file that takes images.
   */
  async decode(logits: TensorLike, boxes: TensorLike, imageSizes: readonly Size[]): Promise<Detection[][]> {
    if (this.takesImages) throw new Error("this file takes images: call detect");
    const feed: Record<string, Tensor> = {
      pred_logits: this.tensor("pred_logits", numbersOf(logits), logits.dims),
      pred_boxes: this.tensor("pred_boxes", numbersOf(boxes), boxes.dims),
    };
    const { sizes } = this.metadata.layout;
    if (sizes !== null) feed[sizes] = this.sizesTensor(sizes, imageSizes);
    const outputs = await this.run(feed);
    return readDetections(this.metadata.layout, outputs, imageSizes, [1, 1]).map((slots) => this.named(slots));
  }

  /**
   * Run the network on an image of zeros: a backend may take a file and fail at its first image.
   *
   * @ignore
   */
  async rehearse(): Promise<void> {
    if (!this.takesImages || !this.metadata.preprocessing) return;
    const { height, width } = this.metadata.preprocessing;
    const dims = [this.batch, 3, height, width];
    await this.run(this.fed(dims, new Uint8Array(3 * height * width), [height, width]));
  }

  /** Give back what it holds. */
  async release(): Promise<void> {
    await this.last.catch(() => undefined);
    await this.session.release();
  }

  private get batch(): number {
    const first = this.inputs.get(this.metadata.feed.images)?.shape[0];
    return typeof first === "number" && first > 0 ? first : 1;
  }

  private refuseRawOutputs(): void {
    if (!this.takesImages) {
      const names = [...this.inputs.keys()].join(", ");
      throw new Error(`this file takes no images (its inputs are ${names}): export a whole detector`);
    }
  }

  private prepared(image: Rows): { size: Size; dims: number[]; pixels: ArrayLike<number> } {
    const { preprocessing, preprocess_inside: inside } = this.metadata;
    if (!preprocessing) throw new Error("this file does not say how images become its input: attach again");
    const size: Size = [image.height, image.width];
    if (inside === "full") return { size, dims: [1, 3, ...size], pixels: planesOf(image) };
    const planes = resize(image, preprocessing.height, preprocessing.width);
    const dims = [1, 3, preprocessing.height, preprocessing.width];
    return { size, dims, pixels: inside ? planes : normalised(planes, preprocessing) };
  }

  /** Make the tensor of each input, for one image; of a file with a fixed batch, the same image throughout. */
  private fed(dims: readonly number[], pixels: ArrayLike<number>, size: Size): Record<string, Tensor> {
    const { images, image_sizes: sizes, ones } = this.metadata.feed;
    const batch = this.batch;
    const free = [batch, dims[2] as number, dims[3] as number];
    const fed: Record<string, Tensor> = {
      [images]: this.tensor(images, repeated(pixels, batch), [batch, ...dims.slice(1)]),
    };
    for (const name of ones) {
      const shape = (this.inputs.get(name)?.shape ?? []).map((length, axis) =>
        typeof length === "number" && length > 0 ? length : (free[axis] as number),
      );
      const count = shape.reduce((product, length) => product * length, 1);
      fed[name] = this.tensor(name, new Uint8Array(count).fill(1), shape);
    }
    if (sizes !== null) fed[sizes] = this.sizesTensor(sizes, Array.from({ length: batch }, () => size));
    const lacking = [...this.inputs.keys()].filter((name) => !(name in fed));
    if (lacking.length) throw new Error(`nothing is known of this file's input ${lacking.join(", ")}`);
    return fed;
  }

  private sizesTensor(name: string, sizes: readonly Size[]): Tensor {
    const widthFirst = this.metadata.layout.sizes_order === "wh";
    const values = sizes.flatMap(([height, width]) => (widthFirst ? [width, height] : [height, width]));
    return this.tensor(name, values, [sizes.length, 2]);
  }

  private tensor(name: string, values: ArrayLike<number>, dims: readonly number[]): Tensor {
    const type = this.inputs.get(name)?.type;
    if (!type) throw new Error(`this file has no input ${name}: its inputs are ${[...this.inputs.keys()].join(", ")}`);
    const Made = this.runtime.Tensor as unknown as new (...args: unknown[]) => Tensor;
    return new Made(type, dataOf(type, values), dims);
  }

  /** Run the network, after what was asked for before. */
  private run(feed: Record<string, Tensor>): Promise<InferenceSession.OnnxValueMapType> {
    const wanted = [...new Set([...Object.keys(this.metadata.layout.outputs), "queries"])];
    const names = wanted.filter((name) => this.session.outputNames.includes(name));
    const ours = this.last.catch(() => undefined).then(() => this.session.run(feed, names));
    this.last = ours;
    return ours;
  }

  private named(slots: readonly Slot[]): Detection[] {
    return slots.map((slot) => ({ ...slot, name: this.names.get(slot.label) ?? String(slot.label) }));
  }
}

/**
 * Keep the detections whose score is above a threshold.
 *
 * @param detections of one image.
 * @param threshold compared in float32, as PyTorch does.
 */
export function above<D extends { readonly score: number }>(detections: readonly D[], threshold: number): D[] {
  const least = Math.fround(threshold);
  return detections.filter(({ score }) => score > least);
}

/** Scale and normalise three planes of bytes, rounded to float32 at each step as PyTorch rounds. */
function normalised(planes: Uint8Array, { scale, mean, std }: Preprocessing): Float32Array {
  const round = Math.fround;
  const found = new Float32Array(planes.length);
  const plane = planes.length / 3;
  for (let channel = 0; channel < 3; channel += 1) {
    const [offset, deviation] = [round(mean[channel] as number), round(std[channel] as number)];
    const table = Float32Array.from({ length: 256 }, (_, value) =>
      round(round(round(value * round(scale)) - offset) / deviation),
    );
    for (let at = channel * plane; at < (channel + 1) * plane; at += 1) found[at] = table[planes[at] as number] as number;
  }
  return found;
}

function repeated(values: ArrayLike<number>, times: number): ArrayLike<number> {
  if (times === 1) return values;
  const all = new Float32Array(values.length * times);
  for (let time = 0; time < times; time += 1) all.set(values, time * values.length);
  return all;
}

export type { Box, Size };
