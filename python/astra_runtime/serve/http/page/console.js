"use strict";

const POLL_MS = 1000;
const STAGES = [
  "queued", "compute", "encode", "pack", "send", "wait", "unpack", "attend", "merge", "decode",
];
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

let model = "";
let conversation = [];
// behind a reverse proxy, the requests of one conversation go to one mesh
let conversationName = newName();
let running = null;
let before = null;
let timelineKey = null;

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  const key = sessionStorage.getItem("astra-key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers, cache: "no-store" });
  if (answer.status === 401) {
    await askForKey(Boolean(key));
    return ask(path, options);
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => null);
    throw new Refused(answer.status, body?.error?.message || `HTTP status ${answer.status}`);
  }
  return answer;
}

let keyAsked = null;

function askForKey(wasWrong) {
  // several requests may find out at once; they wait for one dialog
  keyAsked ??= new Promise((resolve) => {
    const dialog = $("ask-key");
    $("key-problem").hidden = !wasWrong;
    $("key").value = "";
    dialog.addEventListener("close", () => {
      if ($("key").value) sessionStorage.setItem("astra-key", $("key").value.trim());
      keyAsked = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return keyAsked;
}

async function* events(answer) {
  const decoder = new TextDecoder();
  const reader = answer.body.getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;
      const data = block.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function addTurn(role, text) {
  $("hint").hidden = true;
  const words = element("div", { class: "words" });
  const turn = element("article", { class: `turn ${role}` }, words);
  show(words, text);
  $("log").append(turn);
  toEnd(true);
  return turn;
}

/* Text as text; what stands between fences of three backticks, as code. */
function show(words, text) {
  const parts = text.split(/```[^\n`]*\n?/);
  words.replaceChildren(...parts.map((part, i) => (
    i % 2 ? element("pre", {}, part.replace(/\n$/, "")) : document.createTextNode(part)
  )));
}

function toEnd(always) {
  const log = $("log");
  const near = log.scrollHeight - log.scrollTop - log.clientHeight < 120;
  if (always || near) log.scrollTop = log.scrollHeight;
}

function note(turn, text, problem = false) {
  turn.append(element("p", { class: problem ? "note problem" : "note" }, text));
  toEnd(false);
}

function body() {
  const system = $("system").value.trim();
  const first = system ? [{ role: "system", content: system }] : [];
  const most = Math.floor(Number($("tokens").value));
  return {
    model,
    messages: [...first, ...conversation],
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value),
    // an empty field: as many as fit
    max_tokens: most > 0 ? most : null,
  };
}

async function send(question) {
  const mine = conversation;
  mine.push({ role: "user", content: question });
  addTurn("user", question);
  const turn = addTurn("assistant", "");
  turn.classList.add("waiting");
  running = new AbortController();
  busy(true);
  const told = { text: "", begun: performance.now() };
  try {
    await read(turn, told);
  } catch (error) {
    if (error.name !== "AbortError") note(turn, error.message, true);
    else note(turn, "Stopped.");
  }
  turn.classList.remove("waiting");
  // a question without an answer would be asked again with the next one
  if (told.text) mine.push({ role: "assistant", content: told.text });
  else mine.pop();
  running = null;
  busy(false);
  refresh();
}

async function read(turn, told) {
  const words = turn.querySelector(".words");
  const answer = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Conversation": conversationName },
    body: JSON.stringify(body()),
    signal: running.signal,
  });
  for await (const event of events(answer)) {
    if (event.error) throw new Refused(200, event.error.message);
    const piece = event.choices[0]?.delta?.content;
    if (piece) {
      told.first ??= performance.now();
      told.last = performance.now();
      told.text += piece;
      show(words, told.text);
      toEnd(false);
    }
    told.reason = event.choices[0]?.finish_reason || told.reason;
    told.extras = event.astra || told.extras;
    told.usage = event.usage || told.usage;
  }
  note(turn, summary(told));
}

function summary(told) {
  const parts = [];
  const usage = told.usage;
  if (told.first) parts.push(`first token after ${seconds((told.first - told.begun) / 1000)}`);
  if (usage && usage.completion_tokens > 1 && told.last > told.first) {
    const pace = (usage.completion_tokens - 1) / ((told.last - told.first) / 1000);
    parts.push(`${usage.completion_tokens} tokens at ${pace.toFixed(1)} a second`);
  }
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (cached) parts.push(`${cached} of ${usage.prompt_tokens} prompt tokens known before`);
  if (told.extras) parts.push(`answered by rank ${told.extras.ranks.join(", ")}`);
  if (told.extras?.degraded) parts.push("degraded: a device was left out");
  if (told.reason === "length") parts.push("cut off at the token limit");
  return parts.join(" · ");
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
}

async function refresh() {
  try {
    // a timeline that is shown already does not cross again
    const known = timelineKey === null ? "" : `?timeline=${timelineKey}`;
    const status = await (await ask(`v1/astra/status${known}`)).json();
    showStatus(status);
  } catch (error) {
    setState("gone", error instanceof Refused ? error.message : "the server does not answer");
  }
}

async function poll() {
  if (!document.hidden) await refresh();
  setTimeout(poll, POLL_MS);
}

function setState(ready, text) {
  const state = $("state");
  if (state.textContent !== text) state.textContent = text;
  state.dataset.ready = ready;
}

function showStatus(status) {
  model = status.model;
  $("model").textContent = model;
  setState(status.ready ? "yes" : "no", status.ready ? "ready" : status.reason || "not ready");
  const chats = status.kind === "decoder";
  $("question").disabled = $("send").disabled = !chats;
  if (!chats) {
    const path = status.kind === "encoder" ? "/v1/embeddings" : "/v1/images/classify";
    $("hint").textContent = `${model} does not chat: ask it at ${path}.`;
  }
  const limit = status.max_new_tokens;
  if (limit && Number($("tokens").value) > limit) $("tokens").value = limit;
  showPeers(status.peers);
  $("queue").textContent =
    `${status.running} running · ${status.queued} waiting (at most ${status.max_queue})`;
  $("waiting").value = status.max_queue ? status.queued / status.max_queue : 0;
  $("reading").hidden = status.progress === null;
  $("progress").value = status.progress ?? 0;
  if (status.timeline?.length) showTimeline(status.timeline);
  timelineKey = status.timeline_key;
}

function showPeers(peers) {
  const now = performance.now();
  const rows = peers.map((peer) => {
    const old = before?.peers.get(peer.rank);
    const gone = before ? (now - before.at) / 1000 : 0;
    return peerRow(peer, old, gone);
  });
  $("peers").replaceChildren(...rows);
  before = { at: now, peers: new Map(peers.map((peer) => [peer.rank, peer])) };
}

/* Bytes that a device has sent and received. The leader counts what it sends to each. */
function crossed(peer) {
  const both = [peer.bytes_sent, peer.bytes_received];
  return peer.rank === 0 ? both : both.reverse();
}

const known = (value) => value !== null && value !== undefined;

function peerRow(peer, old, gone) {
  const facts = [["state", peer.state]];
  if (peer.state === "here") {
    const answers = peer.running === 1 ? "1 answer" : `${peer.running} answers`;
    facts[0] = ["doing", peer.running ? `writes ${answers}` : "idle"];
    if (peer.prefill_tokens_per_s) facts.push(["reads", rate(peer.prefill_tokens_per_s)]);
    if (peer.decode_tokens_per_s) facts.push(["writes", rate(peer.decode_tokens_per_s)]);
    if (known(peer.busy)) facts.push(["busy", `${Math.round(100 * peer.busy)} %`]);
    if (known(peer.rtt_ms)) facts.push(["answers in", `${peer.rtt_ms.toFixed(1)} ms`]);
  }
  const [up, down] = crossed(peer);
  if (known(peer.bytes_sent_per_s)) {
    const rates = [peer.bytes_sent_per_s, peer.bytes_received_per_s].map(bits);
    if (peer.rank !== 0) rates.reverse();
    facts.push(["link now", `↑ ${rates[0]} ↓ ${rates[1]}`]);
  } else if (old && gone > 0) {
    const [upBefore, downBefore] = crossed(old);
    const rates = [up - upBefore, down - downBefore].map((n) => bits(Math.max(0, n) / gone));
    facts.push(["link now", `↑ ${rates[0]} ↓ ${rates[1]}`]);
  }
  facts.push(["link in all", `↑ ${bytes(up)} ↓ ${bytes(down)}`]);
  const list = element("dl", {});
  for (const [name, value] of facts) list.append(element("dt", {}, name), element("dd", {}, value));
  const leader = peer.rank === 0 ? " (leader)" : "";
  return element("li", { class: "peer", "data-state": peer.state },
    element("div", { class: "name" }, `rank ${peer.rank}${leader}`),
    element("div", { class: "address" }, peer.address), list);
}

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function newName() {
  return crypto.getRandomValues(new Uint32Array(4)).join("-");
}

const kindOf = (name) => (STAGES.includes(name) ? name : "other");
function showTimeline(spans) {
  const ranks = [...new Set(spans.map((span) => span.rank))].sort((a, b) => a - b);
  const start = Math.min(...spans.map((span) => span.start));
  const length = Math.max(...spans.map((span) => span.stop)) - start || 1e-9;
  const left = 44, width = 330, row = 24, height = ranks.length * row + 20;
  const at = (time) => left + ((time - start) / length) * (width - left);
  const chart = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  chart.append(drawn("title", {}, `Timeline of the last request, ${seconds(length)}`));
  ranks.forEach((rank, i) => {
    chart.append(drawn("text", { x: 0, y: i * row + 15 }, `rank ${rank}`));
    const track = { class: "track", x: left, y: i * row + 3, width: width - left, height: 16 };
    chart.append(drawn("rect", track));
  });
  // longer spans first: a stage lies on the one that it is part of
  const ordered = [...spans].sort((a, b) => (b.stop - b.start) - (a.stop - a.start));
  for (const span of ordered) {
    const x = at(span.start);
    const bar = drawn("rect", {
      class: kindOf(span.name), x, y: ranks.indexOf(span.rank) * row + 3,
      width: Math.max(0.4, at(span.stop) - x), height: 16,
    });
    bar.append(drawn("title", {}, `${span.name}: ${seconds(span.stop - span.start)}`));
    chart.append(bar);
  }
  chart.append(drawn("text", { x: left, y: height - 4 }, "0"));
  const end = { x: width, y: height - 4, "text-anchor": "end" };
  chart.append(drawn("text", end, seconds(length)));
  $("timeline").replaceChildren(chart, legend(spans));
}

function legend(spans) {
  const names = [...new Set(spans.map((span) => span.name))];
  return element("ul", { class: "legend" }, ...names.map((name) => {
    const mark = drawn("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" });
    mark.append(drawn("rect", { class: kindOf(name), width: 10, height: 10, rx: 2 }));
    return element("li", {}, mark, ` ${name}`);
  }));
}

const seconds = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(2)} s`);
const rate = (tokens) => `${tokens < 100 ? tokens.toFixed(1) : Math.round(tokens)} tokens/s`;

function scaled(value, units, base) {
  let unit = 0;
  while (value >= base && unit < units.length - 1) { value /= base; unit += 1; }
  return `${value < 10 && unit ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

const bytes = (n) => scaled(n, ["B", "kB", "MB", "GB", "TB"], 1000);
const bits = (n) => scaled(n * 8, ["bit/s", "kbit/s", "Mbit/s", "Gbit/s"], 1000);

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running) return;
  $("question").value = "";
  fit();
  send(question);
});

$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});

function fit() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

$("question").addEventListener("input", fit);
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  conversation = [];
  conversationName = newName();
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("hint").hidden = false;
  $("question").focus();
});

for (const button of document.querySelectorAll("nav button")) {
  button.addEventListener("click", () => {
    $("main").dataset.view = button.dataset.view;
    for (const other of document.querySelectorAll("nav button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
  });
}

poll();
