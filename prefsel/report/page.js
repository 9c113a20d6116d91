// Tables that sort by a click on a title and filter by words; without this script they are the same tables, unsorted.
"use strict";

for (const table of document.querySelectorAll(".wide > table")) {
  if (table.closest(".example")) continue;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  if (rows.length > 3) [...table.tHead.rows[0].cells].forEach((head, column) => makeSortable(body, rows, head, column));
  if (rows.length > 9) table.parentElement.before(searchField(rows));
}

// A cell of a number brings its value as data-v, empty where the number is absent; others are compared as texts.
function valueOf(row, column) {
  const cell = row.cells[column];
  if (!("v" in cell.dataset)) return cell.textContent.trim();
  return cell.dataset.v === "" ? null : Number(cell.dataset.v);
}

function compare(one, other) {
  return typeof one === "number" ? one - other : one.localeCompare(other, undefined, { numeric: true });
}

// Each click goes on: ascending, descending, as it came. What is absent stays last.
function makeSortable(body, rows, head, column) {
  if (!head.textContent.trim()) return;
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const next = { ascending: "descending", descending: null }[head.getAttribute("aria-sort")];
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    if (next === null) return body.append(...rows);
    head.setAttribute("aria-sort", next ?? "ascending");
    const sign = next === "descending" ? -1 : 1;
    const known = rows.filter((row) => valueOf(row, column) !== null);
    known.sort((one, other) => sign * compare(valueOf(one, column), valueOf(other, column)));
    body.append(...known, ...rows.filter((row) => valueOf(row, column) === null));
  });
}

function searchField(rows) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  const count = document.createElement("small");
  const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase());
  label.className = "search";
  input.type = "search";
  input.placeholder = "words in a row";
  label.append("Filter ", input, " ", count);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, place) => (row.hidden = !words.every((word) => texts[place].includes(word))));
    count.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows` : "";
  });
  return label;
}
