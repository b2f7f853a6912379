/** Detections as a COCO file. */

import { above, type Detections } from "./detector.js";

/** An image and what was found in it. */
export interface NamedDetections {
  readonly name: string;
  readonly found: Detections;
}

/** A file that COCO's tools read: images, categories, and detections as annotations with a score. */
export interface Coco {
  readonly images: readonly { id: number; file_name: string; width: number; height: number }[];
  readonly categories: readonly { id: number; name: string }[];
  readonly annotations: readonly {
    id: number;
    image_id: number;
    category_id: number;
    bbox: [x: number, y: number, width: number, height: number];
    area: number;
    iscrowd: 0;
    score: number;
  }[];
}

/**
 * Write detections as COCO has them; images and annotations are counted from 1, categories are labels.
 *
 * @param images and their detections.
 * @param names of the labels.
 * @param threshold detections with a score above it are kept.
 */
export function toCoco(images: readonly NamedDetections[], names: ReadonlyMap<number, string>, threshold = 0): Coco {
  const rows = images.flatMap(({ found }, place) =>
    above(found.detections, threshold).map((detection) => ({ detection, image: place + 1 })),
  );
  const labels = new Map([...names, ...rows.map(({ detection }) => [detection.label, detection.name] as const)]);
  return {
    images: images.map(({ name, found }, place) => ({
      id: place + 1,
      file_name: name,
      width: found.width,
      height: found.height,
    })),
    categories: [...labels].sort(([a], [b]) => a - b).map(([id, name]) => ({ id, name })),
    annotations: rows.map(({ detection, image }, place) => {
      const [x1, y1, x2, y2] = detection.box;
      const [width, height] = [Math.fround(x2 - x1), Math.fround(y2 - y1)];
      return {
        id: place + 1,
        image_id: image,
        category_id: detection.label,
        bbox: [x1, y1, width, height],
        area: width * height,
        iscrowd: 0,
        score: detection.score,
      };
    }),
  };
}
