const STRIP_PIXELS = 2 ** 21;
export function resize(image, height, width) {
    const across = image.width === width ? null : filterOf(image.width, width);
    const narrow = new Uint8Array(image.height * width * 3);
    for (const { strip, top, bottom } of strips(image)) {
        for (let row = top; row < bottom; row += 1) {
            const from = (row - top) * image.width * image.channels;
            filterRow(strip, from, image.channels, across, narrow, row * width * 3, width);
        }
    }
    const down = image.height === height ? null : filterOf(image.height, height);
    const planes = new Uint8Array(3 * height * width);
    for (let row = 0; row < height; row += 1)
        filterColumns(narrow, row, down, planes, height, width);
    return planes;
}
export function planesOf(image) {
    return resize(image, image.height, image.width);
}
function* strips(image) {
    const step = Math.max(1, Math.floor(STRIP_PIXELS / image.width));
    for (let top = 0; top < image.height; top += step) {
        const bottom = Math.min(top + step, image.height);
        yield { strip: image.rows(top, bottom), top, bottom };
    }
}
function filterRow(source, from, channels, filter, target, to, width) {
    for (let place = 0; place < width; place += 1) {
        const out = to + place * 3;
        if (!filter) {
            for (let channel = 0; channel < 3; channel += 1) {
                target[out + channel] = source[from + place * channels + channel];
            }
            continue;
        }
        const half = 1 << (filter.precision - 1);
        let [red, green, blue] = [half, half, half];
        let at = from + filter.first[place] * channels;
        let tap = place * filter.taps;
        for (const end = tap + filter.count[place]; tap < end; tap += 1, at += channels) {
            const weight = filter.weights[tap];
            red += weight * source[at];
            green += weight * source[at + 1];
            blue += weight * source[at + 2];
        }
        target[out] = byte(red >> filter.precision);
        target[out + 1] = byte(green >> filter.precision);
        target[out + 2] = byte(blue >> filter.precision);
    }
}
function filterColumns(source, row, filter, planes, height, width) {
    const first = filter ? filter.first[row] : row;
    const count = filter ? filter.count[row] : 1;
    for (let place = 0; place < width * 3; place += 1) {
        const out = (place % 3) * height * width + row * width + Math.floor(place / 3);
        let at = first * width * 3 + place;
        if (!filter) {
            planes[out] = source[at];
            continue;
        }
        let sum = 1 << (filter.precision - 1);
        for (let tap = row * filter.taps, end = tap + count; tap < end; tap += 1, at += width * 3) {
            sum += filter.weights[tap] * source[at];
        }
        planes[out] = byte(sum >> filter.precision);
    }
}
function byte(value) {
    return value < 0 ? 0 : value > 255 ? 255 : value;
}
function filterOf(input, output) {
    const scale = input / output;
    const support = Math.max(scale, 1);
    const taps = Math.ceil(Math.fround(support)) * 2 + 1;
    const [first, count] = [new Int32Array(output), new Int32Array(output)];
    const exact = new Float64Array(output * taps);
    let greatest = 0;
    for (let place = 0; place < output; place += 1) {
        const centre = scale * (place + 0.5);
        const from = Math.max(Math.trunc(centre - support + 0.5), 0);
        const length = Math.min(Math.max(Math.min(Math.trunc(centre + support + 0.5), input) - from, 0), taps);
        let total = 0;
        for (let tap = 0; tap < length; tap += 1) {
            const distance = Math.abs((tap + from - centre + 0.5) * (scale >= 1 ? 1 / scale : 1));
            const weight = distance < 1 ? 1 - distance : 0;
            exact[place * taps + tap] = weight;
            total += weight;
        }
        for (let tap = 0; total && tap < length; tap += 1) {
            const share = exact[place * taps + tap] / total;
            exact[place * taps + tap] = share;
            greatest = Math.max(greatest, share);
        }
        first[place] = from;
        count[place] = length;
    }
    let precision = 0;
    while (precision < 22 && Math.trunc(0.5 + greatest * 2 ** (precision + 1)) < 2 ** 15)
        precision += 1;
    const weights = Int32Array.from(exact, (weight) => Math.trunc(0.5 + weight * 2 ** precision));
    return { first, count, weights, taps, precision };
}
