"use strict";
(() => {
  const data = JSON.parse(document.getElementById("routing").textContent);
  const byId = (id) => document.getElementById(id);
  const [layerMenu, stepMenu, budgetMenu, box, tip] = ["layer", "step", "budget", "tokens", "tip"].map(byId);
  const tokens = Array.from(box.querySelectorAll(".t"));
  let current = -1;

  const trace = () => data.traces[budgetMenu.selectedIndex];
  const places = () => (layerMenu.value === "all" ? data.layers.map((_, k) => k) : [layerMenu.selectedIndex - 1]);
  const isChosen = (t) => stepMenu.value === "all" || t === stepMenu.selectedIndex - 1;
  const stepsOf = (idx, where) =>
    where.reduce((sum, k) => sum + trace().selected[k].filter((step, t) => isChosen(t) && step[idx] === "1").length, 0);
  const make = (name, text, kind) => {
    const node = document.createElement(name);
    if (text !== undefined) node.textContent = text;
    if (kind) node.className = kind;
    return node;
  };

  function paint() {
    const where = places();
    const most = where.length * (stepMenu.value === "all" ? data.steps : 1);
    tokens.forEach((node, idx) => {
      const steps = stepsOf(idx, where);
      node.dataset.steps = steps;
      node.style.setProperty("--level", (steps / most).toFixed(3));
    });
    paintScale(most);
    paintCapacity(where);
    const wanted = `#layer=${layerMenu.value}&step=${stepMenu.value}&budget=${budgetMenu.value}`;
    if (location.hash !== wanted) history.replaceState(null, "", wanted);
  }

  function paintScale(most) {
    const scale = byId("scale");
    scale.replaceChildren(make("span", "extra thinking steps:"));
    const stride = most > 6 ? Math.ceil(most / 6) : 1;
    for (let steps = 0; steps <= most; steps += stride) {
      const entry = make("span");
      const swatch = make("i", undefined, "swatch");
      swatch.style.setProperty("--level", (steps / most).toFixed(3));
      entry.append(swatch, String(steps));
      scale.append(entry);
    }
  }

  function paintCapacity(where) {
    const shown = (k) => (share, t) => `${Math.round(100 * share)}% (${trace().thresholds[k][t].toFixed(3)})`;
    const text = where.map((k) => `layer ${data.layers[k]}: ${trace().capacity[k].map(shown(k)).join(", ")}`);
    const steps = Array.from({ length: data.steps }, (_, t) => t + 1).join(", ");
    byId("capacity").textContent =
      `Selected tokens at step ${steps} (and the threshold of the router weight): ${text.join("; ")}.`;
  }

  function describe(idx) {
    const rows = make("table");
    const head = make("tr");
    head.append(make("th", "layer"));
    for (let t = 1; t <= data.steps; t += 1) head.append(make("th", `step ${t}`));
    rows.append(head);
    data.layers.forEach((layer, k) => {
      const row = make("tr");
      row.append(make("td", String(layer)));
      trace().selected[k].forEach((step, t) => {
        const yes = step[idx] === "1";
        const weight = trace().weights[k][t][idx].toFixed(3);
        row.append(make("td", `${yes ? "\u25cf" : "\u25cb"} ${weight}`, yes ? "yes" : "no"));
      });
      rows.append(row);
    });
    const text = JSON.stringify(tokens[idx].textContent).slice(1, -1);
    const line = make("div");
    line.append(make("strong", text || "(rest of a character)"), `: ${stepsOf(idx, places())} extra steps, ${layerMenu.selectedOptions[0].text}, ${stepMenu.selectedOptions[0].text}`);
    tip.replaceChildren(line, rows);
  }

  function show(idx) {
    if (idx === current) return;
    if (current >= 0) tokens[current].classList.remove("on");
    current = idx;
    tip.hidden = idx < 0;
    if (idx < 0) return;
    tokens[idx].classList.add("on");
    describe(idx);
    const at = tokens[idx].getClientRects()[0] || tokens[idx].getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left, window.innerWidth - tip.offsetWidth - 8));
    const below = at.bottom + 8 + tip.offsetHeight < window.innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - tip.offsetHeight - 8)}px`;
  }

  function follow() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    for (const [menu, key] of [[layerMenu, "layer"], [stepMenu, "step"], [budgetMenu, "budget"]]) {
      const found = Array.from(menu.options).findIndex((option) => option.value === wanted.get(key));
      if (found >= 0) menu.selectedIndex = found;
    }
    show(-1);
    paint();
    if (wanted.has("token")) show(Math.min(Number(wanted.get("token")) || 0, tokens.length - 1));
  }

  const tokenAt = (event) => tokens.indexOf(event.target.closest(".t"));
  box.addEventListener("pointerover", (event) => show(tokenAt(event)));
  box.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show(-1); });
  box.addEventListener("click", (event) => show(tokenAt(event)));
  box.addEventListener("blur", () => show(-1));
  box.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") show(-1);
    if (!move) return;
    event.preventDefault();
    show(Math.max(0, Math.min(current + move, tokens.length - 1)));
  });
  window.addEventListener("scroll", () => show(-1), { passive: true });
  window.addEventListener("hashchange", follow);
  for (const menu of [layerMenu, stepMenu, budgetMenu]) menu.addEventListener("change", paint);
  follow();
})();
