/** Images in: whatever a browser has, as rows of bytes. */

import type { Rows } from "./resize.js";

/** Bytes of pixels, as an ImageData has them, or without the fourth of each. */
export interface PixelData {
  readonly data: Uint8Array | Uint8ClampedArray;
  readonly width: number;
  readonly height: number;
}

/** What {@link Detector.detect} takes. Transparency is left out. */
export type ImageSource = PixelData | Blob | CanvasImageSource;

/** The most pixels of an image file, unless `maxPixels` says otherwise. */
export const MOST_PIXELS = 2 ** 26;

/** An image that is open; close it when its rows have been taken. */
export interface OpenImage extends Rows {
  close(): void;
}

/**
 * Open an image.
 *
 * @param source pixels, a file, or anything that a canvas draws.
 * @param maxPixels most that a file may have; a larger one is refused before it is decoded.
 * @returns its rows.
 * @throws Error where it cannot be read, is too large or has no pixels.
 */
export async function openImage(source: ImageSource, maxPixels = MOST_PIXELS): Promise<OpenImage> {
  if (source instanceof Uint8Array) throw new Error("bytes are no image: give a Blob of them, or pixels with a size");
  if (isPixels(source)) return rowsOfPixels(source);
  if (typeof Blob !== "undefined" && source instanceof Blob) {
    const bitmap = await decodeImage(source, maxPixels);
    return rowsOfDrawn(bitmap, bitmap.width, bitmap.height, () => bitmap.close());
  }
  const drawn = source as CanvasImageSource;
  const [width, height] = sizeOf(drawn);
  return rowsOfDrawn(drawn, width, height, () => undefined);
}

/**
 * Decode an image file, upright, its bytes as they are in the file.
 *
 * @param file of a format that the browser knows.
 * @param maxPixels most that it may have.
 * @returns the bitmap.
 * @throws Error where it cannot be read or is too large.
 */
export async function decodeImage(file: Blob, maxPixels = MOST_PIXELS): Promise<ImageBitmap> {
  if (file.size === 0) throw new Error("the file is empty");
  if (typeof Image !== "undefined") await checkSize(file, maxPixels);
  try {
    // No colour profile is applied and nothing is multiplied by transparency: training pipelines do neither.
    const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
    refuseLarge(bitmap.width, bitmap.height, maxPixels);
    return bitmap;
  } catch (error) {
    if (error instanceof DOMException) throw new Error("not an image that this browser reads");
    throw error;
  }
}

/** Ask for the size in the header: an image element has it before the pixels are decoded. */
async function checkSize(file: Blob, maxPixels: number): Promise<void> {
  const address = URL.createObjectURL(file);
  const image = new Image();
  try {
    await new Promise<void>((resolve, reject) => {
      image.onload = () => resolve();
      image.onerror = () => reject(new Error("not an image that this browser reads"));
      image.src = address;
    });
    refuseLarge(image.naturalWidth, image.naturalHeight, maxPixels);
  } finally {
    image.removeAttribute("src");
    URL.revokeObjectURL(address);
  }
}

function refuseLarge(width: number, height: number, maxPixels: number): void {
  if (width * height > maxPixels) throw new Error(`${width} x ${height} pixels are more than ${maxPixels}`);
}

function isPixels(source: ImageSource): source is PixelData {
  return "data" in source && "width" in source && typeof source.data === "object";
}

function rowsOfPixels({ data, width, height }: PixelData): OpenImage {
  const channels = data.length / (width * height);
  if (channels !== 3 && channels !== 4) {
    throw new Error(`pixels must be ${width} x ${height} times 3 or 4 bytes; got ${data.length}`);
  }
  return {
    width,
    height,
    channels,
    rows: (top, bottom) => data.subarray(top * width * channels, bottom * width * channels),
    close: () => undefined,
  };
}

function rowsOfDrawn(drawn: CanvasImageSource, width: number, height: number, close: () => void): OpenImage {
  if (!width || !height) throw new Error("an image without pixels: has it been loaded?");
  return {
    width,
    height,
    channels: 4,
    rows(top, bottom) {
      const canvas = new OffscreenCanvas(width, bottom - top);
      const context = canvas.getContext("2d", { willReadFrequently: true });
      if (!context) throw new Error(`no canvas of ${width} x ${bottom - top} pixels`);
      context.imageSmoothingEnabled = false;
      context.drawImage(drawn, 0, top, width, bottom - top, 0, 0, width, bottom - top);
      return context.getImageData(0, 0, width, bottom - top).data;
    },
    close,
  };
}

/** Give width and height of what a canvas draws, in its own pixels. */
export function sizeOf(drawn: CanvasImageSource): [width: number, height: number] {
  if ("naturalWidth" in drawn) return [drawn.naturalWidth, drawn.naturalHeight];
  if ("videoWidth" in drawn) return [drawn.videoWidth, drawn.videoHeight];
  if ("displayWidth" in drawn) return [drawn.displayWidth, drawn.displayHeight];
  return [Number(drawn.width), Number(drawn.height)];
}
