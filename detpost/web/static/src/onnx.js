const GRAPH = 7;
const METADATA = 14;
const INITIALIZER = 5;
const EXTERNAL_DATA = 13;
const VARINT = 0;
const FIXED64 = 1;
const BYTES = 2;
const FIXED32 = 5;
export function readOnnx(bytes) {
    const properties = new Map();
    const weights = new Set();
    let graphs = 0;
    for (const field of fields(bytes, 0, bytes.length)) {
        if (field.wire === BYTES && field.number === METADATA) {
            const [key, value] = entry(bytes, field);
            properties.set(key, value);
        }
        else if (field.wire === BYTES && field.number === GRAPH) {
            graphs += 1;
            for (const name of weightsOf(bytes, field))
                weights.add(name);
        }
    }
    if (graphs !== 1)
        throw notOnnx();
    return { properties, weights: [...weights] };
}
function* weightsOf(bytes, graph) {
    for (const tensor of fields(bytes, graph.start, graph.end)) {
        if (tensor.number !== INITIALIZER || tensor.wire !== BYTES)
            continue;
        for (const field of fields(bytes, tensor.start, tensor.end)) {
            if (field.number !== EXTERNAL_DATA || field.wire !== BYTES)
                continue;
            const [key, value] = entry(bytes, field);
            if (key === "location")
                yield value;
        }
    }
}
function entry(bytes, field) {
    const found = ["", ""];
    for (const part of fields(bytes, field.start, field.end)) {
        if (part.wire === BYTES && (part.number === 1 || part.number === 2)) {
            found[part.number - 1] = new TextDecoder().decode(bytes.subarray(part.start, part.end));
        }
    }
    return found;
}
function* fields(bytes, from, end) {
    let at = from;
    const varint = () => {
        let value = 0;
        for (let scale = 1; at < end; scale *= 128) {
            const byte = bytes[at++];
            value += (byte & 127) * scale;
            if (byte < 128)
                return value;
        }
        throw notOnnx();
    };
    while (at < end) {
        const tag = varint();
        const [number, wire] = [Math.floor(tag / 8), tag % 8];
        let start = at;
        if (wire === VARINT)
            varint();
        else if (wire === FIXED64)
            at += 8;
        else if (wire === FIXED32)
            at += 4;
        else if (wire === BYTES) {
            const length = varint();
            start = at;
            at += length;
        }
        else
            throw notOnnx();
        if (number === 0 || at > end)
            throw notOnnx();
        yield { number, wire, start, end: at };
    }
}
function notOnnx() {
    return new Error("not an ONNX file, or not all of one");
}
