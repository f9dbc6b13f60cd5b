// Hover values: of a line chart the nearest point of each line, of a heat map the cell.
"use strict";
const box = document.createElement("div");
box.id = "hover";
box.hidden = true;
document.body.append(box);

function row(style, text) {
  const line = document.createElement("div");
  if (style) {
    const swatch = document.createElement("i");
    swatch.className = style;
    line.append(swatch);
  }
  line.append(text);
  return line;
}

function show(event, rows) {
  box.replaceChildren(...rows);
  box.hidden = false;
  const right = document.documentElement.scrollLeft + document.documentElement.clientWidth;
  box.style.left = Math.max(0, Math.min(event.pageX + 14, right - box.offsetWidth - 4)) + "px";
  box.style.top = event.pageY + 14 + "px";
}

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return x - points[low][0] < points[high][0] - x ? points[low] : points[high];
}

for (const plot of document.querySelectorAll(".plot")) {
  const lines = JSON.parse(plot.querySelector("script").textContent).filter(line => line[2].length);
  const left = Number(plot.dataset.left), right = Number(plot.dataset.right);
  const cursor = document.createElement("div");
  cursor.className = "cursor";
  cursor.hidden = true;
  plot.append(cursor);
  plot.addEventListener("pointermove", event => {
    const place = plot.getBoundingClientRect();
    const x = left + (right - left) * (event.clientX - place.left) / place.width;
    const found = lines.map(([label, style, points]) => [label, style, nearest(points, x)]);
    if (!found.length) return;
    const at = found.reduce((a, b) => Math.abs(b[2][0] - x) < Math.abs(a[2][0] - x) ? b : a)[2][0];
    cursor.hidden = false;
    cursor.style.left = 100 * (at - left) / (right - left) + "%";
    show(event, [row("", `${plot.dataset.x} ${at}`), ...found.map(([label, style, [step, value]]) =>
      row(style, `${label}: ${value ?? "no number"}` + (step === at ? "" : ` (at ${step})`)))]);
  });
  plot.addEventListener("pointerleave", () => { box.hidden = cursor.hidden = true; });
}

for (const map of document.querySelectorAll(".heat")) {
  const { rows, columns, cells } = JSON.parse(map.querySelector("script").textContent);
  const picture = map.querySelector("svg");
  picture.addEventListener("pointermove", event => {
    const place = picture.getBoundingClientRect();
    const part = (at, from, size, count) =>
      Math.min(count - 1, Math.max(0, Math.floor(count * (at - from) / size)));
    const y = part(event.clientY, place.top, place.height, rows.length);
    const x = part(event.clientX, place.left, place.width, columns.length);
    show(event, [row("", `${rows[y]}, ${columns[x]}`), row("", cells[y][x] ?? "no value")]);
  });
  picture.addEventListener("pointerleave", () => { box.hidden = true; });
}
