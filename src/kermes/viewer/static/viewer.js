// The page of a result: a picture to pan and zoom (OpenSeadragon), a table (Tabulator), and one object in detail.
// The server draws, sorts, filters and chooses colours; here is only what the reader sees and does. All of the view is
// in the address, so that the address opens the same view again.

const $ = (id) => document.getElementById(id);
const DEFAULT_COLUMNS = ["object_id", "blend_id", "outcome", "model", "chi2"];
const LAYERS = ["image", "model", "residual"];
const PAGE = 200; // rows of the table that are asked for at a time
const REACH = 12; // pixels of the screen within which a click finds an object
const BLINK_MS = 700;

let info; // what the server says of the result
let viewer; // OpenSeadragon
let table; // Tabulator
let ids, places, marks; // numbers, places (x, then y) and colours of all objects
let rowOf = new Map(); // row of each object by its number
let pending = null; // changes of a blend that are not fitted yet
let picking = null; // what the next click in the picture means: "add" or "move"
let blinking = null; // timer

const state = {
  layer: "image", band: "", brightness: 0, peaks: true, footprints: false, color: "outcome",
  columns: [], filters: {}, sort: "", descending: false, object: null,
};

// ---------------------------------------------------------------- the server

function tell(text, isError = false) {
  $("message").textContent = text;
  $("message").classList.toggle("error", isError);
  $("message").hidden = false;
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => { $("message").hidden = true; }, 8000);
}

const complain = (text) => tell(text, true);

async function ask(path, query = {}) {
  const response = await fetch(`${path}?${new URLSearchParams(query)}`);
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

const askJson = async (path, query) => (await ask(path, query)).json();

async function send(path, content) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Kermes": info.run },
    body: JSON.stringify(content),
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// Show why something failed, instead of failing silently.
const trying = (action) => async (...args) => {
  try { return await action(...args); } catch (error) { complain(error.message); }
};

const later = (action, ms) => {
  let timer;
  return (...args) => { clearTimeout(timer); timer = setTimeout(() => action(...args), ms); };
};

// ---------------------------------------------------------------- coordinates
// Pixels of the picture are counted from its upper left corner; those of the coadd from below, as on the sky.

const toPicture = (y, x) => [x - info.origin[1] + 0.5, info.height - (y - info.origin[0] + 0.5)];
const toCoadd = (px, py) => [info.height - py - 0.5 + info.origin[0], px - 0.5 + info.origin[1]];

function onScreen() {
  const zero = viewer.viewport.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
  const one = viewer.viewport.pixelFromPoint(new OpenSeadragon.Point(1, 0), true);
  return { x: zero.x, y: zero.y, scale: (one.x - zero.x) / info.width };
}

function pictureOf(position) {
  const { x, y, scale } = onScreen();
  return [(position.x - x) / scale, (position.y - y) / scale];
}

function lookAt(y, x, width = null, immediately = false) {
  const [px, py] = toPicture(y, x);
  const bounds = viewer.viewport.getBounds();
  const wide = width === null ? bounds.width : width / info.width;
  const high = wide * bounds.height / bounds.width;
  const box = new OpenSeadragon.Rect(px / info.width - wide / 2, py / info.width - high / 2, wide, high);
  viewer.viewport.fitBounds(box, immediately);
}

// ---------------------------------------------------------------- the address

function writeAddress() {
  const bounds = viewer.viewport.getBounds();
  const center = bounds.getCenter();
  const [y, x] = toCoadd(center.x * info.width, center.y * info.width);
  const words = {
    // Of a pixel, which may have 40 on the screen, a thousandth.
    y: y.toFixed(3), x: x.toFixed(3), width: (bounds.width * info.width).toFixed(3),
    layer: state.layer, band: state.band, brightness: state.brightness, peaks: state.peaks ? "" : "no",
    footprints: state.footprints ? "yes" : "", color: state.color === "outcome" ? "" : state.color,
    columns: state.columns.join() === defaultColumns().join() ? "" : state.columns.join(),
    filter: Object.keys(state.filters).length ? JSON.stringify(state.filters) : "",
    sort: state.sort, descending: state.descending ? "yes" : "", object: state.object ?? "",
  };
  const query = new URLSearchParams(Object.entries(words).filter(([, value]) => value !== "" && value !== 0));
  history.replaceState(null, "", `#${query}`);
}

const remember = later(writeAddress, 150);

function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  const known = new Set(info.columns.map((column) => column.name));
  const column = (name, otherwise) => (known.has(words.get(name)) ? words.get(name) : otherwise);
  state.layer = [...info.layers, "blink"].includes(words.get("layer")) ? words.get("layer") : info.layers[0];
  state.band = info.bands.includes(words.get("band")) ? words.get("band") : "";
  state.brightness = Number(words.get("brightness")) || 0;
  state.peaks = words.get("peaks") !== "no";
  state.footprints = words.get("footprints") === "yes";
  state.color = column("color", "outcome");
  state.columns = (words.get("columns") || "").split(",").filter((name) => known.has(name));
  if (!state.columns.length) state.columns = defaultColumns();
  state.filters = {};
  try {
    for (const [name, text] of Object.entries(JSON.parse(words.get("filter") || "{}"))) {
      if (known.has(name)) state.filters[name] = String(text);
    }
  } catch { complain("the filter in the address cannot be read"); }
  for (const name of Object.keys(state.filters)) if (!state.columns.includes(name)) state.columns.push(name);
  state.sort = column("sort", "");
  state.descending = words.get("descending") === "yes";
  state.object = words.get("object") ? Number(words.get("object")) : null;
  const [y, x, width] = ["y", "x", "width"].map((name) => parseFloat(words.get(name)));
  return Number.isFinite(y + x + width) && width > 0 ? { y, x, width } : null;
}

function defaultColumns() {
  const known = new Set(info.columns.map((column) => column.name));
  return [...DEFAULT_COLUMNS, ...info.bands.map((band) => `${band}_flux`)].filter((name) => known.has(name));
}

// ---------------------------------------------------------------- the picture

const items = {}; // what OpenSeadragon draws, by name

function tileSource(name) {
  const finer = name === "footprints" ? info.finest : 1;
  const width = info.width * finer, height = info.height * finer;
  const maxLevel = Math.max(1, Math.ceil(Math.log2(Math.max(width, height))));
  const query = new URLSearchParams({ v: `${info.run}-${info.version}` });
  if (name === "footprints") query.set("color", state.color);
  else {
    if (state.band) query.set("band", state.band);
    if (name !== "residual" && state.brightness) query.set("brightness", state.brightness);
  }
  return {
    width, height, tileSize: info.tile, tileOverlap: 0, maxLevel,
    minLevel: Math.max(0, Math.ceil(Math.log2(info.tile)) - 1),
    getTileUrl: (level, x, y) => `tiles/${name}/${level}/${x}_${y}?${query}`,
  };
}

function show(name) {
  const index = [...LAYERS, "footprints"].filter((each) => each in items || each === name).indexOf(name);
  return new Promise((resolve) => {
    viewer.addTiledImage({
      tileSource: tileSource(name), x: 0, y: 0, width: 1, index, replace: name in items, opacity: 0,
      success: ({ item }) => { items[name] = item; applyLayers(); resolve(item); },
    });
  });
}

function applyLayers() {
  const isBlinking = state.layer === "blink";
  const front = isBlinking ? (applyLayers.turn ? "model" : "image") : state.layer;
  for (const [name, item] of Object.entries(items)) {
    item.setPreload(isBlinking && name !== "residual");
    item.setOpacity(name === "footprints" ? Number(state.footprints) : Number(name === front));
  }
  for (const button of $("layers").children) {
    const { layer } = button.dataset;
    button.hidden = layer === "blink" ? info.layers.length < 2 : !info.layers.includes(layer);
    button.classList.toggle("on", layer === state.layer);
  }
  clearInterval(blinking);
  if (isBlinking) {
    blinking = setInterval(() => { applyLayers.turn = !applyLayers.turn; applyLayers(); }, BLINK_MS);
  }
}

function setLayer(layer) {
  state.layer = layer;
  applyLayers();
  remember();
}

async function redraw(names = info.layers) {
  await Promise.all(names.map(show));
}

async function watchDrawing() {
  let seen = info.drawn;
  while (info.drawn < 1) {
    $("progress").textContent = `drawing models: ${Math.floor(100 * info.drawn)} %`;
    await new Promise((resolve) => { setTimeout(resolve, 500); });
    info.drawn = (await askJson("api/state")).drawn;
    if (info.drawn > seen + 0.1 || info.drawn === 1) {
      seen = info.drawn;
      for (const name of ["model", "residual"]) items[name]?.reset();
    }
  }
  $("progress").textContent = "";
}

// ---------------------------------------------------------------- marks

let canvas; // over the picture
let seen = new Float64Array(0); // number of each object on the screen, and where

// What was drawn last stays where it is while the picture under it is still loading.
function followPicture() {
  const { x, y, scale } = onScreen();
  if (`${x} ${y} ${scale}` !== drawMarks.place) drawMarks();
}

function drawMarks() {
  if (!canvas || !places) return;
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth, clientHeight } = $("picture");
  const [wide, high] = [Math.round(clientWidth * ratio), Math.round(clientHeight * ratio)];
  if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
  const context = canvas.getContext("2d");
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, wide, high);
  const { x: x0, y: y0, scale } = onScreen();
  drawMarks.place = `${x0} ${y0} ${scale}`;
  const n = ids.length;
  if (state.peaks && marks) {
    if (seen.length < 3 * n) seen = new Float64Array(3 * n);
    let end = 0;
    for (let k = 0; k < n; k += 1) {
      if (!marks[4 * k + 3]) continue;
      const x = (x0 + places[k] * scale) * ratio, y = (y0 + places[n + k] * scale) * ratio;
      if (x > -9 && y > -9 && x < wide + 9 && y < high + 9) {
        seen[end] = k; seen[end + 1] = x; seen[end + 2] = y;
        end += 3;
      }
    }
    const shown = seen.subarray(0, end);
    // From afar dots, the smaller the denser, so that they do not hide what they mark.
    const between = Math.sqrt((info.width * scale) * (info.height * scale) / n);
    if (end / 3 > 1500) dots(context, shown, wide, high, Math.round(ratio * Math.min(3, Math.max(1, between / 3))));
    else rings(context, shown, ratio, Math.min(9, Math.max(3, 2 * scale)));
  }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  const sign = (y, x, color, text) => {
    const [px, py] = toPicture(y, x);
    context.font = "bold 14px system-ui";
    context.beginPath();
    context.arc(x0 + px * scale, y0 + py * scale, 11, 0, 2 * Math.PI);
    // With a dark edge, to be seen on white too.
    for (const [shade, width] of [["#000", 5], [color, 2]]) {
      context.strokeStyle = shade;
      context.lineWidth = width;
      context.stroke();
    }
    context.strokeStyle = "#000";
    context.lineWidth = 3;
    context.strokeText(text, x0 + px * scale + 14, y0 + py * scale + 5);
    context.fillStyle = color;
    context.fillText(text, x0 + px * scale + 14, y0 + py * scale + 5);
  };
  const placeOf = (id) => { const k = rowOf.get(id); return toCoadd(places[k], places[n + k]); };
  if (state.object !== null && rowOf.has(state.object)) sign(...placeOf(state.object), "#fff", String(state.object));
  if (pending) {
    for (const [y, x] of pending.add) sign(y, x, "#3f3", "+");
    for (const id of pending.remove) sign(...placeOf(id), "#f55", "×");
    for (const [y, x] of Object.values(pending.move)) sign(y, x, "#ff3", "→");
  }
}

// Thousands of marks: straight into the pixels.
function dots(context, shown, wide, high, side) {
  const image = context.createImageData(wide, high);
  const pixels = new Uint32Array(image.data.buffer);
  const colors = new Uint32Array(marks.buffer);
  for (let k = 0; k < shown.length; k += 3) {
    const left = Math.round(shown[k + 1] - side / 2), top = Math.round(shown[k + 2] - side / 2);
    for (let y = Math.max(top, 0); y < Math.min(top + side, high); y += 1) {
      for (let x = Math.max(left, 0); x < Math.min(left + side, wide); x += 1) pixels[y * wide + x] = colors[shown[k]];
    }
  }
  context.putImageData(image, 0, 0);
}

function rings(context, shown, ratio, radius) {
  context.lineWidth = 1.5 * ratio;
  for (let k = 0; k < shown.length; k += 3) {
    const at = 4 * shown[k];
    context.strokeStyle = `rgb(${marks[at]} ${marks[at + 1]} ${marks[at + 2]})`;
    context.beginPath();
    context.arc(shown[k + 1], shown[k + 2], radius * ratio, 0, 2 * Math.PI);
    context.stroke();
  }
}

function nearest(position) {
  const { x: x0, y: y0, scale } = onScreen();
  const n = ids.length;
  let best = null, least = REACH ** 2;
  for (let k = 0; k < n; k += 1) {
    if (!marks[4 * k + 3]) continue;
    const distance = (x0 + places[k] * scale - position.x) ** 2 + (y0 + places[n + k] * scale - position.y) ** 2;
    if (distance < least) [best, least] = [ids[k], distance];
  }
  return best;
}

async function loadPlaces() {
  const content = await (await ask("api/positions")).arrayBuffer();
  const n = content.byteLength / 16;
  ids = new Float64Array(content, 0, n);
  places = new Float32Array(content, 8 * n, 2 * n);
  rowOf = new Map(Array.from(ids, (id, k) => [id, k]));
}

async function loadMarks() {
  const query = { color: state.color, filter: JSON.stringify(state.filters) };
  const turn = loadMarks.turn = (loadMarks.turn ?? 0) + 1;
  const content = await (await ask("api/marks", query)).arrayBuffer();
  if (turn !== loadMarks.turn) return; // another colour or filter was chosen meanwhile
  marks = new Uint8Array(content);
  drawMarks();
}

const number = (value) => (Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2)
  : String(Number(value.toPrecision(4))));

async function loadLegend() {
  const legend = await askJson("api/legend", { color: state.color });
  const parts = [Object.assign(document.createElement("div"), { textContent: legend.title })];
  if (legend.entries) {
    for (const { label, color, count } of legend.entries) {
      const line = document.createElement("div");
      const dot = Object.assign(document.createElement("span"), { className: "dot" });
      dot.style.background = color;
      line.append(dot, `${label}: ${count}`);
      parts.push(line);
    }
  } else {
    const bar = Object.assign(document.createElement("div"), { className: "bar" });
    bar.style.background = `linear-gradient(to right, ${legend.colors.join()})`;
    const ends = Object.assign(document.createElement("div"), { className: "ends" });
    for (const end of legend.log ? [legend.low, "log", legend.high] : [legend.low, legend.high]) {
      ends.append(Object.assign(document.createElement("span"), { textContent: end === "log" ? end : number(end) }));
    }
    parts.push(bar, ends);
  }
  $("legend").replaceChildren(...parts);
}

async function setColor(name) {
  state.color = $("color").value = name;
  remember();
  await Promise.all([loadMarks(), loadLegend(), show("footprints")]);
}

// ---------------------------------------------------------------- the table

function columnOf(name) {
  const column = info.columns.find((each) => each.name === name);
  const isNumber = column.kind === "number" || column.kind === "whole";
  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  return {
    title: name, field: name, headerFilter: "input", headerFilterPlaceholder: " ", headerFilterLiveFilter: true,
    headerTooltip: escaped(column.description + (column.unit ? ` [${column.unit}]` : "")),
    hozAlign: isNumber ? "right" : "left",
    formatter: (cell) => {
      const value = cell.getValue();
      if (value === null || value === undefined) return ""; // none, or not loaded yet
      return typeof value === "boolean" ? (value ? "yes" : "") : column.kind === "number" ? number(value)
        : escaped(String(value));
    },
    headerMenu: [
      { label: "Colour by this", action: trying(() => setColor(name)) },
      { label: "Remove this column", action: () => dropColumn(name) },
    ],
  };
}

function makeTable() {
  table?.destroy();
  table = new Tabulator("#table", {
    height: "100%", layout: "fitDataFill", index: "object_id", columns: state.columns.map(columnOf),
    ajaxURL: "api/rows", ajaxRequestFunc: (url, config, params) => loadRows(params),
    progressiveLoad: "scroll", progressiveLoadScrollMargin: 600, paginationSize: PAGE, sortMode: "remote",
    filterMode: "remote", placeholder: "No object satisfies the filters", headerSortTristate: true,
    initialSort: state.sort ? [{ column: state.sort, dir: state.descending ? "desc" : "asc" }] : [],
    initialHeaderFilter: Object.entries(state.filters).map(([field, value]) => ({ field, value })),
    rowFormatter: (row) => row.getElement().classList.toggle("chosen", row.getData().object_id === state.object),
  });
  table.on("rowClick", trying((event, row) => select(row.getData().object_id, true)));
}

async function loadRows(params) {
  const filters = Object.fromEntries((params.filter ?? []).map(({ field, value }) => [field, String(value)]));
  const sort = params.sort?.[0];
  const changed = JSON.stringify(filters) !== JSON.stringify(state.filters);
  const turn = loadRows.turn = (loadRows.turn ?? 0) + 1;
  [state.filters, state.sort, state.descending] = [filters, sort?.field ?? "", sort?.dir === "desc"];
  try {
    const { total, rows } = await askJson("api/rows", {
      columns: [...new Set(["object_id", ...state.columns])].join(), filter: JSON.stringify(filters),
      sort: state.sort, descending: state.descending, first: (params.page - 1) * PAGE, n: PAGE,
    });
    // An answer that was overtaken by that to a later question says nothing of what is shown.
    if (turn === loadRows.turn) $("count").textContent = total === info.n_objects ? `${total} objects` : `${total} of ${info.n_objects} objects`;
    remember();
    if (changed) await loadMarks();
    return { data: rows, last_page: Math.max(1, Math.ceil(total / PAGE)) };
  } catch (error) {
    complain(error.message); // half a condition, as one types it, is none yet
    return { data: [], last_page: 1 };
  }
}

async function addColumn(name) {
  if (state.columns.includes(name) || !info.columns.some((column) => column.name === name)) return;
  state.columns.push(name);
  await table.addColumn(columnOf(name));
  await table.setData("api/rows");
}

async function dropColumn(name) {
  if (state.columns.length === 1) return;
  state.columns = state.columns.filter((each) => each !== name);
  table.setHeaderFilterValue(name, "");
  await table.deleteColumn(name);
  remember();
}

// ---------------------------------------------------------------- one object

async function select(wanted, center = false) {
  const id = rowOf.has(wanted) ? wanted : null;
  const before = state.object;
  state.object = id;
  remember();
  drawMarks();
  for (const each of [before, id]) {
    const row = each !== null && table.getRow(each); // false where it is not loaded
    if (row) row.getElement().classList.toggle("chosen", each === id);
  }
  if (id === null) {
    const hint = { className: "hint", textContent: "Click an object in the picture or in the table." };
    $("side").replaceChildren(Object.assign(document.createElement("p"), hint));
    return;
  }
  const object = await askJson(`api/objects/${id}`);
  if (state.object !== id) return; // another one was chosen meanwhile
  if (center) lookAt(object.y, object.x);
  showObject(object);
}

function showObject(object) {
  if (pending && pending.blend_id !== object.blend_id) pending = null;
  const side = $("side");
  side.innerHTML = object.html; // written and escaped by the report
  side.scrollTop = 0;
  const line = document.createElement("div");
  line.append(`Blend ${object.blend_id}: `);
  if (object.members.length > 40) line.append(`${object.members.length} objects `);
  for (const id of object.members.slice(0, 40)) {
    const link = Object.assign(document.createElement("button"), { textContent: id, disabled: id === object.object_id });
    link.addEventListener("click", trying(() => select(id)));
    line.append(link, " ");
  }
  const center = Object.assign(document.createElement("button"), { textContent: "Centre" });
  center.addEventListener("click", () => lookAt(object.y, object.x));
  side.querySelector("h2").append(" ", center);
  side.querySelector("h2").after(line);
  if (info.can_edit) {
    line.after(editor(object));
  }
}

// ---------------------------------------------------------------- edits

function startEdit(blendId) {
  if (!pending || pending.blend_id !== blendId) pending = { blend_id: blendId, add: [], remove: [], move: {}, settings: [] };
  return pending;
}

function pick(what) {
  picking = what;
  $("picture").classList.toggle("picking", what !== null);
  $("mode").hidden = what === null;
  $("mode").textContent = what === "add" ? "Click where the new peak is (Esc: never mind)"
    : "Click where the peak is (Esc: never mind)";
}

function editor(object) {
  const box = Object.assign(document.createElement("div"), { className: "edit", id: "editor" });
  const button = (text, title, action, disabled = false) => {
    const made = Object.assign(document.createElement("button"), { textContent: text, title, disabled });
    made.addEventListener("click", trying(async () => { await action(); drawMarks(); }));
    return made;
  };
  const again = () => { box.replaceWith(editor(object)); drawMarks(); };
  const edit = pending ?? { add: [], remove: [], move: {}, settings: [] };
  const isRemoved = edit.remove.includes(object.object_id);
  const head = Object.assign(document.createElement("strong"), { textContent: `Fit blend ${object.blend_id} anew` });
  const tools = Object.assign(document.createElement("div"), { className: "row" });
  tools.append(
    button("Add peak", "Click where it is", () => { startEdit(object.blend_id); pick("add"); }),
    button("Move", "Move the peak of this object", () => { startEdit(object.blend_id); pick("move"); }),
    button(isRemoved ? "Keep" : "Remove", "Take this object out", () => {
      const { remove } = startEdit(object.blend_id);
      if (isRemoved) remove.splice(remove.indexOf(object.object_id), 1); else remove.push(object.object_id);
      again();
    }),
  );
  const settings = Object.assign(document.createElement("input"), {
    id: "settings", placeholder: "settings, such as model=scarlet-lite", size: 32, value: edit.settings.join(" "),
  });
  settings.addEventListener("change", () => {
    startEdit(object.blend_id).settings = settings.value.split(/\s+/).filter(Boolean);
    again();
  });
  const changes = document.createElement("ul");
  const item = (text) => changes.append(Object.assign(document.createElement("li"), { textContent: text }));
  for (const [y, x] of edit.add) item(`new peak at y = ${y.toFixed(1)}, x = ${x.toFixed(1)}`);
  for (const id of edit.remove) item(`without object ${id}`);
  for (const [id, [y, x]] of Object.entries(edit.move)) item(`object ${id} at y = ${y.toFixed(1)}, x = ${x.toFixed(1)}`);
  const go = Object.assign(document.createElement("div"), { className: "row" });
  go.append(
    button("Refit", "Fit this blend anew", () => refit(startEdit(object.blend_id))),
    button("Clear", "Forget these changes", () => { pending = null; pick(null); again(); }, !pending),
  );
  const past = Object.assign(document.createElement("div"), { className: "row" });
  past.append(
    `${info.edits.length} ${info.edits.length === 1 ? "refit" : "refits"} kept in ${info.edits_file}`,
    button("Undo last", "Take back the last refit", async () => { pending = null; await changed(await send("api/undo", {})); },
      !info.edits.length),
    button("Write result", "Write the result with all refits beside it", async () => {
      tell(`written: ${(await send("api/write", {})).path}`);
    }),
  );
  box.append(head, tools, settings, changes, go, past);
  return box;
}

async function refit(edit) {
  $("progress").textContent = "fitting";
  try {
    const answer = await send("api/refit", edit);
    pending = null;
    pick(null);
    const stays = state.object !== null && !edit.remove.includes(state.object);
    await changed(answer, stays ? state.object : answer.after.rows[0]?.object_id ?? null);
    $("side").prepend(comparison(edit, answer));
  } finally {
    $("progress").textContent = "";
  }
}

function comparison(edit, answer) {
  const box = Object.assign(document.createElement("div"), { id: "comparison" });
  box.append(Object.assign(document.createElement("h2"), { textContent: `Blend ${edit.blend_id} before and after` }));
  for (const side of ["before", "after"]) {
    const { picture, chi2, rows } = answer[side];
    const title = `${side}: χ² ${chi2 === null ? "not known" : chi2.toFixed(3)}, ${rows.length} ${rows.length === 1 ? "object" : "objects"}`;
    box.append(
      Object.assign(document.createElement("h3"), { textContent: title }),
      Object.assign(document.createElement("img"), { src: picture, alt: side }),
    );
    const list = document.createElement("table");
    const names = Object.keys(rows[0] ?? {});
    const line = (cells, tag) => {
      const row = list.insertRow();
      for (const text of cells) row.append(Object.assign(document.createElement(tag), { textContent: text }));
    };
    line(names, "th");
    for (const row of rows) line(names.map((name) => (typeof row[name] === "number" ? number(row[name]) : row[name])), "td");
    box.append(list);
  }
  return box;
}

// Another result is shown from now on.
async function changed(answer, object = state.object) {
  Object.assign(info, { version: answer.version, drawn: answer.drawn, n_objects: answer.n_objects, edits: answer.edits });
  await loadPlaces();
  await Promise.all([loadMarks(), loadLegend(), redraw([...info.layers, "footprints"]), table.setData("api/rows")]);
  await select(object);
}

// ---------------------------------------------------------------- the controls

function applyControls() {
  $("band").value = state.band;
  $("brightness").value = state.brightness;
  $("peaks").checked = state.peaks;
  $("footprints").checked = state.footprints;
  $("color").value = state.color;
}

function connect() {
  for (const button of $("layers").children) {
    button.addEventListener("click", () => setLayer(button.dataset.layer));
  }
  $("band").addEventListener("change", trying(async () => { state.band = $("band").value; remember(); await redraw(); }));
  $("brightness").addEventListener("input", later(trying(async () => {
    state.brightness = Number($("brightness").value);
    remember();
    await redraw(info.layers.filter((name) => name !== "residual"));
  }), 80));
  $("peaks").addEventListener("change", () => { state.peaks = $("peaks").checked; remember(); drawMarks(); });
  $("footprints").addEventListener("change", () => {
    state.footprints = $("footprints").checked;
    remember();
    applyLayers();
  });
  $("color").addEventListener("change", trying(() => setColor($("color").value)));
  $("add-column").addEventListener("change", trying(async () => {
    await addColumn($("add-column").value);
    $("add-column").value = "";
    remember();
  }));
  $("clear-filters").addEventListener("click", () => table.clearHeaderFilter());
  $("find").addEventListener("submit", trying(async (event) => {
    event.preventDefault();
    const found = await askJson("api/find", { text: $("find-text").value });
    lookAt(found.y, found.x, Math.min(info.width, 200));
    if (found.object_id !== undefined) await select(found.object_id);
  }));
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const layer = { 1: "image", 2: "model", 3: "residual", b: "blink" }[event.key];
    if (layer && (layer === "blink" ? info.layers.length > 1 : info.layers.includes(layer))) setLayer(layer);
    else if (event.key === "p" || event.key === "f") $(event.key === "p" ? "peaks" : "footprints").click();
    else if (event.key === "Escape") pick(null);
  });
  window.addEventListener("hashchange", trying(openAddress));
  viewer.addHandler("update-viewport", followPicture);
  // Near, pixels are seen as pixels; from afar, several of them make one on the screen.
  viewer.addHandler("zoom", () => viewer.drawer.setImageSmoothingEnabled(onScreen().scale < 1.5));
  viewer.addHandler("animation-finish", remember);
  viewer.addHandler("resize", () => { drawMarks(); remember(); });
  viewer.addHandler("canvas-click", trying(async (event) => {
    if (!event.quick) return;
    if (picking) {
      const place = toCoadd(...pictureOf(event.position));
      if (picking === "add") pending.add.push(place); else pending.move[state.object] = place;
      pick(null);
      await select(state.object); // whose panel lists the change
    } else {
      const id = nearest(event.position);
      if (id !== null) await select(id);
    }
  }));
  const tellPlace = later(async ({ x, y }) => {
    const [row, column] = toCoadd(...pictureOf({ x, y }));
    try {
      const place = await askJson("api/place", { y: row, x: column });
      const words = [`y ${row.toFixed(1)}  x ${column.toFixed(1)}`];
      if ("ra" in place) words.push(`ra ${place.ra.toFixed(6)}  dec ${place.dec.toFixed(6)}`);
      for (const [band, value] of Object.entries(place.values ?? {})) words.push(`${band} ${value === null ? "-" : number(value)}`);
      $("place").textContent = words.join("   ");
    } catch { $("place").textContent = ""; }
  }, 60);
  $("osd").addEventListener("mousemove", (event) => {
    const { left, top } = $("osd").getBoundingClientRect();
    tellPlace({ x: event.clientX - left, y: event.clientY - top });
  });
}

// Show what an address says, of a page that is open already.
async function openAddress() {
  const place = readAddress();
  applyControls();
  makeTable();
  if (place) lookAt(place.y, place.x, place.width);
  await Promise.all([loadMarks(), loadLegend(), redraw([...info.layers, "footprints"])]);
  await select(state.object);
}

async function start() {
  info = await askJson("api/result");
  const option = (value, text = value) => new Option(text, value);
  document.title = $("name").textContent = info.name;
  $("band").append(option("", "all"), ...info.bands.map((band) => option(band)));
  $("color").append(...info.columns.map(({ name }) => option(name)));
  $("all-columns").append(...info.columns.map(({ name }) => option(name)));
  if (info.has_sky) $("find-text").placeholder = "object, ra dec, or y= x=";
  const place = readAddress();
  applyControls();
  viewer = OpenSeadragon({
    element: $("osd"), showNavigationControl: false, drawer: "canvas", imageSmoothingEnabled: false,
    maxZoomPixelRatio: 40, minZoomImageRatio: 0.5, visibilityRatio: 0.2, animationTime: 0.3, imageLoaderLimit: 6,
    minPixelRatio: 0.75, immediateRender: true, maxTilesPerFrame: 12, gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    gestureSettingsTouch: { clickToZoom: false }, subPixelRoundingForTransparency: 1, keyboardNavEnabled: false,
  });
  canvas = Object.assign(document.createElement("canvas"), { id: "marks" });
  $("picture").insertBefore(canvas, $("legend"));
  for (const name of info.layers) await show(name);
  if (place) lookAt(place.y, place.x, place.width, true);
  await loadPlaces();
  connect();
  await Promise.all([loadMarks(), loadLegend(), show("footprints")]);
  makeTable();
  await select(state.object);
  remember();
  document.body.dataset.ready = "yes";
  await watchDrawing();
}

// What a test, or a curious reader at the console, needs.
window.kermes = { state, items, get viewer() { return viewer; }, get table() { return table; }, lookAt, toPicture, onScreen };

trying(start)();
