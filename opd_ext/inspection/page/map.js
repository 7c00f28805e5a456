"use strict";
// The page of `opd inspect`. What stands in rollouts reaches the document as text alone: no markup is ever made of it.
const $ = (id) => document.getElementById(id);
const make = (tag, text, kind) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
};

// ---------------------------------------------------------------- data: every file calls page(kind, number, content)
let INDEX, WORDS;
const loaded = new Map(), waiting = new Map(), KEPT = 60;
function page(kind, number, content) {
  if (kind === "words") WORDS = content;
  else if (kind === "index") { INDEX = content; start(); }
  else {
    const key = `${kind}_${number}`;
    loaded.set(key, content);
    for (const old of [...loaded.keys()].filter((k) => !k.startsWith("text_")).slice(0, -KEPT)) loaded.delete(old);
    waiting.get(key)?.done(content);
    waiting.delete(key);
  }
}
function load(kind, number) {
  const key = `${kind}_${number}`;
  if (loaded.has(key)) return Promise.resolve(loaded.get(key));
  if (!waiting.has(key)) {
    const entry = {};
    entry.promise = new Promise((done, failed) => { entry.done = done; entry.failed = failed; });
    waiting.set(key, entry);
    const script = document.createElement("script");
    script.src = `data/${encodeURIComponent(key)}.js`;
    script.onload = () => script.remove();
    script.onerror = () => { waiting.delete(key); entry.failed(new Error(`data/${key}.js is missing: keep the folder whole.`)); };
    document.head.append(script);
  }
  return waiting.get(key).promise;
}
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
function numbers([low, high, text]) {
  const steps = new Uint16Array(bytes(text).buffer), span = (high - low) / 65535;
  return Float32Array.from(steps, (step) => low + step * span);
}
const whole = ([width, text]) => width === 2 ? new Uint16Array(bytes(text).buffer) : new Uint32Array(bytes(text).buffer);

// ---------------------------------------------------------------- what there is to see
const SIGNALS = {
  push: ["push", "How the loss moves the logit of the token that was sampled: blue makes it likelier, orange less likely. In units of one logit at the weight of an average token.", true],
  loss: ["weight × divergence", "The token's part of the distillation loss, in nats at the weight of an average token; on the sampled token it has a sign.", true],
  divergence: ["divergence", "Distance of teacher and student at this position, in nats; log-ratio of the sampled token where the method looks at nothing else.", true],
  weight: ["weight", "Credit, importance caps, annealing and reduction: 1 is a token of average weight, 0 a token that the teacher does not train.", false],
  advantage: ["teacher − student", "Log-prob of the sampled token, teacher minus student, in nats: blue where the teacher finds it likelier.", true],
  clipped: ["clip", "Share of the vocabulary's terms that the divergence clips.", false],
  overlap: ["overlap", "Share of the student's ten likeliest tokens that are the teacher's, too.", false],
  policy: ["weight × advantage", "What the RL term weighs the token with in the gradient of its log-prob: advantage × gate, reduction and the method's own weights. Blue makes it likelier. In units of an average token, as the push.", true],
  reward: ["advantage", "Of the reward, as the RL term takes it: after what the teacher has made of it, before weights of the method.", true],
  gate: ["gate", "What the RL term multiplies the advantage with: the importance ratio, 0 where a clip is active, the cap where one acts. 1 is a token that the policy finds as likely as before.", false],
  surprise: ["surprise", "−log-prob of the sampled token under the student, in nats.", false],
  entropy: ["entropy", "Of the student, in nats: where it is high, the text forks. The least sure fifth of the tokens is underlined.", false],
};
const OF_STUDENT = new Set(["surprise", "entropy"]);
const OF_REWARD = new Set(["policy", "reward", "gate"]);
const OF_BOTH = new Set(["push"]);
const distils = (method) => method?.distils !== false, rewarded = (method) => method?.rewarded === true;
const shows = (method, signal) => OF_STUDENT.has(signal) || OF_BOTH.has(signal) || (OF_REWARD.has(signal) ? rewarded(method) : distils(method));
// Why a method shows nothing: it has not that term, or none of its terms trains this rollout.
const missing = (method, signal) => !shows(method, signal) ? (OF_REWARD.has(signal) ? "no RL term" : "no teacher") : "no teacher here";
const state = { method: 0, signal: "push", scale: "method", shown: [], at: 0, held: -1, texts: null };
let columns = {}, current = null, request = 0;
const steps = new Set(), sources = new Set();
const column = (name) => columns[name] ??= numbers(INDEX.columns[name]);
const say = (value, digits = 3) => {
  if (value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e5) ? value.toExponential(1) : value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : digits);
};
// Characters that show nothing, or turn what follows around, become signs that can be seen.
const HIDDEN = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;
const visible = (text) => text.replace(HIDDEN, (c) => c === "\t" ? "⇥" : `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
const word = (id) => WORDS[id] ?? `[${id}]`;
const quoted = (id) => visible(word(id)).replaceAll("\n", "↵").replaceAll(" ", "␣") || "∅";

function start() {
  $("about").textContent = `${INDEX.run} · weights of step ${INDEX.step} · ${INDEX.rollouts.toLocaleString("en")} rollouts of ${INDEX.of}${INDEX.of === `step ${INDEX.step}` ? ", sampled before that step's update" : ""}`;
  INDEX.methods.forEach((method, i) => {
    const button = make("button", method.name, "method");
    button.append(make("small", i < 9 ? String(i + 1) : ""));
    button.title = [method.places, ...method.notes].join("\n");
    button.onclick = () => choose({ method: i });
    $("methods").append(button);
  });
  for (const [name, why] of INDEX.absent) {
    const button = make("button", name);
    button.disabled = true;
    button.title = `Not shown: ${why}`;
    $("methods").append(button);
    $("absent").lastElementChild.append(make("li", `${name}: ${why}`));
  }
  $("absent").hidden = !INDEX.absent.length;
  $("absent").firstElementChild.textContent = `Methods that cannot be put to these rollouts (${INDEX.absent.length})`;
  for (const [name, [label]] of Object.entries(SIGNALS)) {
    const button = make("button", label);
    button.dataset.signal = name;
    button.onclick = () => choose({ signal: name });
    $("signals").append(button);
  }
  const filters = [["all", "all"], ["right", "right"], ["wrong", "wrong"], ["cut", "cut off"], ["taught", "with a teacher"], ["untaught", "without a teacher"]];
  INDEX.labels.forEach((label) => { sources.add(label[1]); steps.add(label[3]); });
  drawAlarms();
  if (steps.size > 1) filters.push(...[...steps].slice(0, 500).map((step) => [`step:${step}`, `step ${step}`]));
  if ([...steps].some(alarmed)) filters.push(["alarm", "steps with an alarm"]);
  if (sources.size > 1) filters.push(...[...sources].slice(0, 100).map((source) => [`source:${source}`, source]));
  filters.forEach(([value, label]) => $("filter").append(new Option(label, value)));
  [["order", "in order"], ["surprise", "by surprise"], ["peak", "by most surprising token"], ["push", "by push"], ["divergence", "by divergence"],
    ["entropy", "by entropy"], ["overlap", "by least overlap"], ["tokens", "by length"], ["score", "by score"]]
    .forEach(([value, label]) => $("sort").append(new Option(label, value)));
  $("filter").onchange = $("sort").onchange = select;
  $("scale").onchange = () => choose({ scale: $("scale").value });
  let typing;
  $("search").oninput = () => { clearTimeout(typing); typing = setTimeout(select, 150); };
  $("list").onscroll = drawList;
  $("theme").onclick = turn;
  addEventListener("resize", () => { drawList(); drawStrips(); });
  addEventListener("keydown", press);
  document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  select();
}

// ---------------------------------------------------------------- alarms of the run
// A step that a rollback took back was done again: its alarm is not one of the rollouts that are shown.
const alarms = (step) => (INDEX.alarms ?? []).filter((alarm) => alarm.step === step && !alarm.undone);
const alarmed = (step) => alarms(step).length > 0;
function drawAlarms() {
  const found = INDEX.alarms ?? [];
  $("alarms").hidden = !found.length;
  if (!found.length) return;
  const rows = found.map((alarm) => {
    const step = make("button", `${alarm.step}`);
    step.disabled = !steps.has(alarm.step) || alarm.undone;
    step.title = alarm.undone ? "This step was taken back; the rollouts of its number are of another try." : step.disabled ? "No rollout of this step is on the map." : "Its first rollout.";
    step.onclick = () => { $("search").value = ""; $("filter").value = "all"; $("sort").value = "order"; select().then(() => go(INDEX.labels.findIndex((label) => label[3] === alarm.step))); };
    return [step, alarm.alarm, visible(alarm.why), alarm.done];
  });
  table($("alarmed"), [["step", "alarm", "what was seen", "what was done"], ...rows]);
}

// ---------------------------------------------------------------- the list: search, filter, sort
async function select() {
  const asked = ++request, text = $("search").value.toLowerCase();
  let passes = null;
  if (text) {
    if (!state.texts) {
      $("found").textContent = "reading the texts …";
      state.texts = await Promise.all(INDEX.starts.map((_, number) => load("text", number)));
      if (asked !== request) return;
    }
    passes = new Uint8Array(INDEX.rollouts);
    state.texts.forEach((texts, number) => texts.forEach((each, i) => { passes[INDEX.starts[number] + i] = each.includes(text) ? 1 : 0; }));
  }
  const filter = $("filter").value, name = INDEX.methods[state.method]?.name;
  const right = column("right"), cut = column("cut"), taught = name ? column(`${name}:taught`) : null;
  const keep = {
    all: () => true, right: (i) => right[i] > 0.5, wrong: (i) => right[i] < 0.5, cut: (i) => cut[i] > 0.5,
    alarm: (i) => alarmed(INDEX.labels[i][3]), taught: (i) => taught?.[i] > 0.5, untaught: (i) => !(taught?.[i] > 0.5),
  }[filter] ?? ((i) => filter.startsWith("step:") ? `step:${INDEX.labels[i][3]}` === filter : `source:${INDEX.labels[i][1]}` === filter);
  const before = state.shown[state.at];
  state.shown = [];
  for (let i = 0; i < INDEX.rollouts; i++) if (keep(i) && (!passes || passes[i])) state.shown.push(i);
  const by = sortKey();
  if (by) state.shown.sort((a, b) => by.sign * (by.values[b] - by.values[a]) || a - b);
  $("found").textContent = `${state.shown.length.toLocaleString("en")} of ${INDEX.rollouts.toLocaleString("en")} rollouts`;
  $("rail").style.height = `${state.shown.length * ITEM}px`;
  const again = by ? 0 : Math.max(0, state.shown.indexOf(before));
  $("list").scrollTop = again * ITEM;
  go(again);
}
function sortKey() {
  const sort = $("sort").value, name = INDEX.methods[state.method]?.name;
  if (sort === "order") return null;
  const own = ["push", "divergence", "overlap"].includes(sort);
  return own && !name ? null : { values: column(own ? `${name}:${sort}` : sort), sign: sort === "overlap" ? -1 : 1, label: sort };
}
const ITEM = 54;
function drawList() {
  const first = Math.max(0, Math.floor($("list").scrollTop / ITEM) - 4), last = first + Math.ceil($("list").clientHeight / ITEM) + 8;
  const by = sortKey() ?? { values: column("surprise"), label: "surprise" };
  let most = 0;
  for (const value of by.values) most = Math.max(most, Math.abs(value));
  $("rail").replaceChildren(...state.shown.slice(first, last).map((i, n) => {
    const [question, source, index, step, sample] = INDEX.labels[i];
    const item = make("div", undefined, `item${column("right")[i] > 0.5 ? " right" : ""}${first + n === state.at ? " on" : ""}`);
    item.style.top = `${(first + n) * ITEM}px`;
    item.append(make("b", visible(question) || "(no question)"));
    if (alarmed(step)) item.classList.add("alarm");
    item.append(make("span", [alarmed(step) && "alarm", steps.size > 1 && `step ${step}`, sources.size > 1 && source, index && `#${index}`, sample && `sample ${sample}`, `${Math.round(column("tokens")[i])} tokens`, `${by.label} ${say(by.values[i], 2)}`].filter(Boolean).join(" · ")));
    const bar = make("i");
    bar.style.width = `${most ? 90 * Math.abs(by.values[i]) / most : 0}%`;
    item.append(bar);
    item.onclick = () => go(first + n);
    return item;
  }));
}
async function go(place) {
  state.at = Math.max(0, Math.min(place, state.shown.length - 1));
  state.held = -1;
  const top = state.at * ITEM, list = $("list");
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ITEM > list.scrollTop + list.clientHeight) list.scrollTop = top + ITEM - list.clientHeight;
  drawList();
  if (!state.shown.length) { current = null; $("question").textContent = "No rollout is left: change search or filter."; $("facts").textContent = ""; $("tokens").replaceChildren(); $("strips").replaceChildren(); return; }
  const i = state.shown[state.at], mine = (go.last = Symbol());
  let number = INDEX.starts.length - 1;
  while (INDEX.starts[number] > i) number--;
  try {
    const kinds = ["rollouts", ...INDEX.methods.map((method) => method.name)];
    const pages = await Promise.all(kinds.map((kind) => load(kind, number)));
    if (mine !== go.last) return; // another one was chosen meanwhile
    current = cut(pages[0], pages.slice(1), i - INDEX.starts[number]);
    draw();
  } catch (error) { $("question").textContent = error.message; }
}
// One rollout of a page: views on its numbers.
const OF_TEACHER = new Set(["loss", "divergence", "weight", "advantage", "clipped", "overlap", "log_prob", "entropy"]);
const SHOWN = ["push", ...OF_TEACHER, "policy", "reward", "gate", "ratio"];
function cut(common, methods, place) {
  const from = common.lengths.slice(0, place).reduce((sum, n) => sum + n, 0), length = common.lengths[place];
  const decoded = (store, name, read, each = 1, start = from) => (store.$ ??= {}, (store.$[name] ??= read(store[name])).subarray(start * each, (start + length) * each));
  const tops = (store, start) => ({ shown: store.shown, top: decoded(store, "top", whole, store.shown, start), topP: decoded(store, "topP", numbers, store.shown, start) });
  const own = { ...tops(common, from) };
  for (const name of ["log_prob", "entropy"]) own[name] = decoded(common, name, numbers);
  const found = { length, row: common.rows[place], own, methods: [] };
  for (const name of ["ids", "trained", "forks"]) found[name] = decoded(common, name, whole);
  for (const store of methods) {
    if (!store.there[place]) { found.methods.push(null); continue; }
    const start = common.lengths.slice(0, place).reduce((sum, n, i) => sum + (store.there[i] ? n : 0), 0);
    const each = { taught: store.taught[place] === 1, prompt: store.prompts[place], ...(store.top ? tops(store, start) : {}) };
    for (const name of SHOWN) if (store[name] && (each.taught || !OF_TEACHER.has(name))) each[name] = decoded(store, name, numbers, 1, start);
    found.methods.push(each);
  }
  return found;
}

// ---------------------------------------------------------------- colours
const tint = (kind) => getComputedStyle(document.documentElement).getPropertyValue(`--${kind}`).trim();
function values(signal, method) {
  if (signal === "surprise") return current.own.log_prob.map((x) => -x);
  if (signal === "entropy") return current.own.entropy;
  return current.methods[method]?.[signal] ?? null;
}
function reach(signal, method) {
  if (state.scale === "rollout" || OF_STUDENT.has(signal)) {
    const found = state.scale === "rollout" ? values(signal, method) ?? [] : null;
    return found ? found.reduce((most, x) => Math.max(most, Math.abs(x)), 0) || 1 : signal === "entropy" ? INDEX.student.entropy : INDEX.student.surprise;
  }
  if (signal === "overlap") return 1;
  const of = state.scale === "all" ? INDEX.methods : [INDEX.methods[method]];
  return Math.max(...of.map((each) => each?.scales[signal] || 0)) || 1;
}
// Small signals must be seen beside large ones, so strength goes by the square root; the legend says so.
const strength = (value, most) => Math.min(1, Math.sqrt(Math.abs(value) / most)) * 0.82;
const colour = (value, most, signed, tints) => `rgba(${signed ? (value >= 0 ? tints.up : tints.down) : tints.level}, ${strength(value, most).toFixed(3)})`;
const tints = () => ({ up: tint("up"), down: tint("down"), level: tint("level") });

// ---------------------------------------------------------------- the rollout
function choose(change) {
  const filtered = "method" in change && (["taught", "untaught"].includes($("filter").value) || ["push", "divergence", "overlap"].includes($("sort").value));
  Object.assign(state, change);
  $("scale").value = state.scale;
  if (filtered) select(); else if (current) { draw(); drawList(); }
}
function draw() {
  const method = INDEX.methods[state.method], signed = SIGNALS[state.signal][2];
  [...$("methods").querySelectorAll(".method")].forEach((button, i) => { button.classList.toggle("on", i === state.method); button.setAttribute("aria-pressed", i === state.method); });
  [...$("signals").children].forEach((button) => { button.classList.toggle("on", button.dataset.signal === state.signal); button.classList.toggle("none", Boolean(method) && !shows(method, button.dataset.signal)); });
  $("places").replaceChildren(make("span", method ? method.places : "No method can be put to these rollouts."));
  for (const note of method?.notes ?? []) $("places").append(make("br"), make("em", note));
  $("meaning").textContent = SIGNALS[state.signal][1];
  const row = current.row, facts = [];
  const right = row.acc > 0.5;
  $("question").textContent = visible(INDEX.labels[state.shown[state.at]][0]);
  $("facts").replaceChildren(make("span", right ? "right" : "wrong", right ? "right" : "wrong"));
  facts.push(`score ${say(row.score, 2)}`, `answer ${visible(row.ground_truth === null ? "–" : String(row.ground_truth))}`, `${current.length} tokens${row.truncated ? ", cut off" : ""}`, `step ${row.step}`, `${row.uid}_${row.sample}`);
  for (const alarm of alarms(row.step)) facts.push(`alarm at step ${alarm.step}: ${alarm.alarm}, ${alarm.done}`);
  if (row.feedback) facts.push(`grader: ${visible(String(row.feedback)).slice(0, 300)}`);
  $("facts").append(` · ${facts.join(" · ")}`);
  const found = values(state.signal, state.method), most = reach(state.signal, state.method), paint = tints();
  const nodes = [];
  for (let t = 0; t < current.length; t++) {
    const text = word(current.ids[t]), node = make("span");
    node.textContent = visible(text).replaceAll("\n", "↵\n") || "∅";
    if (found) node.style.background = colour(found[t], most, signed, paint);
    if (current.forks[t]) node.classList.add("fork");
    if (!current.trained[t]) node.classList.add("off");
    node.dataset.t = t;
    nodes.push(node);
  }
  $("tokens").replaceChildren(...nodes);
  if (!current.length) $("tokens").append(make("em", "The response is empty."));
  if (!found) $("tokens").prepend(make("em", shows(method, state.signal) ? `${method?.name} has no teacher for this rollout.\n` : `${method.name} has ${missing(method, state.signal)}.\n`));
  drawLegend(most, signed, paint);
  drawStrips();
  drawNumbers();
  $("prompt").textContent = visible(row.prompt).replaceAll("⟨U+000A⟩", "\n");
  $("teacher").textContent = current.methods[state.method]?.taught ? visible(current.methods[state.method].prompt ?? "") : "There is no teacher here.";
  if (state.held >= 0) hold(state.held); else $("tip").hidden = true;
}
function drawLegend(most, signed, paint) {
  const canvas = $("legend").firstElementChild, pen = canvas.getContext("2d"), wide = canvas.width;
  pen.clearRect(0, 0, wide, 14);
  for (let x = 0; x < wide; x++) {
    const share = x / (wide - 1), value = signed ? (2 * share - 1) * most : share * most;
    pen.fillStyle = colour(value, most, signed, paint);
    pen.fillRect(x, 0, 1, 14);
  }
  const ends = signed ? [-1, -0.5, 0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1];
  $("ticks").replaceChildren(...ends.map((share) => make("span", `${share === 1 ? "≥ " : share === -1 ? "≤ " : ""}${say(share * most, 3)}`)));
}
function drawStrips() {
  if (!current) return;
  const paint = tints(), signal = OF_STUDENT.has(state.signal) ? "push" : state.signal, signed = SIGNALS[signal][2];
  const strip = (label, found, most, sign, note, on, click) => {
    const line = make("div", undefined, `strip${on ? " on" : ""}`), canvas = make("canvas");
    line.append(make("b", label), canvas, make("span", note));
    line.onclick = click;
    canvas.width = 1200; canvas.height = 18;
    const pen = canvas.getContext("2d"), step = 1200 / Math.max(1, current.length);
    for (let t = 0; found && t < current.length; t++) {
      pen.fillStyle = colour(found[t], most, sign, paint);
      pen.fillRect(t * step, 0, Math.max(step - (step > 6 ? 1 : 0), 0.6), 18);
    }
    canvas.onmousemove = (event) => { const t = Math.min(current.length - 1, Math.floor(event.offsetX / canvas.clientWidth * current.length)); if (t >= 0) tell(t, event.clientX, event.clientY); };
    canvas.onmouseleave = quiet;
    return line;
  };
  const lines = [strip("entropy", current.own.entropy, INDEX.student.entropy, false, "student", false, () => choose({ signal: "entropy" }))];
  INDEX.methods.forEach((method, i) => {
    const found = current.methods[i]?.[signal];
    lines.push(strip(method.name, found, reach(signal, i), signed, found ? `forks ${say(100 * onForks(current.methods[i].push), 0)} %` : missing(method, signal), i === state.method, () => choose({ method: i })));
  });
  $("strips").replaceChildren(...lines);
}
function onForks(push) {
  let all = 0, forks = 0;
  push.forEach((x, t) => { all += Math.abs(x); if (current.forks[t]) forks += Math.abs(x); });
  return all ? forks / all : 0;
}
function drawNumbers() {
  const mean = (found) => found?.length ? found.reduce((sum, x) => sum + x, 0) / found.length : NaN;
  const here = current.methods[state.method], method = INDEX.methods[state.method], rows = [["", "here", "all rollouts"]];
  rows.push(["surprise, nats per token", say(-mean(current.own.log_prob)), say(mean(column("surprise")))]);
  rows.push(["student's entropy, nats", say(mean(current.own.entropy)), say(mean(column("entropy")))]);
  if (distils(method) && method) {
    rows.push(["teacher's entropy, nats", say(mean(here?.entropy)), ""]);
    rows.push(["divergence, nats per token", say(mean(here?.divergence)), say(method.stats.divergence)]);
  }
  if (rewarded(method)) {
    const held = here ? [...here.reward].filter((x, t) => x && current.trained[t] && isHeld(here, t)).length : 0;
    const moved = here ? [...here.reward].filter((x, t) => x && current.trained[t]).length : 0;
    rows.push(["advantage, mean", say(mean(here?.reward)), say(mean(column(`${method.name}:reward`)))]);
    rows.push(["tokens with an advantage", here ? `${say(100 * moved / Math.max(1, current.length), 0)} %` : "–", `${say(100 * method.stats.rewarded, 0)} %`]);
    rows.push(["of these clipped or capped", here ? `${say(100 * held / Math.max(1, moved), 1)} %` : "–", `${say(100 * method.stats.held, 1)} %`]);
  }
  if (method) {
    rows.push(["share of push on the least sure 20 %", here ? `${say(100 * onForks(here.push), 0)} %` : "–", `${say(100 * method.stats.forks, 0)} %`]);
  }
  if (distils(method) && method) {
    rows.push(["overlap of the ten likeliest", here?.taught ? `${say(100 * mean(here.overlap), 0)} %` : "–", `${say(100 * method.stats.overlap, 0)} %`]);
    rows.push(["rollouts with a teacher", here?.taught ? "yes" : "no", `${say(100 * method.stats.taught, 0)} %`]);
  }
  table($("numbers"), rows);
  const pushed = [["token", "mean push", "share of all", "times"]], total = method?.stats.pushSum || 1;
  for (const [id, sum, size, count] of method?.pushed ?? []) { const code = make("code", quoted(id)); pushed.push([code, say(sum / count), `${say(100 * size / total, 1)} %`, count.toLocaleString("en")]); }
  table($("pushed"), pushed);
}
function table(node, rows) {
  node.replaceChildren(...rows.map((cells, n) => {
    const line = make("tr");
    cells.forEach((cell) => { const box = make(n ? "td" : "th"); box.append(cell); line.append(box); });
    return line;
  }));
}

// ---------------------------------------------------------------- one token
// What the loss does to the ratio, in a word.
const isHeld = (here, t) => Math.abs(here.gate[t] - here.ratio[t]) > 1e-3 * Math.max(here.ratio[t], 1e-3);
const bound = (here, t) => !current.trained[t] || !isHeld(here, t) ? "" : Math.abs(here.gate[t]) < 1e-3 ? " clipped" : here.gate[t] < here.ratio[t] ? " capped" : " raised";
function tell(t, x, y) {
  const tip = $("tip"), here = current.methods[state.method], own = current.own;
  const pairs = [["token", `${current.ids[t]}`], ["place", `${t + 1} of ${current.length}`], ["student log-prob", say(own.log_prob[t])], ["student entropy", say(own.entropy[t])]];
  if (here?.taught) pairs.push(["teacher log-prob", say(here.log_prob[t])], ["teacher entropy", say(here.entropy[t])], ["divergence", say(here.divergence[t], 4)], ["weight", say(here.weight[t])],
    ["weight × div.", say(here.loss[t], 4)], ["clip", say(here.clipped[t])], ["overlap", say(here.overlap[t], 1)]);
  if (here?.policy) pairs.push(["advantage", say(here.reward[t])], ["ratio", say(here.ratio[t])], ["gate", `${say(here.gate[t])}${bound(here, t)}`], ["weight × adv.", say(here.policy[t], 4)]);
  if (here) pairs.push(["push", say(here.push[t], 4)]);
  const grid = make("div", undefined, "pairs");
  pairs.forEach(([name, value]) => grid.append(make("span", name), make("div", value)));
  const tops = make("div", undefined, "tops");
  for (const [label, source] of [["student", own], [`teacher of ${INDEX.methods[state.method]?.name}`, here?.taught ? here : null]]) {
    if (!source?.top || !source.topP[t * source.shown]) continue; // of another tokenizer, whose tokens lie elsewhere
    const box = make("div");
    box.append(make("h4", label));
    for (let k = 0; k < source.shown; k++) {
      const id = source.top[t * source.shown + k], p = source.topP[t * source.shown + k], bar = make("div", undefined, `bar${id === current.ids[t] ? " same" : ""}`), fill = make("i");
      fill.style.width = `${100 * p}%`;
      bar.append(fill, make("u", quoted(id)), make("u", p < 0.0005 ? "<.001" : p.toFixed(3)));
      box.append(bar);
    }
    tops.append(box);
  }
  const note = [current.trained[t] ? "" : "not trained", current.forks[t] ? "among the least sure 20 %" : ""].filter(Boolean).join(", ");
  tip.replaceChildren(make("b", quoted(current.ids[t])), ...(note ? [make("span", note)] : []), grid, tops);
  tip.hidden = false;
  const { offsetWidth: wide, offsetHeight: high } = tip;
  tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - wide - 8))}px`;
  tip.style.top = `${y + 20 + high > innerHeight ? Math.max(6, y - high - 14) : y + 20}px`;
}
const quiet = () => { if (state.held < 0) $("tip").hidden = true; else hold(state.held); };
function hold(t) {
  [...$("tokens").querySelectorAll(".held")].forEach((node) => node.classList.remove("held"));
  state.held = t;
  const node = $("tokens").querySelector(`[data-t="${t}"]`);
  if (t < 0 || !node) { $("tip").hidden = true; return; }
  node.classList.add("held");
  tell(t, innerWidth, $("legend").getBoundingClientRect().top - 20); // beside the text, not on it
}
$("tokens").onmouseover = (event) => { const t = event.target.dataset?.t; if (t !== undefined) tell(+t, event.clientX, event.clientY); };
$("tokens").onmouseout = quiet;
$("tokens").onclick = (event) => { const t = event.target.dataset?.t; hold(t === undefined || +t === state.held ? -1 : +t); };

function turn() {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  if (current) draw();
}
function press(event) {
  const typing = ["INPUT", "SELECT"].includes(document.activeElement.tagName);
  if (event.key === "Escape") { document.activeElement.blur(); hold(-1); return; }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const names = Object.keys(SIGNALS), at = names.indexOf(state.signal);
  if (event.key === "/") $("search").focus();
  else if (["ArrowRight", "ArrowDown", "j"].includes(event.key)) go(state.at + 1);
  else if (["ArrowLeft", "ArrowUp", "k"].includes(event.key)) go(state.at - 1);
  else if (event.key === "]") choose({ signal: names[(at + 1) % names.length] });
  else if (event.key === "[") choose({ signal: names[(at + names.length - 1) % names.length] });
  else if (event.key === "d") turn();
  else if (/^[1-9]$/.test(event.key) && +event.key <= INDEX.methods.length) choose({ method: +event.key - 1 });
  else return;
  event.preventDefault();
}
