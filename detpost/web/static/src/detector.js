import { openImage } from "./images.js";
import { readDetections } from "./layouts.js";
import { planesOf, resize } from "./resize.js";
import { dataOf, numbersOf } from "./tensors.js";
export class Detector {
    runtime;
    session;
    names;
    metadata;
    backend;
    notes;
    inputSize;
    inputs;
    last = Promise.resolve();
    constructor(runtime, session, metadata, backend, notes) {
        this.runtime = runtime;
        this.session = session;
        this.metadata = metadata;
        this.backend = backend;
        this.notes = notes;
        this.names = new Map(Object.entries(metadata.class_names).map(([label, name]) => [Number(label), name]));
        this.inputs = new Map(session.inputMetadata.map((input) => [
            input.name,
            input.isTensor ? { type: input.type, shape: input.shape } : { type: "no tensor", shape: [] },
        ]));
        const { preprocessing } = metadata;
        this.inputSize =
            preprocessing && this.takesImages && metadata.preprocess_inside !== "full"
                ? { height: preprocessing.height, width: preprocessing.width }
                : null;
    }
    get takesImages() {
        return this.inputs.has(this.metadata.feed.images);
    }
    async detect(image, options = {}) {
        this.refuseRawOutputs();
        const started = performance.now();
        let input;
        if ("dims" in image) {
            if (image.dims.length !== 4 || image.dims[0] !== 1 || image.dims[1] !== 3) {
                throw new Error(`a tensor must have shape (1, 3, H, W); got (${image.dims.join(", ")})`);
            }
            const [, , height, width] = image.dims;
            const size = options.imageSize ?? [height, width];
            input = { size, dims: [...image.dims], pixels: numbersOf(image) };
        }
        else {
            const opened = await openImage(image, options.maxPixels);
            try {
                input = this.prepared(opened);
            }
            finally {
                opened.close();
            }
        }
        const prepared = performance.now();
        const { dims, size } = input;
        const outputs = await this.run(this.fed(dims, input.pixels, size));
        const inputSize = [dims[2], dims[3]];
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
    async decode(logits, boxes, imageSizes) {
        if (this.takesImages)
            throw new Error("this file takes images: call detect");
        const feed = {
            pred_logits: this.tensor("pred_logits", numbersOf(logits), logits.dims),
            pred_boxes: this.tensor("pred_boxes", numbersOf(boxes), boxes.dims),
        };
        const { sizes } = this.metadata.layout;
        if (sizes !== null)
            feed[sizes] = this.sizesTensor(sizes, imageSizes);
        const outputs = await this.run(feed);
        return readDetections(this.metadata.layout, outputs, imageSizes, [1, 1]).map((slots) => this.named(slots));
    }
    async rehearse() {
        if (!this.takesImages || !this.metadata.preprocessing)
            return;
        const { height, width } = this.metadata.preprocessing;
        const dims = [this.batch, 3, height, width];
        await this.run(this.fed(dims, new Uint8Array(3 * height * width), [height, width]));
    }
    async release() {
        await this.last.catch(() => undefined);
        await this.session.release();
    }
    get batch() {
        const first = this.inputs.get(this.metadata.feed.images)?.shape[0];
        return typeof first === "number" && first > 0 ? first : 1;
    }
    refuseRawOutputs() {
        if (!this.takesImages) {
            const names = [...this.inputs.keys()].join(", ");
            throw new Error(`this file takes no images (its inputs are ${names}): export a whole detector`);
        }
    }
    prepared(image) {
        const { preprocessing, preprocess_inside: inside } = this.metadata;
        if (!preprocessing)
            throw new Error("this file does not say how images become its input: attach again");
        const size = [image.height, image.width];
        if (inside === "full")
            return { size, dims: [1, 3, ...size], pixels: planesOf(image) };
        const planes = resize(image, preprocessing.height, preprocessing.width);
        const dims = [1, 3, preprocessing.height, preprocessing.width];
        return { size, dims, pixels: inside ? planes : normalised(planes, preprocessing) };
    }
    fed(dims, pixels, size) {
        const { images, image_sizes: sizes, ones } = this.metadata.feed;
        const batch = this.batch;
        const free = [batch, dims[2], dims[3]];
        const fed = {
            [images]: this.tensor(images, repeated(pixels, batch), [batch, ...dims.slice(1)]),
        };
        for (const name of ones) {
            const shape = (this.inputs.get(name)?.shape ?? []).map((length, axis) => typeof length === "number" && length > 0 ? length : free[axis]);
            const count = shape.reduce((product, length) => product * length, 1);
            fed[name] = this.tensor(name, new Uint8Array(count).fill(1), shape);
        }
        if (sizes !== null)
            fed[sizes] = this.sizesTensor(sizes, Array.from({ length: batch }, () => size));
        const lacking = [...this.inputs.keys()].filter((name) => !(name in fed));
        if (lacking.length)
            throw new Error(`nothing is known of this file's input ${lacking.join(", ")}`);
        return fed;
    }
    sizesTensor(name, sizes) {
        const widthFirst = this.metadata.layout.sizes_order === "wh";
        const values = sizes.flatMap(([height, width]) => (widthFirst ? [width, height] : [height, width]));
        return this.tensor(name, values, [sizes.length, 2]);
    }
    tensor(name, values, dims) {
        const type = this.inputs.get(name)?.type;
        if (!type)
            throw new Error(`this file has no input ${name}: its inputs are ${[...this.inputs.keys()].join(", ")}`);
        const Made = this.runtime.Tensor;
        return new Made(type, dataOf(type, values), dims);
    }
    run(feed) {
        const wanted = [...new Set([...Object.keys(this.metadata.layout.outputs), "queries"])];
        const names = wanted.filter((name) => this.session.outputNames.includes(name));
        const ours = this.last.catch(() => undefined).then(() => this.session.run(feed, names));
        this.last = ours;
        return ours;
    }
    named(slots) {
        return slots.map((slot) => ({ ...slot, name: this.names.get(slot.label) ?? String(slot.label) }));
    }
}
export function above(detections, threshold) {
    const least = Math.fround(threshold);
    return detections.filter(({ score }) => score > least);
}
function normalised(planes, { scale, mean, std }) {
    const round = Math.fround;
    const found = new Float32Array(planes.length);
    const plane = planes.length / 3;
    for (let channel = 0; channel < 3; channel += 1) {
        const [offset, deviation] = [round(mean[channel]), round(std[channel])];
        const table = Float32Array.from({ length: 256 }, (_, value) => round(round(round(value * round(scale)) - offset) / deviation));
        for (let at = channel * plane; at < (channel + 1) * plane; at += 1)
            found[at] = table[planes[at]];
    }
    return found;
}
function repeated(values, times) {
    if (times === 1)
        return values;
    const all = new Float32Array(values.length * times);
    for (let time = 0; time < times; time += 1)
        all.set(values, time * values.length);
    return all;
}
