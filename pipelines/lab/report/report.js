"use strict";
// Draws the plots of the page from the JSON in #data: means over seeds, their intervals, the seeds themselves.

const PLOTS = JSON.parse(document.getElementById("data").textContent);
// told apart also by readers who see few colours, on white and on black
const PALETTE = ["#2a7fc9", "#e07b1a", "#1f9e77", "#c65aa5", "#8c6ad6", "#a08a1c", "#d84b4b", "#5f7a8a"];
const DARK = window.matchMedia("(prefers-color-scheme: dark)");
const SYMBOLS = ["circle", "diamond", "square"];

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// plotly reads a few tags in names
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const number = (value) => Number(value.toPrecision(4)).toString();

// the interval as plotly's error bars; a mean without one has bars of no length
function bars(series, color) {
  const beyond = (ends, sign) => series.mean.map((mean, index) => (ends[index] === null ? 0 : sign * (ends[index] - mean)));
  return { type: "data", symmetric: false, array: beyond(series.high, 1), arrayminus: beyond(series.low, -1), color, thickness: 1.4, width: 3 };
}

const hover = (series) => series.mean.map((mean, index) => {
  const interval = series.low[index] === null ? "no interval" : `${number(series.low[index])} to ${number(series.high[index])}`;
  const seeds = series.seeds[index].length;
  return `${plain(series.at[index])}: ${number(mean)} (${interval}), ${seeds} seed${seeds > 1 ? "s" : ""}`;
});

function dots(plot) {
  const traces = [];
  plot.series.forEach((series, place) => {
    const color = PALETTE[series.color % PALETTE.length];
    const shift = (place - (plot.series.length - 1) / 2) * 0.25;
    const rows = series.at.map((name) => plot.names.indexOf(name) - shift);
    traces.push({
      x: series.seeds.flat(), y: rows.flatMap((row, index) => series.seeds[index].map(() => row)), type: "scatter",
      mode: "markers", marker: { color, size: 5, opacity: 0.45, symbol: SYMBOLS[place] }, hoverinfo: "skip", showlegend: false,
    });
    traces.push({
      x: series.mean, y: rows, type: "scatter", mode: "markers", name: plain(series.label), text: hover(series),
      marker: { color, size: 10, symbol: SYMBOLS[place] }, error_x: bars(series, color), hovertemplate: "%{text}<extra></extra>",
    });
  });
  return traces;
}

function lines(plot) {
  const shade = plot.kind === "lines";
  return plot.series.flatMap((series) => {
    const color = PALETTE[series.color % PALETTE.length];
    const traces = [{
      x: series.at, y: series.mean, type: "scatter", mode: "lines+markers", name: plain(series.label), text: hover(series),
      line: { color, width: 1.8, dash: series.dash }, marker: { color, size: shade ? 4 : 8 },
      hovertemplate: `${plain(series.label)}, %{text}<extra></extra>`, ...(shade ? {} : { error_y: bars(series, color) }),
    }];
    if (shade && series.low.every((low) => low !== null)) {
      traces.unshift({
        x: [...series.at, ...series.at.slice().reverse()], y: [...series.high, ...series.low.slice().reverse()],
        type: "scatter", mode: "none", fill: "toself", fillcolor: color + "22", hoverinfo: "skip", showlegend: false,
      });
    }
    return traces;
  });
}

// pixels that the legend takes in a box of that width
function legendHeight(plot, width) {
  if (plot.series.length < 2) return 0;
  const widest = Math.max(...plot.series.map((series) => series.label.length)) * 7 + 50;
  return 20 * Math.ceil(plot.series.length / Math.max(1, Math.floor((width - 20) / widest))) + 8;
}

function layout(plot, legend) {
  const ink = variable("--ink");
  const axis = { gridcolor: variable("--line"), linecolor: variable("--line"), zeroline: false, automargin: true };
  const ofValues = { ...axis, title: { text: plot.unit, standoff: 6 }, exponentformat: "power" };
  if (plot.zero) Object.assign(ofValues, { zeroline: true, zerolinecolor: ink, zerolinewidth: 1, rangemode: "tozero" });
  const isDots = plot.kind === "dots";
  const names = isDots && {
    ...axis, tickvals: plot.names.map((_, index) => index), ticktext: plot.names.map(plain),
    range: [plot.names.length - 0.4, -0.6], showgrid: false,
  };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, size: 12, family: "system-ui, sans-serif" },
    margin: { l: 10, r: 10, t: 10, b: 45 + legend },
    xaxis: isDots ? ofValues : plot.kind === "stages" ? axis : { ...axis, title: { text: "step", standoff: 6 } },
    yaxis: isDots ? names : ofValues,
    hovermode: "closest",
    hoverlabel: { bgcolor: variable("--paper"), bordercolor: variable("--line"), font: { color: ink } },
    showlegend: legend > 0,
    legend: { orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
  };
}

function draw() {
  for (const box of document.querySelectorAll(".plot")) {
    const plot = PLOTS[Number(box.dataset.plot)];
    plot.names = [...new Set(plot.series.flatMap((series) => series.at))];
    const legend = legendHeight(plot, box.clientWidth);
    box.style.height = `${(plot.kind === "dots" ? 90 + 26 * plot.names.length : 300) + legend}px`;
    Plotly.react(box, plot.kind === "dots" ? dots(plot) : lines(plot), layout(plot, legend), {
      responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    });
  }
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
