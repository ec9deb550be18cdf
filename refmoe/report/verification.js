// SPDX-License-Identifier: Apache-2.0
// Shows one run in the heat map and a cell's findings in words. The page is complete without it: the map then shows all
// runs, and each cell has its words as a title.
"use strict";
// In a notebook the page is the document of a frame, where "#..." would be an address of the notebook itself.
(() => {
  if (location.protocol !== "about:") return;
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    const place = link && document.getElementById(link.getAttribute("href").slice(1));
    if (!place) return;
    event.preventDefault();
    place.tabIndex = -1;
    place.focus();
    place.scrollIntoView();
  });
})();
(() => {
  const holder = document.getElementById("heat-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const table = document.getElementById("heat-map");
  const detail = document.getElementById("detail");
  const select = document.getElementById("run");
  const cells = Array.from(table.querySelectorAll(".cell"));
  const overall = cells.map((cell) => ({
    level: Array.from(cell.classList).find((name) => name !== "cell" && name !== "first"),
    symbol: cell.children[0].textContent,
    amount: cell.children[1] ? cell.children[1].textContent : "",
    words: cell.title,
  }));
  const first = cells.findIndex((cell) => cell.classList.contains("first"));
  const pick = () => Number(select.value);

  function verdict(level) {
    if (level.startsWith("pass")) return "passes";
    if (level.startsWith("fail")) return "fails";
    return level === "open" ? "is undecidable" : "was not checked";
  }

  function single(run, index) {
    const [level, symbol] = data.levels[data.states[run][index]];
    const [error, excess, limit, rung, reason, amount] = data.numbers[run][index].split(" ");
    let words = `${data.taps[index]}, run ${data.runs[run]}: ${verdict(level)}.`;
    if (level !== "none") {
      if (error === "legal") words += " Largest error within what is allowed.";
      else if (error === "inf") words += " Largest error infinite.";
      else if (error !== "-") words += ` Largest error ${error} times what is allowed.`;
      if (limit !== "-" && limit !== "0" && excess !== "-") {
        words += ` Excess ${excess} standard deviations, improbable above ${limit}.`;
      }
      words += data.texts[reason] ? ` Reason: ${data.texts[reason]}.` : "";
      words += data.texts[rung] ? ` (${data.texts[rung]})` : "";
    }
    return { level, symbol, amount: amount || "", words };
  }

  const view = (index) => (pick() < 0 ? overall[index] : single(pick(), index));

  function show(index) {
    detail.textContent = view(index).words;
    detail.classList.add("used"); // only now may it cover a part of the map
  }

  function paint() {
    cells.forEach((cell, index) => {
      const { level, symbol, amount, words } = view(index);
      const outlined = index === first && (pick() < 0 || data.runs[pick()] === data.first);
      cell.className = `cell ${level}${outlined ? " first" : ""}`;
      cell.children[0].textContent = symbol;
      if (cell.children[1]) cell.children[1].textContent = amount;
      cell.setAttribute("aria-label", words);
    });
  }

  // One cell is in the order of the tab key; arrow keys lead to the others.
  let current = first < 0 ? 0 : first;

  function enter(index, focus) {
    cells[current].tabIndex = -1;
    current = index;
    cells[current].tabIndex = 0;
    if (focus) cells[current].focus();
    show(current);
  }

  function neighbour(cell, key) {
    const row = cell.parentElement;
    const inside = Array.from(row.querySelectorAll(".cell"));
    const place = inside.indexOf(cell);
    if (key === "ArrowLeft") return inside[place - 1];
    if (key === "ArrowRight") return inside[place + 1];
    if (key === "Home") return inside[0];
    if (key === "End") return inside[inside.length - 1];
    const next = key === "ArrowUp" ? row.previousElementSibling : key === "ArrowDown" ? row.nextElementSibling : null;
    if (!next) return undefined;
    const others = Array.from(next.querySelectorAll(".cell"));
    return others.find((other) => other.cellIndex >= cell.cellIndex) || others[others.length - 1];
  }

  table.setAttribute("role", "grid");
  cells.forEach((cell, index) => {
    cell.removeAttribute("title");
    cell.tabIndex = index === current ? 0 : -1;
  });
  const indexOf = new Map(cells.map((cell, index) => [cell, index]));
  const target = (event) => indexOf.get(event.target.closest(".cell"));
  table.addEventListener("mouseover", (event) => target(event) !== undefined && show(target(event)));
  table.addEventListener("focusin", (event) => target(event) !== undefined && enter(target(event), false));
  table.addEventListener("click", (event) => target(event) !== undefined && enter(target(event), true));
  table.addEventListener("keydown", (event) => {
    const found = target(event) === undefined ? undefined : neighbour(event.target.closest(".cell"), event.key);
    if (!found) return;
    event.preventDefault();
    enter(indexOf.get(found), true);
  });
  select.addEventListener("change", () => {
    paint();
    show(current);
  });
  select.value = "-1"; // some browsers restore an earlier choice on reload
  document.querySelector(".choose").hidden = false;
  detail.hidden = false;
  paint();
})();
