// The mask brush. The mask has the pixels of the image; white pixels are replaced.
import { Dialog, html, useEffect, useRef, useState } from "./ui.js";

const MAX_SIDE = 2048; // larger images are reduced before they are sent

/** An image file as a PNG data: URL. Throws an error if it cannot be read. */
export async function readFile(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name} is not an image that this browser can read: choose a PNG, JPEG or WebP file.`);
  }
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = Object.assign(document.createElement("canvas"), { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

const loadImage = (url) => new Promise((resolve, reject) => {
  const image = new Image();
  Object.assign(image, { onload: () => resolve(image), onerror: () => reject(new Error("the image cannot be read")), src: url });
});

export function MaskEditor({ image, mask, onMask, onClose }) {
  const canvas = useRef(), state = useRef(null), [size, setSize] = useState(12), [erase, setErase] = useState(false), [, update] = useState(0);
  const [cursor, setCursor] = useState(null);

  useEffect(() => {
    (async () => {
      const photo = await loadImage(image), { naturalWidth: width, naturalHeight: height } = photo;
      const pixels = new Uint8Array(width * height);
      if (mask) {
        const context = new OffscreenCanvas(width, height).getContext("2d");
        context.drawImage(await loadImage(mask), 0, 0, width, height);
        context.getImageData(0, 0, width, height).data.forEach((value, index) => { if (index % 4 === 0) pixels[index / 4] = value >= 128 ? 1 : 0; });
      }
      state.current = { photo, width, height, pixels, undo: [], redo: [], last: null };
      Object.assign(canvas.current, { width, height });
      update((count) => count + 1);
    })();
  }, []);
  useEffect(show);

  function show() {
    if (!state.current) return;
    const { photo, width, height, pixels } = state.current, context = canvas.current.getContext("2d", { willReadFrequently: true });
    context.drawImage(photo, 0, 0);
    const picture = context.getImageData(0, 0, width, height), { data } = picture;
    for (let index = 0; index < pixels.length; index++) {
      if (pixels[index]) { data[4 * index] = (data[4 * index] + 255) / 2; data[4 * index + 1] /= 2; data[4 * index + 2] = (data[4 * index + 2] + 110) / 2; }
    }
    context.putImageData(picture, 0, 0);
  }

  const radius = () => Math.max(0.5, (size / 200) * Math.min(state.current.width, state.current.height));

  function dot(x, y) {
    const { width, height, pixels } = state.current, r = radius();
    for (let row = Math.max(0, Math.floor(y - r)); row < Math.min(height, y + r); row++) {
      for (let column = Math.max(0, Math.floor(x - r)); column < Math.min(width, x + r); column++) {
        if (Math.hypot(column + 0.5 - x, row + 0.5 - y) <= r || (Math.floor(x) === column && Math.floor(y) === row)) pixels[row * width + column] = erase ? 0 : 1;
      }
    }
  }

  function line(from, to) {
    const distance = Math.hypot(to[0] - from[0], to[1] - from[1]), count = Math.ceil(distance / Math.max(radius() / 2, 0.5)) || 1;
    for (let index = 0; index <= count; index++) dot(from[0] + ((to[0] - from[0]) * index) / count, from[1] + ((to[1] - from[1]) * index) / count);
    show();
  }

  function remember() {
    const current = state.current;
    current.undo.push(current.pixels.slice());
    if (current.undo.length > 50) current.undo.shift();
    current.redo = [];
  }

  function back(from, to) {
    const current = state.current;
    if (!current[from].length) return;
    current[to].push(current.pixels);
    current.pixels = current[from].pop();
    update((count) => count + 1);
  }

  function change(value) {
    remember();
    state.current.pixels = state.current.pixels.map(value);
    update((count) => count + 1);
  }

  const position = (event) => {
    const box = canvas.current.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * state.current.width, ((event.clientY - box.top) / box.height) * state.current.height];
  };
  const pointer = {
    onPointerDown: (event) => { canvas.current.setPointerCapture(event.pointerId); remember(); state.current.last = position(event); line(state.current.last, state.current.last); },
    onPointerMove: (event) => { if (state.current?.last) { const next = position(event); line(state.current.last, next); state.current.last = next; } },
    onPointerUp: () => { state.current.last = null; update((count) => count + 1); },
  };
  const keys = (event) => {
    if (!state.current) return;
    const { width, height } = state.current, [x, y] = cursor || [width / 2, height / 2], pace = Math.max(1, Math.round(radius()));
    const move = { ArrowLeft: [-pace, 0], ArrowRight: [pace, 0], ArrowUp: [0, -pace], ArrowDown: [0, pace] }[event.key];
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") back(...(event.shiftKey ? ["redo", "undo"] : ["undo", "redo"]));
    else if (event.target === canvas.current && move) setCursor([Math.min(width - 0.5, Math.max(0.5, x + move[0])), Math.min(height - 0.5, Math.max(0.5, y + move[1]))]);
    else if (event.target === canvas.current && event.key === " ") { remember(); dot(x, y); update((count) => count + 1); }
    else return;
    event.preventDefault();
  };
  const done = () => {
    const { width, height, pixels } = state.current;
    if (!pixels.includes(1)) onMask(null);
    else {
      const result = Object.assign(document.createElement("canvas"), { width, height }), context = result.getContext("2d"), picture = context.createImageData(width, height);
      pixels.forEach((value, index) => picture.data.set([255 * value, 255 * value, 255 * value, 255], 4 * index));
      context.putImageData(picture, 0, 0);
      onMask(result.toDataURL("image/png"));
    }
    onClose();
  };
  const current = state.current, share = current ? Math.round((100 * current.pixels.reduce((sum, value) => sum + value, 0)) / current.pixels.length) : 0;
  return html`
    <${Dialog} title="Paint what is replaced" wide onClose=${onClose}>
      <div class="mask-editor" onKeyDown=${keys}>
        <div class="canvas">
          <canvas ref=${canvas} class=${current?.width < 128 ? "pixels" : ""} tabindex="0" role="application"
            aria-label="The image. Arrow keys move the brush, Space paints." ...${pointer}></canvas>
          ${cursor && current && html`<span class="cursor" style=${{ left: `${(100 * cursor[0]) / current.width}%`, top: `${(100 * cursor[1]) / current.height}%` }}></span>`}
        </div>
        <div class="toolbar">
          <label class="slider"><span>Brush</span><input type="range" min="1" max="60" value=${size} onInput=${(event) => setSize(Number(event.target.value))} /><output>${size} %</output></label>
          <label class="check"><input type="checkbox" checked=${erase} onChange=${(event) => setErase(event.target.checked)} /> Erase</label>
          <button type="button" disabled=${!current?.undo.length} onClick=${() => back("undo", "redo")}>Undo</button>
          <button type="button" disabled=${!current?.redo.length} onClick=${() => back("redo", "undo")}>Redo</button>
          <button type="button" onClick=${() => change(() => 0)}>Clear</button>
          <button type="button" onClick=${() => change((value) => 1 - value)}>Invert</button>
          <span aria-live="polite">${share} % is replaced</span>
          <button type="button" class="primary" onClick=${done}>Use this mask</button>
        </div>
      </div>
    <//>`;
}
