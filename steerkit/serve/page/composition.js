// Compositions as text, Python and curl. A term is what steerkit's JSON of a composition holds: {vector, strength, scope,
// window: [from, to], unit, without, fade, when, hold}, all but the first left out where the vector's file decides.

const BARE = /^(hub:)?[\p{L}\p{N}_./]+(-+[\p{L}\p{N}_./]+)*$/u;
const NUMBER = /^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?$/i;
const nameOf = (name) => (BARE.test(name) && !NUMBER.test(name) ? name : JSON.stringify(name));

function fadeOf(fade, isMinus) {
  const to = isMinus ? -fade.to : fade.to;
  return ` fade(${fade.shape} over ${fade.over}${to ? ` to ${to}` : ""})`;
}

const comparisonOf = ({ reading, above, below, off }) =>
  `${nameOf(reading)} ${above !== undefined ? ">" : "<"} ${above ?? below}${off !== undefined ? ` off ${off}` : ""}`;

/** A rule over readings; & joins before |, and what one sign joins is joined from the left. */
function ruleOf(rule) {
  if (rule.not) return `~(${ruleOf(rule.not)})`;
  if (!rule.all && !rule.any) return comparisonOf(rule);
  const [parts, sign] = rule.all ? [rule.all, " & "] : [rule.any, " | "];
  const inBrackets = (part, place) => (rule.all && part.any) || (place > 0 && (rule.all ? part.all : part.any));
  return parts.map((part, place) => (inBrackets(part, place) ? `(${ruleOf(part)})` : ruleOf(part))).join(sign);
}

/** On what else a term depends, as it is read aloud: a gate, or the reading that it holds. */
export function conditionOf({ when, hold }) {
  const gate = when ? ` when(${ruleOf(when.rule)}${when.per_token ? " per token" : ""})` : "";
  const [low, high] = hold?.within ?? [];
  return gate + (hold ? ` hold(${nameOf(hold.reading)} at ${hold.at} within ${low} to ${high})` : "");
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
    text += conditionOf(term);
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
