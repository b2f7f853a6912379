/**
 * The resize that detectors are trained with, bilinear and antialiased, to the bit as torchvision does it to bytes.
 *
 * Source: PyTorch, aten/src/ATen/native/cpu/UpSampleKernel.cpp: weights are 16-bit integers of as many binary places
 * as the greatest of them leaves room for; rows first, then columns, rounded to bytes in between.
 */

/** An image that gives its pixels a strip of rows at a time. */
export interface Rows {
  readonly height: number;
  readonly width: number;
  /** Bytes of a pixel: red, green and blue come first. */
  readonly channels: 3 | 4;
  /** Give the bytes of the rows from `top` on, before `bottom`. */
  rows(top: number, bottom: number): Uint8Array | Uint8ClampedArray;
}

// Pixels that are taken at a time: a large image is never in memory twice.
const STRIP_PIXELS = 2 ** 21;

interface Filter {
  readonly first: Int32Array;
  readonly count: Int32Array;
  readonly weights: Int32Array;
  /** Weights of one place. */
  readonly taps: number;
  /** Binary places. */
  readonly precision: number;
}

/**
 * Resize an image.
 *
 * @param image of any size.
 * @param height wanted.
 * @param width wanted.
 * @returns three planes of bytes: red, green, blue.
 */
export function resize(image: Rows, height: number, width: number): Uint8Array {
  const across = image.width === width ? null : filterOf(image.width, width);
  const narrow = new Uint8Array(image.height * width * 3);
  for (const { strip, top, bottom } of strips(image)) {
    for (let row = top; row < bottom; row += 1) {
      const from = (row - top) * image.width * image.channels;
      filterRow(strip, from, image.channels, across, narrow, row * width * 3, width);
    }
  }
  const down = image.height === height ? null : filterOf(image.height, height);
  const planes = new Uint8Array(3 * height * width);
  for (let row = 0; row < height; row += 1) filterColumns(narrow, row, down, planes, height, width);
  return planes;
}

/** Give an image as it is, in three planes of bytes. */
export function planesOf(image: Rows): Uint8Array {
  return resize(image, image.height, image.width);
}

function* strips(image: Rows): Iterable<{ strip: Uint8Array | Uint8ClampedArray; top: number; bottom: number }> {
  const step = Math.max(1, Math.floor(STRIP_PIXELS / image.width));
  for (let top = 0; top < image.height; top += step) {
    const bottom = Math.min(top + step, image.height);
    yield { strip: image.rows(top, bottom), top, bottom };
  }
}

function filterRow(
  source: Uint8Array | Uint8ClampedArray,
  from: number,
  channels: number,
  filter: Filter | null,
  target: Uint8Array,
  to: number,
  width: number,
): void {
  for (let place = 0; place < width; place += 1) {
    const out = to + place * 3;
    if (!filter) {
      for (let channel = 0; channel < 3; channel += 1) {
        target[out + channel] = source[from + place * channels + channel] as number;
      }
      continue;
    }
    const half = 1 << (filter.precision - 1);
    let [red, green, blue] = [half, half, half];
    let at = from + (filter.first[place] as number) * channels;
    let tap = place * filter.taps;
    for (const end = tap + (filter.count[place] as number); tap < end; tap += 1, at += channels) {
      const weight = filter.weights[tap] as number;
      red += weight * (source[at] as number);
      green += weight * (source[at + 1] as number);
      blue += weight * (source[at + 2] as number);
    }
    target[out] = byte(red >> filter.precision);
    target[out + 1] = byte(green >> filter.precision);
    target[out + 2] = byte(blue >> filter.precision);
  }
}

function filterColumns(
  source: Uint8Array,
  row: number,
  filter: Filter | null,
  planes: Uint8Array,
  height: number,
  width: number,
): void {
  const first = filter ? (filter.first[row] as number) : row;
  const count = filter ? (filter.count[row] as number) : 1;
  for (let place = 0; place < width * 3; place += 1) {
    const out = (place % 3) * height * width + row * width + Math.floor(place / 3);
    let at = first * width * 3 + place;
    if (!filter) {
      planes[out] = source[at] as number;
      continue;
    }
    let sum = 1 << (filter.precision - 1);
    for (let tap = row * filter.taps, end = tap + count; tap < end; tap += 1, at += width * 3) {
      sum += (filter.weights[tap] as number) * (source[at] as number);
    }
    planes[out] = byte(sum >> filter.precision);
  }
}

function byte(value: number): number {
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/** Make the weights of every place of a row of `output` pixels, out of `input` ones. */
function filterOf(input: number, output: number): Filter {
  const scale = input / output;
  const support = Math.max(scale, 1);
  const taps = Math.ceil(Math.fround(support)) * 2 + 1;
  const [first, count] = [new Int32Array(output), new Int32Array(output)];
  const exact = new Float64Array(output * taps);
  let greatest = 0;
  for (let place = 0; place < output; place += 1) {
    const centre = scale * (place + 0.5);
    const from = Math.max(Math.trunc(centre - support + 0.5), 0);
    const length = Math.min(Math.max(Math.min(Math.trunc(centre + support + 0.5), input) - from, 0), taps);
    let total = 0;
    for (let tap = 0; tap < length; tap += 1) {
      const distance = Math.abs((tap + from - centre + 0.5) * (scale >= 1 ? 1 / scale : 1));
      const weight = distance < 1 ? 1 - distance : 0;
      exact[place * taps + tap] = weight;
      total += weight;
    }
    for (let tap = 0; total && tap < length; tap += 1) {
      const share = (exact[place * taps + tap] as number) / total;
      exact[place * taps + tap] = share;
      greatest = Math.max(greatest, share);
    }
    first[place] = from;
    count[place] = length;
  }
  let precision = 0;
  while (precision < 22 && Math.trunc(0.5 + greatest * 2 ** (precision + 1)) < 2 ** 15) precision += 1;
  const weights = Int32Array.from(exact, (weight) => Math.trunc(0.5 + weight * 2 ** precision));
  return { first, count, weights, taps, precision };
}
