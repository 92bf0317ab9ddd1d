// Page of remit inspect --html: draw the tokens from the data block, colour them, say what one of them is.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const detail = document.getElementById("detail");
const WHITE_BELOW = 0.1; // nat of delta
const SATURATION = 2; // nat of delta
const LOW = 8; // nat: a token with probability below exp(-8) has the full colour where there is no base
const span = data.epsilon === null ? 1 : data.epsilon; // weights reach from 1 - span to 1 + span
let by = data.base === null ? "reference" : "delta";

function element(name, classes = "", text = "") {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  if (text) made.textContent = text;
  return made;
}

// --- text: marks for what has no shape, runs for right to left -------------------------------------------

const NAMED = { "\n": "↵", "\r": "␍", "\t": "⇥", "\u007f": "␡" };
// controls, and what steers direction or joins nothing; not the joiner U+200D, which emoji and scripts are made with
const PARTS = /( +)|([\u0000-\u001f\u007f-\u009f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff])/;
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;
const LEFT_TO_RIGHT = /\p{L}/u;
// digits run from left to right within text that does not; the space of a token " 1" goes with them
const NUMBER_BEGINS = /^ *\p{N}+$/u;
const DIGITS = /^[.,:/]?\p{N}+$/u;
const WITHIN_NUMBER = /^[.,:/]$/;

function mark(character) {
  const code = character.codePointAt(0);
  if (NAMED[character]) return NAMED[character];
  return code < 32 ? String.fromCodePoint(0x2400 + code) : "U+" + code.toString(16).toUpperCase().padStart(4, "0");
}

/** Append `text` to `parent`: its textContent grows by exactly that, marks are drawn by the style. */
function write(parent, text) {
  for (const part of text.split(PARTS)) {
    if (!part) continue;
    if (part[0] === " ") parent.append(element("span", "s", part));
    else if (PARTS.test(part)) {
      const made = element("span", "m", part);
      made.dataset.mark = mark(part);
      parent.append(made);
    } else parent.append(part);
  }
}

function direction(text) {
  if (/[\n\r]/.test(text)) return "break";
  if (RIGHT_TO_LEFT.test(text)) return "rtl";
  return LEFT_TO_RIGHT.test(text) ? "ltr" : "neutral";
}

/** Last group of the run of right-to-left groups that starts at `first`; neutral ones within it belong to it. */
function endOfRun(directions, first, boundaries) {
  let last = first;
  for (let index = first + 1; index < directions.length && !boundaries.has(index); index++) {
    if (directions[index] === "rtl") last = index;
    else if (directions[index] !== "neutral") break;
  }
  return last;
}

/** A run of groups of one direction, at the end of `parent`. */
function child(parent, dir) {
  const made = element("span", "r");
  made.dir = dir;
  parent.append(made);
  return made;
}

function token(row, index) {
  const made = element("span", "t");
  made.dataset.i = index;
  made.tabIndex = index === 0 ? 0 : -1;
  return made;
}

/** One token as itself, or a character over the tokens that it is made of. */
function group(row, first, count, text) {
  if (count === 1) {
    const made = token(row, first);
    write(made, text);
    return made;
  }
  const made = element("span", "g");
  made.style.minWidth = 7 * count + "px"; // so that each can be pointed at
  const over = element("span", "over");
  const under = element("span", "under");
  write(over, text);
  for (let index = first; index < first + count; index++) under.append(token(row, index));
  made.append(under, over);
  return made;
}

function draw(row, place) {
  const section = element("section", "row");
  section.id = "row-" + row.row;
  section.dataset.place = place;
  section.append(element("h2", "", "row " + row.row), element("p", "facts", facts(row)));
  const text = element("div", "text");
  text.dir = "ltr";
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `tokens of row ${row.row}; the arrow keys go from one to the next`);
  const starts = [];
  let at = 0;
  for (const [count] of row.groups) starts.push((at += count) - count);
  const directions = row.groups.map(([, shown]) => direction(shown));
  const documents = new Map(); // first group of each document piece; a piece that starts within a group comes before it
  let next = 0;
  starts.forEach((start, index) => {
    while (next < row.documents.length && row.documents[next][0] < start + row.groups[index][0]) {
      documents.set(index, [...(documents.get(index) || []), row.documents[next++][1]]);
    }
  });
  let run = null;
  let runEnd = -1;
  let number = null;
  row.groups.forEach(([count, shown], index) => {
    for (const id of documents.get(index) || []) {
      const made = element("span", "d");
      made.dataset.doc = id;
      made.setAttribute("role", "separator");
      made.setAttribute("aria-label", "document " + id);
      text.append(made);
    }
    if (index > runEnd && directions[index] === "rtl") {
      runEnd = endOfRun(directions, index, documents);
      run = child(text, "rtl");
      number = null;
    }
    const goesOn = (at) => {
      const [now, then] = [at, at + 1].map((place) => (place <= runEnd ? row.groups[place][1] : ""));
      return DIGITS.test(now) || (WITHIN_NUMBER.test(now) && DIGITS.test(then));
    };
    if (number && !goesOn(index)) number = null;
    if (!number && index <= runEnd && NUMBER_BEGINS.test(shown) && goesOn(index + 1)) number = child(run, "ltr");
    (number || (index <= runEnd ? run : text)).append(group(row, starts[index], count, shown));
  });
  section.append(text);
  return section;
}

function facts(row) {
  const pieces = row.documents.length;
  const facts = [row.part, row.file, `${row.ids.length} tokens`, `${pieces} document piece${pieces === 1 ? "" : "s"}`];
  const weights = row.weight.filter((weight) => weight !== null);
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const share = (side) => Math.round((100 * row.clipped.filter((value) => value === side).length) / weights.length);
  if (weights.length) {
    facts.push(`mean delta ${signed(mean(row.delta.filter((delta) => delta !== null)), 3)} nat`);
    if (data.epsilon !== null) facts.push(`clipped low ${share(-1)} %, high ${share(1)} %`);
  }
  if (row.reference.every((value) => value === null)) facts.push(`no log-probs of ${data.reference}`);
  if (!row.exact) facts.push("tokens as the vocabulary spells them: this tokenizer changes text across tokens");
  return facts.join(" · ");
}

// --- colour ----------------------------------------------------------------------------------------------

/** [colour, share of it in per cent] of a value. */
function colour(value) {
  if (value === null) return ["none", 0];
  if (by === "reference") return ["low", 100 * Math.min(1, -value / LOW)];
  if (by === "delta" && Math.abs(value) < WHITE_BELOW) return ["flat", 0];
  const share = by === "delta" ? value / SATURATION : (value - 1) / span;
  return [share > 0 ? "up" : share < 0 ? "down" : "flat", 100 * Math.min(1, Math.abs(share))];
}

function paintOne(made, value) {
  const [name, share] = colour(value);
  made.dataset.c = name;
  made.style.setProperty("--s", share.toFixed(2));
}

function paint() {
  for (const section of document.querySelectorAll(".row")) {
    const values = data.rows[section.dataset.place][by];
    for (const made of section.querySelectorAll(".t")) paintOne(made, values[made.dataset.i]);
  }
  legend();
}

function legend() {
  const scales = {
    delta: [-SATURATION, SATURATION, ["-2", "-1", "0", "+1", "+2 nat"], `${data.base} more confident`, `${data.reference} more confident`],
    weight: [1 - span, 1 + span, [1 - span, 1 - span / 2, 1, 1 + span / 2, 1 + span].map((w) => String(+w.toFixed(3))), "weight below 1", "weight above 1"],
    reference: [-LOW, 0, ["-8 nat", "-6", "-4", "-2", "0"], `improbable to ${data.reference}`, "certain"],
  };
  const [from, to, ticks, left, right] = scales[by];
  const bar = element("div", "bar");
  for (let step = 0; step < 41; step++) {
    const made = element("i", "t");
    paintOne(made, from + ((to - from) * step) / 40);
    bar.append(made);
  }
  const lines = [["ticks", ticks], ["ends", [left, right]]].map(([name, texts]) => {
    const line = element("div", name);
    line.append(...texts.map((text) => element("span", "", text)));
    return line;
  });
  const none = element("div", "ends");
  const dashed = element("span", "t", "dashed");
  dashed.dataset.c = "none";
  const words = element("span");
  words.append(dashed, ": no log-prob");
  none.append(words);
  document.getElementById("legend").replaceChildren(bar, ...lines, none);
}

// --- what a token is -------------------------------------------------------------------------------------

const signed = (value, digits) => (value < 0 ? "-" : "+") + Math.abs(value).toFixed(digits);

function describe(made) {
  const row = data.rows[made.closest(".row").dataset.place];
  const index = Number(made.dataset.i);
  const id = row.ids[index];
  const one = (name, digits, sign) => {
    const value = row[name][index];
    return value === null ? "none" : (sign ? signed(value, digits) : value.toFixed(digits)) + (name === "weight" ? "" : " nat");
  };
  const lines = [["token id", id], ["position", index], [`log p ${data.reference}`, one("reference", 4)]];
  const pieces = made.parentElement.matches(".under") ? [...made.parentElement.children] : [];
  if (pieces.length) lines.push(["piece", `${pieces.indexOf(made) + 1} of ${pieces.length}`]);
  if (data.base !== null) {
    const clipped = { "-1": "low, to " + +(1 - span).toFixed(4), 0: "no", 1: "high, to " + +(1 + span).toFixed(4) };
    lines.push([`log p ${data.base}`, one("base", 4)], ["delta", one("delta", 4, true)]);
    lines.push(["centred delta", one("centred", 4, true)], ["weight", one("weight", 4)]);
    lines.push(["clipped", row.weight[index] === null ? "none" : clipped[row.clipped[index]]]);
  }
  const list = element("dl");
  for (const [name, value] of lines) list.append(element("dt", "", name), element("dd", "", String(value)));
  detail.replaceChildren(element("p", "name", data.symbols[id]), list);
  detail.hidden = false;
  const box = made.getBoundingClientRect();
  const below = box.bottom + 8 + detail.offsetHeight <= innerHeight;
  detail.style.top = Math.max(4, below ? box.bottom + 8 : box.top - detail.offsetHeight - 8) + "px";
  detail.style.left = Math.max(4, Math.min(box.left, document.documentElement.clientWidth - detail.offsetWidth - 8)) + "px";
}

// one listener for all tokens of the page
const rows = document.getElementById("rows");
const tokenAt = (event) => (event.target instanceof Element ? event.target.closest("#rows .t") : null);
/** Of the token under the pointer, else of the one that has the focus. */
function describeCurrent() {
  const made = rows.querySelector(".t:hover") || rows.querySelector(".t:focus");
  if (made) describe(made);
  else detail.hidden = true;
}
rows.addEventListener("mouseover", describeCurrent);
rows.addEventListener("mouseleave", describeCurrent);
rows.addEventListener("focusin", (event) => {
  const made = tokenAt(event);
  if (!made) return;
  const before = made.closest(".text").querySelector('.t[tabindex="0"]');
  if (before) before.tabIndex = -1; // one stop of the Tab key per row
  made.tabIndex = 0;
  describe(made);
});
rows.addEventListener("focusout", describeCurrent);
addEventListener("scroll", describeCurrent, { passive: true });
addEventListener("keydown", (event) => {
  if (event.key === "Escape") detail.hidden = true;
  const made = tokenAt(event);
  if (!made || event.ctrlKey || event.altKey || event.metaKey) return;
  const all = [...made.closest(".text").querySelectorAll(".t")];
  const to = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10, Home: -all.length, End: all.length }[event.key];
  if (!to) return;
  event.preventDefault();
  all[Math.max(0, Math.min(all.length - 1, Number(made.dataset.i) + to))].focus();
});
for (const choice of document.querySelectorAll('input[name="by"]')) {
  choice.addEventListener("change", () => {
    by = choice.value;
    paint();
  });
}

rows.append(...data.rows.map(draw));
if (data.rows.length > 1) {
  for (const row of data.rows) {
    const link = element("a", "", "row " + row.row);
    link.href = "#row-" + row.row;
    document.getElementById("rows-nav").append(link);
  }
}
paint();
