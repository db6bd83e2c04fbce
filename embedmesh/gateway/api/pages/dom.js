// Building the page. Whatever comes from a reply or a document becomes text nodes, never markup.

/** Where this gateway is, without a slash at the end; right also behind a proxy that puts a prefix before its paths. */
const BASE = new URL(".", location.href).href.replace(/\/$/, "");

const byId = (id) => document.getElementById(id);

/** An element with attributes and children; a child that is a string becomes text, null and undefined are left out. */
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Text in which `backticks` mark code. */
function prose(text) {
  return text.split("`").map((part, index) => (index % 2 ? el("code", {}, part) : part));
}

/**
 * A table with a row of headings; cells are lists of children, or one child. Where it is too wide it scrolls by itself;
 * with `stacks` its cells stand one below the other on a phone, which reads better where they are sentences.
 */
function table(label, headings, rows, { stacks = false } = {}) {
  const head = el(
    "tr",
    {},
    headings.map((heading) => el("th", { scope: "col" }, heading)),
  );
  const body = rows.map((cells) =>
    el(
      "tr",
      {},
      cells.map((cell) => el("td", {}, cell)),
    ),
  );
  const whole = el("table", { "aria-label": label }, el("thead", {}, head), el("tbody", {}, body));
  return el(
    "div",
    { class: stacks ? "scrolls stacks" : "scrolls", tabindex: "0", role: "region", "aria-label": label },
    whole,
  );
}

/** Something short that people who cannot see the page should hear. */
function announce(words) {
  byId("announcer").textContent = words;
}

/** A button that copies what an element shows. */
function copyButton(shown, what) {
  const button = el("button", { type: "button", class: "quiet copy", "aria-label": `Copy ${what}` }, "Copy");
  button.addEventListener("click", async () => {
    const copied = await copyText(shown);
    button.textContent = copied ? "Copied" : "Press Ctrl+C";
    announce(copied ? `Copied ${what}` : `Selected ${what}; press Ctrl+C`);
    setTimeout(() => (button.textContent = "Copy"), 1600);
  });
  return button;
}

/** Whether it was copied; where the browser does not let us (plain http to another machine), it is selected. */
async function copyText(shown) {
  try {
    await navigator.clipboard.writeText(shown.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(shown);
    return false;
  }
}

function codeBlock(source, what) {
  const code = el("code", {}, source);
  const scrolling = el("pre", { tabindex: "0", role: "region", "aria-label": what }, code);
  return el("div", { class: "code" }, scrolling, copyButton(code, what));
}

/** Tabs, `[label, panel]` each. Arrow keys, Home and End move between them. */
function tabs(name, label, entries) {
  const buttons = entries.map(([title], index) =>
    el(
      "button",
      { type: "button", role: "tab", id: `${name}-tab-${index}`, "aria-controls": `${name}-panel-${index}` },
      title,
    ),
  );
  const panels = entries.map(([, content], index) =>
    el("div", { role: "tabpanel", id: `${name}-panel-${index}`, "aria-labelledby": `${name}-tab-${index}` }, content),
  );
  const choose = (chosen) => {
    buttons.forEach((button, index) => {
      button.setAttribute("aria-selected", String(index === chosen));
      button.tabIndex = index === chosen ? 0 : -1;
      panels[index].hidden = index !== chosen;
    });
  };
  const moves = { ArrowRight: (i) => i + 1, ArrowLeft: (i) => i - 1, Home: () => 0, End: () => buttons.length - 1 };
  buttons.forEach((button, index) => {
    button.addEventListener("click", () => choose(index));
    button.addEventListener("keydown", (event) => {
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      const next = (move(index) + buttons.length) % buttons.length;
      choose(next);
      buttons[next].focus();
    });
  });
  choose(0);
  return el("div", { class: "tabs" }, el("div", { role: "tablist", "aria-label": label }, buttons), panels);
}
