import { numbersOf } from "./tensors.js";
export function readDetections(layout, outputs, imageSizes, inputSize) {
    const parts = partsOf(layout, outputs);
    const boxes = parts.get("boxes");
    if (!boxes)
        throw new Error(`the layout ${layout.name} has no boxes`);
    const kept = Math.round(boxes.values.length / (boxes.columns * imageSizes.length));
    const valid = validity(layout, parts, kept);
    return imageSizes.map((size, image) => {
        const found = [];
        for (let slot = 0; slot < kept; slot += 1) {
            if (!valid(image, slot))
                continue;
            const row = image * kept + slot;
            const { score, label } = best(parts, row);
            const box = placed(layout, cornersOf(boxes, row, layout.box_format), size, inputSize);
            const query = parts.get("queries");
            found.push({ score, label, box, query: query ? at(query, row) : null });
        }
        return found;
    });
}
function partsOf(layout, outputs) {
    const found = new Map();
    const held = { ...layout.outputs, ...("queries" in outputs ? { queries: ["queries"] } : {}) };
    for (const [name, parts] of Object.entries(held)) {
        const output = outputs[name];
        if (!output)
            throw new Error(`no output ${name}, which its layout ${layout.name} names`);
        const values = numbersOf(output);
        const wide = parts.length > 1 || parts[0] === "boxes" || parts[0] === "class_logits";
        const columns = wide ? output.dims[output.dims.length - 1] : 1;
        let first = 0;
        for (const part of parts) {
            found.set(part, { values, columns, first });
            first += part === "boxes" ? 4 : 1;
        }
    }
    return found;
}
function at(part, row, column = 0) {
    return part.values[row * part.columns + part.first + column];
}
function best(parts, row) {
    const logits = parts.get("class_logits");
    if (!logits)
        return { score: at(parts.get("scores"), row), label: at(parts.get("labels"), row) };
    let label = 0;
    for (let other = 1; other < logits.columns; other += 1) {
        if (at(logits, row, other) > at(logits, row, label))
            label = other;
    }
    return { score: Math.fround(1 / (1 + Math.exp(-at(logits, row, label)))), label };
}
function validity(layout, parts, kept) {
    const [valid, count, labels] = [parts.get("valid"), parts.get("count"), parts.get("labels")];
    const boxes = parts.get("boxes");
    if (valid)
        return (image, slot) => at(valid, image * kept + slot) !== 0;
    if (count)
        return (image, slot) => slot < at(count, image);
    if (labels && layout.empty_label < 0)
        return (image, slot) => at(labels, image * kept + slot) >= 0;
    return (image, slot) => {
        const row = image * kept + slot;
        return best(parts, row).score > 0 || [0, 1, 2, 3].some((side) => at(boxes, row, side) !== 0);
    };
}
function cornersOf(boxes, row, format) {
    const round = Math.fround;
    const [a, b, c, d] = [0, 1, 2, 3].map((side) => at(boxes, row, side));
    if (format === "xyxy")
        return [a, b, c, d];
    if (format === "xywh")
        return [a, b, round(a + c), round(b + d)];
    return [round(a - c / 2), round(b - d / 2), round(a + c / 2), round(b + d / 2)];
}
function placed(layout, box, image, input) {
    if (layout.sizes !== null)
        return box;
    const round = Math.fround;
    const [height, width] = layout.normalised ? image : [round(image[0] / input[0]), round(image[1] / input[1])];
    return [round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height)];
}
