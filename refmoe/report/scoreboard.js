// SPDX-License-Identifier: Apache-2.0
"use strict";
(() => {
  const board = document.getElementById("board"), detail = document.getElementById("detail");
  const marks = [...board.querySelectorAll(".mark")];
  if (!marks.length) return;
  const rows = [...board.tBodies[0].rows].map((row) => [...row.querySelectorAll(".mark")]);
  const show = (mark) => { detail.textContent = mark.title || mark.dataset.words; detail.classList.add("used"); };
  const enter = (mark) => {
    marks.forEach((other) => { other.tabIndex = other === mark ? 0 : -1; });
    mark.focus();
    show(mark);
  };
  marks.forEach((mark, i) => {
    mark.dataset.words = mark.title;
    mark.removeAttribute("title");
    mark.setAttribute("aria-label", mark.dataset.words);
    mark.setAttribute("role", "img");
    mark.tabIndex = i ? -1 : 0;
  });
  board.addEventListener("mouseover", (event) => { if (event.target.matches(".mark")) show(event.target); });
  board.addEventListener("focusin", (event) => { if (event.target.matches(".mark")) show(event.target); });
  board.addEventListener("click", (event) => { if (event.target.matches(".mark")) enter(event.target); });
  board.addEventListener("keydown", (event) => {
    const row = rows.findIndex((each) => each.includes(event.target));
    if (row < 0) return;
    const column = rows[row].indexOf(event.target);
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key];
    const next = step && rows[row + step[0]] && rows[row + step[0]][column + step[1]];
    if (!next) return;
    event.preventDefault();
    enter(next);
  });
  detail.hidden = false;
})();
