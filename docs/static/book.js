// SPDX-License-Identifier: Apache-2.0
// What the theme leaves out for a reader with a keyboard or a screen reader.
"use strict";

const scrolls = (element) => element.scrollWidth > element.clientWidth || element.scrollHeight > element.clientHeight;

// what scrolls can be reached by the keyboard; what does not is no stop on the way
function reachScrollers() {
  for (const each of document.querySelectorAll("article pre, article .table-wrapper, article .math.scroll")) {
    if (scrolls(each)) each.tabIndex = 0;
    else each.removeAttribute("tabindex");
  }
}

function nameLandmarks() {
  for (const each of document.querySelectorAll('[role="heading"]:not([aria-level])')) each.ariaLevel = "2";
  const names = { ".sidebar-drawer": "site contents", ".toc-drawer": "page contents" };
  for (const [place, name] of Object.entries(names)) {
    for (const each of document.querySelectorAll(place)) each.ariaLabel = name;
  }
  for (const each of document.querySelectorAll(".content-icon-container")) {
    each.role = "region";
    each.ariaLabel = "page tools";
  }
}

nameLandmarks();
reachScrollers();
addEventListener("load", reachScrollers);
addEventListener("resize", reachScrollers);
document.addEventListener("toggle", reachScrollers, true);
