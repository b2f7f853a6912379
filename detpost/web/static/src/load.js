import { Detector } from "./detector.js";
import { readMetadata } from "./metadata.js";
import { readOnnx } from "./onnx.js";
export async function load(source, options = {}) {
    const address = typeof source === "string" || source instanceof URL ? String(source) : null;
    const bytes = await bytesOf(source);
    const file = readOnnx(bytes);
    const metadata = readMetadata(file);
    const weights = await weightsOf(file, address);
    const runtime = options.runtime ?? runtimeOf;
    const lent = source instanceof Uint8Array || source instanceof ArrayBuffer;
    const open = async (backend, notes) => {
        const made = await runtime(backend);
        const given = lent || backend === "webgpu" ? bytes.slice() : bytes;
        const session = await made.InferenceSession.create(given, {
            executionProviders: [backend],
            externalData: weights,
            logSeverityLevel: 3,
        });
        return new Detector(made, session, metadata, backend, notes);
    };
    const backend = options.backend ?? ((await hasGraphicsProcessor()) ? "webgpu" : "wasm");
    if (backend === "wasm")
        return open("wasm", []);
    try {
        const detector = await open("webgpu", []);
        await detector.rehearse();
        return detector;
    }
    catch (error) {
        if (options.backend)
            throw error;
        return open("wasm", [`WebGPU does not run this file: ${firstLine(error)}`]);
    }
}
async function bytesOf(source) {
    if (source instanceof Uint8Array)
        return source;
    if (source instanceof ArrayBuffer)
        return new Uint8Array(source);
    if (typeof source === "string" || source instanceof URL)
        return fetched(String(source));
    return new Uint8Array(await source.arrayBuffer());
}
async function fetched(address) {
    const answer = await fetch(address);
    if (!answer.ok)
        throw new Error(`${address} cannot be fetched: ${answer.status} ${answer.statusText}`.trim());
    return new Uint8Array(await answer.arrayBuffer());
}
async function weightsOf(file, address) {
    if (file.weights.length && address === null) {
        throw new Error(`its weights are in another file (${file.weights.join(", ")}): load it by its address`);
    }
    const base = new URL(address ?? ".", globalThis.location?.href ?? "file:///");
    return Promise.all(file.weights.map(async (name) => ({ path: name, data: await fetched(new URL(encodeURI(name), base).href) })));
}
async function hasGraphicsProcessor() {
    const gpu = globalThis.navigator?.gpu;
    const adapter = await gpu?.requestAdapter().catch(() => null);
    return Boolean(adapter && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter));
}
async function runtimeOf(backend) {
    return backend === "webgpu" ? import("onnxruntime-web/webgpu") : import("onnxruntime-web");
}
export function firstLine(error) {
    const text = error instanceof Error ? error.message : String(error);
    return text.trim().split("\n", 1)[0] ?? "";
}
