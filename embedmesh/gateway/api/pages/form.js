// The form: which fields it has for which model, and what its button does.

const BUTTONS = {
  embeddings: "Create embeddings",
  rerank: "Rank documents",
  chat: "Send",
  completions: "Complete",
  images: "Create images",
};
const BUSY = {
  embeddings: "Sending…",
  rerank: "Ranking…",
  chat: "Answering…",
  completions: "Answering…",
  images: "Painting…",
};
const CHOICES = { embeddings: "Embed", rerank: "Rerank", chat: "Chat", completions: "Complete", images: "Images" };
const ASKS = { embeddings: embed, rerank: rank, images: paint };

let kind = "embeddings"; // of the model that is chosen

/** Show the fields for the model that is chosen. */
function showKind() {
  const model = chosenModel();
  kind = kindOf(model);
  for (const each of KINDS) byId(`for-${each}`).hidden = each !== kind;
  for (const button of byId("kinds").children) button.setAttribute("aria-pressed", String(button.value === kind));
  byId("send").textContent = BUTTONS[kind];
  byId("anew").hidden = kind !== "chat";
  if (model) byId("model-hint").textContent = hintOf(model);
  const sizes = Object.entries(model?.image_prices_nanousd ?? {});
  if (sizes.length)
    byId("size").replaceChildren(
      ...sizes.map(([size, price]) => el("option", { value: size }, `${size}, ${dollars(price)}`)),
    );
}

/** A button for each thing that the served models do, where that is more than one: it takes the first such model. */
function offerKinds() {
  const kinds = Object.keys(CHOICES).filter((each) => served.some((model) => kindOf(model) === each));
  byId("kinds").hidden = kinds.length < 2;
  byId("kinds").replaceChildren(
    ...kinds.map((each) => {
      const button = el("button", { type: "button", class: "quiet" }, CHOICES[each]);
      button.value = each;
      button.addEventListener("click", () => {
        if (underWay) return;
        byId("model").value = served.find((model) => kindOf(model) === each).id;
        showKind();
      });
      return button;
    }),
  );
}

async function send(event) {
  event.preventDefault();
  const button = byId("send");
  if (button.disabled) return;
  if (!byId("model").value.trim()) await choose(); // fills in the first model
  const model = byId("model").value.trim();
  if (!model) return showNoModel();
  button.disabled = true;
  button.textContent = BUSY[kind];
  try {
    await (ASKS[kind] ? ASKS[kind](model) : talk(kind, model));
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
  offerKinds();
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
