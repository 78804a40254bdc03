// What the theme leaves out for people who use a keyboard or a screen reader.
const label = (selector, attributes) => {
  for (const element of document.querySelectorAll(selector))
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
};
label(".sidebar-drawer", { "aria-label": "All pages" });
label(".toc-drawer", { "aria-label": "On this page" });
label(".view-this-page", { role: "navigation", "aria-label": "Source of this page" });
for (const box of document.querySelectorAll("pre, .table-wrapper, .math-wrapper"))
  if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
