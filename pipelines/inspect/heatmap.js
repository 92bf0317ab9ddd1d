// Page of remit inspect --html: draw the tokens from the data block, colour them, say what one of them is.
// heatmap_text.js stands before it in the same script.

const data = JSON.parse(document.getElementById("data").textContent);
const detail = document.getElementById("detail");
const WHITE_BELOW = 0.1; // nat of delta
const SATURATION = 2; // nat of delta
const LOW = 8; // nat: a token with probability below exp(-8) has the full colour where there is no base
const MANY = 20000; // tokens: above, rows are laid out as they come into view
const span = data.epsilon === null ? 1 : data.epsilon; // weights reach from 1 - span to 1 + span
let by = data.base === null ? "reference" : "delta";

// --- tokens -----------------------------------------------------------------------------------------------

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
  section.style.containIntrinsicSize = `auto ${8 + row.ids.length / 8}rem`; // some 13 tokens a line
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

const counted = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

function facts(row) {
  const pieces = row.documents.length;
  const facts = [row.part, row.file, counted(row.ids.length, "token"), counted(pieces, "document piece")];
  const weights = row.weight.filter((weight) => weight !== null);
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const share = (side) => Math.round((100 * row.clipped.filter((value) => value === side).length) / weights.length);
  if (weights.length) {
    facts.push(`mean delta ${signed(mean(row.delta.filter((delta) => delta !== null)), 3)} nat`);
    if (data.epsilon !== null) facts.push(`clipped low ${share(-1)} %, high ${share(1)} %`);
  }
  for (const name of row.quarantined) facts.push(`quarantined: no log-probs of ${name}`);
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

const tokens = data.rows.reduce((sum, row) => sum + row.ids.length, 0);
rows.classList.toggle("many", tokens > MANY);
rows.append(...data.rows.map(draw));
if (data.rows.length > 1) {
  for (const row of data.rows) {
    const link = element("a", "", "row " + row.row);
    link.href = "#row-" + row.row;
    document.getElementById("rows-nav").append(link);
  }
}
paint();
