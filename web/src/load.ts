/** Files opened: fetched, read, and given to ONNX Runtime Web. */

import type { InferenceSession } from "onnxruntime-web";

import { Detector, type Backend, type Runtime } from "./detector.js";
import { readMetadata } from "./metadata.js";
import { readOnnx, type OnnxFile } from "./onnx.js";

/** The address of a file, or the file itself. */
export type Source = string | URL | Blob | ArrayBuffer | Uint8Array;

export interface LoadOptions {
  /** What runs it; by default WebGPU where there is a graphics processor for it, else WebAssembly. */
  readonly backend?: Backend;
  /** Gives ONNX Runtime Web for a backend; by default the package `onnxruntime-web`. */
  readonly runtime?: (backend: Backend) => Promise<Runtime>;
}

/**
 * Load a detector.
 *
 * @param source the address of an ONNX file that detpost wrote, or the file itself.
 * @param options see there.
 * @returns the detector.
 * @throws Error a file that cannot be fetched, that detpost did not write, or that ONNX Runtime does not take.
 */
export async function load(source: Source, options: LoadOptions = {}): Promise<Detector> {
  const address = typeof source === "string" || source instanceof URL ? String(source) : null;
  const bytes = await bytesOf(source);
  const file = readOnnx(bytes);
  const metadata = readMetadata(file);
  const weights = await weightsOf(file, address);
  const runtime = options.runtime ?? runtimeOf;
  // A runtime in a worker takes the bytes away from who gave them: the caller's own, or those for another try, are copied.
  const lent = source instanceof Uint8Array || source instanceof ArrayBuffer;
  const open = async (backend: Backend, notes: string[]): Promise<Detector> => {
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
  if (backend === "wasm") return open("wasm", []);
  try {
    const detector = await open("webgpu", []);
    await detector.rehearse();
    return detector;
  } catch (error) {
    if (options.backend) throw error;
    return open("wasm", [`WebGPU does not run this file: ${firstLine(error)}`]);
  }
}

async function bytesOf(source: Source): Promise<Uint8Array> {
  if (source instanceof Uint8Array) return source;
  if (source instanceof ArrayBuffer) return new Uint8Array(source);
  if (typeof source === "string" || source instanceof URL) return fetched(String(source));
  return new Uint8Array(await source.arrayBuffer());
}

async function fetched(address: string): Promise<Uint8Array> {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address} cannot be fetched: ${answer.status} ${answer.statusText}`.trim());
  return new Uint8Array(await answer.arrayBuffer());
}

/** Fetch the files of weights, which lie beside the model. */
async function weightsOf(file: OnnxFile, address: string | null): Promise<NonNullable<InferenceSession.SessionOptions["externalData"]>> {
  if (file.weights.length && address === null) {
    throw new Error(`its weights are in another file (${file.weights.join(", ")}): load it by its address`);
  }
  const base = new URL(address ?? ".", globalThis.location?.href ?? "file:///");
  return Promise.all(
    file.weights.map(async (name) => ({ path: name, data: await fetched(new URL(encodeURI(name), base).href) })),
  );
}

/** Tell whether there is one; one that is made of software is slower than WebAssembly. */
async function hasGraphicsProcessor(): Promise<boolean> {
  interface Adapter {
    readonly isFallbackAdapter?: boolean;
    readonly info?: { readonly isFallbackAdapter?: boolean };
  }
  const gpu = (globalThis.navigator as { gpu?: { requestAdapter(): Promise<Adapter | null> } } | undefined)?.gpu;
  const adapter = await gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter));
}

async function runtimeOf(backend: Backend): Promise<Runtime> {
  return backend === "webgpu" ? import("onnxruntime-web/webgpu") : import("onnxruntime-web");
}

/** Give an error as one line. */
export function firstLine(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  return text.trim().split("\n", 1)[0] ?? "";
}
