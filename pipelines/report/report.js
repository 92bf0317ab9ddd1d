"use strict";
// Draws the plots of the page from the JSON in #data. State: the horizontal axis, and which runs are shown.

const DATA = JSON.parse(document.getElementById("data").textContent);
// told apart also by readers who see few colours, on white and on black
const PALETTE = ["#2a7fc9", "#e07b1a", "#1f9e77", "#c65aa5", "#8c6ad6", "#a08a1c", "#d84b4b", "#5f7a8a"];
const DARK = window.matchMedia("(prefers-color-scheme: dark)");
const state = { axis: "step", shown: DATA.runs.map(() => true) };

const color = (number) => PALETTE[number % PALETTE.length];
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// plotly reads a few tags in names
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text) => (text.length > 40 ? "…" + text.slice(-39) : text);
const transparent = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

const stepsOf = (plot, line) => (plot.kind === "held-out" ? DATA.runs[line.run].held_out : DATA.runs[line.run]).step;

/** Whether the lines of a plot have their points at the same steps, as far as they go. */
function sameSteps(plot) {
  const [longest, ...others] = plot.lines.map((line) => stepsOf(plot, line)).sort((a, b) => b.length - a.length);
  return others.every((steps) => steps.every((step, index) => step === longest[index]));
}

function curve(plot, line) {
  const run = DATA.runs[line.run];
  const isHeldOut = plot.kind === "held-out";
  const curves = line.source === null ? run.curves : run.sources[line.source];
  const values = isHeldOut ? run.held_out.loss : curves[line.figure];
  return {
    x: (isHeldOut ? run.held_out : run)[state.axis],
    y: plot.scale === 1 ? values : values.map((value) => (value === null ? null : value * plot.scale)),
    name: plain(short(line.label)),
    // where the points of the lines do not stand at the same places, each says where its own is
    hovertemplate: `%{y:${plot.format}}${sameSteps(plot) ? "" : " at %{x}"}<extra>%{fullData.name}</extra>`,
    type: "scatter",
    mode: isHeldOut || values.length === 1 ? "lines+markers" : "lines",
    line: { color: color(line.color), width: 1.6, dash: line.dash },
    visible: state.shown[line.run],
  };
}

// quantiles, ascending: the space between neighbours is filled, more so towards the median
function band(plot) {
  return plot.lines.map((line, index) => {
    const trace = curve(plot, line);
    const middle = (plot.lines.length - 1) / 2;
    const closeness = 1 - Math.abs(index - 0.5 - middle) / (middle + 1);
    trace.line.width = line.dash === "solid" ? 2 : 0.8;
    trace.fill = index ? "tonexty" : "none";
    trace.fillcolor = transparent(color(line.color), 0.05 + 0.25 * closeness);
    return trace;
  });
}

function heat(plot) {
  const run = DATA.runs[plot.lines[0].run].heat;
  const [none, few, many] = DARK.matches ? [variable("--panel"), "#8a6a2a", "#ffd166"] : ["#ffffff", "#c9a0dc", "#5b0f86"];
  const first = Number(run.centres[0]);
  const last = Number(run.centres[run.centres.length - 1]);
  const bins = Math.round((last - first) / 0.05) + 1;
  // bins without tokens in the whole run are not in the data
  const rows = Array.from({ length: bins }, () => run.edges.step.slice(1).map(() => 0));
  run.centres.forEach((centre, index) => { rows[Math.round((Number(centre) - first) / 0.05)] = run.shares[index]; });
  return [{
    x: run.edges[state.axis],
    y: Array.from({ length: bins + 1 }, (_, index) => first + (index - 0.5) * 0.05),
    z: rows,
    type: "heatmap",
    colorscale: [[0, none], [0.2, few], [1, many]], // rare weights show beside the many near 1
    colorbar: { thickness: 10, tickformat: ".0%", tickfont: { color: variable("--ink") }, outlinewidth: 0 },
    hovertemplate: "weight %{y:.2f}: %{z:.2%} of the tokens<extra></extra>",
  }];
}

function traces(plot) {
  if (plot.kind === "heat") return heat(plot);
  return plot.kind === "band" ? band(plot) : plot.lines.map((line) => curve(plot, line));
}

// pixels that the legend takes in a box of that width
function legendHeight(plot, width) {
  if (plot.kind === "heat" || plot.lines.length < 2) return 0;
  const widest = Math.max(...plot.lines.map((line) => short(line.label).length)) * 7 + 50;
  return 20 * Math.ceil(plot.lines.length / Math.max(1, Math.floor((width - 20) / widest))) + 8;
}

function tickFormat(plot) {
  if (plot.kind === "heat") return ".2f";
  return plot.format.includes("%") ? ".2~%" : plot.format.includes(",") ? "~s" : undefined;
}

function layout(plot, legend) {
  const ink = variable("--ink");
  const axis = {
    gridcolor: variable("--line"), linecolor: variable("--line"), zerolinecolor: variable("--line"), automargin: true,
  };
  const isShare = plot.kind === "lines" && plot.format.includes("%");
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, size: 12, family: "system-ui, sans-serif" },
    margin: { l: 10, r: 10, t: 10, b: 45 + legend },
    xaxis: {
      ...axis, title: { text: state.axis === "step" ? "step" : "tokens", standoff: 6 },
      hoverformat: state.axis === "step" ? ",d" : ".4s",
    },
    yaxis: {
      ...axis, title: { text: plot.unit }, tickformat: tickFormat(plot), exponentformat: "power",
      ...(isShare ? { minallowed: -0.01, maxallowed: 1.01 } : {}), // else a constant gets a whole unit on both sides
    },
    hovermode: plot.kind === "heat" ? "closest" : "x unified",
    hoverlabel: { bgcolor: variable("--paper"), bordercolor: variable("--line"), font: { color: ink } },
    showlegend: legend > 0,
    legend: { orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    uirevision: state.axis, // a zoom outlives a change of the runs or colours
  };
}

function draw() {
  for (const box of document.querySelectorAll(".plot")) {
    const plot = DATA.plots[Number(box.dataset.plot)];
    const figure = box.closest("figure");
    figure.hidden = figure.dataset.run !== undefined && !state.shown[Number(figure.dataset.run)];
    if (figure.hidden) continue;
    const legend = legendHeight(plot, box.clientWidth);
    box.style.height = `${300 + legend}px`;
    Plotly.react(box, traces(plot), layout(plot, legend), {
      responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    });
  }
}

for (const swatch of document.querySelectorAll(".swatch")) {
  const own = color(Number(swatch.dataset.color));
  const isDashed = Math.floor(Number(swatch.dataset.color) / PALETTE.length) % 2 === 1; // as its lines are
  swatch.style.background = isDashed ? `repeating-linear-gradient(90deg, ${own} 0 3px, transparent 3px 5px)` : own;
}
for (const box of document.querySelectorAll("input[name=run]")) {
  box.checked = true; // browsers remember what was ticked before a reload
  box.addEventListener("change", () => { state.shown[Number(box.value)] = box.checked; draw(); });
}
for (const radio of document.querySelectorAll("input[name=axis]")) {
  radio.checked = radio.value === state.axis;
  radio.addEventListener("change", () => { state.axis = radio.value; draw(); });
}
DARK.addEventListener("change", draw);
let waiting;
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return; // a phone that hides its address bar
  width = window.innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(draw, 200);
});
draw();
