"use strict";
(() => {
  const data = JSON.parse(document.getElementById("lines").textContent);
  const [box, menu, readout] = ["losses", "axis", "readout"].map((id) => document.getElementById(id));
  const toggles = Array.from(document.querySelectorAll("[data-toggles]"));
  const isShown = (run) => toggles.every((toggle) => toggle.checked || toggle.dataset.toggles !== String(run));
  const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 5 });

  function paint() {
    for (const chart of box.querySelectorAll("[data-axis]")) chart.hidden = chart.dataset.axis !== menu.value;
    for (const mark of box.querySelectorAll("[data-run]")) mark.style.display = isShown(mark.dataset.run) ? "" : "none";
    readout.textContent = "Point at the chart to read values.";
  }

  function read(event) {
    const chart = data[menu.value];
    const frame = box.querySelector(`[data-axis="${menu.value}"] svg`).getBoundingClientRect();
    const share = ((event.clientX - frame.left) / frame.width - chart.left) / chart.width;
    const x = chart.x[0] + share * (chart.x[1] - chart.x[0]);
    const nearest = (points) => points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
    const values = chart.lines
      .filter((line) => isShown(line.run))
      .map((line) => [line.name, ...nearest(line.points)])
      .map(([name, at, loss]) => `${name} ${loss.toFixed(4)} at ${number(at)}`);
    readout.textContent = values.length ? `${menu.selectedOptions[0].text}: ${values.join("; ")}` : "No run is shown.";
  }

  menu.addEventListener("change", paint);
  for (const toggle of toggles) toggle.addEventListener("change", paint);
  box.addEventListener("pointermove", read);
  paint();
})();
