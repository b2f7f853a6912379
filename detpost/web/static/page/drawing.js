export function colourOf(label) {
    return `oklch(52% 0.17 ${(label * 137.508 + 265) % 360})`;
}
export function fitted(image, width, height) {
    const factor = Math.min(width / image.width, height / image.height);
    return { width: Math.max(1, Math.floor(image.width * factor)), height: Math.max(1, Math.floor(image.height * factor)) };
}
export function draw(canvas, picture, image, found, marked, size) {
    const density = window.devicePixelRatio || 1;
    canvas.width = Math.round(size.width * density);
    canvas.height = Math.round(size.height * density);
    canvas.style.width = `${size.width}px`;
    canvas.style.height = `${size.height}px`;
    const context = canvas.getContext("2d");
    if (!context)
        return;
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    context.scale(density, density);
    const [across, down] = [size.width / image.width, size.height / image.height];
    const order = [...found].reverse().sort((a, b) => Number(a === marked) - Number(b === marked));
    for (const detection of order) {
        const [x1, y1, x2, y2] = detection.box;
        const corners = [x1 * across, y1 * down, x2 * across, y2 * down];
        drawBox(context, corners, colourOf(detection.label), detection === marked);
    }
    for (const detection of order) {
        const caption = `${detection.name} ${detection.score.toFixed(2)}`;
        drawCaption(context, detection.box[0] * across, detection.box[1] * down, caption, colourOf(detection.label), size);
    }
}
function drawBox(context, [x1, y1, x2, y2], colour, marked) {
    const width = marked ? 5 : 2.5;
    context.lineJoin = "round";
    for (const [style, extra] of [["rgb(255 255 255 / 85%)", 2], [colour, 0]]) {
        context.strokeStyle = style;
        context.lineWidth = width + extra;
        context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    }
}
function drawCaption(context, left, top, caption, colour, size) {
    const [height, padding] = [20, 5];
    context.font = "600 13px system-ui, sans-serif";
    context.textBaseline = "middle";
    const width = context.measureText(caption).width + 2 * padding;
    const x = Math.min(Math.max(0, left - 1), Math.max(0, size.width - width));
    const y = Math.min(Math.max(0, top < height ? top : top - height), Math.max(0, size.height - height));
    context.fillStyle = colour;
    context.fillRect(x, y, width, height);
    context.fillStyle = "white";
    context.fillText(caption, x + padding, y + height / 2 + 1);
}
