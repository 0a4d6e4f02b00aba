// The sliders: one card for each vector that steers.

import { conditionOf } from "./composition.js";

let number = 0; // of cards made, for ids

/** An element with properties and children. Text is only ever set as text. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const rounded = (value) => Number(value.toPrecision(6));

function rangeOf(facts, strength) {
  const most = Math.max(...facts.ladder.map(Math.abs), 2 * Math.abs(facts.strength ?? 0), Math.abs(strength));
  return { most, step: 10 ** Math.floor(Math.log10(most / 10)) };
}

/** The strength a vector starts with: what is taken where nobody gives one, else a weak one. */
export const startOf = (facts) => facts.strength ?? facts.ladder[Math.floor(facts.ladder.length / 3)];

/** A card.
 *
 * facts: of the vector, as the server tells them.
 * begun: the term it begins with.
 * changed(isFinal): called when something was changed; not final while a slider is being moved.
 * removed(): called when the vector is taken away.
 * Its `term()` is what the card says.
 */
export function card(facts, begun, changed, removed) {
  const id = `term-${++number}`;
  const strength = begun.strength ?? (begun.minus ? -1 : 1) * startOf(facts);
  const { most, step } = rangeOf(facts, strength);
  const slider = element("input", { type: "range", id, min: -most, max: most, step, value: strength });
  slider.setAttribute("aria-label", `strength of ${facts.name}`);
  const exact = element("input", { type: "number", step: "any", value: strength });
  exact.setAttribute("aria-label", `strength of ${facts.name} as a number`);
  slider.disabled = exact.disabled = Boolean(begun.hold); // which finds the strength itself
  const track = element("span", { className: "track" }, slider, mark(0.5, ""));
  const more = element("p", { className: "more" });
  if (facts.strength !== null) {
    track.append(mark((facts.strength + most) / (2 * most), "suggested"));
    const suggested = element("button", { type: "button", textContent: `suggested ${facts.strength}` });
    suggested.addEventListener("click", () => set(facts.strength, true));
    more.append(suggested);
  } else {
    more.append(element("span", { textContent: `no suggested strength (${facts.counts})` }));
  }
  const remove = element("button", { type: "button", textContent: "Remove" });
  remove.setAttribute("aria-label", `Remove ${facts.name}`);
  remove.addEventListener("click", () => { root.remove(); removed(); });
  more.append(remove);

  const scope = element("select", {}, new Option(facts.scope, ""));
  scope.append(...facts.scopes.filter((one) => one !== facts.scope).map((one) => new Option(one, one)));
  if (begun.scope && ![...scope.options].some((one) => one.value === begun.scope)) scope.append(new Option(begun.scope));
  scope.value = begun.scope ?? "";
  const [from, to] = ["from", "to"].map((name, place) => {
    const input = element("input", { type: "number", min: 0, step: 1, placeholder: place ? "end" : "0" });
    input.value = begun.window?.[place] ?? "";
    return [name, input];
  });
  const where = element("div", { className: "where" });
  where.append(element("label", {}, "Tokens", scope));
  for (const [name, input] of [from, to]) where.append(element("label", {}, name, input));

  const fits = () => ["response", "generated"].includes(scope.value || facts.scope);
  function settle() {
    for (const [, input] of [from, to]) input.disabled = !fits();
  }
  function set(value, isFinal) {
    if (Number.isFinite(value)) slider.value = value;
    exact.value = rounded(Number.isFinite(value) ? value : slider.valueAsNumber);
    changed(isFinal);
  }
  slider.addEventListener("input", () => { exact.value = rounded(slider.valueAsNumber); changed(false); });
  slider.addEventListener("change", () => changed(true));
  exact.addEventListener("change", () => set(exact.valueAsNumber, true));
  for (const input of [scope, from[1], to[1]]) {
    input.addEventListener("change", () => { settle(); changed(true); });
  }
  settle();

  const root = element("fieldset", { className: "term" }, element("legend", { textContent: titleOf(facts, begun) }));
  root.append(element("div", { className: "strength" }, track, exact), more, where);
  const term = () => {
    const strength = exact.value === "" ? slider.valueAsNumber : exact.valueAsNumber;
    const said = { ...begun, strength, scope: scope.value || undefined, minus: undefined };
    if (begun.hold) said.strength = undefined;
    const [first, end] = [from[1], to[1]].map((input) => (input.value === "" ? null : input.valueAsNumber));
    said.window = fits() && (first !== null || end !== null) ? [first ?? 0, end] : undefined;
    return said;
  };
  return { root, term, focus: () => slider.focus() };
}

const titleOf = (facts, begun) =>
  (begun.without ? `${facts.name} without ${begun.without}` : facts.name) + conditionOf(begun);

function mark(place, kind) {
  const made = element("span", { className: `mark ${kind}` });
  made.style.setProperty("--place", place);
  return made;
}
