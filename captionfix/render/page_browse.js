"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const [tools, list, more, found] = ["tools", "cards", "more", "found"].map(find);
  const PAGE = 60;
  let shown = [];

  function make(tag, name, text, ...children) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined && text !== null) element.textContent = text;
    element.append(...children);
    return element;
  }
  const percent = (share) => (share === null ? "–" : `${Math.round(100 * share)} %`);
  const chance = (p) => (p === null ? "–" : p.toFixed(2));
  const nats = (value) => (value === null ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2));
  const score = {
    share: (card) => `image ${percent(card.share)}`,
    probability: (card) => `p ${chance(card.probability)}`,
    effect: (card) => `${nats(card.effect)} nats`,
    pointing: (card) => (card.pointing === 0 ? "hit" : `off by ${percent(card.pointing)}`),
  };

  // A line breaks between its parts, not within one.
  function listed(head, texts) {
    const last = texts.length - 1;
    return make("p", "soft", null, head, ...texts.flatMap((text, i) => [make("span", "whole", i < last ? `${text},` : text), " "]));
  }

  function draw(card) {
    const word = card.words[card.place];
    const shot = make(card.link ? "a" : "div", "shot");
    if (card.link) shot.href = card.link;
    if (card.picture) {
      const image = make("img");
      [image.width, image.height] = card.size;
      image.alt = `Map of “${word}” over ${card.image}`;
      image.src = card.picture;
      shot.append(image);
    } else shot.append(make("span", "absent", "no picture"));
    const head = make("h2", "", null, make("small", "", score[tools.elements.sort.value](card)), make("bdi", "", word));
    const caption = make("p");
    caption.dir = "auto";
    card.words.forEach((text, place) => caption.append(place ? " " : "", place === card.place ? make("mark", "", text) : text));
    const numbers = listed("", [`p ${chance(card.probability)}`, `image ${percent(card.share)}`, `effect ${nats(card.effect)}`]);
    const others = card.alternatives.filter(([text]) => text !== word).slice(0, 3).map(([text, p]) => `${text} ${chance(p)}`);
    const item = make("li", "", null, shot, head, caption, numbers);
    if (others.length) item.append(listed("instead: ", others));
    const name = make("p", "soft name", card.image);
    name.title = card.image;
    item.append(name);
    return item;
  }

  function extend() {
    const count = list.children.length;
    list.append(...shown.slice(count, count + PAGE).map(draw));
    more.hidden = list.children.length >= shown.length;
  }

  function arrange() {
    const key = tools.elements.sort.value;
    const text = tools.elements.text.value.trim().toLowerCase();
    const sign = key === "pointing" ? -1 : 1;
    shown = data.cards
      .filter((card) => card[key] !== null && (!text || card.words[card.place].toLowerCase().startsWith(text)))
      .sort((a, b) => sign * (a[key] - b[key]));
    found.textContent = shown.length === 1 ? "1 word" : `${shown.length} words`;
    list.replaceChildren();
    extend();
  }

  tools.elements.sort.value = data.sort;
  tools.addEventListener("input", arrange);
  tools.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", extend);
  arrange();
})();
