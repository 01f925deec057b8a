"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const [stage, tools, pins, detail, status] = ["stage", "tools", "pins", "detail", "status"].map(find);
  const buttons = [...document.querySelectorAll(".word")];
  const MOST = 4;
  const state = { shown: null, pins: [], kind: data.several ? "specific" : "raw", underline: "share", points: false, box: false, arcs: true, opacity: 80 };

  function make(tag, name, text, ...children) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined && text !== null) element.textContent = text;
    element.append(...children);
    return element;
  }
  const percent = (share) => (share === null ? "–" : share > 0 && share < 0.005 ? "< 1 %" : `${Math.round(100 * share)} %`);
  const chance = (p) => (p === null ? "–" : p > 0 && p < 0.005 ? "< 0.01" : p.toFixed(2));
  const named = (word) => (word.contrast === null ? word.text : `${word.text}, not ${word.contrast}`);

  // Maps: one byte a cell, already along the colours; drawn on the image's frame with bilinear interpolation.
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const maps = { specific: bytes(data.maps.specific), raw: bytes(data.maps.raw) };
  const [columns, rows] = data.maps.grid;
  const colours = bytes(data.colours);
  const LONG = 480;
  const factor = LONG / Math.max(...data.size);
  const frame = data.size.map((side) => Math.max(1, Math.round(side * factor)));
  const VEIL = 0.19; // white under the colours, so that the dark ones show on dark things too
  const RISE = 0.9;
  const drawn = new Map();

  function steps(length, cells, low, high) {
    return Array.from({ length }, (_, i) => {
      const at = (((i + 0.5) / length - low) / (high - low)) * cells - 0.5;
      if (at < -0.5 || at > cells - 0.5) return null;
      const left = Math.max(0, Math.min(cells - 1, Math.floor(at)));
      return [left, Math.min(cells - 1, left + 1), Math.max(0, Math.min(1, at - left))];
    });
  }
  const across = steps(frame[0], columns, data.window[0], data.window[2]);
  const down = steps(frame[1], rows, data.window[1], data.window[3]);

  function picture(index) {
    const key = state.kind + index;
    if (!drawn.has(key)) {
      const map = maps[state.kind].subarray(index * columns * rows, (index + 1) * columns * rows);
      const image = new ImageData(frame[0], frame[1]);
      for (let y = 0, to = 0; y < frame[1]; y++) {
        for (let x = 0; x < frame[0]; x++, to += 4) {
          let value = 0;
          if (across[x] && down[y]) {
            const [l, r, u] = across[x];
            const [t, b, v] = down[y];
            value =
              (map[t * columns + l] * (1 - u) + map[t * columns + r] * u) * (1 - v) +
              (map[b * columns + l] * (1 - u) + map[b * columns + r] * u) * v;
          }
          const top = Math.pow(value / 255, RISE);
          const veil = (1 - top) * VEIL;
          const all = top + veil;
          const colour = 3 * Math.round(value);
          for (let c = 0; c < 3; c++) image.data[to + c] = (top * colours[colour + c] + veil * 255) / all;
          image.data[to + 3] = 255 * all;
        }
      }
      drawn.set(key, image);
    }
    return drawn.get(key);
  }

  function show(view, index) {
    const map = view.querySelector(".map");
    view.classList.toggle("on", index !== null);
    if (index === null) {
      map.setAttribute("aria-label", "Nothing chosen: the image as it is");
      return;
    }
    const word = data.words[index];
    if (map.width !== frame[0] || map.height !== frame[1]) [map.width, map.height] = frame;
    map.getContext("2d").putImageData(picture(index), 0, 0);
    map.setAttribute("aria-label", `Map of “${word.text}”: ${word.where[state.kind]}`);
    marks(view.querySelector(".marks"), word);
  }

  function marks(canvas, word) {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = Math.max(1, Math.round(width * ratio));
    canvas.height = Math.max(1, Math.round(height * ratio));
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const outline = (edges, dash, thin) => {
      const [x0, y0, x1, y1] = edges.map((edge, i) => edge * (i % 2 ? height : width));
      pen.setLineDash(dash);
      for (const [ink, line] of [["#000", thin + 2], ["#fff", thin]]) {
        pen.strokeStyle = ink;
        pen.lineWidth = line;
        pen.strokeRect(x0 + 1.5, y0 + 1.5, Math.max(1, x1 - x0 - 3), Math.max(1, y1 - y0 - 3));
      }
      pen.setLineDash([]);
    };
    if (data.partial) outline(data.window, [5, 5], 0.75);
    if (state.points) {
      const unit = Math.max(1.1, width / 300);
      pen.fillStyle = "#fff";
      pen.strokeStyle = "#000";
      pen.lineWidth = 0.5;
      for (let i = 0; i < word.points.length; i += 3) {
        pen.beginPath();
        pen.arc((word.points[i] / 1e4) * width, (word.points[i + 1] / 1e4) * height, unit * (0.4 + 0.016 * word.points[i + 2]), 0, 7);
        pen.fill();
        pen.stroke();
      }
    }
    if (state.box && word.box) outline(word.box, [], 1.5);
  }

  // Language credits: shades and numbers on the earlier words, arcs to those in the same line.
  function credits(index) {
    const svg = document.querySelector(".arcs");
    svg.replaceChildren();
    buttons.forEach((button, place) => {
      const under = button.querySelector(".under");
      const share = state.arcs && index !== null ? data.words[index].credits[place] || 0 : 0;
      button.style.setProperty("--credit", Math.sqrt(share));
      under.textContent = share >= 0.005 ? percent(share) : "";
      if (share < 0.005) return;
      const [from, to] = [button, buttons[index]];
      if (from.offsetTop !== to.offsetTop) return;
      const [a, b] = [from, to].map((one) => one.offsetLeft + one.offsetWidth / 2);
      const foot = from.offsetTop + from.querySelector(".text").offsetTop - 2;
      const rise = Math.min(26, 8 + 0.07 * Math.abs(b - a));
      const arc = document.createElementNS(svg.namespaceURI, "path");
      arc.setAttribute("d", `M${a} ${foot}C${a} ${foot - rise} ${b} ${foot - rise} ${b} ${foot}`);
      arc.setAttribute("stroke-width", (1 + 7 * Math.sqrt(share)).toFixed(2));
      arc.setAttribute("stroke-opacity", "0.75");
      svg.append(arc);
    });
  }

  function bars(word) {
    const list = make("ul", data.known.language ? "bars" : "bars wide"); // names of classes are long
    const rest = word.alternatives.some(([text]) => text === word.text) ? [] : [[word.text, word.p]];
    for (const [text, p] of [...word.alternatives, ...rest]) {
      const fill = make("i");
      fill.style.width = `${100 * (p || 0)}%`;
      const name = make("span", "name", text);
      name.dir = "auto";
      name.title = text;
      list.append(make("li", text === word.text ? "own" : "", null, name, make("span", "long", null, fill), make("span", "much", chance(p))));
    }
    return list;
  }

  function sources(word) {
    const stack = make("div", "stack");
    const keys = make("ul", "keys");
    const add = (kind, text, share) => {
      if (share === null || share <= 0) return;
      const part = make("i", kind);
      part.style.width = `${100 * share}%`;
      if (share >= 0.02) part.classList.add("apart");
      stack.append(part);
      if (share >= 0.005) keys.append(make("li", `key ${kind}`, `${text} ${percent(share)}`));
    };
    add("image", "image", word.share);
    let little = 0; // many that are too small to be seen each
    for (const [text, share] of word.language) {
      if (share >= 0.005) add("language", text, share);
      else little += share || 0;
    }
    add("language", "other words", little);
    add("other", data.known.language ? "biases and earlier states" : "biases", word.other);
    return [stack, keys];
  }

  function describe(index) {
    if (index === null) {
      detail.replaceChildren(make("p", "blank", "Nothing is chosen: this is the image as it is."));
      return;
    }
    const word = data.words[index];
    const head = make("h2", "", word.text);
    head.dir = "auto";
    if (word.contrast !== null) head.append(make("span", "versus", `not ${word.contrast}`));
    const facts = make("dl", "facts");
    const fact = (name, value) => facts.append(make("div", "", null, make("dt", "", name), make("dd", "", value)));
    fact("probability", chance(word.p));
    fact("image share", percent(word.share));
    if (word.effect !== null) fact("image effect, nats", (word.effect < 0 ? "−" : "+") + Math.abs(word.effect).toFixed(2));
    const parts = [head, facts];
    if (word.share !== null) parts.push(make("h3", "", "Where it comes from"), ...sources(word));
    parts.push(make("h3", "", data.known.language ? "Most probable at this place" : "Most probable"), bars(word));
    if (state.points) {
      const count = word.points.length / 3;
      parts.push(make("h3", "", count < word.count ? `The ${count} heaviest of ${word.count} fixations` : `${count} fixations`));
    }
    detail.replaceChildren(...parts);
  }

  function legend() {
    const scale = data.scales[state.kind];
    const ticks = scale.ticks.map(([place, text]) => {
      const tick = make("span", "", text);
      tick.style.left = `${100 * place}%`;
      return tick;
    });
    find("scale").querySelector(".ticks").replaceChildren(...ticks);
    const what = state.kind === "specific" ? "evidence beyond the mean of all words" : "evidence";
    const text = `${what}, in multiples of an even spread${data.several ? "; the same colours for all words" : ""}${scale.clipped ? "; yellow: this or more" : ""}`;
    find("scale").querySelector("figcaption").textContent = text + (data.partial ? "; dashed: what the CNN sees" : "");
    find("scale").setAttribute("aria-label", `Colours: ${text}, from ${scale.ticks[0][1]} to ${scale.ticks[scale.ticks.length - 1][1]}`);
  }

  function choose(index, said) {
    state.shown = index;
    buttons.forEach((button, place) => {
      button.classList.toggle("shown", place === index);
      if (index !== null) button.tabIndex = place === index ? 0 : -1;
    });
    show(stage, index);
    credits(index);
    describe(index);
    if (said) status.textContent = index === null ? "The image as it is" : `${named(data.words[index])}: probability ${chance(data.words[index].p)}, image share ${percent(data.words[index].share)}; ${data.words[index].where[state.kind]}`;
  }

  function pin(index) {
    const held = state.pins.includes(index);
    const dropped = !held && state.pins.length === MOST ? state.pins[0] : null;
    state.pins = held ? state.pins.filter((one) => one !== index) : [...state.pins.slice(dropped === null ? 0 : 1), index];
    const text = data.words[index].text;
    status.textContent = held ? `${text}: no longer pinned` : `${text}: pinned` + (dropped === null ? "" : `; ${data.words[dropped].text} made room`);
    board();
  }

  // A line breaks between its parts, not within one.
  function listed(texts) {
    const last = texts.length - 1;
    return make("p", "", null, ...texts.flatMap((text, i) => [make("span", "whole", i < last ? `${text},` : text), " "]));
  }

  function board() {
    buttons.forEach((button, place) => button.setAttribute("aria-pressed", String(state.pins.includes(place))));
    pins.hidden = state.pins.length === 0;
    pins.style.setProperty("--pins", Math.max(1, state.pins.length));
    pins.replaceChildren(
      ...state.pins.map((index) => {
        const word = data.words[index];
        const close = make("button", "plain", "Unpin");
        close.type = "button";
        close.setAttribute("aria-label", `Unpin ${word.text}`);
        close.addEventListener("click", () => {
          pin(index);
          buttons[index].focus();
        });
        const view = stage.cloneNode(true);
        view.removeAttribute("id");
        view.querySelector("img").alt = "";
        const title = make("h3", "", named(word));
        title.dir = "auto";
        const effect = word.effect === null ? [] : [`effect ${word.effect < 0 ? "−" : "+"}${Math.abs(word.effect).toFixed(2)}`];
        const others = word.alternatives.map(([name, p]) => `${name} ${chance(p)}`);
        const panel = make("article", "pin", null, make("header", "", null, title, close), view,
          listed([`p ${chance(word.p)}`, `image ${percent(word.share)}`, ...effect]), listed(others));
        panel.dataset.word = index;
        return panel;
      }),
    );
    for (const panel of pins.children) show(panel.querySelector(".view"), Number(panel.dataset.word));
  }

  function redraw() {
    document.documentElement.style.setProperty("--strength", state.opacity / 100);
    legend();
    choose(state.shown, false);
    for (const panel of pins.children) show(panel.querySelector(".view"), Number(panel.dataset.word));
  }

  let touched = null; // the word that a finger's tap found already shown: only such a tap pins
  buttons.forEach((button, index) => {
    button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && choose(index, false));
    button.addEventListener("pointerdown", (event) => {
      touched = event.pointerType === "mouse" || state.shown === index ? null : index;
    });
    button.addEventListener("focus", () => choose(index, true));
    button.addEventListener("click", () => {
      if (touched === index) choose(index, true);
      else pin(index);
      touched = null;
    });
  });
  find("words").addEventListener("keydown", (event) => {
    const at = buttons.indexOf(document.activeElement);
    const last = buttons.length - 1;
    const back = getComputedStyle(find("words")).direction === "rtl" ? 1 : -1;
    const to = { ArrowRight: at - back, ArrowLeft: at + back, ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: last }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    buttons[Math.max(0, Math.min(last, to))].focus();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && choose(null, true));
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.addEventListener("input", () => {
    const form = tools.elements;
    Object.assign(state, { kind: form.kind.value, underline: form.underline.value, points: form.points.checked, box: form.box.checked, arcs: form.arcs.checked, opacity: Number(form.opacity.value) });
    form.strength.value = `${state.opacity} %`;
    find("words").dataset.underline = state.underline;
    redraw();
  });
  const theme = find("theme");
  const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => (theme.textContent = dark() ? "Light" : "Dark");
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    label();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  new ResizeObserver(redraw).observe(stage);

  tools.reset(); // a browser that reloads keeps the boxes as they were
  // what there is nothing of is not offered: a classifier's classes have no earlier words
  tools.elements.kind.value = state.kind;
  find("kinds").hidden = !data.several;
  find("effects").hidden = !data.known.effect;
  find("credits").hidden = !data.known.language;
  label();
  redraw();
  const asked = /^#word-(\d+)$/.exec(location.hash);
  if (asked && buttons[asked[1]]) choose(Number(asked[1]), false);
})();
