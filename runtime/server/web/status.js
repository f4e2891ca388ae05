// How busy the server is, once a second while the page is looked at.

import { byId, get } from "/web/api.js";

const size = (bytes) =>
  bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : `${Math.round(bytes / 2 ** 20)} MiB`;

async function look() {
  if (document.hidden) return;
  try {
    const { models } = await get("/stats");
    const sum = (key) => models.reduce((total, model) => total + model[key], 0);
    byId("rate").textContent = sum("tokens_per_second").toFixed(1);
    byId("busy").textContent = `${sum("n_busy")}/${sum("n_slots")}`;
    byId("memory").textContent = size(sum("memory_bytes"));
    byId("cache").value = sum("kv_size") ? sum("kv_used") / sum("kv_size") : 0;
  } catch {
    byId("rate").textContent = byId("busy").textContent = byId("memory").textContent = "–";
  }
}

export function start() {
  look();
  setInterval(look, 1000);
}
