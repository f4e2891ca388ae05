// Completion: a prefix, a hole, a suffix.

import { byId, events, settings, speed } from "/web/api.js";

let running = null;

async function fill() {
  const middle = byId("middle");
  const status = byId("fill-status");
  const suffix = byId("suffix").value;
  const stop = byId("stop").value.replaceAll("\\n", "\n").replaceAll("\\t", "\t");
  const body = { ...settings(), prompt: byId("prefix").value, stream_options: { include_usage: true } };
  if (suffix) body.suffix = suffix;
  if (stop) body.stop = [stop];
  middle.textContent = "";
  middle.className = "waiting";
  status.textContent = "";
  status.className = "muted";
  running = new AbortController();
  byId("fill").textContent = "Stop";
  byId("accept").disabled = true;
  byId("fill-note").textContent = suffix ? "fill in the middle" : "after the prefix";
  let dsq = null;
  let n = 0;
  try {
    for await (const event of events("/v1/completions", body, running.signal)) {
      middle.append(event.choices[0]?.text ?? "");
      dsq = event.dsq ?? dsq;
      n = event.usage?.completion_tokens ?? n;
    }
    const dropped = (dsq?.dropped_prefix_tokens ?? 0) + (dsq?.dropped_suffix_tokens ?? 0);
    status.textContent = speed(n, dsq) + (dropped ? `; ${dropped} tokens of the file did not fit` : "");
  } catch (error) {
    status.textContent = error.name === "AbortError" ? "stopped" : error.message;
    status.classList.toggle("failed", error.name !== "AbortError");
  }
  middle.className = "";
  byId("accept").disabled = !middle.textContent;
  byId("fill").textContent = "Complete";
  running = null;
}

export function start() {
  byId("fill").addEventListener("click", () => (running ? running.abort() : fill()));
  byId("accept").addEventListener("click", () => {
    byId("prefix").value += byId("middle").textContent;
    byId("middle").textContent = "";
    byId("accept").disabled = true;
  });
  for (const id of ["prefix", "suffix"]) {
    byId(id).addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) fill();
    });
  }
}
