// The conversation: each turn is a question and two answers, token by token.

import { element } from "./terms.js";

export const COLUMNS = ["plain", "steered"];

const signed = (value) => `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(2)}`;
const mean = (values) => values.reduce((sum, one) => sum + one, 0) / values.length;
const known = (tokens, what) => tokens.map((one) => one[what]).filter((one) => one !== null);

/** One turn.
 *
 * question: what was asked.
 * steering: the composition's text.
 * probe: name of the vector that is read at each token; empty for none.
 */
export class Turn {
  constructor(question, steering, probe) {
    Object.assign(this, { question, steering, probe, columns: {} });
    const used = element("code", { className: "used", textContent: steering || "no steering" });
    const both = element("div", { className: "columns" });
    for (const name of COLUMNS) {
      this.columns[name] = new Column(name, probe);
      both.append(this.columns[name].root);
    }
    this.root = element("article", { className: "turn" }, element("p", { className: "question", textContent: question }));
    this.root.append(used, both);
  }

  textOf(name) {
    return this.columns[name].text;
  }

  get isEmpty() {
    return COLUMNS.every((name) => this.textOf(name) === "");
  }

  /** The largest value that a tint shows in this turn; 0 where it shows none. */
  largest(tint) {
    const shown = this.shown(tint);
    const values = COLUMNS.flatMap((name) => (shown ? known(this.columns[name].tokens, shown) : []));
    return values.reduce((most, one) => Math.max(most, Math.abs(one)), 0);
  }

  /** Which of a token's values a tint shows: readings of another probe than this turn's are not known. */
  shown(tint) {
    return tint === "kl" ? "kl" : tint && tint === this.probe ? "reading" : "";
  }

  paint(tint, largest) {
    const shown = this.shown(tint);
    for (const name of COLUMNS) for (const token of this.columns[name].tokens) paint(token, shown, largest);
  }

  end(ends) {
    for (const name of COLUMNS) this.columns[name].end(ends?.[name] ?? { finish: "stopped" });
  }
}

function paint(token, shown, largest) {
  const value = shown ? token[shown] : null;
  if (!token.span) return;
  token.span.classList.toggle("tinted", value !== null && largest > 0);
  token.span.classList.toggle("below", value < 0);
  token.span.style.setProperty("--share", value === null || !largest ? 0 : (0.9 * Math.abs(value)) / largest);
}

/** One answer. Its tokens are one stop of the Tab key; arrow keys go from token to token. */
class Column {
  constructor(name, probe) {
    Object.assign(this, { name, probe, text: "", tokens: [], count: 0, finish: "" });
    this.answer = element("div", { className: "answer" });
    this.answer.setAttribute("role", "group");
    this.answer.setAttribute("aria-label", `${name} answer`);
    this.answer.setAttribute("aria-busy", "true");
    this.facts = element("p", { className: "facts" });
    this.root = element("section", { className: "column" }, element("h3", { textContent: name }), this.answer, this.facts);
    this.root.dataset.column = name;
    this.answer.addEventListener("pointerover", (event) => this.tell(event.target));
    this.answer.addEventListener("pointerleave", () => this.sum());
    this.answer.addEventListener("focusin", (event) => this.tell(event.target));
    this.answer.addEventListener("focusout", () => this.sum());
    this.answer.addEventListener("keydown", (event) => this.go(event));
  }

  add({ text, kl, reading }) {
    this.text += text;
    const token = { text, kl, reading, span: null };
    if (text) {
      const shown = text.trimStart() || text; // the blank before a word is not tinted, so that lines end clean
      token.span = element("span", { className: "token", textContent: shown, tabIndex: this.answer.firstElementChild ? -1 : 0 });
      this.answer.append(text.slice(0, text.length - shown.length), token.span);
    }
    this.tokens.push(token);
    this.count += 1;
    this.sum();
  }

  end({ finish, tokens }) {
    this.finish = finish;
    this.count = tokens ?? this.count;
    this.answer.setAttribute("aria-busy", "false");
    this.sum();
  }

  /** What there is to say of the whole answer. */
  sum() {
    const said = [`${this.count} tokens${this.finish === "length" ? " (all it may have)" : ""}`];
    if (this.finish === "stopped") said[0] += ", stopped";
    const [kl, reading] = [known(this.tokens, "kl"), known(this.tokens, "reading")];
    if (kl.length) said.push(`mean KL ${mean(kl).toFixed(3)} nats`);
    if (reading.length) said.push(`mean ${this.probe} ${signed(mean(reading))} sd`);
    this.facts.textContent = said.join(" \u00b7 ");
  }

  /** What there is to say of one token. */
  tell(span) {
    const token = this.tokens.find((one) => one.span === span);
    if (!token) return;
    const said = [`\u201c${token.text.trim() || "blank"}\u201d`];
    if (token.kl !== null) said.push(`KL ${token.kl.toFixed(3)} nats`);
    if (token.reading !== null) said.push(`${this.probe} ${signed(token.reading)} sd`);
    this.facts.textContent = said.join(" \u00b7 ");
  }

  go(event) {
    const spans = [...this.answer.children];
    const at = spans.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    const next = spans[Math.min(Math.max(to, 0), spans.length - 1)];
    spans[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}
