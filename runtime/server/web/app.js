// The page's frame: views, options, models.

import { byId, get } from "/web/api.js";
import { start as startChat } from "/web/chat.js";
import { start as startPlayground } from "/web/playground.js";
import { start as startStatus } from "/web/status.js";

const views = ["chat", "playground"];

function show(view) {
  for (const name of views) {
    byId(name).hidden = name !== view;
    byId(`tab-${name}`).setAttribute("aria-selected", String(name === view));
  }
  history.replaceState(null, "", `#${view}`);
}

function showOptions(open) {
  byId("options").hidden = !open;
  byId("options-button").setAttribute("aria-expanded", String(open));
}

async function loadModels() {
  const select = byId("model");
  try {
    const { data } = await get("/v1/models");
    const chosen = select.value;
    select.replaceChildren(...data.map((model) => new Option(model.id, model.id)));
    const wanted = chosen || data.find((model) => model.loaded)?.id;
    if (wanted) select.value = wanted;
    select.title = select.value;
  } catch (error) {
    if (error.status === 401) {
      showOptions(true);
      byId("key").focus();
    }
  }
}

for (const name of views) byId(`tab-${name}`).addEventListener("click", () => show(name));
byId("options-button").addEventListener("click", () => showOptions(byId("options").hidden));
byId("key").addEventListener("change", loadModels);
startChat();
startPlayground();
startStatus();
await loadModels();
show(views.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat");
