// What is asked of the server, and what it sends back. Addresses are relative, so the page works behind any path.

let key = ""; // in memory alone

export const hasKey = () => key !== "";
export const setKey = (given) => { key = given.trim(); };

/** An error that is shown as it is; `status` is the server's. */
export class Refused extends Error {
  constructor(message, status = 0) {
    super(message.replace(/\s+/g, " "));
    this.status = status;
  }
}

async function reached(path, options) {
  const headers = key ? { ...options.headers, Authorization: `Bearer ${key}` } : options.headers;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server cannot be reached");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Refused(said?.error?.message ?? `the server answered ${response.status}`, response.status);
}

/** The model, its vectors, and how requests are steered that say nothing of it. */
export async function vectors() {
  return (await reached("steerkit/vectors", {})).json();
}

/** The events of both columns, as they come. */
export async function* compare(body, signal) {
  const response = await reached("steerkit/compare", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("the server broke off");
    }
    if (part.done) return;
    const events = (left + part.value).split("\n\n");
    left = events.pop();
    for (const event of events) {
      const found = JSON.parse(event.slice("data: ".length));
      if (found.error) throw new Refused(found.error.message);
      yield found;
    }
  }
}
