// The conversation.

import { byId, events, settings, speed } from "/web/api.js";
import { rendered } from "/web/markdown.js";

let messages = [];
let running = null;

function bubble(role) {
  const made = document.createElement("div");
  made.className = `message ${role}`;
  byId("messages").append(made);
  return made;
}

function nearEnd() {
  const box = byId("messages");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
}

function show() {
  byId("chat-empty").hidden = messages.length > 0;
  byId("chat-send").textContent = running ? "Stop" : "Send";
}

async function send(text) {
  const box = byId("messages");
  messages.push({ role: "user", content: text });
  bubble("user").textContent = text;
  const answer = bubble("assistant");
  const body = document.createElement("div");
  body.className = "waiting";
  answer.append(body);
  running = new AbortController();
  show();
  box.scrollTop = box.scrollHeight;

  let content = "";
  let n = 0;
  let dsq = null;
  let finish = null;
  let drawn = false;
  const draw = () => {
    drawn = false;
    const follow = nearEnd();
    body.replaceChildren(...rendered(content));
    if (follow) box.scrollTop = box.scrollHeight;
  };
  const system = byId("system").value.trim();
  const sent = system ? [{ role: "system", content: system }, ...messages] : messages;
  const foot = document.createElement("div");
  foot.className = "foot";
  try {
    const body_ = { ...settings(), messages: sent, stream_options: { include_usage: true } };
    for await (const event of events("/v1/chat/completions", body_, running.signal)) {
      const choice = event.choices[0];
      content += choice?.delta?.content ?? "";
      finish = choice?.finish_reason ?? finish;
      dsq = event.dsq ?? dsq;
      n = event.usage?.completion_tokens ?? n;
      if (!drawn) {
        drawn = true;
        requestAnimationFrame(draw);
      }
    }
    foot.textContent = speed(n, dsq) + (finish === "length" ? ", cut at the longest answer" : "");
  } catch (error) {
    foot.textContent = error.name === "AbortError" ? "stopped" : error.message;
    foot.classList.toggle("failed", error.name !== "AbortError");
  }
  draw();
  body.className = "";
  answer.append(foot);
  if (content) messages.push({ role: "assistant", content });
  else messages.pop(); // what was not answered is not part of the conversation
  running = null;
  show();
  if (nearEnd()) box.scrollTop = box.scrollHeight;
}

export function start() {
  const input = byId("chat-input");
  const grow = () => {
    input.style.height = "auto";
    input.style.height = `${input.scrollHeight + 2}px`;
  };
  const submit = () => {
    if (running) {
      running.abort();
      return;
    }
    const text = input.value.trim();
    if (!text) return;
    input.value = "";
    grow();
    send(text);
  };
  input.addEventListener("input", grow);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!running) submit();
    }
  });
  byId("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  byId("chat-new").addEventListener("click", () => {
    running?.abort();
    messages = [];
    for (const old of document.querySelectorAll("#messages .message")) old.remove();
    show();
    input.focus();
  });
  for (const idea of document.querySelectorAll(".idea")) {
    idea.addEventListener("click", () => send(idea.textContent));
  }
  show();
  input.focus();
}
