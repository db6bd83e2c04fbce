// The form: which fields it has for which model, and what its button does.

const BUTTONS = { embeddings: "Create embeddings", chat: "Send", completions: "Complete", images: "Create images" };
const BUSY = { embeddings: "Sending…", chat: "Answering…", completions: "Answering…", images: "Painting…" };

let kind = "embeddings"; // of the model that is chosen

/** Show the fields for the model that is chosen. */
function showKind() {
  const model = chosenModel();
  kind = kindOf(model);
  for (const each of KINDS) byId(`for-${each}`).hidden = each !== kind;
  byId("send").textContent = BUTTONS[kind];
  byId("anew").hidden = kind !== "chat";
  if (model) byId("model-hint").textContent = hintOf(model);
  const sizes = Object.entries(model?.image_prices_nanousd ?? {});
  if (sizes.length)
    byId("size").replaceChildren(
      ...sizes.map(([size, price]) => el("option", { value: size }, `${size}, ${dollars(price)}`)),
    );
}

async function send(event) {
  event.preventDefault();
  const button = byId("send");
  if (button.disabled) return;
  if (!byId("model").value.trim()) await choose(); // fills in the first model
  const model = byId("model").value.trim();
  if (!model) return showNoModel();
  const streams = kind === "chat" || kind === "completions";
  button.disabled = true;
  button.textContent = BUSY[kind];
  try {
    await (streams ? talk(kind, model) : kind === "images" ? paint(model) : embed(model));
  } catch (error) {
    showNotSent("No answer", whyNoAnswer(error));
  } finally {
    button.disabled = false;
    button.textContent = BUTTONS[kind];
    if (document.activeElement === document.body) button.focus(); // what had the focus is gone; the place is not
  }
}

async function choose() {
  await offerModels();
  showKind();
}

function readyTheForm() {
  byId("try-form").addEventListener("submit", send);
  byId("key").addEventListener("change", choose);
  byId("model").addEventListener("input", () => underWay || showKind());
  byId("anew").addEventListener("click", startAnew);
  byId("try-form").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault(); // or a browser may submit a second time
    byId("try-form").requestSubmit();
  });
  const show = byId("show-key");
  show.addEventListener("click", () => {
    const hidden = byId("key").type === "password";
    byId("key").type = hidden ? "text" : "password";
    show.textContent = hidden ? "Hide" : "Show";
    show.setAttribute("aria-pressed", String(hidden));
  });
}
