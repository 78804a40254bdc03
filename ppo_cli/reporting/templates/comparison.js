"use strict";
(() => {
  const list = document.getElementById("samples");
  const form = document.getElementById("controls");
  const count = document.getElementById("count");
  const items = [...list.children].map((node, place) => ({
    node,
    place,
    change: Number(node.dataset.change),
    scores: node.dataset.scores.split(" ").map(Number),
    text: [...node.querySelectorAll(".text")].map((one) => one.textContent).join("\n").toLowerCase(),
  }));
  // What a choice of the list "Sort by" means: `place`, `change`, `size`, or the number of a model.
  const keys = {
    place: (item) => -item.place,
    change: (item) => item.change,
    size: (item) => Math.abs(item.change),
  };
  const filters = {
    all: () => true,
    better: (item) => item.change > 0,
    worse: (item) => item.change < 0,
    equal: (item) => item.change === 0,
  };
  function sort() {
    const [name, direction] = form.elements.sort.value.split(" ");
    const key = keys[name] || ((item) => item.scores[Number(name)]);
    const sign = direction === "up" ? 1 : -1;
    items.sort((a, b) => sign * (key(a) - key(b)) || a.place - b.place);
    list.append(...items.map((item) => item.node));
  }
  function show() {
    const keep = filters[form.elements.show ? form.elements.show.value : "all"];
    const words = form.elements.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of items) {
      const fits = keep(item) && words.every((word) => item.text.includes(word));
      item.node.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${items.length} prompts shown`;
  }
  form.hidden = false;
  form.addEventListener("input", (event) => {
    if (event.target.name === "sort") sort();
    show();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { sort(); show(); }));
  show();
})();
