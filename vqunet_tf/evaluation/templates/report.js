// Without scripts everything is shown; with them one budget at a time, and the long table sorts.
const groups = [...document.querySelectorAll("[data-tabs]")];
const show = (name) => groups.forEach((group) => {
  const names = [...group.querySelectorAll("[data-tab]")].map((part) => part.dataset.tab);
  if (!names.includes(name)) return;
  group.querySelectorAll("[data-tab]").forEach((part) => { part.hidden = part.dataset.tab !== name; });
  group.querySelectorAll(".tabs button").forEach((b) => b.setAttribute("aria-pressed", b.textContent === name));
});
groups.forEach((group) => {
  const parts = [...group.querySelectorAll("[data-tab]")];
  if (parts.length < 2) return;
  const bar = document.createElement("div");
  bar.className = "tabs";
  parts.forEach((part) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = part.dataset.tab;
    button.onclick = () => show(part.dataset.tab);
    bar.append(button);
    part.querySelector(".tabname").hidden = true;
  });
  group.prepend(bar);
});
const first = document.querySelector("[data-tab]");
if (first) show(first.dataset.tab);

document.querySelectorAll("table[data-sort]").forEach((table) => {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    let order = -1;
    button.onclick = () => {
      order = -order;
      const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
      body.append(...[...body.rows].sort((a, b) => order * compare(key(a), key(b))));
    };
  });
});
