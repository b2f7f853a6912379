/** What detpost records in a file: how it decodes, what it takes and gives. */

import type { OnnxFile } from "./onnx.js";

export type BoxFormat = "xyxy" | "xywh" | "cxcywh";

/** How raw outputs are decoded. */
export interface DecodeSpec {
  readonly activation: "sigmoid" | "softmax";
  readonly selection: "flat" | "per_query";
  readonly top_k: number;
  readonly score_threshold: number | null;
  readonly background: "none" | "first" | "last";
  readonly box_format: BoxFormat;
  readonly clip: boolean;
}

/** How detections lie in the outputs. */
export interface Layout {
  readonly name: string;
  readonly sizes: string | null;
  readonly sizes_order: "hw" | "wh";
  readonly box_format: BoxFormat;
  readonly normalised: boolean;
  readonly empty_label: number;
  /** What each output holds: parts that stand side by side where there are several. */
  readonly outputs: Readonly<Record<string, readonly string[]>>;
}

/** What is done to pixels before the network. */
export interface Preprocessing {
  readonly height: number;
  readonly width: number;
  readonly scale: number;
  readonly mean: readonly [number, number, number];
  readonly std: readonly [number, number, number];
}

/** The inputs by what they are for. */
export interface Feed {
  readonly images: string;
  readonly image_sizes: string | null;
  /** Inputs that are 1 throughout. */
  readonly ones: readonly string[];
}

export interface Metadata {
  readonly spec: DecodeSpec;
  readonly class_names: Readonly<Record<string, string>>;
  readonly layout: Layout;
  readonly preprocessing: Preprocessing | null;
  /** Whether the file scales and normalises pixels itself, or with "full" resizes too. */
  readonly preprocess_inside: boolean | "scale" | "full";
  readonly feed: Feed;
}

const PREFIX = "detpost.";

/**
 * Read what detpost recorded.
 *
 * @param file what the file says of itself.
 * @returns the metadata.
 * @throws Error where detpost did not write the file.
 */
export function readMetadata(file: OnnxFile): Metadata {
  const found: Record<string, unknown> = {};
  for (const [key, value] of file.properties) {
    if (key.startsWith(PREFIX)) found[key.slice(PREFIX.length)] = parsed(value);
  }
  if (!found["spec"] || !found["layout"]) {
    throw new Error("not written by detpost, so it does not say how it is read: run `detpost attach FILE -o OUT`");
  }
  const layout = found["layout"] as Layout;
  return {
    spec: found["spec"] as DecodeSpec,
    class_names: (found["class_names"] ?? {}) as Record<string, string>,
    layout,
    preprocessing: (found["preprocessing"] ?? null) as Preprocessing | null,
    preprocess_inside: (found["preprocess_inside"] ?? false) as Metadata["preprocess_inside"],
    feed: (found["feed"] ?? { images: "images", image_sizes: layout.sizes, ones: [] }) as Feed,
  };
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
