"use strict";
// The labelling page. The server holds the drawing; this page sends one change at a time and draws what comes back.
// Masks travel as {box: [x, y, w, h], runs}: counts of pixels row by row, outside and inside in turn.

const $ = (id) => document.getElementById(id);
const state = {
  project: null, index: 0, pair: null, instances: null, images: {}, classId: 1, selected: 0, tool: "click",
  candidate: null, history: [], points: [], box: null, polygon: [], stroke: null, cursor: null, on: "fused",
  view: { scale: 1, x: 0, y: 0 }, temperatures: null, clicksSpent: 0,
};
let overlay = document.createElement("canvas"), painted = document.createElement("canvas");
// busy: questions without an answer, and the first opening; unsaved: changes among them
let queue = Promise.resolve(), busy = 1, unsaved = 0, drawn = 0;
let coming = [];  // pictures of this pair that have not arrived
const PATIENCE = 300000;  // milliseconds for one answer

// ---- the server ----------------------------------------------------------------------------------------------------

function say(text, error = false) { $("status").textContent = text; $("status").className = error ? "error" : ""; }
function count(by) { busy += by; document.body.dataset.busy = busy; }

async function ask(path, body) {
  count(1);
  try {
    const signal = AbortSignal.timeout(PATIENCE);
    const answer = await fetch(path, body === undefined ? { signal } : { method: "POST", body: JSON.stringify(body), signal });
    const content = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
    if (!answer.ok) throw new Error(content.error || content.detail || `the server answered ${answer.status}`);
    return content;
  } catch (error) {
    const silent = error instanceof TypeError || error.name === "TimeoutError";
    throw silent ? new Error("the server does not answer; is fusionsam label still running?") : error;
  } finally { count(-1); }
}

function change(what) {  // one after another: each says which state it was made on; a function is asked in its turn
  const index = state.index;
  unsaved++;
  const job = queue.then(async () => {
    if (index !== state.index || !state.pair) return null;
    say("saving ...");
    try {
      const asked = typeof what === "function" ? what() : what;
      const answer = await ask(`/api/pairs/${index}/change`, { ...asked, revision: state.pair.revision });
      if (index === state.index) take(answer);
      say("saved");
      return answer;
    } catch (error) { say(error.message, true); lists(); return null; }  // boxes stand again as the pair does
  }).finally(() => { unsaved--; });
  queue = job;
  return job;
}

function take(answer) {
  const { box, values } = answer.patch, [x0, y0, w] = box, W = state.pair.size[1];
  for (let i = 0, at = 0; i < values.length; i += 2) {
    for (let left = values[i + 1]; left > 0;) {  // row by row
      const x = at % w, n = Math.min(left, w - x), start = (y0 + Math.floor(at / w)) * W + x0 + x;
      state.instances.fill(values[i], start, start + n);
      at += n; left -= n;
    }
  }
  const before = new Map(state.pair.objects.map((o) => [o.id, o.class]));
  const recolour = answer.objects.some((o) => before.has(o.id) && before.get(o.id) !== o.class);
  Object.assign(state.pair, { revision: answer.revision, objects: answer.objects, unsure: answer.unsure, done: answer.done });
  if (!answer.objects.some((o) => o.id === state.selected)) state.selected = 0;
  colour(recolour ? [0, 0, W, state.pair.size[0]] : box);
  const row = state.project.pairs[state.index];
  Object.assign(row, { unsure: answer.unsure, objects: answer.objects.length,
    status: answer.done ? "done" : answer.objects.length || answer.clicks ? "started" : "todo" });
  readTemperatures();
  lists();
  draw();
}

function colour([x0, y0, w, h]) {  // the overlay inside a box
  if (!w || !h) return;
  const W = state.pair.size[1], context = overlay.getContext("2d"), image = context.createImageData(w, h);
  const table = new Uint32Array(65536), pixels = new Uint32Array(image.data.buffer);
  for (const o of state.pair.objects) {
    const [red, green, blue] = state.project.classes[o.class].color;
    table[o.id] = (255 << 24 | blue << 16 | green << 8 | red) >>> 0;
  }
  for (let y = 0, i = 0; y < h; y++) {
    const row = (y0 + y) * W + x0;
    for (let x = 0; x < w; x++) pixels[i++] = table[state.instances[row + x]];
  }
  context.putImageData(image, x0, y0);
}

let opened = 0;
async function open(index) {
  if (index < 0 || index >= state.project.pairs.length) return;
  const mine = ++opened;  // only the pair that was asked for last is shown, whichever answer comes last
  await queue;
  if (mine !== opened) return;
  coming.forEach((image) => { if (!image.complete) image.src = ""; });  // or the few connections of a browser wait on
  coming = [];
  say("opening ...");
  let pair;
  try {
    do {  // what was drawn on the pair before, while this one came, is saved first
      await queue;
      pair = await ask(`/api/pairs/${index}`);
    } while (unsaved && mine === opened);
  } catch (error) {
    await queue;
    if (mine !== opened) return;
    // nothing may be drawn on the pair before
    Object.assign(state, { index, pair: null, images: {} });
    discard();
    return say(error.message, true);
  }
  if (mine !== opened) return;
  const [H, W] = pair.size;
  Object.assign(state, { index, pair, instances: new Uint16Array(H * W), images: {}, selected: 0, temperatures: null });
  discard();
  overlay.width = painted.width = W; overlay.height = painted.height = H;
  panes(); fit();
  take(pair);
  location.hash = index + 1;
  const load = (name) => new Promise((resolve) => {
    const image = new Image();
    coming.push(image);
    image.onload = () => { if (state.pair === pair) { state.images[name] = image; draw(); } resolve(true); };
    image.onerror = () => resolve(false);
    image.src = `/api/pairs/${index}/picture/${name}?v=${state.project.token}`;
  });
  count(1);
  // the fused picture last: the others need no network
  const loaded = await Promise.all([...pair.pictures].reverse().map(load));
  count(-1);
  if (state.pair === pair) say(loaded.every(Boolean) ? "ready" : "a picture could not be read", !loaded.every(Boolean));
}

async function readTemperatures() {
  const pair = state.pair;
  if (state.temperatures === false) return;
  try {
    const answer = await ask(`/api/pairs/${state.index}/temperatures`);
    if (state.pair !== pair) return;
    state.temperatures = answer.radiometric && {
      objects: new Map(answer.objects.map((o) => [o.id, o])), classes: new Map(answer.classes.map((o) => [o.class, o])),
    };
    lists(); draw();
  } catch (error) { if (state.pair === pair) { state.temperatures = false; say(error.message, true); } }
}

// ---- masks ---------------------------------------------------------------------------------------------------------

function toRuns(inside, w, h) {
  const runs = []; let value = false, n = 0;
  for (let i = 0; i < w * h; i++) {
    if (inside(i) !== value) { runs.push(n); n = 0; value = !value; }
    n++;
  }
  runs.push(n);
  return runs;
}

function tint(mask, canvas, [red, green, blue]) {
  const [, , w, h] = mask.box;
  canvas.width = Math.max(1, w); canvas.height = Math.max(1, h);
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer), colour = (255 << 24 | blue << 16 | green << 8 | red) >>> 0;
  let at = 0;
  mask.runs.forEach((n, i) => { if (i % 2) pixels.fill(colour, at, at + n); at += n; });
  context.putImageData(image, 0, 0);
  return canvas;
}

let askedFor = 0;
async function askMask() {
  const mine = ++askedFor, index = state.index;
  const last = state.history[state.history.length - 1];
  const previous = last && !state.box ? [last.answer.token, last.chosen] : null;
  say("asking ...");
  try {
    const answer = await ask(`/api/pairs/${index}/mask`, {
      points: state.points.map((p) => [p.x, p.y]), labels: state.points.map((p) => p.on), box: state.box, on: state.on, previous,
    });
    if (mine !== askedFor || index !== state.index) return;
    state.history.push({ answer, chosen: answer.best, points: [...state.points], box: state.box });
    showCandidate();
    say("");
  } catch (error) {
    if (mine !== askedFor) return;
    state.points.pop(); say(error.message, true); draw();
  }
}

function showCandidate() {
  const last = state.history[state.history.length - 1];
  if (!last) { state.candidate = null; } else {
    const mask = last.answer.masks[last.chosen];
    state.candidate = { mask, canvas: tint(mask, document.createElement("canvas"), [255, 40, 200]) };
  }
  lists(); draw();
}

function discard() {
  Object.assign(state, { candidate: null, history: [], points: [], box: null, polygon: [], stroke: null });
  askedFor++;
  lists(); draw();
}

async function accept(classId = state.classId) {
  if (!state.candidate) return;
  const { mask } = state.candidate, clicks = state.points.length + (state.box ? 1 : 0), on = state.on;
  discard();
  state.classId = classId;
  if (!mask.box[2]) return say("the mask is empty; click elsewhere", true);
  const answer = await change({ kind: "paint", ...mask, object: 0, class: classId, tool: "click", on, clicks });
  if (answer) { state.selected = answer.object; lists(); draw(); }
}

async function paintRegion(inside, box, tool) {
  const [, , w, h] = box;
  const runs = toRuns(inside, w, h);
  if (tool === "erase") return change({ kind: "erase", box, runs, tool });
  const classId = state.classId;
  const answer = await change(() => {  // the stroke before may have made the object that this one belongs to
    const object = state.selected && objectOf(state.selected)?.class === classId ? state.selected : 0;
    return { kind: "paint", box, runs, object, class: classId, tool };
  });
  if (answer) { state.selected = answer.object; lists(); draw(); }
}

function objectOf(id) { return state.pair?.objects.find((o) => o.id === id); }

async function chooseClass(id) {
  if (id < 1 || id >= state.project.classes.length) return;
  if (state.candidate) return accept(id);
  state.classId = id;
  if (state.selected && objectOf(state.selected)?.class !== id) await change({ kind: "class", object: state.selected, class: id });
  lists();
}

function undo() {
  if (state.polygon.length) { state.polygon.pop(); return draw(); }
  if (state.history.length) {  // the last click, not yet a change
    state.history.pop();
    const last = state.history[state.history.length - 1];
    state.points = last ? [...last.points] : []; state.box = last ? last.box : null;
    return showCandidate();
  }
  change({ kind: "undo" });
}

// ---- drawing -------------------------------------------------------------------------------------------------------

function panes() {
  if (!state.pair) return;
  const side = $("side").checked, names = side ? ["visible", "fused", "infrared"].filter((n) => state.pair.pictures.includes(n)) : ["one"];
  $("stage").className = side ? "side" : "";
  $("stage").replaceChildren(...names.map((name) => {
    const figure = document.createElement("figure"), canvas = document.createElement("canvas"), caption = document.createElement("figcaption");
    canvas.dataset.picture = name; canvas.tabIndex = 0;
    figure.append(canvas, caption);
    listen(canvas);
    return figure;
  }));
}

function canvases() { return [...document.querySelectorAll("#stage canvas")]; }

function fit() {
  const canvas = canvases()[0];
  if (!canvas || !state.pair) return;
  const [H, W] = state.pair.size, r = canvas.getBoundingClientRect(), scale = Math.min(r.width / W, r.height / H) || 1;
  state.view = { scale, x: (r.width - W * scale) / 2, y: (r.height - H * scale) / 2, fitted: true };
  draw();
}

function draw() { if (!drawn) drawn = requestAnimationFrame(() => { drawn = 0; canvases().forEach(render); }); }

function there(name) { return state.pair.pictures.includes(name) ? name : "fused"; }  // that every pair has

function shownPicture(canvas) {
  if (canvas.dataset.picture !== "one") return canvas.dataset.picture;
  return there(["visible", "fused", "infrared"][Math.round(+$("slider").value)]);
}

function render(canvas) {
  const r = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1, context = canvas.getContext("2d");
  if (canvas.width !== Math.round(r.width * ratio)) canvas.width = Math.round(r.width * ratio);
  if (canvas.height !== Math.round(r.height * ratio)) canvas.height = Math.round(r.height * ratio);
  context.setTransform(1, 0, 0, 1, 0, 0); context.clearRect(0, 0, canvas.width, canvas.height);
  if (!state.pair) return;
  const { scale, x, y } = state.view, [H, W] = state.pair.size;
  context.setTransform(scale * ratio, 0, 0, scale * ratio, x * ratio, y * ratio);
  context.imageSmoothingEnabled = scale < 2;
  const picture = (name, alpha) => {
    const image = state.images[name];
    if (!image || alpha <= 0) return;
    context.globalAlpha = alpha;
    context.filter = name === "infrared" && +$("brightness").value !== 1 ? `brightness(${$("brightness").value})` : "none";
    context.drawImage(image, 0, 0, W, H);
    context.filter = "none";
  };
  if (canvas.dataset.picture === "one") {
    const at = +$("slider").value, low = ["visible", "fused"][Math.min(1, Math.floor(at))], high = at < 1 ? "fused" : "infrared";
    picture(there(low), 1); picture(high, at - Math.min(1, Math.floor(at)));
  } else picture(canvas.dataset.picture, 1);
  canvas.nextSibling.textContent = state.images[shownPicture(canvas)] ? shownPicture(canvas) : `${shownPicture(canvas)} ...`;
  context.globalAlpha = +$("opacity").value;
  context.imageSmoothingEnabled = false;
  context.drawImage(overlay, 0, 0);
  context.globalAlpha = 0.6;
  if (state.candidate) context.drawImage(state.candidate.canvas, state.candidate.mask.box[0], state.candidate.mask.box[1]);
  if (state.stroke) context.drawImage(painted, 0, 0);
  context.globalAlpha = 1;
  marks(context, 1 / scale);
}

function marks(context, unit) {
  const ring = (x, y, fill, radius = 5) => {
    context.beginPath(); context.arc(x + 0.5, y + 0.5, radius * unit, 0, 7);
    context.fillStyle = fill; context.fill(); context.lineWidth = 1.5 * unit; context.strokeStyle = "#fff"; context.stroke();
  };
  const selected = objectOf(state.selected);
  context.lineWidth = 1.5 * unit;
  if (selected) { context.strokeStyle = "#fff"; context.strokeRect(...selected.box); }
  if (state.box) { const [a, b, c, d] = state.box; context.strokeStyle = "#ff28c8"; context.strokeRect(a, b, c - a, d - b); }
  state.points.forEach((p) => ring(p.x, p.y, p.on ? "#19c37d" : "#e53935"));
  if (state.polygon.length) {
    context.beginPath(); state.polygon.forEach(([x, y]) => context.lineTo(x, y)); context.strokeStyle = "#ff28c8"; context.stroke();
    state.polygon.forEach(([x, y]) => ring(x - 0.5, y - 0.5, "#ff28c8", 3));
  }
  // of the selected object, else of all objects of the class
  const { objects, classes } = state.temperatures || {};
  const heat = selected ? objects?.get(state.selected) : classes?.get(state.classId);
  if (heat && heat.hottest) { ring(...heat.hottest, "#ff3d00", 4); ring(...heat.coldest, "#2979ff", 4); }
  if (!state.cursor) return;
  const [x, y] = state.cursor;
  context.strokeStyle = "#fff"; context.lineWidth = unit; context.beginPath();
  if (state.tool === "brush" || state.tool === "erase") context.arc(x, y, +$("size").value / 2, 0, 7);
  else { context.moveTo(x - 8 * unit, y); context.lineTo(x + 8 * unit, y); context.moveTo(x, y - 8 * unit); context.lineTo(x, y + 8 * unit); }
  context.stroke();
}

// ---- the pointer ---------------------------------------------------------------------------------------------------

function listen(canvas) {
  let down = null;
  const fingers = new Map();
  const at = (event) => {
    const r = canvas.getBoundingClientRect();
    return [(event.clientX - r.x - state.view.x) / state.view.scale, (event.clientY - r.y - state.view.y) / state.view.scale];
  };
  const pixel = ([x, y]) => {
    const [H, W] = state.pair.size;
    return [Math.min(W - 1, Math.max(0, Math.floor(x))), Math.min(H - 1, Math.max(0, Math.floor(y)))];
  };
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("pointerleave", () => { state.cursor = null; draw(); });
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(canvas, event, Math.exp(-event.deltaY / 400)); }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    if (!state.pair) return;
    canvas.focus(); canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    const pan = state.tool === "move" || event.button === 1 || fingers.size > 1;
    const box = fingers.size > 1 && down ? down.box : state.box;  // of the mask, before a finger drags another
    down = { place: at(event), client: [event.clientX, event.clientY], view: { ...state.view }, pan, box, off: event.button === 2 || event.shiftKey || $("off").checked };
    if (fingers.size > 1) { state.stroke = null; state.box = box; return; }
    if (!pan && (state.tool === "brush" || state.tool === "erase")) { begin(); dab(at(event), at(event)); }
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!state.pair) return;
    const before = state.cursor;
    state.cursor = at(event);
    if (fingers.size === 2 && fingers.has(event.pointerId)) pinch(canvas, fingers, event);
    else if (down?.pan) Object.assign(state.view, { x: down.view.x + event.clientX - down.client[0], y: down.view.y + event.clientY - down.client[1], fitted: false });
    else if (down && state.stroke) dab(before || state.cursor, state.cursor);
    else if (down && state.tool === "click" && far(down, event)) state.box = boxOf(pixel(down.place), pixel(state.cursor));
    if (fingers.has(event.pointerId)) fingers.set(event.pointerId, [event.clientX, event.clientY]);
    draw();
  });
  const up = (event) => {
    fingers.delete(event.pointerId);
    const was = down;
    if (!was || !state.pair) return;
    if (fingers.size) {  // the finger that stays moves the picture on from where it is now
      down = { ...was, client: [...fingers.values()][0], view: { ...state.view } };
      return;
    }
    down = null;
    if (was.pan || event.type === "pointercancel") {
      state.stroke = null;
      if (!was.pan) state.box = was.box;
      return draw();
    }
    if (state.stroke) return finish();
    const [x, y] = pixel(at(event));
    if (state.tool === "click") { state.on = shownPicture(canvas); clicked(was, event, [x, y]); }
    else if (state.tool === "polygon") { state.polygon.push(at(event)); draw(); }
    else if (state.tool === "select") { state.selected = state.instances[y * state.pair.size[1] + x]; const o = objectOf(state.selected); if (o) state.classId = o.class; lists(); draw(); }
  };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  const far = (was, event) => Math.hypot(event.clientX - was.client[0], event.clientY - was.client[1]) > 5;
  const boxOf = (a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])];
  const clicked = (was, event, [x, y]) => {
    if (far(was, event)) {
      const box = boxOf(pixel(was.place), [x, y]);
      if (box[0] === box[2] || box[1] === box[3]) { state.box = null; return draw(); }
      state.box = box; state.points = [];
    } else if (was.off && !state.points.some((p) => p.on) && !state.box) {
      return say("first click on the object, then off it", true);
    } else state.points.push({ x, y, on: was.off ? 0 : 1 });
    draw(); askMask();
  };
}

function zoom(canvas, event, factor) {
  const r = canvas.getBoundingClientRect(), x = event.clientX - r.x, y = event.clientY - r.y;
  const scale = Math.min(60, Math.max(0.02, state.view.scale * factor)), k = scale / state.view.scale;
  state.view = { scale, x: x - (x - state.view.x) * k, y: y - (y - state.view.y) * k };
  draw();
}

function pinch(canvas, fingers, event) {
  const other = [...fingers].find(([id]) => id !== event.pointerId)[1], mine = fingers.get(event.pointerId);
  const span = (a) => Math.hypot(a[0] - other[0], a[1] - other[1]) || 1, now = [event.clientX, event.clientY];
  state.view.x += (now[0] - mine[0]) / 2; state.view.y += (now[1] - mine[1]) / 2;
  zoom(canvas, { clientX: (now[0] + other[0]) / 2, clientY: (now[1] + other[1]) / 2 }, span(now) / span(mine));
}

function begin() {
  const [H, W] = state.pair.size;
  painted.getContext("2d").clearRect(0, 0, W, H);
  state.stroke = { inside: new Uint8Array(H * W), box: [W, H, -1, -1] };
}

function dab(from, to) {  // discs along the way: a pixel is inside when its centre is
  const [H, W] = state.pair.size, radius = +$("size").value / 2, stroke = state.stroke, context = painted.getContext("2d");
  const steps = Math.max(1, Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) / Math.max(0.5, radius / 2)));
  context.fillStyle = state.tool === "erase" ? "#fff" : "#ff28c8";
  for (let i = 0; i <= steps; i++) {
    const cx = from[0] + (to[0] - from[0]) * i / steps, cy = from[1] + (to[1] - from[1]) * i / steps;
    const inner = Math.max(radius, 0.71);  // a brush of one pixel takes the pixel below it
    for (let y = Math.max(0, Math.floor(cy - inner)); y <= Math.min(H - 1, Math.ceil(cy + inner)); y++)
      for (let x = Math.max(0, Math.floor(cx - inner)); x <= Math.min(W - 1, Math.ceil(cx + inner)); x++) {
        if (Math.hypot(x + 0.5 - cx, y + 0.5 - cy) > inner || stroke.inside[y * W + x]) continue;
        stroke.inside[y * W + x] = 1;
        context.fillRect(x, y, 1, 1);
        const b = stroke.box;
        b[0] = Math.min(b[0], x); b[1] = Math.min(b[1], y); b[2] = Math.max(b[2], x); b[3] = Math.max(b[3], y);
      }
  }
}

async function finish() {
  const mine = state.stroke, { inside, box: [x0, y0, x1, y1] } = mine, W = state.pair.size[1], w = x1 - x0 + 1;
  if (x1 >= 0) await paintRegion((i) => inside[(y0 + Math.floor(i / w)) * W + x0 + (i % w)] === 1, [x0, y0, w, y1 - y0 + 1], state.tool);
  if (state.stroke === mine) state.stroke = null;  // else the next one was begun while this one was saved
  draw();
}

async function closePolygon() {
  const corners = state.polygon, [H, W] = state.pair.size;
  state.polygon = [];
  if (corners.length < 3) { say("a polygon needs three corners", true); return draw(); }
  const xs = corners.map((c) => c[0]), ys = corners.map((c) => c[1]), low = (v) => Math.max(0, Math.floor(Math.min(...v)));
  const x0 = low(xs), y0 = low(ys), w = Math.min(W, Math.ceil(Math.max(...xs))) - x0, h = Math.min(H, Math.ceil(Math.max(...ys))) - y0;
  if (w < 1 || h < 1) return draw();
  const canvas = document.createElement("canvas"); canvas.width = w; canvas.height = h;
  const context = canvas.getContext("2d"); context.translate(-x0, -y0); context.beginPath();
  corners.forEach(([x, y]) => context.lineTo(x, y)); context.fill();
  const data = context.getImageData(0, 0, w, h).data;
  await paintRegion((i) => data[4 * i + 3] > 127, [x0, y0, w, h], "polygon");
}

// ---- lists and keys ------------------------------------------------------------------------------------------------

function button(parts, on, act) {
  const made = document.createElement("button");
  made.append(...parts); made.classList.toggle("on", on); made.onclick = act;
  return made;
}
function swatch(color) { const made = document.createElement("span"); made.className = "swatch"; made.style.background = `rgb(${color})`; return made; }
function heat(read) {
  if (!read || read.mean === null) return [];
  const small = document.createElement("small"), c = (v) => v.toFixed(1);
  small.textContent = `${c(read.minimum)} to ${c(read.maximum)}, mean ${c(read.mean)}, 95 % ${c(read.p95)} \u00b0C, ${read.area} px`;
  return [small];
}
function key(text) { const made = document.createElement("kbd"); made.textContent = text; return made; }

function lists() {
  if (!state.project) return;
  const { classes, pairs } = state.project, done = pairs.filter((p) => p.status === "done").length;
  $("classes").replaceChildren(...classes.slice(1).map((c) =>
    button([swatch(c.color), c.name, ...(c.id < 10 ? [key(c.id)] : []), ...heat(state.temperatures?.classes?.get(c.id))], c.id === state.classId, () => chooseClass(c.id))));
  $("pair").replaceChildren(...pairs.map((p, i) => new Option(
    `${{ done: "\u2713", started: "\u2026", todo: "\u00a0" }[p.status]} ${p.id}${p.unsure ? " ?" : ""}`, i, false, i === state.index)));
  $("progress").max = pairs.length; $("progress").value = done; $("count").textContent = `${done} of ${pairs.length} done`;
  document.querySelectorAll("[data-tool]").forEach((b) => b.classList.toggle("on", b.dataset.tool === state.tool));
  const last = state.history[state.history.length - 1];
  $("masks").replaceChildren(...(last ? last.answer.masks.map((m, i) =>
    button([`${i + 1}: ${m.score.toFixed(2)}`], i === last.chosen, () => { last.chosen = i; showCandidate(); })) : ["click on an object, or drag a box"]));
  $("accept").disabled = $("discard").disabled = !state.candidate;
  if (!state.pair) return;
  $("unsure").checked = state.pair.unsure; $("done").checked = state.pair.done;
  $("objects-count").textContent = `(${state.pair.objects.length})`;
  $("objects").replaceChildren(...state.pair.objects.map((o) => {
    const parts = [swatch(classes[o.class].color), `${o.id} ${classes[o.class].name}`, ...heat(state.temperatures?.objects?.get(o.id))];
    return button(parts, o.id === state.selected, () => { state.selected = o.id; state.classId = o.class; lists(); draw(); });
  }));
}

function tool(name) { if (state.tool !== name) { state.tool = name; discard(); } }
function toggle(id) { $(id).checked = !$(id).checked; $(id).dispatchEvent(new Event("change")); }
function remove() { if (state.selected) change({ kind: "delete", object: state.selected }); }
function nextMask() { const last = state.history[state.history.length - 1]; if (last) { last.chosen = (last.chosen + 1) % last.answer.masks.length; showCandidate(); } }
function resize(by) { $("size").value = +$("size").value + by; $("sized").textContent = $("size").value; draw(); }

const KEYS = {
  c: () => tool("click"), b: () => tool("brush"), e: () => tool("erase"), p: () => tool("polygon"), s: () => tool("select"), m: () => tool("move"),
  z: undo, y: () => change({ kind: "redo" }), a: () => change({ kind: "propose" }), n: () => queue.then(() => { state.selected = 0; lists(); draw(); }),
  f: fit, u: () => toggle("unsure"), d: () => toggle("done"), v: () => toggle("side"), Tab: nextMask,
  Enter: () => (state.polygon.length ? closePolygon() : accept()), Escape: discard, Delete: remove, Backspace: remove,
  ArrowRight: () => open(state.index + 1), ArrowLeft: () => open(state.index - 1), "[": () => resize(-2), "]": () => resize(2),
};

document.addEventListener("keydown", (event) => {
  if (!state.project || event.altKey || event.metaKey || (event.ctrlKey && !"zy".includes(event.key))) return;
  if (event.target.matches("select, input[type=text]")) return;
  if (event.target.matches("input[type=range]") && event.key.startsWith("Arrow")) return;
  if (event.target.matches("button") && event.key === "Enter" && !state.polygon.length && !state.candidate) return;
  const act = /^[1-9]$/.test(event.key) ? () => chooseClass(+event.key) : KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act || (event.key === "Tab" && !state.candidate)) return;
  event.preventDefault();
  act();
});

document.querySelectorAll("[data-tool]").forEach((b) => (b.onclick = () => tool(b.dataset.tool)));
for (const [id, act] of Object.entries({
  previous: () => open(state.index - 1), next: () => open(state.index + 1), undo, redo: KEYS.y, propose: KEYS.a, fit, new: KEYS.n,
  delete: remove, accept: () => accept(), discard, clear: () => confirm("Remove every object of this pair?") && change({ kind: "clear" }),
})) $(id).onclick = act;
$("pair").onchange = () => { open(+$("pair").value); $("pair").blur(); };
$("unsure").onchange = () => change({ kind: "mark", unsure: $("unsure").checked });
$("done").onchange = () => change({ kind: "mark", done: $("done").checked });
$("side").onchange = () => { panes(); fit(); };
for (const id of ["slider", "opacity", "brightness"]) $(id).oninput = draw;
$("size").oninput = () => resize(0);
window.addEventListener("resize", () => (state.view.fitted ? fit() : draw()));  // what was zoomed stays where it is
window.addEventListener("beforeunload", (event) => { if (unsaved) event.preventDefault(); });

// after the page itself: else a browser counts the pictures as part of it, and waits for a network to fuse them
window.addEventListener("load", async () => {
  try { state.project = await ask("/api/project"); } catch (error) { count(-1); return say(error.message, true); }
  $("train").textContent = state.project.train;
  const first = state.project.pairs.findIndex((p) => p.status !== "done");
  const wanted = parseInt(location.hash.slice(1), 10) - 1;
  await open(wanted >= 0 && wanted < state.project.pairs.length ? wanted : Math.max(0, first));
  count(-1);
});
