// A curve over the steps of a run, by uPlot.
import { html, number, useEffect, useRef } from "./ui.js";

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** series: {label, steps, values, low?, high?, color}. lines: horizontal ones, {label, value} */
export function Chart({ title, series, lines = [], log = false, unit = "" }) {
  const box = useRef();
  const last = series[0].values.at(-1), step = series[0].steps.at(-1);
  const draw = () => {
    box.current.replaceChildren();
    const steps = [...new Set(series.flatMap((each) => each.steps))].sort((a, b) => a - b);
    const at = (each, values) => { const map = new Map(each.steps.map((x, index) => [x, values[index]])); return steps.map((x) => map.get(x) ?? null); };
    const data = [steps], shown = [{ label: "step" }], bands = [];
    for (const each of series) {
      data.push(at(each, each.values));
      const stroke = color(each.color);
      shown.push({ label: each.label, stroke, width: 1.5, spanGaps: true, points: { show: each.steps.length < 16, size: 5 }, value: (_, value) => (value == null ? "–" : number(value) + unit) });
      if (each.low) {
        data.push(at(each, each.high), at(each, each.low));
        const edge = { stroke: "transparent", spanGaps: true, points: { show: false }, value: (_, value) => (value == null ? "–" : number(value) + unit) };
        shown.push({ ...edge, label: "95 % high" }, { ...edge, label: "95 % low" });
        bands.push({ series: [data.length - 2, data.length - 1], fill: `${stroke}33` });
      }
    }
    for (const line of lines) {
      data.push(steps.map(() => line.value));
      shown.push({ label: line.label, stroke: color("--muted"), dash: [4, 4], width: 1, points: { show: false }, value: (_, value) => (value == null ? "–" : number(value) + unit) });
    }
    const axis = { stroke: color("--muted"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), size: 4 }, font: "11px system-ui, sans-serif" };
    const positive = log && data.slice(1).every((values) => values.every((value) => value === null || value > 0));
    return new globalThis.uPlot({
      width: Math.max(box.current.clientWidth, 120), height: 190, bands, series: shown,
      scales: { x: { time: false }, y: positive ? { distr: 3 } : {} },
      axes: [{ ...axis, size: 28 }, { ...axis, size: 58, values: (_, ticks) => ticks.map((value) => (value === null ? "" : number(value) + unit)) }],
      cursor: { y: false }, legend: { live: true },
    }, data, box.current);
  };
  useEffect(() => {
    let chart = draw();
    const again = () => { chart.destroy(); chart = draw(); };
    const watch = new ResizeObserver(([entry]) => chart.setSize({ width: Math.max(entry.contentRect.width, 120), height: 190 }));
    watch.observe(box.current);
    const media = matchMedia("(prefers-color-scheme: dark)");
    media.addEventListener("change", again);
    addEventListener("themechange", again);
    return () => { watch.disconnect(); media.removeEventListener("change", again); removeEventListener("themechange", again); chart.destroy(); };
  }, [JSON.stringify([series.map((each) => [each.steps.length, each.steps.at(-1), each.values.at(-1)]), lines, log])]);
  const summary = `${number(last)}${unit} at step ${step}`;
  return html`
    <figure class="chart">
      <figcaption>${title} <output>${number(last)}${unit}</output></figcaption>
      <div ref=${box} role="img" aria-label=${`${title}: ${summary}`}></div>
    </figure>`;
}
