// Talking to the server: JSON, and answers as they come.

export const byId = (id) => document.getElementById(id);

function headers() {
  const key = byId("key").value.trim();
  const all = { "Content-Type": "application/json" };
  if (key) all.Authorization = `Bearer ${key}`;
  return all;
}

async function failure(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // no JSON: the status says it
  }
  const error = new Error(message);
  error.status = response.status;
  return error;
}

export async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await failure(response);
  return response.json();
}

/** The `data:` events of a POST, parsed. Leaving the loop, or `signal`, ends the generation. */
export async function* events(path, body, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: headers(),
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        if (!block.startsWith("data: ")) continue;
        const text = block.slice(6);
        if (text === "[DONE]") return;
        const event = JSON.parse(text);
        if (event.error) throw new Error(event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export function settings() {
  const number = (id) => {
    const value = byId(id).valueAsNumber;
    return Number.isFinite(value) ? value : undefined;
  };
  return {
    model: byId("model").value || undefined,
    temperature: number("temperature"),
    top_p: number("top_p"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
  };
}

/** `12 tokens, 40.1 tokens/s` of an answer's `dsq` field and its count. */
export function speed(n, dsq) {
  const parts = [`${n} token${n === 1 ? "" : "s"}`];
  if (dsq?.tokens_per_second) parts.push(`${dsq.tokens_per_second.toFixed(1)} tokens/s`);
  if (dsq?.accepted_tokens) parts.push(`${dsq.accepted_tokens} from drafts`);
  return parts.join(", ");
}
