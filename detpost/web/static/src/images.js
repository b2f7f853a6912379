export const MOST_PIXELS = 2 ** 26;
export async function openImage(source, maxPixels = MOST_PIXELS) {
    if (source instanceof Uint8Array)
        throw new Error("bytes are no image: give a Blob of them, or pixels with a size");
    if (isPixels(source))
        return rowsOfPixels(source);
    if (typeof Blob !== "undefined" && source instanceof Blob) {
        const bitmap = await decodeImage(source, maxPixels);
        return rowsOfDrawn(bitmap, bitmap.width, bitmap.height, () => bitmap.close());
    }
    const drawn = source;
    const [width, height] = sizeOf(drawn);
    return rowsOfDrawn(drawn, width, height, () => undefined);
}
export async function decodeImage(file, maxPixels = MOST_PIXELS) {
    if (file.size === 0)
        throw new Error("the file is empty");
    if (typeof Image !== "undefined")
        await checkSize(file, maxPixels);
    try {
        const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
        refuseLarge(bitmap.width, bitmap.height, maxPixels);
        return bitmap;
    }
    catch (error) {
        if (error instanceof DOMException)
            throw new Error("not an image that this browser reads");
        throw error;
    }
}
async function checkSize(file, maxPixels) {
    const address = URL.createObjectURL(file);
    const image = new Image();
    try {
        await new Promise((resolve, reject) => {
            image.onload = () => resolve();
            image.onerror = () => reject(new Error("not an image that this browser reads"));
            image.src = address;
        });
        refuseLarge(image.naturalWidth, image.naturalHeight, maxPixels);
    }
    finally {
        image.removeAttribute("src");
        URL.revokeObjectURL(address);
    }
}
function refuseLarge(width, height, maxPixels) {
    if (width * height > maxPixels)
        throw new Error(`${width} x ${height} pixels are more than ${maxPixels}`);
}
function isPixels(source) {
    return "data" in source && "width" in source && typeof source.data === "object";
}
function rowsOfPixels({ data, width, height }) {
    const channels = data.length / (width * height);
    if (channels !== 3 && channels !== 4) {
        throw new Error(`pixels must be ${width} x ${height} times 3 or 4 bytes; got ${data.length}`);
    }
    return {
        width,
        height,
        channels,
        rows: (top, bottom) => data.subarray(top * width * channels, bottom * width * channels),
        close: () => undefined,
    };
}
function rowsOfDrawn(drawn, width, height, close) {
    if (!width || !height)
        throw new Error("an image without pixels: has it been loaded?");
    return {
        width,
        height,
        channels: 4,
        rows(top, bottom) {
            const canvas = new OffscreenCanvas(width, bottom - top);
            const context = canvas.getContext("2d", { willReadFrequently: true });
            if (!context)
                throw new Error(`no canvas of ${width} x ${bottom - top} pixels`);
            context.imageSmoothingEnabled = false;
            context.drawImage(drawn, 0, top, width, bottom - top, 0, 0, width, bottom - top);
            return context.getImageData(0, 0, width, bottom - top).data;
        },
        close,
    };
}
export function sizeOf(drawn) {
    if ("naturalWidth" in drawn)
        return [drawn.naturalWidth, drawn.naturalHeight];
    if ("videoWidth" in drawn)
        return [drawn.videoWidth, drawn.videoHeight];
    if ("displayWidth" in drawn)
        return [drawn.displayWidth, drawn.displayHeight];
    return [Number(drawn.width), Number(drawn.height)];
}
