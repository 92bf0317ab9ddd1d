// Page of remit inspect --html: how text is written, with marks for what has no shape and runs for right to left.
"use strict";

function element(name, classes = "", text = "") {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  if (text) made.textContent = text;
  return made;
}

const NAMED = {
  "\n": "↵", "\t": "⇥", "\u007f": "DEL", "\u0085": "NEL", "\u00ad": "SHY", "\u200b": "ZWSP", "\u200c": "ZWNJ",
  "\u200d": "ZWJ", "\u200e": "LRM", "\u200f": "RLM", "\u2060": "WJ", "\ufe0f": "VS16", "\ufeff": "BOM",
};
const CONTROLS = (
  "NUL SOH STX ETX EOT ENQ ACK BEL BS HT LF VT FF CR SO SI DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US"
).split(" ");
// spaces; controls, and what steers direction or joins nothing
const PARTS =
  /( +)|([\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]+)|([\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff])/;
// joiners and selectors among letters and emoji shape them; alone they would not be seen
const SHAPELESS = /^\p{Default_Ignorable_Code_Point}+$/u;
const COMBINING = /^\p{M}/u;
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;
const LEFT_TO_RIGHT = /\p{L}/u;
// digits run from left to right within text that does not; the space of a token " 1" goes with them
const NUMBER_BEGINS = /^ *\p{N}+$/u;
const DIGITS = /^[.,:/]?\p{N}+$/u;
const WITHIN_NUMBER = /^[.,:/]$/;

/** A drawn sign for one character, before it; the character itself takes no room unless it breaks a line or is a tab. */
function marked(character) {
  const made = element("span", "\n\t".includes(character) && character ? "m" : "m h", character);
  const code = character.codePointAt(0);
  const hex = () => "U+" + code.toString(16).toUpperCase().padStart(4, "0");
  made.dataset.mark = character === "" ? "∅" : NAMED[character] || CONTROLS[code] || hex();
  return made;
}

/** Append `text` to `parent`: its textContent grows by exactly that, marks are drawn by the style. */
function write(parent, text) {
  if (text === "") parent.append(marked(text)); // a token that the decoder drops
  for (const part of text.split(PARTS)) {
    if (!part) continue;
    const [, spaces, others, character] = part.match(PARTS) || [];
    if (spaces || others) parent.append(element("span", spaces ? "s" : "w", part));
    else if (character) parent.append(marked(part));
    else if (SHAPELESS.test(part)) parent.append(...[...part].map(marked));
    else if (COMBINING.test(part)) parent.append(element("span", "c", part));
    else parent.append(part);
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
