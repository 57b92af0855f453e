"""The style sheet: one accent, numerals that line up, light and dark."""

STYLE = """
:root{--paper:#fcfcfa;--ink:#1b2023;--soft:#586168;--rule:#e3e5e1;--mark:#7f8783;--line:#8a9298;
--accent:#078058;--wash:rgba(7,128,88,.09);--ban:rgba(90,80,60,.08);--lost:#8a7f6c;--warn:#a23b1e;--field:#f1f2ee;
--shade0:#4a3426;--shade1:#5b4a2b;--shade2:#5f6330;--shade3:#4f7a3c;--shade4:#2f8a52;--shade5:#1f9d6b}
@media (prefers-color-scheme:dark){:root{--paper:#14181a;--ink:#e6e9e7;--soft:#a3acb0;--rule:#2a3134;
--mark:#767f7b;--line:#858f94;--accent:#5fcfa2;--wash:rgba(95,207,162,.1);--ban:rgba(230,215,180,.07);
--lost:#8f8672;--warn:#f0917a;--field:#1f2527;
--shade0:#8a6a52;--shade1:#99814f;--shade2:#9b9f55;--shade3:#84b866;--shade4:#6bd08b;--shade5:#9bf0c0}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1160px;margin:0 auto;padding:72px 40px 96px}
h1{font-size:34px;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0;overflow-wrap:anywhere}
h2{font-size:20px;line-height:1.3;font-weight:650;margin:0;overflow-wrap:anywhere}
section{margin-top:64px}
h2,.plot,summary,.scroll{scroll-margin-top:72px}
.lead{font-size:19px;line-height:1.5;max-width:44em;margin:14px 0 0;overflow-wrap:anywhere}
.note,.readout{color:var(--soft);font-size:14.5px;margin:4px 0 0;max-width:60em;overflow-wrap:anywhere}
.readout{margin:6px 0 0 52px}
.notes{margin:20px 0 0;padding:12px 16px 12px 32px;background:var(--field);border-radius:6px;font-size:14.5px;
overflow-wrap:anywhere;max-width:60em}
.warning{color:var(--warn);font-size:14.5px;margin:4px 0 0;max-width:60em;overflow-wrap:anywhere}
.figures{display:flex;flex-wrap:wrap;gap:24px 48px;margin:36px 0 0;padding:0}
.figures dt{color:var(--soft);font-size:14px}
.figures dd{margin:2px 0 0;font-size:22px;line-height:1.3;font-weight:600;white-space:nowrap}
.switch{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;align-items:center;gap:6px;border:0;
margin:40px -8px -24px;padding:10px 8px;min-width:0;background:var(--paper);font-size:14.5px}
.switch legend{float:left;color:var(--soft);padding:0 10px 0 0;margin:0}
.switch label{cursor:pointer}
.switch input{position:absolute;opacity:0;width:1px;height:1px}
.switch span{display:block;padding:4px 14px;border-radius:99px;background:var(--field);color:var(--ink)}
.switch input:checked+span{background:var(--accent);color:var(--paper);font-weight:600}
.switch input:focus-visible+span{outline:2px solid var(--ink);outline-offset:2px}
.by-flops,.by-seconds{display:none}
main:has(#axis-flops:checked) .by-step,main:has(#axis-seconds:checked) .by-step{display:none}
main:has(#axis-flops:checked) .by-flops,main:has(#axis-seconds:checked) .by-seconds{display:block}
.plot{margin-top:20px;padding:0 16px 0 52px}
.plot.labelled{padding-right:96px}
.plot.small{padding:0 8px 0 48px;margin-top:8px}
.plot:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:4px;
border-radius:3px}
svg{display:block;overflow:visible}
text{fill:var(--soft);font-size:12.5px}
.grid{stroke:var(--rule);stroke-width:1}
.mark{stroke:var(--mark);stroke-width:1;stroke-dasharray:3 3}
.one{stroke:var(--mark);stroke-width:1}
.cursor{stroke:var(--ink);stroke-width:1}
.span{fill:var(--ban)}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.second,.line.history{stroke:var(--line);stroke-width:1.25}
.line.main,.line.forecast{stroke:var(--accent)}
.line.actual{stroke:var(--ink);stroke-width:1.25}
.line.forecast{stroke-width:2.5}
.line.undone{stroke:var(--lost);stroke-dasharray:4 3;stroke-width:1.5}
.line.flow{stroke-width:1.5}
.area{fill:var(--wash)}
.dot.second{fill:var(--line)}
.dot.main{fill:var(--accent)}
.end{font-size:13.5px}
.end.main{fill:var(--accent);font-weight:600}
.number{fill:var(--accent);font-weight:650}
.undone .number{fill:var(--soft)}
.path{fill:var(--ink);font-size:13px;paint-order:stroke;stroke:var(--paper);stroke-width:4px;
stroke-linejoin:round}
.bar.undone{fill:var(--ban);stroke:var(--lost);stroke-dasharray:4 3}
.shade0{fill:var(--shade0);background:var(--shade0)}
.shade1{fill:var(--shade1);background:var(--shade1)}
.shade2{fill:var(--shade2);background:var(--shade2)}
.shade3{fill:var(--shade3);background:var(--shade3)}
.shade4{fill:var(--shade4);background:var(--shade4)}
.shade5{fill:var(--shade5);background:var(--shade5)}
.tone0{stroke:var(--shade0)}
.tone1{stroke:var(--shade1)}
.tone2{stroke:var(--shade2)}
.tone3{stroke:var(--shade3)}
.tone4{stroke:var(--shade4)}
.tone5{stroke:var(--shade5)}
.branch{stroke:var(--ink);stroke-width:1}
.branch-dot{fill:var(--ink)}
.key{display:flex;flex-wrap:wrap;gap:4px 24px;margin:10px 0 0;font-size:14px;color:var(--soft)}
.swatch{display:inline-block;width:20px;height:0;border-top:2px solid;margin-right:8px;vertical-align:middle}
.swatch.block{width:14px;height:10px;border:0;margin-right:8px}
.swatch.block.undone{border:1px dashed var(--lost);background:var(--ban)}
.ramp .swatch.block{margin:0}
.swatch.second,.swatch.history{border-color:var(--line)}
.swatch.main,.swatch.forecast{border-color:var(--accent)}
.swatch.actual{border-color:var(--ink)}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(280px,100%),1fr));
gap:32px 40px;margin-top:24px}
figure{margin:0;min-width:0}
figcaption{font-size:14.5px;line-height:1.4;overflow-wrap:anywhere}
figcaption strong{display:block;font-weight:600}
details{margin:14px 0 0 52px;font-size:14.5px}
figure details{margin-left:48px}
summary{cursor:pointer;color:var(--soft);width:max-content;max-width:100%}
details .scroll{max-height:420px;overflow:auto;margin-top:12px}
.scroll{overflow-x:auto;margin-top:4px}
table{border-collapse:collapse;width:100%;font-size:14.5px;line-height:1.45}
details table{width:auto}
caption{text-align:left;color:var(--soft);padding:0 0 12px}
caption span{display:block;max-width:min(60em,100vw - 32px)}
th,td{text-align:left;vertical-align:top;padding:9px 20px 9px 0;font-weight:400;
border-top:1px solid var(--rule)}
details th,details td{padding-top:5px;padding-bottom:5px}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--soft);font-size:13.5px;vertical-align:bottom;border-top:0}
tbody th{font-weight:600}
th.n,td.n{text-align:right;white-space:nowrap}
tr.marked>*{background:var(--wash);font-weight:600}
tr.marked>:first-child{box-shadow:inset 3px 0 var(--accent);padding-left:8px}
td,th{max-width:24em;overflow-wrap:break-word}
#decisions~.scroll td:nth-child(n+3):nth-child(-n+4){min-width:11em}
code{font:13.5px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
abbr{text-decoration:none}
.sub{display:block;color:var(--soft);font-size:13.5px}
@media (min-width:721px){.narrow{display:none}}
@media (max-width:720px){.wide{display:none}
main{padding:36px 16px 64px}
section{margin-top:52px}
h1{font-size:26px}
table{width:max-content;min-width:100%}
.lead{font-size:17px}
.figures{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px 16px;margin-top:28px}
.figures dd{font-size:18px;white-space:normal}
.switch{margin:28px 0 -20px;padding:8px 0}
.switch legend{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.readout,details{margin-left:0}
.plot,.plot.labelled{padding:0 10px 0 44px}}
@media print{main{max-width:none;padding:0}section{break-inside:avoid}.scroll{overflow:visible}
.switch,.readout{display:none}}
"""
