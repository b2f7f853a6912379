/** The page: images in, by any way that a browser has; boxes, a list and a COCO file out. */

import {
  above,
  decodeImage,
  firstLine,
  load,
  toCoco,
  type Backend,
  type Detection,
  type Detections,
  type Detector,
  type Runtime,
} from "../src/index.js";
import { colourOf, draw, fitted } from "./drawing.js";

/** What `detpost web` wrote beside the page. */
interface Site {
  readonly model: string;
  readonly examples: readonly string[];
}

interface Item {
  readonly name: string;
  /** The file, to detect in it again; null for a frame of the camera. */
  readonly file: Blob | null;
  picture: ImageBitmap;
  found: Detections;
  /** Its small picture. */
  button?: HTMLElement;
}

// Pixels of a side of what is kept of an image to draw it.
const PICTURE_SIDE = 2048;
const HERE = new URL("..", import.meta.url);

const page = {
  model: element("model", HTMLElement),
  about: element("about", HTMLElement),
  drop: element("drop", HTMLElement),
  canvas: element("canvas", HTMLCanvasElement),
  hint: element("hint", HTMLElement),
  choose: element("choose", HTMLButtonElement),
  camera: element("camera", HTMLButtonElement),
  files: element("files", HTMLInputElement),
  images: element("images", HTMLElement),
  examples: element("examples", HTMLElement),
  exampleList: element("example-list", HTMLElement),
  problems: element("problems", HTMLElement),
  status: element("status", HTMLElement),
  threshold: element("threshold", HTMLInputElement),
  least: element("least", HTMLElement),
  list: element("list", HTMLElement),
  save: element("save", HTMLButtonElement),
  video: element("video", HTMLVideoElement),
};

let detector: Detector | null = null;
let items: Item[] = [];
let current: Item | null = null;
let examples: readonly string[] = [];
let marked: Detection | null = null;
// What is asked for is done one after the other.
let last: Promise<unknown> = Promise.resolve();

function element<E extends HTMLElement>(id: string, kind: new () => E): E {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`the page has no ${id}`);
  return found;
}

/** Do a thing after those before it; what goes wrong is a line on the page. */
function inTurn(name: string, task: () => Promise<void>): Promise<void> {
  const ours = last.then(task).catch((error: unknown) => problem(name, error));
  last = ours;
  return ours;
}

function problem(name: string, error: unknown): void {
  const line = document.createElement("li");
  line.textContent = `${name}: ${firstLine(error)}`;
  page.problems.append(line);
  if (page.status.dataset["busy"]) showFound();
}

function busy(text: string): void {
  page.status.textContent = text;
  page.status.dataset["busy"] = "yes";
}

async function runtime(backend: Backend): Promise<Runtime> {
  const file = backend === "webgpu" ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs";
  const ort = (await import(new URL(`ort/${file}`, HERE).href)) as typeof import("onnxruntime-web");
  ort.env.wasm.wasmPaths = new URL("ort/", HERE).href;
  ort.env.wasm.proxy = backend === "wasm"; // in a worker, so that the page answers while the network runs
  return ort;
}

/** Take another model: of the site, or a file that was dropped. What is shown is detected again with it. */
async function open(source: string | Blob, name: string): Promise<void> {
  busy(`Loading ${name}`);
  const wanted = new URLSearchParams(location.search).get("backend");
  const backend = wanted === "webgpu" || wanted === "wasm" ? wanted : null;
  const opened = await load(source, { runtime, ...(backend ? { backend } : {}) });
  const before = detector;
  detector = opened;
  await before?.release();
  page.model.textContent = name;
  document.title = `${name}: detections`;
  page.about.textContent = describe(opened);
  for (const note of opened.notes) problem(name, note);
  if (!opened.takesImages) problem(name, "takes a network's raw outputs and no images: export a whole detector");
  const again = items;
  [items, current] = [[], null];
  showImages();
  for (const item of again) if (item.file) await detectIn(item.file, item.name);
  showFound();
}

function describe(opened: Detector): string {
  const threads = globalThis.crossOriginIsolated && opened.backend === "wasm" ? ", threads" : "";
  return [
    opened.names.size ? `${opened.names.size} classes` : "",
    opened.inputSize ? `input ${opened.inputSize.width} × ${opened.inputSize.height}` : "",
    (opened.backend === "webgpu" ? "WebGPU" : "WebAssembly") + threads,
  ]
    .filter(Boolean)
    .join(" · ");
}

/** Take files as they come: images, and a model among them. */
function take(files: Iterable<File>): void {
  begin();
  const all = [...files];
  all.forEach((file, place) => {
    const which = all.length > 1 ? ` (${place + 1} of ${all.length})` : "";
    if (file.name.endsWith(".onnx")) void inTurn(file.name, () => open(file, file.name));
    else {
      void inTurn(file.name, async () => {
        busy(`Detecting in ${file.name}${which}`);
        await detectIn(file, file.name);
        showFound();
      });
    }
  });
}

/** Make way for something new: old problems go, and the camera stops. */
function begin(): void {
  page.problems.replaceChildren();
  page.camera.setAttribute("aria-pressed", "false");
}

function ready(): Detector {
  if (!detector) throw new Error("no detector is loaded: drop an .onnx file that detpost wrote");
  return detector;
}

async function detectIn(file: Blob, name: string): Promise<void> {
  const bitmap = await decodeImage(file);
  try {
    const found = await ready().detect(bitmap);
    const item = { name, file, picture: await pictureOf(bitmap), found };
    items.push(item);
    show(item);
  } finally {
    bitmap.close();
  }
}

/** Keep what drawing needs of an image. */
async function pictureOf(bitmap: ImageBitmap | HTMLVideoElement): Promise<ImageBitmap> {
  const [width, height] = bitmap instanceof ImageBitmap ? [bitmap.width, bitmap.height] : [bitmap.videoWidth, bitmap.videoHeight];
  const factor = Math.min(1, PICTURE_SIDE / Math.max(width, height));
  return createImageBitmap(bitmap, {
    resizeWidth: Math.max(1, Math.round(width * factor)),
    resizeHeight: Math.max(1, Math.round(height * factor)),
    resizeQuality: "high",
  });
}

function show(item: Item): void {
  current = item;
  marked = null;
  showImages();
  showExamples();
}

function threshold(): number {
  return Number(page.threshold.value);
}

/** Show the detections of the current image; the network is not asked again. */
function showFound(): void {
  delete page.status.dataset["busy"];
  page.least.textContent = threshold().toFixed(2);
  page.save.disabled = items.length === 0;
  if (!current) {
    page.status.textContent = detector?.takesImages ? "Ready for images." : "No detector.";
    page.list.replaceChildren();
    redraw();
    return;
  }
  const found = above(current.found.detections, threshold());
  const { prepare, network } = current.found.times;
  const count = `${found.length} ${found.length === 1 ? "detection" : "detections"}`;
  page.status.textContent =
    `${current.name}: ${count} in ${time(prepare + network)} (${time(network)} network, ${time(prepare)} pixels)`;
  page.list.replaceChildren(...found.map(row));
  redraw();
}

function time(milliseconds: number): string {
  return milliseconds < 10 ? `${milliseconds.toFixed(1)} ms` : `${Math.round(milliseconds)} ms`;
}

function row(detection: Detection): HTMLElement {
  const button = document.createElement("button");
  button.type = "button";
  button.append(swatch(detection.label), text("name", detection.name), text("score", detection.score.toFixed(2)));
  const [x1, y1, x2, y2] = detection.box.map(Math.round) as [number, number, number, number];
  button.setAttribute(
    "aria-label",
    `${detection.name}, score ${detection.score.toFixed(2)}, from ${x1}, ${y1} to ${x2}, ${y2} pixels`,
  );
  const mark = (on: boolean): void => {
    marked = on ? detection : null;
    redraw();
  };
  for (const name of ["focus", "pointerenter"]) button.addEventListener(name, () => mark(true));
  for (const name of ["blur", "pointerleave"]) button.addEventListener(name, () => mark(false));
  const item = document.createElement("li");
  item.append(button);
  return item;
}

function text(kind: string, content: string): HTMLElement {
  const span = document.createElement("span");
  span.className = kind;
  span.textContent = content;
  return span;
}

/** Make the square that says which colour a class has; an attribute, as styles in the page are not allowed. */
function swatch(label: number): Element {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  picture.setAttribute("viewBox", "0 0 10 10");
  picture.setAttribute("aria-hidden", "true");
  const square = document.createElementNS(space, "rect");
  for (const side of ["width", "height"]) square.setAttribute(side, "10");
  square.setAttribute("rx", "2");
  square.setAttribute("fill", colourOf(label));
  picture.append(square);
  return picture;
}

function redraw(): void {
  page.canvas.hidden = !current;
  page.hint.hidden = Boolean(current);
  page.drop.classList.toggle("filled", Boolean(current));
  if (!current) return;
  const found = above(current.found.detections, threshold());
  const room = page.drop.clientWidth;
  const size = fitted(current.found, room, Math.max(240, window.innerHeight * 0.7));
  draw(page.canvas, current.picture, current.found, found, marked, size);
  const said = found.map(({ name, score }) => `${name} ${score.toFixed(2)}`).join(", ");
  page.canvas.setAttribute("aria-label", `${current.name} with ${found.length} boxes${said ? `: ${said}` : ""}`);
}

/** Show a small picture of each image, where there are several; those that are there stay, and keep the focus. */
function showImages(): void {
  const shown = items.length > 1 ? items : [];
  for (const item of shown) {
    item.button ??= pressed(smallPicture(item), item.name, () => {
      show(item);
      showFound();
    });
    item.button.querySelector("button")?.setAttribute("aria-current", String(item === current));
    if (!page.images.contains(item.button)) page.images.append(item.button);
  }
  if (!shown.length) page.images.replaceChildren();
}

function smallPicture({ picture }: Item): Element {
  const small = document.createElement("canvas");
  small.height = 112;
  small.width = Math.max(1, Math.round((small.height * picture.width) / picture.height));
  small.getContext("2d")?.drawImage(picture, 0, 0, small.width, small.height);
  return small;
}

function pressed(content: Element, label: string, action: () => void): HTMLElement {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-label", label);
  button.append(content);
  button.addEventListener("click", action);
  const item = document.createElement("li");
  item.append(button);
  return item;
}

/** Offer the examples that are not among the images yet. */
function showExamples(): void {
  const shown = new Set(items.map(({ name }) => name));
  const left = examples.filter((address) => !shown.has(nameOf(address)));
  page.examples.hidden = left.length === 0;
  page.exampleList.replaceChildren(
    ...left.map((address) => {
      const picture = document.createElement("img");
      picture.src = new URL(address, HERE).href;
      picture.alt = "";
      return pressed(picture, nameOf(address), () => void example(address));
    }),
  );
}

function nameOf(address: string): string {
  return decodeURIComponent(address.slice(address.lastIndexOf("/") + 1));
}

function example(address: string): Promise<void> {
  begin();
  const name = nameOf(address);
  return inTurn(name, async () => {
    busy(`Detecting in ${name}`);
    await detectIn(await (await fetch(new URL(address, HERE))).blob(), name);
    showFound();
    // The button that was pressed is gone: the keyboard goes on at what it brought.
    if (document.activeElement === document.body) page.images.querySelector<HTMLElement>("[aria-current=true]")?.focus();
  });
}

function save(): void {
  const images = items.map(({ name, found }) => ({ name, found }));
  const content = JSON.stringify(toCoco(images, detector?.names ?? new Map(), threshold()), null, 1);
  const address = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  const link = document.createElement("a");
  [link.href, link.download] = [address, "detections.json"];
  link.click();
  URL.revokeObjectURL(address);
}

/** Detect in the camera's frames, one after the other, until the button is pressed again. */
async function film(): Promise<void> {
  const { video, camera } = page;
  let item: Item | null = null;
  camera.setAttribute("aria-pressed", "true");
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    try {
      video.srcObject = stream;
      await video.play();
      const name = `camera ${items.filter(({ file }) => !file).length + 1}`;
      while (camera.getAttribute("aria-pressed") === "true") {
        // Of this moment: the network runs while the video goes on.
        const picture = await pictureOf(video);
        const found: Detections = await ready().detect(picture);
        if (item) [item.picture, item.found] = [picture, found];
        else {
          item = { name, file: null, picture, found };
          items.push(item);
          show(item);
        }
        if (current === item) showFound();
        await new Promise(requestAnimationFrame);
      }
    } finally {
      for (const track of stream.getTracks()) track.stop();
      video.srcObject = null;
    }
  } finally {
    camera.setAttribute("aria-pressed", "false");
    if (item) renew(item);
  }
}

/** Make an item's small picture anew. */
function renew(item: Item): void {
  item.button?.remove();
  delete item.button;
  showImages();
}

function listen(): void {
  page.choose.addEventListener("click", () => page.files.click());
  page.files.addEventListener("change", () => {
    take(page.files.files ?? []);
    page.files.value = "";
  });
  document.addEventListener("paste", (event) => take(event.clipboardData?.files ?? []));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    page.drop.classList.add("over");
  });
  document.addEventListener("dragleave", () => page.drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    page.drop.classList.remove("over");
    take(event.dataTransfer?.files ?? []);
  });
  page.threshold.addEventListener("input", showFound);
  page.save.addEventListener("click", save);
  page.camera.hidden = !navigator.mediaDevices?.getUserMedia;
  page.camera.addEventListener("click", () => {
    const films = page.camera.getAttribute("aria-pressed") === "true";
    begin();
    if (!films) void inTurn("camera", film);
  });
  new ResizeObserver(redraw).observe(page.drop);
}

async function start(): Promise<void> {
  listen();
  const answer = await fetch(new URL("site.json", HERE));
  const site = (await answer.json()) as Site;
  await inTurn(nameOf(site.model), () => open(new URL(site.model, HERE).href, nameOf(site.model)));
  examples = site.examples;
  showExamples();
  if (detector?.takesImages && examples[0]) await example(examples[0]);
}

start().catch((error: unknown) => problem("this page", error));
