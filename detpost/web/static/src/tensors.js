export function numbersOf(tensor) {
    if (tensor.type === "float16" && tensor.data instanceof Uint16Array)
        return Float32Array.from(tensor.data, fromHalf);
    if (tensor.type === "int64" || tensor.type === "uint64") {
        return Float64Array.from(tensor.data, Number);
    }
    return tensor.data;
}
export function dataOf(type, values) {
    switch (type) {
        case "float32":
            return Float32Array.from(values);
        case "float64":
            return Float64Array.from(values);
        case "uint8":
        case "bool":
            return Uint8Array.from(values);
        case "int32":
            return Int32Array.from(values);
        case "int64":
            return BigInt64Array.from(values, (value) => BigInt(value));
        case "float16": {
            const halves = Uint16Array.from(values, toHalf);
            const Half = globalThis.Float16Array;
            return (Half ? new Half(halves.buffer) : halves);
        }
        default:
            throw new Error(`an input of type ${type} cannot be filled`);
    }
}
export function fromHalf(bits) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 31)
        return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}
export function toHalf(value) {
    const sign = Object.is(value, -0) || value < 0 ? 0x8000 : 0;
    const size = Math.abs(value);
    if (Number.isNaN(value))
        return 0x7e00;
    if (size >= 65520)
        return sign | 0x7c00;
    const exponent = size < 2 ** -14 ? -14 : Math.floor(Math.log2(size));
    const steps = roundToEven(size * 2 ** (10 - exponent));
    return sign | (size < 2 ** -14 ? steps : ((exponent + 15) << 10) + (steps - 1024));
}
function roundToEven(value) {
    const below = Math.floor(value);
    const rest = value - below;
    if (rest !== 0.5)
        return Math.round(value);
    return below % 2 ? below + 1 : below;
}
