// Compositions as text, Python and curl. A term is what steerkit's JSON of a composition holds: {vector, strength, scope,
// window: [from, to], unit, without, fade}, all but the first left out where the vector's file decides.

const BARE = /^[\p{L}\p{N}_./]+(-+[\p{L}\p{N}_./]+)*$/u;
const NUMBER = /^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?$/i;
const nameOf = (name) => (BARE.test(name) && !NUMBER.test(name) ? name : JSON.stringify(name));

function fadeOf(fade, isMinus) {
  const to = isMinus ? -fade.to : fade.to;
  return ` fade(${fade.shape} over ${fade.over}${to ? ` to ${to}` : ""})`;
}

/** The line that `Composition.parse` reads; empty where nothing steers. */
export function textOf(terms) {
  let text = "";
  for (const term of terms) {
    const isMinus = term.minus || term.strength < 0;
    text += text ? (isMinus ? " - " : " + ") : isMinus ? "- " : "";
    text += nameOf(term.vector);
    if (term.without) text += `~${nameOf(term.without)}`;
    if (term.scope) text += `@${term.scope}`;
    if (term.window) text += `[${term.window[0] || ""}:${term.window[1] ?? ""}]`;
    if (term.strength !== undefined) text += `*${Math.abs(term.strength)}`;
    if (term.unit) text += ` ${term.unit}`;
    if (term.fade) text += fadeOf(term.fade, isMinus);
  }
  return text;
}

/** Lines of Python that give the steered answer; `asked` is the body of a chat completion. */
export function pythonOf(asked, model) {
  const drawn = asked.temperature ? `, do_sample=True, temperature=${asked.temperature}` : "";
  const seed = asked.temperature && asked.seed !== undefined ? `, seed=${asked.seed}` : "";
  const steering = asked.steering ? `, vector=${JSON.stringify(asked.steering)}` : "";
  return [
    "import steerkit",
    "",
    `model, tokenizer = steerkit.load_model(${JSON.stringify(model)})`,
    `messages = ${JSON.stringify(asked.messages)}`,
    `options = dict(max_new_tokens=${asked.max_tokens}${drawn}${seed})`,
    `print(steerkit.generate(model, tokenizer, [messages]${steering}, **options)[0])`,
    "",
  ].join("\n");
}

/** A command that asks this server for the steered answer. A key is read from the environment, never written out. */
export function curlOf(asked, address, hasKey) {
  const key = hasKey ? ' -H "Authorization: Bearer $STEERKIT_API_KEY"' : "";
  const body = JSON.stringify(asked).replaceAll("'", "'\\''");
  return `curl '${address}v1/chat/completions'${key} -H 'Content-Type: application/json' -d '${body}'\n`;
}
