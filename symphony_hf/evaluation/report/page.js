"use strict";

// Each header gets a button that sorts its table: numbers by `data-value`, the rest as words, what is missing last.
// Without scripts the headers are words, and the tables stay in the order in which they were written.
const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

function compareCells(a, b, direction) {
  const [x, y] = [a, b].map((cell) => (cell.dataset.value === undefined ? NaN : Number(cell.dataset.value)));
  if (!Number.isNaN(x) || !Number.isNaN(y)) {
    if (Number.isNaN(x)) return 1;
    if (Number.isNaN(y)) return -1;
    return direction * (x - y);
  }
  return direction * collator.compare(a.textContent, b.textContent);
}

function sortBy(header) {
  const headers = [...header.parentElement.cells];
  const column = headers.indexOf(header);
  const ascending = header.getAttribute("aria-sort") !== "ascending";
  for (const other of headers) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = header.closest("table").tBodies[0];
  const direction = ascending ? 1 : -1;
  // Array.prototype.sort is stable: sorted by one column and then by another, rows keep the first order among equals.
  const rows = [...body.rows].sort((a, b) => compareCells(a.cells[column], b.cells[column], direction));
  body.append(...rows);
}

for (const header of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...header.childNodes);
  button.addEventListener("click", () => sortBy(header));
  header.append(button);
}

// On paper nothing can be opened.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
