// What the package promises, as cases that run in Node.js and in a browser alike: against the files that
// tests/web/package_files.py wrote, with Python's answers beside them.

function same(found, expected, what) {
  if (JSON.stringify(found) !== JSON.stringify(expected)) {
    throw new Error(`${what}: got ${JSON.stringify(found).slice(0, 300)}, not ${JSON.stringify(expected).slice(0, 300)}`);
  }
}

function near(found, expected, allowed, what) {
  const gap = Math.max(...found.map((value, place) => Math.abs(value - expected[place])));
  if (found.length !== expected.length || !(gap <= allowed)) {
    throw new Error(`${what}: got ${found}, not ${expected} within ${allowed}`);
  }
}

async function refused(pattern, action) {
  try {
    await action();
  } catch (error) {
    if (pattern.test(error.message) && !error.message.includes("\n")) return;
    throw new Error(`the wrong error: ${error.message}`);
  }
  throw new Error(`no error like ${pattern}`);
}

/** Do a thing in a browser with this adapter for WebGPU. */
async function withAdapter(adapter, action) {
  const holder = (globalThis.navigator ??= {});
  Object.defineProperty(holder, "gpu", { value: { requestAdapter: async () => adapter }, configurable: true });
  try {
    await action();
  } finally {
    delete holder.gpu;
  }
}

/**
 * Give the cases.
 *
 * @param api the package.
 * @param base address of the folder with the files.
 * @param runtime gives ONNX Runtime Web; by default that of the package.
 */
export async function cases(api, base, runtime) {
  const bytes = async (name) => new Uint8Array(await (await fetch(new URL(name, base))).arrayBuffer());
  const floats = async (name) => new Float32Array((await bytes(name)).buffer);
  const known = await (await fetch(new URL("expected.json", base))).json();
  const load = (source, options = {}) => api.load(source, { backend: "wasm", ...(runtime ? { runtime } : {}), ...options });
  const opened = (name) => load(new URL(name, base));
  const picture = async () => ({ data: await bytes("image.bin"), width: known.width, height: known.height });

  const found = known.detectors.map(({ file, detections }) => [
    `${file} gives Python's detections`,
    async () => {
      const detector = await opened(file);
      const result = await detector.detect(await picture());
      const kept = api.above(result.detections, known.threshold);
      same(kept.map(({ label }) => label), detections.map(({ label }) => label), "labels");
      same(kept.map(({ name }) => name), detections.map(({ name }) => name), "names");
      near(kept.map(({ score }) => score), detections.map(({ score }) => score), 1e-4, "scores");
      near(kept.flatMap(({ box }) => box), detections.flatMap(({ box }) => box), 0.05, "boxes");
      same([result.width, result.height], [known.width, known.height], "size");
      await detector.release();
    },
  ]);

  const decoded = known.decodes.map(({ file, detections }) => [
    `${file} decodes raw outputs as Python does`,
    async () => {
      const detector = await opened(file);
      const [logits, boxes] = [await floats("logits.bin"), await floats("boxes.bin")];
      const results = await detector.decode(
        { type: "float32", dims: known.logits, data: logits },
        { type: "float32", dims: known.boxes, data: boxes },
        known.sizes,
      );
      detections.forEach((rows, image) => {
        const slots = results[image];
        same(slots.map(({ label }) => label), rows.map(({ label }) => label), `labels of image ${image}`);
        same(slots.map(({ query }) => query), rows.map(({ query }) => query), `queries of image ${image}`);
        near(slots.map(({ score }) => score), rows.map(({ score }) => score), 1e-6, `scores of image ${image}`);
        near(slots.flatMap(({ box }) => box), rows.flatMap(({ box }) => box), 1e-3, `boxes of image ${image}`);
      });
      same(logits.length > 0, true, "the caller's array is still there");
      await detector.release();
    },
  ]);

  return [
    ...found,
    ...decoded,
    ...known.resizes.map(({ source, height, width, to, file, result }) => [
      `${width} x ${height} pixels become ${to[1]} x ${to[0]} as torchvision makes them`,
      async () => {
        const image = { height, width, channels: 3, rows: null };
        const data = await bytes(source);
        image.rows = (top, bottom) => data.subarray(top * width * 3, bottom * width * 3);
        const planes = api.resize(image, ...to);
        const expected = await bytes(result);
        const wrong = planes.reduce((count, value, place) => count + (value !== expected[place]), 0);
        same([planes.length, wrong], [expected.length, 0], file ?? "bytes that differ");
      },
    ]),
    [
      "half precision is read and rounded as NumPy does",
      async () => {
        const halves = await floats("halves.bin");
        const widened = halves.filter((value, bits) => !Object.is(api.fromHalf(bits), value) && !Number.isNaN(value));
        same(widened.length, 0, "numbers read otherwise");
        const [values, bits] = [await floats("floats.bin"), new Uint16Array((await bytes("rounded.bin")).buffer)];
        const other = values.filter((value, place) => api.toHalf(value) !== bits[place]);
        same([...other], [], "numbers rounded otherwise");
      },
    ],
    [
      "a tensor is taken as the network's own input",
      async () => {
        const detector = await opened("tiny.onnx");
        const { height, width } = detector.inputSize;
        const data = await floats("input.bin");
        const image = await detector.detect(await picture());
        const tensor = await detector.detect(
          { type: "float32", dims: [1, 3, height, width], data },
          { imageSize: [known.height, known.width] },
        );
        same(tensor.detections, image.detections, "detections");
        await refused(/must have shape \(1, 3, H, W\); got \(3, 4\)/, () =>
          detector.detect({ type: "float32", dims: [3, 4], data: new Float32Array(12) }),
        );
        await refused(/pixels must be 5 x 5 times 3 or 4 bytes; got 7/, () =>
          detector.detect({ data: new Uint8Array(7), width: 5, height: 5 }),
        );
        await refused(/takes images: call detect/, () => detector.decode(data, data, []));
        await detector.release();
      },
    ],
    [
      "a fourth byte of each pixel changes nothing, and many images at once stay apart",
      async () => {
        const detector = await opened("tiny.onnx");
        const image = await picture();
        const wide = new Uint8Array((image.data.length / 3) * 4).map((_, at) =>
          at % 4 === 3 ? 77 : image.data[Math.floor(at / 4) * 3 + (at % 4)],
        );
        const black = { ...image, data: new Uint8Array(image.data.length) };
        const results = await Promise.all([image, black, { ...image, data: wide }].map((each) => detector.detect(each)));
        same(results[2].detections, results[0].detections, "with a fourth byte");
        same(api.above(results[1].detections, known.threshold), [], "of a black image");
        await detector.release();
      },
    ],
    [
      "a file says what it is",
      async () => {
        const detector = await opened("tiny.onnx");
        same([...detector.names], known.names, "names");
        same(detector.inputSize, { height: 128, width: 128 }, "size");
        same([detector.takesImages, detector.backend, detector.metadata.spec.top_k], [true, "wasm", 30], "kind");
        await detector.release();
        const own = await bytes("tiny.onnx");
        await (await load(own)).release();
        same(own.length > 0, true, "the caller's bytes are still there");
        const post = await opened(known.decodes[0].file);
        same([post.takesImages, post.inputSize], [false, null], "a post-processor");
        await refused(/takes no images \(its inputs are pred_logits, pred_boxes, image_sizes\)/, async () =>
          post.detect(await picture()),
        );
        await post.release();
      },
    ],
    [
      "weights in a file beside the model are fetched",
      async () => {
        const detector = await opened("outside.onnx");
        const result = await detector.detect(await picture());
        same(api.above(result.detections, known.threshold).length, known.detectors[0].detections.length, "detections");
        await detector.release();
        await refused(/its weights are in another file \(outside.onnx.data\)/, async () =>
          load(await bytes("outside.onnx")),
        );
      },
    ],
    [
      "a file that fails on WebGPU at its first image runs in WebAssembly",
      async () => {
        const asked = [];
        const failing = async (backend) => {
          asked.push(backend);
          const real = runtime ? await runtime("wasm") : await import("onnxruntime-web");
          if (backend === "wasm") return real;
          const create = async (...given) => {
            const session = await real.InferenceSession.create(given[0], { executionProviders: ["wasm"] });
            const { inputMetadata, outputNames } = session;
            return { inputMetadata, outputNames, run: () => Promise.reject(new Error("no kernel\nof that kind")) };
          };
          return { Tensor: real.Tensor, InferenceSession: { create } };
        };
        await withAdapter({ info: {} }, async () => {
          const detector = await api.load(new URL("tiny.onnx", base), { runtime: failing });
          same([asked, detector.backend], [["webgpu", "wasm"], "wasm"], "backends");
          same(detector.notes, ["WebGPU does not run this file: no kernel"], "notes");
          same((await detector.detect(await picture())).detections.length > 0, true, "detections");
          await detector.release();
          await refused(/no kernel/, () =>
            api.load(new URL("tiny.onnx", base), { runtime: failing, backend: "webgpu" }).catch((error) => {
              throw new Error(error.message.split("\n")[0]);
            }),
          );
        });
        asked.length = 0;
        for (const adapter of [null, { info: { isFallbackAdapter: true } }]) {
          await withAdapter(adapter, async () => {
            await (await api.load(new URL("tiny.onnx", base), { runtime: failing })).release();
          });
        }
        same(asked, ["wasm", "wasm"], "without a graphics processor");
      },
    ],
    [
      "what cannot be loaded is said in one line",
      async () => {
        await refused(/not written by detpost.*detpost attach/, () => opened("plain.onnx"));
        await refused(/not an ONNX file/, () => opened("image.bin"));
        await refused(/not an ONNX file/, () => load(new Uint8Array(0)));
        const whole = await bytes("tiny.onnx");
        for (const share of [0.999, 0.5, 0.001]) {
          await refused(/not an ONNX file, or not all of one/, () => load(whole.slice(0, whole.length * share)));
        }
        await refused(/nothing.onnx cannot be fetched: 404/, () => opened("nothing.onnx"));
      },
    ],
    [
      "COCO's file has images, categories and annotations",
      async () => {
        const detection = (label, score) => ({ label, score, name: `n${label}`, box: [1, 2, 4, 8], query: 0 });
        const seen = { detections: [detection(3, 0.9), detection(1, 0.5)], width: 10, height: 20, times: null };
        const coco = api.toCoco([{ name: "a.png", found: seen }], new Map([[1, "n1"]]), 0.5);
        same(coco.images, [{ id: 1, file_name: "a.png", width: 10, height: 20 }], "images");
        same(coco.categories, [{ id: 1, name: "n1" }, { id: 3, name: "n3" }], "categories");
        const annotation = { id: 1, image_id: 1, category_id: 3, bbox: [1, 2, 3, 6], area: 18, iscrowd: 0, score: 0.9 };
        same(coco.annotations, [annotation], "annotations");
      },
    ],
  ];
}
