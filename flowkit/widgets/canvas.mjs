// One picture on an HTML canvas: heat maps, lines, areas, points, bars, texts and handles, in rows of panels.
//
// mount(root, source) draws source.picture into root and plays its frames. With source.send it talks to a kernel (keys,
// drags, steps), one question at a time: while an answer is on its way keys wait in their order, and of a drag its newest place.
// Without it, as in a page on its own, the frames are all there is. No build step and nothing loaded from anywhere.

const OKABE_ITO = { blue: "#0072B2", orange: "#E69F00", green: "#009E73", red: "#D55E00", sky: "#56B4E9", purple: "#CC79A7", yellow: "#F0E442" };
const THEMES = {
  light: { ink: "#16181d", faint: "#d5d9e0", paper: "#ffffff", panel: "#f7f8fa", quiet: "#5a6270" },
  dark: { ink: "#f2f4f8", faint: "#3c4350", paper: "#14161b", panel: "#1c1f26", quiet: "#aab2c0", blue: "#3f9fe0" },
};
const DASHES = { solid: [], dashed: [9, 6], dotted: [2, 5] };
const TYPES = { u1: Uint8Array, f4: Float32Array };
const PATIENCE = 10000;      // ms after which an unanswered question is given up

function isLight() {
  const said = document.body.dataset.jpThemeLight;
  return said === undefined ? !matchMedia("(prefers-color-scheme: dark)").matches : said === "true";
}

// A typed array over the bytes that came, copied only where they do not lie on the type's boundary.
function typed(bytes, type) {
  const Kind = TYPES[type];
  const start = bytes.byteOffset, end = start + bytes.byteLength;
  const buffer = start % Kind.BYTES_PER_ELEMENT ? bytes.buffer.slice(start, end) : bytes.buffer;
  return new Kind(buffer, start % Kind.BYTES_PER_ELEMENT ? 0 : start, bytes.byteLength / Kind.BYTES_PER_ELEMENT);
}

class Painter {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.images = new WeakMap();
  }

  // Sizes of all panels, in CSS pixels, for a canvas `width` wide and at most `height` high.
  layout(frame, width, height) {
    const size = Math.max(18, Math.min(34, Math.round(Math.min(width / 52, height / 24))));
    const rows = frame.rows.map(row => ({
      panels: row,
      top: row.some(p => p.title) ? 1.7 * size : 0.5 * size,
      bottom: (row.some(p => p.xlabel) ? 1.5 * size : 0.35 * size) + (row.some(p => p.xticks.length) ? 1.25 * size : 0),
      high: Math.max(...row.map(p => p.height)),
    }));
    const left = p => (p.ylabel ? 1.5 * size : 0.4 * size) + (p.yticks.length ? 2.4 * size : 0);
    const columns = Math.max(...rows.map(r => r.panels.length));
    const lefts = Array.from({ length: columns }, (_, c) => Math.max(0, ...rows.map(r => r.panels[c] ? left(r.panels[c]) : 0)));
    const gap = 0.7 * size, pads = lefts.reduce((a, b) => a + b, 0) + gap * columns;
    const units = Math.max(...rows.map(r => r.panels.reduce((sum, p) => sum + p.width, 0)));
    const room = height - rows.reduce((sum, r) => sum + r.top + r.bottom, 0);
    const unit = Math.max(40, Math.min((width - pads) / units, room / rows.reduce((sum, r) => sum + r.high, 0)));
    // What is left over to the sides goes to the panels that may be wider than planned.
    const spare = Math.max(0, width - pads - unit * units);
    let y = 0;
    for (const row of rows) {
      const free = row.panels.filter(p => !p.equal), wish = free.reduce((sum, p) => sum + p.width, 0);
      const extra = wish ? Math.min(spare, 1.2 * wish * unit) : 0;
      const used = pads + unit * row.panels.reduce((sum, p) => sum + p.width, 0) + extra;
      let x = Math.max(0, (width - Math.max(used, 0)) / 2);
      row.panels.forEach((p, c) => {
        x += lefts[c];
        const w = p.width * unit + (p.equal || !wish ? 0 : extra * p.width / wish);
        p.place = { x, y: y + row.top, w, h: p.height * unit };
        x += w + gap;
      });
      y += row.top + row.high * unit + row.bottom;
    }
    return { size, height: Math.ceil(y) };
  }

  draw(picture, frame, width, room) {
    const ratio = window.devicePixelRatio || 1, c = this.context;
    const { size, height } = this.layout(frame, width, room);
    const wide = Math.round(width * ratio), high = Math.round(height * ratio);
    if (this.canvas.width !== wide || this.canvas.height !== high) {
      this.canvas.width = wide;
      this.canvas.height = high;
      this.canvas.style.width = `${width}px`;
      this.canvas.style.height = `${height}px`;
    }
    this.theme = THEMES[isLight() ? "light" : "dark"];
    this.picture = picture;
    this.size = size;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.fillStyle = this.theme.paper;
    c.fillRect(0, 0, width, height);
    for (const row of frame.rows) for (const panel of row) this.panel(panel);
    return height;
  }

  colour(name) { return this.theme[name] ?? OKABE_ITO[name] ?? name; }

  array(ref) {
    const bytes = this.picture.arrays[ref.at];
    return ref.cache ??= typed(bytes, ref.type);
  }

  write(words, x, y, { align = "center", base = "alphabetic", colour = "ink", size = this.size, weight = "" } = {}) {
    const c = this.context;
    c.font = `${weight} ${size}px "Helvetica Neue", Arial, "Liberation Sans", system-ui, sans-serif`;
    c.textAlign = align;
    c.textBaseline = base;
    c.fillStyle = this.colour(colour);
    c.fillText(words, x, y);
  }

  panel(p) {
    const c = this.context, { x, y, w, h } = p.place, [l, r, b, t] = p.box, size = this.size;
    const X = v => x + (v - l) / (r - l) * w, Y = v => y + h - (v - b) / (t - b) * h;
    Object.assign(p, { X, Y, backX: v => l + (v - x) / w * (r - l), backY: v => b + (y + h - v) / h * (t - b) });
    if (p.frame) {
      c.fillStyle = this.theme.panel;
      c.fillRect(x, y, w, h);
    }
    c.save();
    c.beginPath();
    c.rect(x, y, w, h);
    c.clip();
    for (const mark of p.marks) if (mark.kind !== "text" && mark.kind !== "handles") this[mark.kind](mark, p);
    c.restore();
    if (p.frame) {
      c.strokeStyle = this.theme.faint;
      c.lineWidth = 1;
      c.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1);
    }
    for (const mark of p.marks) if (mark.kind === "text" || mark.kind === "handles") this[mark.kind](mark, p);
    if (p.title) this.write(p.title, x + w / 2, y - 0.55 * size, { weight: "600" });
    let under = y + h;
    if (p.xticks.length) {
      p.xticks.forEach(v => this.write(tick(v), X(v), under + 1.15 * size, { colour: "quiet" }));
      under += 1.25 * size;
    }
    if (p.xlabel) this.write(p.xlabel, x + w / 2, under + 1.15 * size, { colour: "quiet" });
    p.yticks.forEach(v => this.write(tick(v), x - 0.4 * size, Y(v), { align: "right", base: "middle", colour: "quiet" }));
    if (p.ylabel) {
      c.save();
      c.translate(x - 0.6 * size - (p.yticks.length ? 2.4 * size : 0), y + h / 2);
      c.rotate(-Math.PI / 2);
      this.write(p.ylabel, 0, 0, { colour: "quiet" });
      c.restore();
    }
  }

  heat(mark, p) {
    const [rows, columns] = mark.values.shape, values = this.array(mark.values), [l, r, b, t] = mark.extent, c = this.context;
    let image = this.images.get(values);
    if (!image) {
      const palette = this.array(mark.palette);
      image = new OffscreenCanvas(columns, rows);
      const pixels = new ImageData(columns, rows), words = new Uint32Array(pixels.data.buffer), colours = new Uint32Array(256);
      for (let i = 0; i < 256; i++) colours[i] = 0xff000000 | palette[3 * i + 2] << 16 | palette[3 * i + 1] << 8 | palette[3 * i];
      for (let i = 0; i < rows; i++)                 // the first row of the values is the lowest of the picture
        for (let j = 0, from = (rows - 1 - i) * columns, to = i * columns; j < columns; j++) words[to + j] = colours[values[from + j]];
      image.getContext("2d").putImageData(pixels, 0, 0);
      this.images.set(values, image);
    }
    c.imageSmoothingEnabled = mark.smooth;
    c.imageSmoothingQuality = "medium";
    c.drawImage(image, p.X(l), p.Y(t), p.X(r) - p.X(l), p.Y(b) - p.Y(t));
  }

  // The polylines' path; a NaN lifts the pen.
  trace(ref, p) {
    const v = this.array(ref), c = this.context, [count, length] = ref.shape;
    const { x, y, w, h } = p.place, [l, r, b, t] = p.box, sx = w / (r - l), sy = h / (t - b);
    // Canvases misbehave far outside: what is that far off needs no exact place.
    const clamp = q => q > 20000 ? 20000 : q < -20000 ? -20000 : q;
    c.beginPath();
    for (let i = 0, k = 0; i < count; i++) {
      let down = false;
      for (let j = 0; j < length; j++, k += 2) {
        const a = x + (v[k] - l) * sx, d = y + h - (v[k + 1] - b) * sy;
        if (a !== a || d !== d) down = false;
        else if (down) c.lineTo(clamp(a), clamp(d));
        else { c.moveTo(clamp(a), clamp(d)); down = true; }
      }
    }
  }

  lines(mark, p) {
    const c = this.context;
    this.trace(mark.xy, p);
    c.globalAlpha = mark.alpha;
    c.strokeStyle = this.colour(mark.colour);
    c.lineWidth = mark.width * this.size / 20;
    c.lineJoin = c.lineCap = "round";
    c.setLineDash(DASHES[mark.dash].map(d => d * this.size / 20));
    c.stroke();
    c.setLineDash([]);
    c.globalAlpha = 1;
  }

  arrows(mark, p) {
    const v = this.array(mark.xy), c = this.context, wide = mark.width * this.size / 20;
    c.strokeStyle = c.fillStyle = this.colour(mark.colour);
    c.lineWidth = wide;
    c.lineCap = "butt";
    for (let k = 0; k < v.length; k += 4) {
      const x = p.X(v[k]), y = p.Y(v[k + 1]), dx = p.X(v[k + 2]) - x, dy = p.Y(v[k + 3]) - y, length = Math.hypot(dx, dy);
      if (length < 1) continue;
      const head = Math.min(2.4 * wide + 0.4 * this.size, 0.7 * length), turn = Math.atan2(dy, dx);
      c.save();
      c.translate(x, y);
      c.rotate(turn);
      c.setLineDash(DASHES[mark.dash].map(d => d * this.size / 20));
      c.beginPath();
      c.moveTo(0, 0);
      c.lineTo(length - 0.8 * head, 0);
      c.stroke();
      c.beginPath();
      c.moveTo(length, 0);
      c.lineTo(length - head, 0.42 * head);
      c.lineTo(length - head, -0.42 * head);
      c.fill();
      c.restore();
    }
  }

  area(mark, p) {
    const c = this.context;
    this.trace(mark.xy, p);
    c.globalAlpha = mark.alpha;
    c.fillStyle = this.colour(mark.colour);
    c.fill();
    c.globalAlpha = 1;
  }

  points(mark, p) {
    const v = this.array(mark.xy), c = this.context, radius = mark.size * this.size / 20, { x, y, w, h } = p.place;
    c.globalAlpha = mark.alpha;
    c.fillStyle = c.strokeStyle = this.colour(mark.colour);
    c.lineWidth = Math.max(1.5, radius / 2.5);
    c.beginPath();
    for (let k = 0; k < v.length; k += 2) {
      const a = p.X(v[k]), d = p.Y(v[k + 1]);
      if (a < x - 9 || a > x + w + 9 || d < y - 9 || d > y + h + 9 || a !== a || d !== d) continue;
      shape(c, mark.marker, a, d, radius);
    }
    if (mark.marker === "ring" || mark.marker === "cross") c.stroke(); else c.fill();
    c.globalAlpha = 1;
  }

  bars(mark, p) {
    const v = this.array(mark.boxes), c = this.context;
    for (let i = 0; i < mark.colours.length; i++) {
      const [l, r, b, t] = v.subarray(4 * i, 4 * i + 4);
      c.fillStyle = this.colour(mark.colours[i]);
      c.fillRect(p.X(l), p.Y(t), p.X(r) - p.X(l), p.Y(b) - p.Y(t));
      c.strokeStyle = this.theme.paper;
      c.lineWidth = 1.5;
      c.strokeRect(p.X(l), p.Y(t), p.X(r) - p.X(l), p.Y(b) - p.Y(t));
    }
  }

  spots() {}

  text(mark, p) { this.write(mark.words, p.X(mark.x), p.Y(mark.y), mark); }

  handles(mark, p) {
    const v = this.array(mark.xy), c = this.context, radius = 0.5 * this.size;
    for (let i = 0; 2 * i < v.length; i++) {
      const a = p.X(v[2 * i]), d = p.Y(v[2 * i + 1]);
      c.beginPath();
      shape(c, mark.markers[i], a, d, radius);
      c.fillStyle = this.colour(mark.colours[i]);
      c.fill();
      c.lineWidth = mark.selected === i ? 4 : 2;
      c.strokeStyle = mark.selected === i ? this.theme.ink : this.theme.paper;
      c.stroke();
    }
  }
}

function shape(c, marker, x, y, r) {
  if (marker === "square") c.rect(x - 0.88 * r, y - 0.88 * r, 1.76 * r, 1.76 * r);
  else if (marker === "triangle") { c.moveTo(x, y - 1.2 * r); c.lineTo(x + 1.1 * r, y + 0.8 * r); c.lineTo(x - 1.1 * r, y + 0.8 * r); c.closePath(); }
  else if (marker === "diamond") { c.moveTo(x, y - 1.25 * r); c.lineTo(x + 1.25 * r, y); c.lineTo(x, y + 1.25 * r); c.lineTo(x - 1.25 * r, y); c.closePath(); }
  else if (marker === "cross") { c.moveTo(x - r, y - r); c.lineTo(x + r, y + r); c.moveTo(x - r, y + r); c.lineTo(x + r, y - r); }
  else { c.moveTo(x + r, y); c.arc(x, y, r, 0, 7); }
}

function tick(v) { return String(Math.round(v * 100) / 100).replace("-", "−"); }

function element(tag, name, parent, attributes = {}) {
  const e = document.createElement(tag);
  e.className = name;
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  parent.append(e);
  return e;
}

// Drawn here, since not every font has the signs.
function icon(path, filled) {
  const paint = filled ? 'fill="currentColor"' : 'fill="none" stroke="currentColor" stroke-width="2.6" stroke-linecap="round" stroke-linejoin="round"';
  return `<svg viewBox="0 0 24 24" width="22" height="22" aria-hidden="true"><path d="${path}" ${paint}/></svg>`;
}

export function mount(root, source) {
  const box = element("div", "flowkit-view", root);
  const title = element("div", "flowkit-title", box);
  // JupyterLab leaves keys alone only where the focused element itself asks for it.
  const own = { "data-lm-suppress-shortcuts": "true" };
  const canvas = element("canvas", "flowkit-canvas", box, { ...own, tabindex: "0", role: "application" });
  const bar = element("div", "flowkit-bar", box);
  const play = element("button", "flowkit-play", bar, { ...own, type: "button" });
  const slider = element("input", "flowkit-slider", bar, { ...own, type: "range", min: "0", step: "1" });
  const where = element("span", "flowkit-where", bar);
  const reset = element("button", "flowkit-reset", bar, { ...own, type: "button", "aria-label": "reset", title: "reset (R)" });
  const full = element("button", "flowkit-full", bar, { ...own, type: "button", "aria-label": "full screen", title: "full screen (F)" });
  const caption = element("div", "flowkit-caption", box);
  const problem = element("div", "flowkit-problem", box, { role: "alert" });
  const spoken = element("div", "flowkit-spoken", box, { "aria-live": "polite" });
  const painter = new Painter(canvas);
  reset.innerHTML = icon("M5 10a7 7 0 1 1 2 5M5 4v6h6");
  full.innerHTML = icon("M4 9V4h5M15 4h5v5M20 15v5h-5M9 20H4v-5");

  let picture = source.picture, at = 0, playing = false, last = 0, asked = 0, answered = 0, waiting = [], askedAt = 0, held = null;
  let settling, drawing, size;

  const around = () => box.closest(".flowkit-box") ?? box;         // the picture with the kernel's controls
  const frames = () => picture.frames;
  const many = () => frames().length > 1;
  const remote = () => source.send && (picture.live || !many());   // the kernel, and not the frames, answers keys

  // How large the canvas may be. Asking makes the browser lay out the page, so it is not asked for each picture.
  function measure() {
    const whole = document.fullscreenElement === around() || source.alone;
    const parts = around() === box ? [box] : [...around().children];
    const others = parts.reduce((sum, part) => sum + part.offsetHeight, 0) - canvas.offsetHeight;
    return { width: Math.floor(bar.clientWidth), height: Math.max(240, window.innerHeight - others - (whole ? 24 : 180)) };
  }

  function draw() {
    if (!frames().length || !box.isConnected) return;
    size ??= measure();
    if (size.width < 1) { size = undefined; return; }
    const frame = frames()[at];
    painter.draw(picture, frame, size.width, size.height);
    slider.value = at;
    where.textContent = frame.label ?? "";
    slider.setAttribute("aria-valuetext", frame.label ?? "");
    canvas.setAttribute("aria-label", `${source.title}. ${frame.label ?? ""}. ${source.caption}`);
    box.dataset.frame = at;
    box.dataset.drawn = +(box.dataset.drawn ?? 0) + 1;
    box.dispatchEvent(new CustomEvent("flowkit-drawn"));
    if (source.hall) { source.hall = false; arrive(); }
    clearTimeout(settling);
    if (!playing) settling = setTimeout(settled, 700);
  }

  // In the hall: whoever has just run this cell by its keys finds them in the view. A page that was loaded anew, or Run All, moves nothing.
  function arrive() {
    const cell = box.closest(".jp-Cell"), active = cell?.parentElement.querySelector(":scope > .jp-mod-active");
    if (!active || (active !== cell && active !== cell.nextElementSibling)) return;
    canvas.focus({ preventScroll: true });
    setTimeout(() => around().scrollIntoView({ block: "nearest" }), 200);        // when the controls have come too
  }

  // Escape gives the keys back to the notebook, at the next cell; Shift+Enter runs that cell at once.
  async function leave(event) {
    const cell = box.closest(".jp-Cell"), next = cell?.nextElementSibling ?? cell;
    if (!next) return;
    event.preventDefault();
    event.stopPropagation();
    if (document.fullscreenElement) await document.exitFullscreen();
    next.scrollIntoView({ block: "start" });
    next.focus({ preventScroll: true });
    const enter = { key: "Enter", code: "Enter", keyCode: 13, shiftKey: true, bubbles: true, cancelable: true };
    // Not the last cell: JupyterLab would put an empty one after it.
    if (event.key === "Enter" && next.nextElementSibling?.matches(".jp-Cell")) next.dispatchEvent(new KeyboardEvent("keydown", enter));
  }

  function settled() {
    spoken.textContent = frames()[at].label ?? "";
    if (source.settled && !held) canvas.toBlob(async blob => blob && source.settled(at, await blob.arrayBuffer()), "image/png");
  }

  function later() {                            // at most one redraw in a screen's frame, for what comes in bursts
    size = undefined;
    drawing ??= requestAnimationFrame(() => { drawing = undefined; draw(); });
  }

  function show(index) {
    const n = frames().length;
    at = Math.max(0, Math.min(n - 1, index));
    draw();
  }

  function update() {
    box.classList.toggle("flowkit-single", !many());
    slider.max = frames().length - 1;
    slider.setAttribute("aria-label", source.title);
    title.textContent = source.title;
    caption.textContent = source.caption;
    play.innerHTML = playing || picture.running ? icon("M8 5v14M16 5v14") : icon("M7 4l13 8-13 8z", true);
    play.setAttribute("aria-label", playing || picture.running ? "pause" : "play");
    play.title = `${playing ? "pause" : "play"} (space)`;
    at = Math.min(at, Math.max(0, frames().length - 1));
  }

  // Ask the kernel, or have it wait while the kernel works: equal keys are added up, of a drag only the newest place is kept.
  function ask(message) {
    if (!source.send) return;
    const now = performance.now(), before = waiting.at(-1);
    if (asked > answered && now - askedAt < PATIENCE) {
      if (message.type === "settle" && before) return;              // what waits comes to rest by itself
      if (message.key === "r") waiting = [];
      else if (before && ["type", "key", "wrap", "name", "index"].every(word => before[word] === message[word])) message.times = (waiting.pop().times ?? 1) + 1;
      waiting.push(message);
      return;
    }
    if (asked > answered) waiting = [];         // given up, and what waited for it
    askedAt = now;
    source.send({ ...message, ask: ++asked });
  }

  function heard(number) {
    if (number === undefined || number < asked) return;
    answered = number;
    if (waiting.length) ask(waiting.shift());
    else if (playing && remote() && !picture.live) requestAnimationFrame(() => playing && ask({ type: "key", key: "ArrowRight", wrap: true }));
  }

  function setPlaying(on) {
    playing = on;
    update();
    if (!on) {
      later();
      if (remote()) ask({ type: "settle" });
      return;
    }
    if (remote()) return ask({ type: "key", key: "ArrowRight", wrap: true });
    if (at === frames().length - 1) show(0);
    last = performance.now();
    requestAnimationFrame(function next(now) {
      if (!playing) return;
      const rate = 1000 / (picture.rate ?? 15);
      if (now - last >= rate) {
        last = now;
        if (at === frames().length - 1) return setPlaying(false);
        show(at + 1);
      }
      requestAnimationFrame(next);
    });
  }

  const actions = {
    " ": () => picture.live ? ask({ type: "key", key: " " }) : setPlaying(!playing),
    r: () => { playing = false; at = 0; update(); draw(); ask({ type: "key", key: "r" }); },
    f: () => document.fullscreenElement ? document.exitFullscreen() : around().requestFullscreen?.(),
    Home: () => remote() ? ask({ type: "key", key: "Home" }) : show(0),
    End: () => remote() ? ask({ type: "key", key: "End" }) : show(frames().length - 1),
    ArrowRight: () => remote() ? ask({ type: "key", key: "ArrowRight" }) : show(at + 1),
    ArrowLeft: () => remote() ? ask({ type: "key", key: "ArrowLeft" }) : show(at - 1),
    ArrowUp: () => remote() ? ask({ type: "key", key: "ArrowUp" }) : show(at + (picture.stride ?? 10)),
    ArrowDown: () => remote() ? ask({ type: "key", key: "ArrowDown" }) : show(at - (picture.stride ?? 10)),
    n: () => { at = 0; ask({ type: "key", key: "n" }); },
    b: () => { at = 0; ask({ type: "key", key: "b" }); },
    PageUp: () => actions.ArrowUp(),
    PageDown: () => actions.ArrowDown(),
  };
  for (let i = 1; i < 10; i++) actions[i] = () => ask({ type: "key", key: String(i) });

  function keydown(event) {
    if (event.key === "Escape" || (event.key === "Enter" && event.shiftKey)) return leave(event);
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (!actions[key] || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.tagName === "BUTTON" && key === " ") return;
    event.preventDefault();
    event.stopPropagation();
    if (playing && key !== " " && key !== "f") { playing = false; update(); }
    actions[key]();
  }

  // The handle, or the spot, nearest to the pointer.
  function nearest(event, kind = "handles") {
    const area = canvas.getBoundingClientRect(), x = event.clientX - area.left, y = event.clientY - area.top;
    let best = null, reach = 40;
    for (const row of frames()[at].rows) for (const panel of row) for (const mark of panel.marks) {
      if (mark.kind !== kind || !panel.X) continue;
      const v = painter.array(mark.xy);
      for (let i = 0; 2 * i < v.length; i++) {
        const distance = Math.hypot(panel.X(v[2 * i]) - x, panel.Y(v[2 * i + 1]) - y);
        if (distance < reach) { reach = distance; best = { panel, index: i, name: mark.name, to: mark.to?.[i] }; }
      }
    }
    return best;
  }

  canvas.addEventListener("pointerdown", event => {
    canvas.focus();
    held = source.send ? nearest(event) : null;
    const spot = nearest(event, "spots");
    if (held) canvas.setPointerCapture(event.pointerId);
    else if (spot) { setPlaying(false); show(spot.to); }
    else if (many() && !picture.live) setPlaying(!playing);
    event.preventDefault();
  });
  canvas.addEventListener("pointermove", event => {
    const spot = held || playing ? null : nearest(event, "spots");
    if (spot && spot.to !== at) show(spot.to);
    if (!held) { canvas.style.cursor = source.send && frames().length && nearest(event) ? "grab" : many() ? "pointer" : "default"; return; }
    const area = canvas.getBoundingClientRect();
    canvas.style.cursor = "grabbing";
    ask({ type: "drag", name: held.name, index: held.index,
      x: held.panel.backX(event.clientX - area.left), y: held.panel.backY(event.clientY - area.top) });
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { if (held) { held = null; ask({ type: "settle" }); } });
  box.addEventListener("keydown", keydown);
  slider.addEventListener("input", () => { playing = false; update(); show(+slider.value); });
  play.addEventListener("click", () => actions[" "]());
  reset.addEventListener("click", () => actions.r());
  full.addEventListener("click", () => actions.f());

  const watchSize = new ResizeObserver(later), watchTheme = new MutationObserver(later), dark = matchMedia("(prefers-color-scheme: dark)");
  watchSize.observe(box);
  watchTheme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  dark.addEventListener("change", later);
  document.addEventListener("fullscreenchange", later);
  // The kernel's controls beside this picture keep their keys from JupyterLab as well.
  const claim = event => around().contains(event.target) && event.target.setAttribute("data-lm-suppress-shortcuts", "true");
  document.addEventListener("focusin", claim);
  if (document.fullscreenEnabled === false) full.hidden = true;
  update();
  draw();

  return {
    replace(next, frame) {                     // another picture in the place of this one
      picture = next;
      if (frame !== undefined) at = frame;
      if (picture.live) at = frames().length - 1;
      update();
      draw();
      heard(next.ask);
    },
    words() { problem.textContent = source.problem ?? ""; update(); later(); },
    show(index) { if (index !== at) show(index); },
    close() {
      playing = false;
      clearTimeout(settling);
      watchSize.disconnect();
      watchTheme.disconnect();
      dark.removeEventListener("change", later);
      document.removeEventListener("fullscreenchange", later);
      document.removeEventListener("focusin", claim);
      box.remove();
    },
  };
}

// In a notebook: a picture that a model holds. `tail` messages add frames to it (a training that records itself).
function render({ model, el }) {
  const source = {
    get title() { return model.get("title"); },
    get caption() { return model.get("caption"); },
    get problem() { return model.get("problem"); },
    picture: model.get("picture"),
    hall: model.get("hall"),
    send: message => model.send(message),
    settled: (frame, png) => model.send({ type: "settled", frame }, undefined, [png]),
  };
  const view = mount(el, source);
  const replaced = () => view.replace(model.get("picture"));
  const worded = () => view.words();
  const message = (content, buffers) => {
    if (content.type !== "tail") return;
    const picture = model.get("picture");
    // Every view of the model hears this message; the model's picture grows once.
    if (picture.frames.length === content.from) {
      renumber(content.frames, picture.arrays.length);
      picture.arrays.push(...buffers);
      picture.frames.push(...content.frames);
      Object.assign(picture, content.set);
    }
    view.replace(picture);
  };
  model.on("change:picture", replaced);
  for (const name of ["title", "caption", "problem"]) model.on(`change:${name}`, worded);
  model.on("msg:custom", message);
  worded();
  return () => {
    model.off("change:picture", replaced);
    for (const name of ["title", "caption", "problem"]) model.off(`change:${name}`, worded);
    model.off("msg:custom", message);
    view.close();
  };
}

// Frames refer to arrays by number; those that come later follow those that are there.
function renumber(node, by) {
  if (Array.isArray(node)) node.forEach(n => renumber(n, by));
  else if (node && typeof node === "object") {
    if (Number.isInteger(node.at)) node.at += by;
    for (const value of Object.values(node)) renumber(value, by);
  }
}

export default { render };
