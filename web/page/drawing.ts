/** An image and its boxes on a canvas. */

import type { Detection, Detections } from "../src/index.js";

interface Size {
  readonly width: number;
  readonly height: number;
}

/** Give a class its colour: neighbouring labels lie far apart, and white is readable on each. */
export function colourOf(label: number): string {
  return `oklch(52% 0.17 ${(label * 137.508 + 265) % 360})`;
}

/** Give the size, in pixels of the page, in which an image fits. */
export function fitted(image: Size, width: number, height: number): Size {
  const factor = Math.min(width / image.width, height / image.height);
  return { width: Math.max(1, Math.floor(image.width * factor)), height: Math.max(1, Math.floor(image.height * factor)) };
}

/**
 * Draw an image with its detections.
 *
 * @param canvas gets the size, in the screen's own pixels.
 * @param picture the image, in any resolution.
 * @param image its true size, in whose pixels boxes are.
 * @param found what to draw.
 * @param marked what of it stands out.
 * @param size in pixels of the page.
 */
export function draw(
  canvas: HTMLCanvasElement,
  picture: ImageBitmap,
  image: Detections,
  found: readonly Detection[],
  marked: Detection | null,
  size: Size,
): void {
  const density = window.devicePixelRatio || 1;
  canvas.width = Math.round(size.width * density);
  canvas.height = Math.round(size.height * density);
  canvas.style.width = `${size.width}px`;
  canvas.style.height = `${size.height}px`;
  const context = canvas.getContext("2d");
  if (!context) return;
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  context.scale(density, density);
  const [across, down] = [size.width / image.width, size.height / image.height];
  // The best is drawn last, and what stands out after it.
  const order = [...found].reverse().sort((a, b) => Number(a === marked) - Number(b === marked));
  for (const detection of order) {
    const [x1, y1, x2, y2] = detection.box;
    const corners = [x1 * across, y1 * down, x2 * across, y2 * down] as const;
    drawBox(context, corners, colourOf(detection.label), detection === marked);
  }
  for (const detection of order) {
    const caption = `${detection.name} ${detection.score.toFixed(2)}`;
    drawCaption(context, detection.box[0] * across, detection.box[1] * down, caption, colourOf(detection.label), size);
  }
}

function drawBox(
  context: CanvasRenderingContext2D,
  [x1, y1, x2, y2]: readonly [number, number, number, number],
  colour: string,
  marked: boolean,
): void {
  const width = marked ? 5 : 2.5;
  context.lineJoin = "round";
  for (const [style, extra] of [["rgb(255 255 255 / 85%)", 2], [colour, 0]] as const) {
    context.strokeStyle = style;
    context.lineWidth = width + extra;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
  }
}

function drawCaption(
  context: CanvasRenderingContext2D,
  left: number,
  top: number,
  caption: string,
  colour: string,
  size: Size,
): void {
  const [height, padding] = [20, 5];
  context.font = "600 13px system-ui, sans-serif";
  context.textBaseline = "middle";
  const width = context.measureText(caption).width + 2 * padding;
  // Within the picture: above the box where there is room, else inside of it.
  const x = Math.min(Math.max(0, left - 1), Math.max(0, size.width - width));
  const y = Math.min(Math.max(0, top < height ? top : top - height), Math.max(0, size.height - height));
  context.fillStyle = colour;
  context.fillRect(x, y, width, height);
  context.fillStyle = "white";
  context.fillText(caption, x + padding, y + height / 2 + 1);
}
