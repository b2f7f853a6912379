// Browsers load neither modules nor models from the disk: say so, as the page's own script cannot.
if (location.protocol === "file:") {
  document.getElementById("status").textContent =
    "Browsers let no page that is opened from the disk load a detector: run `detpost web MODEL.onnx -o SITE --serve`, " +
    "or put the folder behind any web server.";
}
