"use strict";
// All of the page is there without this: it only opens what is folded, at once.
const button = document.getElementById("open-all");
if (button) {
  const all = () => [...document.querySelectorAll("#report details")];
  button.hidden = false;
  button.addEventListener("click", () => {
    const open = all().some((one) => !one.open);
    for (const one of all()) one.open = open;
    button.textContent = open ? "Close all" : "Open all";
  });
}
