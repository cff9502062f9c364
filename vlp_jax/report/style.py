"""How the page looks."""

CSS = """:root {
  --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --ground: #f6f8fa;
  --right: #1a7f37; --wrong: #c22a2a;
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
    sans-serif;
}
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px; }
h1, h2, p { text-wrap: pretty; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 16px; }
h2 { font-size: 19px; line-height: 1.3; margin: 0 0 8px; }
section, header {
  background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 20px 24px; margin-bottom: 20px;
}
.note { color: var(--soft); font-size: 14px; margin: 0 0 14px; }
.facts { display: grid; gap: 12px 28px; margin: 0 0 16px;
  grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
summary { cursor: pointer; }
a { color: #0a58ca; }
pre {
  background: var(--ground); border-radius: 6px; padding: 14px; margin: 12px 0 0;
  max-height: 420px; overflow: auto; font-size: 13px; line-height: 1.45;
}
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 16px; text-align: right; white-space: nowrap; }
th[scope="row"] { text-align: left; padding-left: 0; font-weight: 600; }
thead th { color: var(--soft); font-weight: 500; font-size: 14px; }
.groups th { text-align: center; padding-bottom: 0; color: var(--ink); }
tbody tr { border-top: 1px solid var(--line); }
.plot { display: block; width: 100%; height: auto; }
.query { border-top: 1px solid var(--line); padding: 14px 0; }
.query:first-child { border-top: 0; padding-top: 4px; }
.query:last-child { padding-bottom: 0; }
.query p { margin: 0 0 8px; font-weight: 600; overflow-wrap: anywhere; }
.shots { display: flex; flex-wrap: wrap; gap: 12px; }
figure { margin: 0; width: 112px; }
figure img { display: block; width: 112px; height: 112px; object-fit: contain; }
.shot { position: relative; }
.shot.right, .shot.wrong {
  width: 120px; height: 120px; border: 4px solid; border-radius: 6px; overflow: hidden;
}
.shot.right { border-color: var(--right); }
.shot.wrong { border-color: var(--wrong); }
.shot b {
  position: absolute; right: 0; bottom: 0; width: 22px; height: 22px; color: #fff;
  font-size: 14px; line-height: 22px; text-align: center; border-top-left-radius: 6px;
}
.shot.right b { background: var(--right); }
.shot.wrong b { background: var(--wrong); }
figcaption {
  font-size: 14px; text-align: center; margin-top: 4px; overflow-wrap: anywhere;
}
.given { color: var(--soft); font-style: italic; }
.note .right, li.right b { color: var(--right); }
.note .wrong, li.wrong b { color: var(--wrong); }
.images .query { display: flex; gap: 20px; align-items: flex-start; }
.images figure { flex: none; }
ol { list-style: none; margin: 0; padding: 0; min-width: 0; }
li {
  display: flex; gap: 10px; padding: 2px 0; font-size: 15px; overflow-wrap: anywhere;
}
li b { flex: none; width: 16px; }
li.right span { font-weight: 600; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
