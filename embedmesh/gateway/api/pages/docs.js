// The page's life: fetch the document, draw it, look after the form and the light in the corner.

const READINESS_EVERY_MS = 15000; // a gateway calls itself ready for 15 s after its last real embedding

async function drawReference() {
  byId("loading").replaceChildren("Loading the description of this API…");
  try {
    const response = await fetch(`${BASE}/openapi.json`);
    if (!response.ok) throw new Error(String(response.status));
    const api = await response.json();
    byId("version").textContent = api.info.version;
    byId("summary").replaceChildren(...prose(api.info.summary));
    apiErrors = api["x-embedmesh-errors"];
    for (const draw of [drawSamples, drawRoutes, drawMembers, drawReply, drawErrors]) draw(api);
    byId("loading").replaceChildren();
    if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView(); // it was not there before
  } catch {
    const again = el("button", { type: "button" }, "Try again");
    again.addEventListener("click", drawReference);
    const words = el("p", {}, "The description of this API (openapi.json) could not be loaded.");
    byId("loading").replaceChildren(el("div", { class: "notice" }, words, again));
  }
}

async function showReadiness() {
  const light = byId("readiness");
  let [state, words, why] = ["bad", "not reachable", ""];
  try {
    const response = await fetch(`${BASE}/readyz`);
    const { reasons } = await response.json();
    [state, words] = response.ok ? ["good", "ready"] : ["warn", "not ready"];
    why = reasons.join("; ");
  } catch {
    // the words above say it
  }
  if (light.textContent !== words) light.textContent = words; // unchanged words are not announced again
  light.className = `readiness ${state}`;
  light.title = why;
}

byId("address").textContent = `${BASE}/v1`;
byId("address").after(copyButton(byId("address"), "the base URL"));
readyTheForm();
drawReference();
showReadiness();
setInterval(() => document.hidden || showReadiness(), READINESS_EVERY_MS);
