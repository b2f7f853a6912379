export { toCoco } from "./coco.js";
export { above, Detector, } from "./detector.js";
export { decodeImage, MOST_PIXELS } from "./images.js";
export { firstLine, load } from "./load.js";
