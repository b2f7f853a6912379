const PREFIX = "detpost.";
export function readMetadata(file) {
    const found = {};
    for (const [key, value] of file.properties) {
        if (key.startsWith(PREFIX))
            found[key.slice(PREFIX.length)] = parsed(value);
    }
    if (!found["spec"] || !found["layout"]) {
        throw new Error("not written by detpost, so it does not say how it is read: run `detpost attach FILE -o OUT`");
    }
    const layout = found["layout"];
    return {
        spec: found["spec"],
        class_names: (found["class_names"] ?? {}),
        layout,
        preprocessing: (found["preprocessing"] ?? null),
        preprocess_inside: (found["preprocess_inside"] ?? false),
        feed: (found["feed"] ?? { images: "images", image_sizes: layout.sizes, ones: [] }),
    };
}
function parsed(text) {
    try {
        return JSON.parse(text);
    }
    catch {
        return null;
    }
}
