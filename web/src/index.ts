/** Detections of ONNX files that detpost wrote, in the browser and in Node.js. */

export { toCoco, type Coco, type NamedDetections } from "./coco.js";
export {
  above,
  Detector,
  type Backend,
  type Box,
  type Detection,
  type Detections,
  type DetectOptions,
  type Runtime,
  type Size,
} from "./detector.js";
export { decodeImage, MOST_PIXELS, type ImageSource, type PixelData } from "./images.js";
export { firstLine, load, type LoadOptions, type Source } from "./load.js";
export type { BoxFormat, DecodeSpec, Feed, Layout, Metadata, Preprocessing } from "./metadata.js";
export type { TensorLike } from "./tensors.js";
