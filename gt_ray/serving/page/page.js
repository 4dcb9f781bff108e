// The page of the delta-generation endpoint. What clients or the service say is shown as text, never as HTML.

let info = null; // of GET /v1/info
let token = ""; // in memory only
let files = []; // of the latest choice; every choice is an array of its own
const running = {}; // task: the choice that it works on
const $ = (id) => document.getElementById(id);
const short = (number) => Number(Number(number).toPrecision(3)).toString();
const bytes = (number) => (number < 1e6 ? `${short(number / 1e3)} kB` : `${short(number / 1e6)} MB`);

/** Make an element, of SVG too; strings among the children become text. */
function make(tag, attributes = {}, ...children) {
  const kind = ["svg", "line", "circle", "text"].includes(tag) ? "2000/svg" : "1999/xhtml";
  const element = document.createElementNS(`http://www.w3.org/${kind}`, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Call the service; rejects with what to show. XMLHttpRequest, for fetch does not tell when a body has been sent. */
function call(method, path, body = null, onSent = null) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const fail = (message, status) => reject(Object.assign(new Error(message), { status }));
    request.open(method, path);
    request.responseType = "blob";
    if (token) request.setRequestHeader("Authorization", `Bearer ${token}`);
    request.upload.onload = onSent;
    const why = body ? ", or the file has changed since it was chosen" : "";
    request.onerror = () => fail(`The service does not answer${why}; try again.`, 503);
    request.onload = async () => {
      const { status, response } = request;
      if (status === 200) return resolve(request);
      if (status === 401) $("token-form").hidden = false;
      const { detail } = await response.text().then(JSON.parse).catch(() => ({}));
      fail(detail || `The service failed (${status}); try again.`, status);
    };
    request.send(body);
  });
}

const json = (...what) => call(...what).then((answer) => answer.response.text()).then(JSON.parse);

/** Arguments of `call`, to post update files and texts to the chosen checkpoint. FormData would change a prompt (its
 * line ends become CRLF, which an LLM answers otherwise) and tell the names of the files. */
function post(path, updates, texts = {}, query = {}) {
  const boundary = `gt-ray-${Math.random().toString(36).slice(2)}`;
  const head = (name) => `--${boundary}\r\nContent-Disposition: form-data; name="${name}"\r\n\r\n`;
  const part = (name, content) => [head(name), content, "\r\n"];
  const parts = updates.map((file) => part('update"; filename="update.safetensors', file));
  for (const [name, text] of Object.entries(texts)) parts.push(part(name, text));
  const type = `multipart/form-data; boundary=${boundary}`;
  const where = new URLSearchParams({ checkpoint: $("checkpoint").value, ...query });
  return ["POST", `${path}?${where}`, new Blob([...parts.flat(), `--${boundary}--\r\n`], { type })];
}

/** Do a task once at a time, with status and alert beside it; nothing of it is shown once other files are chosen. */
async function run(id, status, task) {
  const mine = files;
  if (running[id] === mine) return;
  running[id] = mine;
  $(`${id}-error`).textContent = "";
  $(`${id}-status`).textContent = status;
  let show, failed = "";
  try {
    show = await task(mine);
  } catch (error) {
    failed = error.message;
  }
  if (running[id] === mine) running[id] = null;
  if (files !== mine) return;
  $(`${id}-status`).textContent = "";
  $(`${id}-error`).textContent = failed;
  show?.();
}

async function load() {
  try {
    info = await json("GET", "/v1/info");
  } catch (error) {
    $("info-error").textContent = error.status === 401 && !token ? "" : error.message;
    if (error.status >= 500) setTimeout(load, 5000); // a generator may not be ready yet
    return;
  }
  $("info-error").textContent = "";
  $("token-form").hidden = !info.tokens;
  $("checkpoint").replaceChildren(...info.checkpoints.map((one) => make("option", {}, one.name)));
  $("checkpoint-field").hidden = info.checkpoints.length === 1;
  $("pooling").replaceChildren(...info.poolings.map((name) => make("option", {}, name)));
  $("try").hidden = !info.tries;
  document.querySelector("main").hidden = false;
  describe();
}

/** Show the chosen checkpoint, and check with it what has been chosen already. */
function describe() {
  const one = info.checkpoints.find(({ name }) => name === $("checkpoint").value);
  const { updates, update_bytes, requests_per_minute, time_limit_s } = info.limits;
  const pair = [["TinyLM, which you fine-tune", one.tinylm], ["LLM, which the adapter is for", one.llm]];
  $("pair").replaceChildren(...pair.map(([title, about]) => model(title, about)));
  $("limits").textContent =
    `Checkpoint ${one.name}, version ${one.version}. Limits: updates of ${bytes(update_bytes)}, ${updates} at once; ` +
    `${requests_per_minute} requests a minute; ${short(time_limit_s)} s for an answer.`;
  $("commands").textContent =
    (info.tokens ? "export GT_RAY_TOKEN_FILE=token.txt\n" : "") +
    `gt-ray client root ${location.origin}${one === info.checkpoints[0] ? "" : ` --checkpoint ${one.name}`}\n` +
    "gt-ray client finetune --data my.jsonl --task <task>\ngt-ray client send update.safetensors -o adapter/";
  $("tasks").textContent = `Tasks of the shadows: ${one.tasks.join(", ")}.`;
  $("settings").replaceChildren(...list(flat(one.fine_tune)));
  $("examples").replaceChildren(...one.examples.map(example));
  if (files.length) choose(files);
}

function example({ task, prompt }) {
  const button = make("button", { type: "button" }, `Example: ${task}`);
  button.onclick = () => ($("prompt").value = prompt);
  return button;
}

function model(title, { model: name, root, dtype, lora, blocks, width }) {
  const start = `${root.slice(0, 12)}…`;
  const hash = make("button", { class: "hash", title: root, "aria-label": `Root ${start} Copy all of it` }, start);
  hash.onclick = async () => {
    hash.textContent = root; // there is no clipboard without https
    await navigator.clipboard?.writeText(root).then(() => ($("copied").textContent = "Copied."), () => {});
  };
  const kind = { lora: "LoRA", xs: "LoRA-XS" }[lora.kind];
  const trained = kind ? `${kind}, rank ${lora.rank}, on ${lora.target_modules.join(", ")}` : "all weights";
  const size = `${blocks} of ${width.toLocaleString("en")} numbers`;
  const rows = [["model", `${name} (${dtype})`], ["root", hash], ["trained", trained], ["blocks", size]];
  return make("div", {}, make("h3", {}, title), make("dl", {}, ...list(rows)));
}

const list = (rows) => rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));

/** Settings of a fine-tune as [name, value]; those of `stop` count only where it does not end after its steps. */
const flat = ({ stop, ...settings }) =>
  Object.entries({ ...settings, ...(stop?.when === "plateau" ? stop : {}) })
    .map(([name, value]) => [name === "when" ? "stop" : name.replaceAll("_", " "), String(value)]);

function choose(chosen) {
  files = [...chosen];
  $("generate").disabled = $("ask").disabled = true;
  for (const id of ["checked", "result", "pooling-field"]) $(id).hidden = true;
  for (const id of ["generate-error", "try-error", "try-status", "stages", "answers"]) $(id).textContent = "";
  run("check", `Checking ${files[0].name} …`, async ([first, ...more]) => {
    refuse([first, ...more]);
    const told = await json(...post("/v1/updates:check", [first]));
    return () => show(told, first.name, more.length);
  });
}

/** Keep what is no update, such as the private data, from being sent by mistake. */
function refuse(chosen) {
  const { updates, update_bytes: most } = info.limits;
  const other = chosen.find((file) => !file.name.endsWith(".safetensors"));
  const large = chosen.find((file) => file.size > most);
  if (other) throw new Error(`${other.name} is no .safetensors file; nothing has been sent.`);
  if (large) throw new Error(`${large.name} is larger than an update (${bytes(most)}); nothing has been sent.`);
  if (chosen.length > updates) throw new Error(`The service takes ${updates} files at once, not ${chosen.length}.`);
}

function show({ checkpoint, fine_tune, samples, mechanism, norms }, file, more) {
  const shadows = info.checkpoints.find(({ name }) => name === checkpoint);
  const usual = new Map([["rows", String(shadows.samples)], ...flat(shadows.fine_tune)]);
  const numbers = ["epsilon", "delta"].filter((key) => typeof mechanism[key] === "number"); // an infinite one is null
  const privacy = numbers.map((key) => `${key} ${short(mechanism[key])}`).join(", ") || "no privacy guarantee";
  const same = ([name, value]) => (usual.get(name) ?? value) === value;
  const rows = [["rows", String(samples)], ...flat(fine_tune)];
  $("told").replaceChildren(
    ...list([
      ["mechanism, as the file states it", `${mechanism.name}: ${privacy}`],
      ...rows.map((one) => (same(one) ? one : [one[0], `${one[1]} (shadows: ${usual.get(one[0])})`])),
    ]),
  );
  plot(norms);
  const first = more ? `The first of ${more + 1} files, ${file},` : file;
  $("check-status").textContent = `${first} is an update that checkpoint ${checkpoint} reads:`;
  $("pooling-field").hidden = !more;
  $("checked").hidden = $("generate").disabled = $("ask").disabled = false;
}

/** Short name of a block: the number of its layer, or what stands last. */
const label = (block) => (/\.\d+\./.test(block) ? `layer ${block.match(/\.(\d+)\./)[1]}` : block.split(".").at(-1));

/** A row for each block. Positions are in percent, so that the text keeps its size on every screen. */
function plot(norms) {
  const known = norms.some((one) => "low" in one);
  const outside = ({ norm, low, high }) => norm < low || norm > high;
  const largest = Math.max(...norms.flatMap(({ norm, high = 0 }) => [norm, high])) || 1;
  const steps = [1, 2, 5, 10].map((digit) => digit * 10 ** Math.floor(Math.log10(largest / 2)));
  const step = steps.find((one) => largest / one <= 6);
  const height = norms.length > 12 ? 18 : 28;
  const bottom = norms.length * height + 6;
  const x = (norm) => `${24 + (72 * norm) / largest}%`;
  const line = (kind, from, to, y1, y2) => make("line", { class: kind, x1: x(from), x2: x(to), y1, y2 });
  const named = { role: "img", "aria-labelledby": "plot-title", "aria-describedby": "plot-text" };
  const picture = make("svg", { ...named, height: bottom + 22 });
  for (let at = 0; at <= largest; at += step) {
    picture.append(line("grid", at, at, 0, bottom));
    picture.append(make("text", { x: x(at), y: bottom + 16, "text-anchor": "middle" }, short(at)));
  }
  norms.forEach((one, i) => {
    const { block, norm, low, median, high } = one;
    const y = height * (i + 0.5) + 3;
    picture.append(make("text", { y: y + 4 }, label(block)));
    if ("low" in one) picture.append(line("range", low, high, y, y), line("median", median, median, y - 8, y + 8));
    picture.append(make("circle", { class: outside(one) ? "dot outside" : "dot", cx: x(norm), cy: y, r: 6 }));
  });
  $("plot").replaceChildren(picture);
  for (const item of document.querySelectorAll(".legend .shadows")) item.hidden = !known;
  const far = norms.filter(outside).map(({ block }) => label(block)).join(", ");
  $("plot-text").textContent = known
    ? `Outside the range of nine of ten shadows: ${far || "none"}.`
    : "The checkpoint does not know the norms of its shadows.";
  const columns = known ? ["norm", "low", "median", "high"] : ["norm"];
  const cells = norms.map((one) => columns.map((key) => make("td", {}, short(one[key]))));
  const rows = cells.map((row, i) => make("tr", {}, make("th", { scope: "row" }, norms[i].block), ...row));
  const head = ["block", ...columns].map((key) => make("th", { scope: "col" }, key));
  $("numbers").replaceChildren(make("tr", {}, ...head), ...rows);
}

async function generate(updates) {
  const pooling = updates.length > 1 ? { pooling: $("pooling").value } : {};
  const size = bytes(updates.reduce((sum, file) => sum + file.size, 0));
  const seconds = make("span", { "aria-hidden": "true" }); // read out ten times a second, it would drown the rest
  const now = make("li", { class: "now" }, `Sending ${size}`);
  const start = performance.now();
  const took = () => `${((performance.now() - start) / 1000).toFixed(1)} s`;
  const clock = setInterval(() => (seconds.textContent = took()), 100);
  $("result").hidden = true;
  $("stages").replaceChildren(make("li", {}, "Checked"), now);
  const onSent = () => {
    now.before(make("li", {}, `Sent ${size}`));
    now.replaceChildren("Generating ", seconds);
  };
  try {
    const answer = await call(...post("/v1/updates:generate", updates, {}, pooling), onSent);
    now.replaceWith(make("li", {}, `Generated in ${took()}`), make("li", {}, "Ready"));
    return () => deliver(answer, pooling);
  } catch (error) {
    now.replaceWith(make("li", { class: "failed" }, "Not generated"));
    throw error;
  } finally {
    clearInterval(clock);
  }
}

function deliver(answer, { pooling }) {
  const estimate = JSON.parse(answer.getResponseHeader("Gt-Ray-Estimate") ?? "{}");
  const [name, version, sha256] = (answer.getResponseHeader("Gt-Ray-Checkpoint") ?? "? ? ?").split(" ");
  URL.revokeObjectURL($("download").href);
  $("download").href = URL.createObjectURL(answer.response);
  $("result").hidden = false;
  $("generate-status").className = estimate.out_of_range ? "warning" : "";
  $("generate-status").textContent = certainty(estimate);
  const pooled = pooling ? `; pooling: ${pooling}` : "";
  $("made-by").textContent = `Made by checkpoint ${name}, version ${version}, SHA-256 ${sha256}${pooled}.`;
}

/** What the validation shadows let expect of an adapter. */
function certainty({ distance, range, error, error_high, of_behaviour, out_of_range }) {
  const unknown = "Nothing is known of the error of this adapter; test it before you use it.";
  if (distance === undefined) return unknown;
  const validated = `${short(range)} the largest that was validated`;
  const where = `distance from the shadows is ${short(distance)} (1 is usual, ${validated}).`;
  if (out_of_range) return `Out of range: the ${where} ${unknown}`;
  if (error === null) return `The ${where} ${unknown}`;
  const what = of_behaviour
    ? "Of what fine-tuning the LLM gains, the adapters of validation shadows lose"
    : "The error of the adapters of validation shadows, as a share of the mean update's, is";
  return `The ${where} ${what} ${short(error)} on average, and up to ${short(error_high)} in nine of ten.`;
}

async function ask([first]) {
  $("answers").replaceChildren();
  const told = await json(...post("/v1/updates:try", [first], { prompt: $("prompt").value }));
  const answers = [["The LLM as it is", told.base], [`With ${first.name}`, told.updated]];
  const card = ([title, text]) => make("div", {}, make("h3", {}, title), make("p", {}, text || "(nothing)"));
  return () => $("answers").replaceChildren(...answers.map(card));
}

const submit = {
  "token-form": () => ((token = $("token").value.trim()), load()),
  "generate-form": () => run("generate", "", generate),
  "try-form": () => run("try", "Asking …", ask),
};
document.onsubmit = (event) => {
  event.preventDefault();
  submit[event.target.id]();
};
$("checkpoint").onchange = describe;
$("file").onclick = () => ($("file").value = ""); // so that choosing the same file again counts
$("file").onchange = () => $("file").files.length && choose($("file").files);
// Dropped beside the zone, a file would make the browser leave the page to show it.
const dragged = (over) => (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.querySelector(".drop").classList.toggle("over", over);
  if (info && event.type === "drop") choose(event.dataTransfer.files);
};
document.ondragover = dragged(true);
document.ondragleave = document.ondrop = dragged(false);
load();
