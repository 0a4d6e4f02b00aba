// A chat in two columns: the model as it is, and steered. The server's events come from server.js, the sliders are
// terms.js, the answers turns.js, and what is copied composition.js.

import { curlOf, pythonOf, textOf } from "./composition.js";
import { compare, hasKey, setKey, vectors } from "./server.js";
import { card, element, startOf } from "./terms.js";
import { COLUMNS, Turn } from "./turns.js";

const at = (id) => document.getElementById(id);
const wide = matchMedia("(min-width: 60rem)"); // as in style.css: there the controls stand beside the chat
const cards = [];
let turns = [];
let running = null; // AbortController of the answer under way
let model = "";

// --- steering -------------------------------------------------------------------------------------------------------

const composition = () => textOf(cards.map((one) => one.term()));

function addCard(facts, begun) {
  const made = card(facts, begun, changed, () => {
    cards.splice(cards.indexOf(made), 1);
    changed(true);
    at("add").focus();
  });
  cards.push(made);
  at("terms").append(made.root);
  changed(true);
  return made;
}

function changed(isFinal) {
  at("composition").textContent = at("summary").textContent = composition() || "no steering";
  if (isFinal && at("live").checked && turns.length) again();
}

// --- tints ----------------------------------------------------------------------------------------------------------

function paint() {
  const tint = at("tint").value;
  const largest = Math.max(0, ...turns.map((turn) => turn.largest(tint)));
  for (const turn of turns) turn.paint(tint, largest);
  const isProbe = tint !== "" && tint !== "kl";
  at("legend").hidden = tint === "";
  at("legend").classList.toggle("both", isProbe);
  const end = largest ? largest.toFixed(2) : "";
  at("least").textContent = isProbe ? end && `\u2212${end}` : "0";
  at("most").textContent = isProbe ? end && `+${end}` : end;
  const unit = isProbe ? `standard deviations of ${tint}` : "nats from plain";
  at("unit").textContent = largest || !isProbe ? unit : `${tint} is read from the next answer on`;
}

// --- asking ---------------------------------------------------------------------------------------------------------

function messagesOf(column, question) {
  const system = at("system").value.trim();
  const said = turns.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.textOf(column) },
  ]);
  return [...(system ? [{ role: "system", content: system }] : []), ...said, { role: "user", content: question }];
}

function settings() {
  const number = (id) => (at(id).value === "" ? undefined : at(id).valueAsNumber);
  return { steering: composition(), temperature: number("temperature"), seed: number("seed"), max_tokens: number("max-tokens") };
}

async function ask(question, replaced = null) {
  if (running) return;
  const [tint, chat, under] = [at("tint").value, turns, new AbortController()];
  const probe = tint === "kl" ? "" : tint;
  const body = { messages: Object.fromEntries(COLUMNS.map((name) => [name, messagesOf(name, question)])), ...settings() };
  if (probe) body.probe = probe;
  const turn = new Turn(question, body.steering, probe);
  running = under;
  at("error").textContent = "";
  at("empty").hidden = true;
  at("turns").append(turn.root);
  busy("Answering");
  follow(true);
  let outcome = "Answered";
  try {
    for await (const event of compare(body, under.signal)) {
      if (event.done) turn.end(event.done);
      else turn.columns[event.column].add(event);
      turn.paint(tint, turn.largest(tint));
      follow();
    }
  } catch (error) {
    turn.end(null);
    outcome = error.name === "AbortError" ? "Stopped" : "";
    if (!outcome) fail(error);
  }
  running = null;
  settle(chat, turn, replaced);
  busy("", outcome);
  paint();
  if (outcome === "Answered" && at("live").checked && composition() !== body.steering) again();
}

/** Keep a turn that has an answer; else leave everything as it was before it. */
function settle(chat, turn, replaced) {
  const kept = turn.isEmpty ? replaced : turn;
  if (kept !== turn) turn.root.remove();
  if (chat !== turns) {
    turn.root.remove(); // a new chat was begun meanwhile
  } else if (kept) {
    turns.push(kept);
    at("turns").append(kept.root);
  } else if (!at("question").value) {
    at("question").value = turn.question;
  }
  at("empty").hidden = turns.length > 0;
}

function again() {
  if (running || !turns.length) return;
  const last = turns.pop();
  last.root.remove();
  ask(last.question, last);
}

/** Keep what is written last in sight, unless somebody has scrolled away from it meanwhile. */
function follow(always = false) {
  const chat = getComputedStyle(at("chat")).overflowY === "auto" ? at("chat") : document.documentElement;
  if (always || chat.scrollHeight - chat.scrollTop - chat.clientHeight < 160) chat.scrollTop = chat.scrollHeight;
}

function busy(doing, done = "") {
  at("status").textContent = doing || done;
  at("send").disabled = doing !== "";
  at("stop").disabled = doing === "";
  at("again").disabled = doing !== "" || !turns.length;
}

function fail(error) {
  if (error.status !== 401) {
    at("error").textContent = error.message;
    return;
  }
  at("refused").textContent = hasKey() ? error.message : "";
  at("door").showModal();
}

// --- the key, copying, and what is there ----------------------------------------------------------------------------

async function copy(kind) {
  const question = at("question").value.trim() || turns.at(-1)?.question || "How was your day?";
  const system = at("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: question }];
  const asked = { messages, ...settings() };
  const address = new URL(".", location.href).href;
  const text = { text: asked.steering, python: pythonOf(asked, model), curl: curlOf(asked, address, hasKey()) }[kind];
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers give the clipboard to safe origins alone; elsewhere a selection can be copied.
    const field = element("textarea", { value: text, className: "unseen" });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  at("status").textContent = `Copied ${{ text: "the composition", python: "Python", curl: "a curl command" }[kind]}`;
}

async function begin() {
  let found;
  try {
    found = await vectors();
  } catch (error) {
    fail(error);
    return;
  }
  model = found.model;
  at("error").textContent = "";
  at("model").textContent = model;
  document.title = `${model} \u00b7 steerkit`;
  const byName = new Map(found.vectors.map((facts) => [facts.name, facts]));
  at("add").append(...found.vectors.map((facts) => new Option(facts.name)));
  at("tint").append(...found.vectors.filter((facts) => facts.is_probe).map((facts) => new Option(facts.name)));
  const first = found.vectors.find((facts) => facts.strength !== null);
  const terms = found.default?.terms ?? (first ? [{ vector: first.name }] : []);
  for (const term of terms) addCard(byName.get(term.vector), term);
  at("add").addEventListener("change", () => {
    const facts = byName.get(at("add").value);
    at("add").value = "";
    if (facts) addCard(facts, { vector: facts.name, strength: startOf(facts) }).focus();
  });
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || running) return;
  at("question").value = "";
  if (!wide.matches) at("controls").open = false; // they would stand above the answer
  ask(question);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("again").addEventListener("click", again);
at("fresh").addEventListener("click", () => {
  running?.abort();
  for (const turn of turns) turn.root.remove();
  turns = [];
  at("empty").hidden = false;
  busy("");
  paint();
  at("question").focus();
});
at("tint").addEventListener("change", paint);
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", () => copy(button.dataset.copy));
}
at("door").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(at("key").value);
  at("key").value = "";
  at("door").close();
  at("error").textContent = "";
  if (!model) begin();
});
at("controls").open = wide.matches;
wide.addEventListener("change", () => { at("controls").open ||= wide.matches; });
begin();
