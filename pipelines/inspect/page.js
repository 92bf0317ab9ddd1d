// Page of remit inspect --html: what a token is, the keys that go from one to the next, the switch of the colours.
"use strict";

const rows = document.getElementById("rows");
const detail = document.getElementById("detail");
const symbols = JSON.parse(document.getElementById("symbols").textContent); // by token id
const { reference, base, epsilon, entropy } = document.body.dataset;

function element(name, text, classes = "") {
  const made = document.createElement(name);
  made.className = classes;
  made.textContent = text;
  return made;
}

function describe(token) {
  const [position, id, logprob, logprobOfBase, delta, centred, weight, clipped, open = "-"] = token.dataset.n.split(" ");
  const nat = (value) => (value === "-" ? "none" : value + " nat");
  const lines = [["token id", id], ["position", position], [`log p ${reference}`, nat(logprob)]];
  if (entropy !== undefined) lines.push([`entropy of ${reference}`, nat(open)]);
  const pieces = token.parentElement.matches(".under") ? [...token.parentElement.children] : [];
  if (pieces.length) lines.push(["piece", `${pieces.indexOf(token) + 1} of ${pieces.length}`]);
  if (base) {
    const ends = { "-1": `low, to ${+(1 - epsilon).toFixed(4)}`, 0: "no", 1: `high, to ${+(1 + +epsilon).toFixed(4)}` };
    lines.push([`log p ${base}`, nat(logprobOfBase)], ["delta", nat(delta)], ["centred delta", nat(centred)]);
    lines.push(["weight", weight === "-" ? "none" : weight], ["clipped", ends[clipped] ?? "none"]);
  }
  const list = document.createElement("dl");
  for (const [name, value] of lines) list.append(element("dt", name), element("dd", value));
  detail.replaceChildren(element("p", symbols[id], "name"), list);
  detail.hidden = false;
  const box = token.getBoundingClientRect();
  const below = box.bottom + 8 + detail.offsetHeight <= innerHeight;
  detail.style.top = Math.max(4, below ? box.bottom + 8 : box.top - detail.offsetHeight - 8) + "px";
  detail.style.left = Math.max(4, Math.min(box.left, document.documentElement.clientWidth - detail.offsetWidth - 8)) + "px";
}

/** Of the token under the pointer, else of the one that has the focus. */
function describeCurrent() {
  const token = rows.querySelector(".t:hover") || rows.querySelector(".t:focus");
  if (token) describe(token);
  else detail.hidden = true;
}

for (const text of rows.querySelectorAll(".text")) text.querySelector(".t").tabIndex = 0; // one stop of the Tab key per row
for (const event of ["mouseover", "mouseleave", "focusin", "focusout"]) rows.addEventListener(event, describeCurrent);
addEventListener("scroll", describeCurrent, { passive: true });
addEventListener("keydown", (event) => {
  if (event.key === "Escape") detail.hidden = true;
  const token = event.target.closest?.("#rows .t");
  if (!token || event.ctrlKey || event.altKey || event.metaKey) return;
  const all = [...token.closest(".text").querySelectorAll(".t")];
  const by = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10, Home: -all.length, End: all.length }[event.key];
  if (!by) return;
  event.preventDefault();
  const next = all[Math.max(0, Math.min(all.length - 1, all.indexOf(token) + by))];
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
for (const choice of document.querySelectorAll('input[name="by"]')) {
  choice.addEventListener("change", () => (document.body.dataset.by = choice.value));
}
document.querySelector("mark")?.scrollIntoView({ block: "center" });
