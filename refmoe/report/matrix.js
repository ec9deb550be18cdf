// SPDX-License-Identifier: Apache-2.0
// Filters the grid by class and text, and shows a cell in words. The page is complete without it: each cell has its
// words as a title.
"use strict";
(() => {
  const table = document.getElementById("matrix");
  const detail = document.getElementById("detail");
  const kind = document.getElementById("kind");
  const text = document.getElementById("text");
  const cases = Array.from(table.querySelectorAll("thead th"), (th) => th.textContent);
  const rows = Array.from(table.querySelectorAll("tbody tr")).filter((row) => row.cells[0].scope === "row");

  function filter() {
    const words = text.value.toLowerCase().split(/\s+/);
    rows.forEach((row) => {
      const said = `${row.cells[0].textContent} ${row.cells[0].title}`.toLowerCase();
      row.hidden = !words.every((word) => said.includes(word));
    });
    Array.from(table.tBodies).forEach((body) => {
      const wanted = !kind.value || body.dataset.kind === kind.value;
      body.hidden = !wanted || !Array.from(body.rows).some((row) => rows.includes(row) && !row.hidden);
    });
    const shown = rows.filter((row) => !row.hidden && !row.parentElement.hidden).length;
    document.getElementById("shown").textContent = `${shown} of ${rows.length} mutants`;
  }

  // One cell is in the order of the tab key; arrow keys lead to the others.
  let current = table.querySelector(".cell");

  function show(cell) {
    const head = cell.parentElement.cells[0];
    detail.textContent = `${head.textContent} on ${cases[cell.cellIndex]}. ${cell.dataset.words}. ${head.title}`;
    detail.classList.add("used"); // only now may it cover a part of the grid
  }

  function enter(cell, focus) {
    current.tabIndex = -1;
    current = cell;
    cell.tabIndex = 0;
    if (focus) cell.focus();
    show(cell);
  }

  function neighbour(cell, key) {
    const visible = Array.from(table.querySelectorAll(".cell")).filter((each) => each.offsetParent);
    const same = visible.filter((each) =>
      key === "ArrowLeft" || key === "ArrowRight"
        ? each.parentElement === cell.parentElement
        : each.cellIndex === cell.cellIndex,
    );
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[key];
    return step ? same[same.indexOf(cell) + step] : undefined;
  }

  table.querySelectorAll(".cell").forEach((cell) => {
    cell.dataset.words = cell.title;
    cell.setAttribute("aria-label", cell.title);
    cell.removeAttribute("title");
    cell.tabIndex = cell === current ? 0 : -1;
  });
  table.setAttribute("role", "grid");
  const target = (event) => event.target.closest(".cell");
  table.addEventListener("mouseover", (event) => target(event) && show(target(event)));
  table.addEventListener("focusin", (event) => target(event) && enter(target(event), false));
  table.addEventListener("click", (event) => target(event) && enter(target(event), true));
  table.addEventListener("keydown", (event) => {
    const found = target(event) && neighbour(target(event), event.key);
    if (!found) return;
    event.preventDefault();
    enter(found, true);
  });
  kind.addEventListener("change", filter);
  text.addEventListener("input", filter);
  kind.value = ""; // some browsers restore an earlier choice on reload
  text.value = "";
  document.querySelector(".choose").hidden = false;
  detail.hidden = false;
  filter();
})();
