import { above } from "./detector.js";
export function toCoco(images, names, threshold = 0) {
    const rows = images.flatMap(({ found }, place) => above(found.detections, threshold).map((detection) => ({ detection, image: place + 1 })));
    const labels = new Map([...names, ...rows.map(({ detection }) => [detection.label, detection.name])]);
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
